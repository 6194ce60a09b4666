"""Every transform of torch with calls that the kernels serve, waves included: the numbers of the specification."""

import pytest
import torch

import transforms
from fusedlstm.engines import launch
from support import assert_accurate


@pytest.fixture
def waves(monkeypatch):
    """Layers of a stack share a launch."""
    monkeypatch.setattr(launch, "layers_together", lambda cell, like, hx, layers, *_: layers)


SERVED = {name: case for name, case in transforms.CASES.items() if case["cell"] in launch.STEPS}
# One of every op, and masks: compilation, and a Jacobian, for which each row is a launch, take seconds.
FEW = ("lstm", "one step", "two layers", "states", "packed", "resets")
SLOW = ("jacrev", "compile")


@pytest.mark.parametrize(
    ("path", "case"), [p for p in transforms.pairs(SERVED) if not p.id.startswith(SLOW) or p.id.endswith(FEW)]
)
def test_ours(device, path, case, waves):
    found = transforms.found(path, case, "triton", torch.float32, device)
    same_dtype, exact = (transforms.plain(path, case, dtype) for dtype in (torch.float32, torch.float64))
    for k, results in enumerate(zip(found, same_dtype, exact, strict=True)):
        assert_accurate(f"{path}, result {k}", *results)


@pytest.mark.parametrize("name", ["lstm", "one step", "two layers"])
def test_what_would_drop_tangents_raises(device, name, waves):
    """Of every op of a forward."""
    transforms.check_tangents_behind_samples(transforms.Call(transforms.CASES[name], "triton", torch.float32, device))
