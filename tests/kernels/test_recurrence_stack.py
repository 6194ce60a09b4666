"""The kernels with STACK run the layers of a stack as a wave in one launch, like one layer after another."""

import pytest
import torch

from fusedlstm.cells import Grads, Saved, State, Weights
from fusedlstm.engines import launch, reference
from support import (
    DTYPES,
    LENGTHS,
    assert_accurate,
    cast,
    recurrence,
    stack_inputs,
    tiled,
    without_padding,
)

LAYOUTS = {
    "dense": {},
    "ragged": {"lengths": [2, 0, 3, 1, 2] * 4},
    "packed": {"packed": LENGTHS["two tiles"]},
    "resets": {"resets": 0.3},
    "packed, resets": {"packed": LENGTHS["ragged"], "resets": 0.3},
}


def specified(inputs, grads):
    """Layer after layer with autograd: every result, and every gradient that the backward kernel returns."""
    preact_x, weights, state, batch = inputs
    hx, cx = (x.clone().requires_grad_() for x in state)
    results, preacts = [], []
    for k, weight in enumerate(weights.weight_hh):
        if k > 0:
            preact_x = (results[-1].output @ weights.weight_ih[k - 1].t() + weights.bias[k - 1]).unsqueeze(0)
        preact_x = preact_x + torch.zeros_like(preact_x).requires_grad_()
        preact_x.retain_grad()
        preacts.append(preact_x)
        of_layer = Weights([weight]), State(hx[k : k + 1], cx[:, k : k + 1])
        results.append(reference.recurrence_fwd(recurrence(), preact_x, *of_layer, batch))
    output, h_n, c_n, gates, c_seq = zip(*results, strict=True)
    saved = Saved(torch.stack(output), torch.cat(h_n), torch.cat(c_n, 1), torch.stack(gates), torch.stack(c_seq, 1))
    torch.autograd.backward((output[-1], c_seq[-1], saved.h_n, saved.c_n), grads)
    return *(x.detach() for x in saved), torch.cat([p.grad for p in preacts]), hx.grad, cx.grad


def run(inputs, grads, dtype, **tiles):
    """The two launches."""
    layers, B, H = inputs.state.hx.shape
    fwd, bwd = (
        tiled(pass_, B, H, dtype, directions=layers, stack=True, precision="ieee", **tiles) for pass_ in ("fwd", "bwd")
    )
    saved = launch.recurrence_fwd(recurrence(), *inputs, plan=fwd)
    return *saved, *launch.recurrence_bwd(recurrence(), grads, saved, *inputs[1:], plan=bwd)


def check(inputs, dtype, **tiles):
    generator = torch.Generator().manual_seed(2)
    hx, leading = inputs.state.hx, inputs.preact_x.shape[1:-1]
    layers, B, H = hx.shape
    shapes = ((*leading, H), (1, *leading, H), (layers, B, H), (1, layers, B, H))
    grads = Grads(*(torch.randn(shape, generator=generator).to(hx) for shape in shapes))
    exact = specified(cast(inputs, torch.float64), cast(grads, torch.float64))
    same_dtype = specified(cast(inputs, DTYPES[dtype]), cast(grads, DTYPES[dtype]))
    names = (*Saved._fields, "grad_preact", "grad_hx", "grad_cx")
    for name, ours, other, true in zip(names, run(inputs, grads, dtype, **tiles), same_dtype, exact, strict=True):
        if name == "gates":
            ours, other, true = (
                torch.stack([without_padding(x, inputs.batch.layout) for x in gates]) for gates in (ours, other, true)
            )
        assert_accurate(name, ours, other, true)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("protocol", ["counter", "data"])
def test_every_layout(device, layout, protocol):
    """Two batch tiles or one, two programs a group, two layers."""
    check(stack_inputs(3, 20, 24, 2, torch.float32, device, **LAYOUTS[layout]), "fp32", protocol=protocol)


@pytest.mark.parametrize("dtype", DTYPES)
def test_three_layers(device, dtype):
    check(stack_inputs(3, 5, 20, 3, DTYPES[dtype], device), dtype, protocol="data")


@pytest.mark.parametrize(
    "tiles", [{"schedule": "streamed"}, {"transposed": True, "groups": 1}], ids=["streamed", "walked"]
)
def test_other_tiles(device, tiles):
    check(stack_inputs(3, 20, 24, 2, torch.float32, device), "fp32", **tiles)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs the interpreter: run without a GPU")
@pytest.mark.parametrize("protocol", ["counter", "data"])
def test_seeded_schedules(protocol):
    from fusedlstm.engines import interpreter

    inputs = stack_inputs(3, 5, 20, 3, torch.float32, "cpu")
    for seed in range(2):
        with interpreter.side_by_side(seed, yield_on_memory=True):
            check(inputs, "fp32", protocol=protocol)
