"""docs/add_a_cell.md, followed literally: its check as it stands, and its kernels under the accuracy rule."""

import copy
import functools
import runpy

import pytest
import torch

import page
from fusedlstm import autograd
from fusedlstm.engines import launch
from support import DTYPES, assert_accurate, tiled


def test_the_check_of_the_page(ugrnn):
    runpy.run_path(ugrnn.__file__.replace("ugrnn.py", "check_ugrnn.py"))


def check(layer, sequence, device, dtype):
    layer.to(dtype)
    found = []
    for backend, place, precision in (
        ("triton", device, dtype),
        ("reference", "cpu", dtype),
        ("reference", "cpu", torch.float64),
    ):
        module = copy.deepcopy(layer).to(place, precision)
        module.backend = backend
        found.append(page.outcome(module, sequence, dtype))
    for name, ours in found[0].items():
        assert_accurate(name, ours, found[1][name], found[2][name])


def use(monkeypatch, **tiles):
    """Make every launch use these tiles."""

    def plan_for(cell, like, weight_hh, hx, pass_, layout, stack):
        D, B, H = hx.shape
        return tiled(pass_, B, H, launch.DTYPES[like.dtype], directions=D, precision="ieee", cell=cell, **tiles)

    monkeypatch.setattr(launch, "plan_for", plan_for)


# H = 40 in tiles of 16 units: three programs a group.
FORMS = {
    "single": {"schedule": "single"},
    "resident, counter": {"protocol": "counter"},
    "resident, data": {"protocol": "data"},
}


@pytest.mark.parametrize(("dtype", "sequence"), [("fp32", "dense"), ("bf16", "packed"), ("fp32", "lengths, resets")])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_all_gradients(device, monkeypatch, ugrnn, form, dtype, sequence):
    use(monkeypatch, block_k=64, **form)
    check(ugrnn.UGRNN(5, 40, bidirectional=True), sequence, device, DTYPES[dtype])


def in_blocks(monkeypatch):
    for name, value in {"FEWEST_STEPS": 2, "FEWEST_ROWS": 1, "MOST_BLOCKS": 3}.items():
        monkeypatch.setattr(autograd, name, value)


REGULARISED = {"zoneout": 0.2, "candidate_dropout": 0.3, "recurrent_dropout": 0.4, "weight_dropout": 0.1}
OTHERS = {
    "stepped": ({}, functools.partial(use, schedule="stepped")),
    "streamed": ({}, functools.partial(use, schedule="streamed", transposed=True)),
    "a wave of layers": ({"num_layers": 2}, None),
    "heads": ({"num_heads": 2}, None),
    "regularised": (REGULARISED, None),
    "recomputed": ({"save": "states"}, in_blocks),
}


@pytest.mark.parametrize(("options", "prepare"), OTHERS.values(), ids=OTHERS.keys())
def test_what_comes_with_it(device, monkeypatch, ugrnn, options, prepare):
    if prepare:
        prepare(monkeypatch)
    check(ugrnn.UGRNN(5, 18, **options), "dense", device, torch.float32)


def test_a_single_step(device, ugrnn):
    """In one launch with its input product."""
    cell, found = ugrnn.UGRNNCell(5, 18), []
    x, h = torch.randn(3, 5), torch.randn(3, 18)
    for backend, place, dtype in (
        ("triton", device, torch.float32),
        ("reference", "cpu", torch.float32),
        ("reference", "cpu", torch.float64),
    ):
        module = copy.deepcopy(cell).to(place, dtype)
        module.backend = backend
        with torch.no_grad():
            found.append(module(x.to(place, dtype), h.to(place, dtype)))
    assert_accurate("h_1", *found)
