"""Four kinds of tests, a process each, since Triton decides at import whether it interprets:

tests/cpu       no kernel runs
tests/kernels   the kernels: interpreted on CPU tensors, or compiled where there is a GPU
tests/compiled  the kernels compiled for every target, without a GPU
tests/fake_cuda the host code of a GPU, on tensors that only say that they are on one (`fake_gpu`)
"""

import gc

import pytest
import torch


def pytest_collection_modifyitems(items):
    folders = {item.path.parent.name for item in items}
    if {"kernels", "compiled"} <= folders and not torch.cuda.is_available():
        raise pytest.UsageError("tests/kernels and tests/compiled need a process each: make test")
    if "fake_cuda" in folders and len(folders) > 1:
        raise pytest.UsageError("tests/fake_cuda needs a process of its own: make test")


def pytest_collection_finish():
    gc.freeze()  # what is imported stays, and the collector need not look at all of torch again and again


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def ugrnn(tmp_path_factory):
    """The file of docs/add_a_cell.md, imported."""
    import page

    with page.imported(tmp_path_factory.mktemp("page")) as module:
        yield module
