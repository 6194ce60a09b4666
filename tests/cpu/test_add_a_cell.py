"""docs/add_a_cell.md, followed literally: size, equations, and the layer on the engines without kernels."""

import importlib
import re

import pytest
import torch

import page

EXACT = {"rtol": 1e-9, "atol": 1e-11}


def test_the_cell_is_one_file_of_under_60_lines():
    assert [*page.FILES] == ["ugrnn.py", "check_ugrnn.py", "mgu.py"]
    assert page.TEXT.count("```python") == len(page.FILES), "a block without the name of its file is not run"
    assert len(page.FILES["ugrnn.py"].splitlines()) < 60  # with its empty lines


def test_what_the_page_points_to_is_there():
    root = page.Path(page.__file__).parents[2]
    paths = re.findall(r"`((?:fusedlstm|kernels|tests)/[\w/]+\.py)`", page.TEXT)
    assert len(paths) >= 4 and all((root / path).exists() for path in paths)


def test_written_out_backward_equals_autograd(ugrnn):
    """A step by itself, with what is offered to the memory dropped in part."""
    preact_x, preact_h = torch.randn(2, 2, 3, 7, dtype=torch.float64, requires_grad=True)
    (h, dh), drop = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True), 2.0 * (torch.rand(3, 7) < 0.5)
    gates, state = ugrnn.step(preact_x.unbind(0), preact_h.unbind(0), (h,), (), drop)
    of_x, of_h, of_state = torch.autograd.grad(state[0], (preact_x, preact_h, h), dh)
    with torch.no_grad():
        dpreact, dprev = ugrnn.step_backward(gates, (h,), state, (dh,), (), drop)
        torch.testing.assert_close(ugrnn.update(gates, (h,), drop), state, **EXACT)
    for expected in (of_x, of_h):
        torch.testing.assert_close(torch.stack(dpreact), expected, **EXACT)
    torch.testing.assert_close(dprev[0], of_state, **EXACT)


OPTIONS = {
    "plain": {},
    "two bidirectional layers": {"num_layers": 2, "bidirectional": True},
    "heads, clipped, no bias": {"num_heads": 2, "grad_clip": 0.2, "bias": False},
    "lean, two layers": {"num_layers": 2, "save": "states"},
    "regularised": {
        "zoneout": 0.2,
        "candidate_dropout": 0.3,
        "recurrent_dropout": 0.4,
        "weight_dropout": 0.1,
        "bidirectional": True,
    },
}


@pytest.mark.parametrize("sequence", page.SEQUENCES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_torch_equals_reference(ugrnn, options, sequence):
    layer = ugrnn.UGRNN(3, 6, **options, dtype=torch.float64)
    found = []
    for backend in ("torch", "reference"):
        layer.backend = backend
        found.append(page.outcome(layer, sequence, torch.float64))
    for name, ours in found[0].items():
        torch.testing.assert_close(ours, found[1][name], **EXACT, msg=lambda text, name=name: f"{name}: {text}")
    assert all(ours.any() for ours in found[0].values())


def test_the_class_of_a_single_step(ugrnn):
    layer, cell = ugrnn.UGRNN(3, 6), ugrnn.UGRNNCell(3, 6)
    cell.load_state_dict({name.removesuffix("_l0"): p for name, p in layer.state_dict().items()})
    x, h = torch.randn(4, 3), torch.randn(4, 6)
    torch.testing.assert_close(cell(x, h), layer(x[None], h[None])[1][0])


@pytest.mark.parametrize("sequence", page.SEQUENCES)
def test_the_cell_without_a_written_out_backward(ugrnn, sequence):
    """Its gate multiplies h before the product: as a loop by hand, and with every option."""
    module = importlib.import_module("mgu")
    layer, x = module.MGU(3, 6, dtype=torch.float64), torch.randn(5, 4, 3, dtype=torch.float64)
    h, (w_f, w_g), (u_f, u_g) = torch.zeros(4, 6).double(), layer.weight_ih_l0.chunk(2), layer.weight_hh_l0.chunk(2)
    b_f, b_g = (layer.bias_ih_l0 + layer.bias_hh_l0).chunk(2)
    for x_t in x:
        f = torch.sigmoid(x_t @ w_f.t() + h @ u_f.t() + b_f)
        h = (1 - f) * h + f * torch.tanh(x_t @ w_g.t() + (f * h) @ u_g.t() + b_g)
    torch.testing.assert_close(layer(x)[1][0], h, **EXACT)
    for options in OPTIONS.values():
        found = page.outcome(module.MGU(3, 6, **options, dtype=torch.float64), sequence, torch.float64)
        assert all(value.isfinite().all() and value.any() for value in found.values())
