"""bench/precision.py: the errors that it measures are those of the dtype, for kernels, loop and torch."""

import pytest
import torch

from bench import precision


@pytest.mark.parametrize("name", ["GRU", "PeepholeLSTM"])
def test_errors_are_those_of_the_dtype(name, device, monkeypatch):
    for size in ("STEPS", "BATCH", "UNITS"):
        monkeypatch.setattr(precision, size, 4)
    found = {dtype: precision.measured(name, dtype, device) for dtype in (torch.float32, torch.bfloat16)}
    for dtype, errors in found.items():
        assert [*errors] == ["kernels", "loop", "torch"]
        for forward, backward in errors.values():
            assert 0 < forward < 2 * torch.finfo(dtype).eps and 0 < backward < 20 * torch.finfo(dtype).eps
    # In half precision the loop has the rounding of its results alone.
    assert found[torch.bfloat16]["loop"][0] < torch.finfo(torch.bfloat16).eps / 2
