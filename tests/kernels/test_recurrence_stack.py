"""The kernels with STACK run the layers of a stack as a wave in one launch, like one layer after another."""

import pytest
import torch

from fusedlstm.engines import launch, reference
from support import DTYPES, LENGTHS, assert_accurate, cast, recurrence_inputs, tiled, without_padding

LAYOUTS = {
    "dense": {},
    "ragged": {"lengths": [2, 0, 3, 1, 2] * 4},
    "packed": {"packed": LENGTHS["two tiles"]},
    "resets": {"resets": 0.3},
    "packed, resets": {"packed": LENGTHS["ragged"], "resets": 0.3},
}


def stack_inputs(T, B, H, layers, dtype, device, **layout):
    """The tensors of the forward launch: preact_x of the first layer, the weights of all, and `launch.Stack`."""
    inputs = recurrence_inputs(T, B, H, layers, dtype, device, **layout)
    inputs["preact_x"] = inputs["preact_x"][:1]
    generator = torch.Generator().manual_seed(7)
    weight_ih = torch.randn(layers - 1, 4 * H, H, generator=generator) * H**-0.5
    bias = torch.randn(layers - 1, 4 * H, generator=generator)
    inputs["stack"] = launch.Stack(*(x.to(dtype).to(device) for x in (weight_ih, bias)))
    return inputs


def specified(inputs, grads):
    """Layer after layer with autograd: every result, and every gradient that the backward kernel returns."""
    inputs = dict(inputs)
    stack, preact_x, layout = inputs["stack"], inputs["preact_x"], inputs["layout"]
    hx, cx, weight_hh = (
        inputs["hx"].clone().requires_grad_(),
        inputs["cx"].clone().requires_grad_(),
        inputs["weight_hh"],
    )
    results, preacts = [], []
    for k, weight in enumerate(weight_hh):
        if k > 0:
            preact_x = (results[-1][0] @ stack.weight_ih[k - 1].t() + stack.bias[k - 1]).unsqueeze(0)
        preact_x = preact_x + torch.zeros_like(preact_x).requires_grad_()
        preact_x.retain_grad()
        preacts.append(preact_x)
        results.append(reference.recurrence_fwd("lstm", preact_x, [weight], hx[k : k + 1], cx[:, k : k + 1], layout))
    output, h_n, c_n, gates, c_seq = zip(*results, strict=True)
    forward = (torch.stack(output), torch.cat(h_n), torch.cat(c_n, 1), torch.stack(gates), torch.stack(c_seq, 1))
    torch.autograd.backward((output[-1], c_seq[-1], *forward[1:3]), grads)
    return *(x.detach() for x in forward), torch.cat([p.grad for p in preacts]), hx.grad, cx.grad


def run(inputs, grads, dtype, **tiles):
    """The two launches."""
    layers, B, H = inputs["hx"].shape
    fwd, bwd = (
        tiled(pass_, B, H, dtype, directions=layers, stack=True, precision="ieee", **tiles) for pass_ in ("fwd", "bwd")
    )
    ours = launch.recurrence_fwd("lstm", **inputs, save_gates=True, save_states=True, plan=fwd)
    states = {k: v for k, v in inputs.items() if k != "preact_x"}
    saved = dict(zip(("output", "gates", "c_seq"), (ours[0], *ours[3:]), strict=True))
    grad_output, grad_c_seq, grad_h_n, grad_c_n = grads
    return *ours, *launch.recurrence_bwd(
        "lstm", grad_output, grad_c_seq, grad_h_n, grad_c_n, **states, **saved, plan=bwd
    )


def check(inputs, dtype, **tiles):
    generator = torch.Generator().manual_seed(2)
    layers, B, H = inputs["hx"].shape
    leading, device = inputs["preact_x"].shape[1:-1], inputs["hx"].device
    shapes = ((*leading, H), (1, *leading, H), (layers, B, H), (1, layers, B, H))
    grads = [torch.randn(shape, generator=generator).to(DTYPES[dtype]).to(device) for shape in shapes]
    exact = specified(cast(inputs, torch.float64), cast(grads, torch.float64))
    same_dtype = specified(cast(inputs, DTYPES[dtype]), cast(grads, DTYPES[dtype]))
    names = ("output", "h_n", "c_n", "gates", "c_seq", "grad_preact", "grad_hx", "grad_cx")
    for name, ours, other, true in zip(names, run(inputs, grads, dtype, **tiles), same_dtype, exact, strict=True):
        if name == "gates":
            ours, other, true = (
                torch.stack([without_padding(x, inputs["layout"]) for x in gates]) for gates in (ours, other, true)
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
