import os

import pytest
import torch

# Only this place decides whether the kernels are interpreted, before they are imported: if and only if there is no GPU.
if torch.cuda.is_available():
    os.environ.pop("TRITON_INTERPRET", None)
else:
    os.environ["TRITON_INTERPRET"] = "1"


torch.set_num_threads(1)  # the interpreter runs one program at a time, and tests run side by side


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch):
    """Float32 products in full precision: TF32 has an accuracy of its own, which torch on a CPU does not share."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch):
    """Fresh memory is NaN, so that an element that is never written shows."""

    def poison(make):
        def poisoned(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return poisoned

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))


@pytest.fixture(autouse=True)
def fresh_launches():
    """Tests change what a launch is made of, and launches are kept."""
    from fusedlstm.engines import launch, stepping

    for kept in (launch._bound, stepping._cached_bound):
        kept.cache_clear()
    launch._variants.clear()
