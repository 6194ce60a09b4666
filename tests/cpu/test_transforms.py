"""Every transform of torch with every call that needs no kernel: the right numbers, or an error that says why."""

import pytest
import torch

import transforms

ATEN = {
    "lstm": {"cell": "lstm"},
    "gru": {"cell": "gru"},
    "packed": {"cell": "rnn_tanh", "batch_sizes": torch.tensor([2, 2, 1])},
    "projected": {"cell": "lstm", "proj_size": 3},
    "one step": {"cell": "lstm", "steps": 1},
}
EXACT = {"rtol": 1e-9, "atol": 1e-12}


@pytest.mark.parametrize(("path", "case"), transforms.pairs(transforms.CASES))
def test_ours(path, case):
    found = transforms.found(path, case, "torch", torch.float64)
    torch.testing.assert_close(found, transforms.plain(path, case, torch.float64), **EXACT)


@pytest.mark.parametrize(("path", "case"), transforms.pairs(ATEN))
def test_aten(path, case):
    """Where ATen has no rule, ours serves."""
    found = transforms.found(path, case, "auto", torch.float64)
    torch.testing.assert_close(found, transforms.plain(path, case, torch.float64), **EXACT)


@pytest.mark.parametrize("cell", ["lstm", "peephole", "gru"])
def test_what_would_drop_tangents_raises(cell):
    f = transforms.Call({"cell": cell, **transforms.OURS}, "torch", torch.float32)
    transforms.check_tangents_behind_samples(f)
    transforms.check_tangents_in_graphs(f)
