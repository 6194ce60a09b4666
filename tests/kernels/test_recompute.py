"""kernels/recompute.py and a backward in blocks, against the specification in the same dtype and in float64."""

import pytest
import torch

import fusedlstm
from fusedlstm import autograd
from fusedlstm.engines import launch, reference
from support import DTYPES, assert_accurate, cast, recurrence, recurrence_inputs, strided, without_padding

LAYOUTS = {
    "dense": {},
    "resets": {"resets": 0.3},
    "ragged, resets": {"lengths": [3, 0, 4, 1], "resets": 0.3},
    "packed, resets": {"packed": [4, 3, 3, 1], "resets": 0.3},
}


@pytest.mark.parametrize(("dtype", "H"), [("fp32", 130), ("bf16", 19), ("fp16", 1)])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_specification(device, layout, directions, dtype, H):
    """130 units need two programs per sequence. Without recurrent weights, the preactivation is preact_x alone."""
    inputs = recurrence_inputs(4, 3, H, directions, DTYPES[dtype], device, **LAYOUTS[layout])
    for w in inputs.weights.weight_hh:
        w.zero_()
    preact = inputs.preact_x.movedim(0, -2).contiguous().movedim(-2, 0)  # directions beside each other, as products are
    gates, c_seq = launch.recompute(recurrence(), preact, None, inputs.state, inputs.batch)
    same, exact = (
        reference.recurrence_fwd(recurrence(), *cast(inputs, precision)) for precision in (DTYPES[dtype], torch.float64)
    )
    assert_accurate("gates", *(without_padding(x, inputs.batch.layout) for x in (gates, same.gates, exact.gates)))
    assert_accurate("c_seq", c_seq, same.c_seq, exact.c_seq)


def run(lstm, x, states, grads, **options):
    leaves = [y.detach().to(lstm.weight_hh_l0).requires_grad_() for y in (x, *states)]
    input = strided(leaves[0]) if x.is_cuda else leaves[0]
    output, (h_n, c_n), c_seq = lstm(input, tuple(leaves[1:]), return_cell_states=True, **options)
    results = (output, h_n, c_n, c_seq)
    names = ["input", "h_0", "c_0", *(name for name, _ in lstm.named_parameters())]
    found = torch.autograd.grad(
        results, [*leaves, *lstm.parameters()], [g.to(r) for g, r in zip(grads, results, strict=True)]
    )
    found = {f"grad of {name}": g for name, g in zip(names, found, strict=True)}
    return dict(zip(("output", "h_n", "c_n", "c_seq"), results, strict=True)) | found


CASES = {
    "dense": ({}, {}),
    "clipped, batch first": ({"batch_first": True, "grad_clip": 0.1}, {}),
    "two bidirectional layers": ({"num_layers": 2, "bidirectional": True}, {}),
    "projected": ({"proj_size": 7}, {}),
    "lengths, resets": ({"bias": False}, {"lengths": torch.tensor([9, 0, 4])}),
}


@pytest.mark.parametrize(("case", "dtype"), [*((case, "bf16") for case in CASES), ("dense", "fp32"), ("dense", "fp16")])
def test_all_gradients_in_blocks(device, monkeypatch, case, dtype):
    monkeypatch.setattr(autograd, "FEWEST_STEPS", 2)
    monkeypatch.setattr(autograd, "FEWEST_ROWS", 1)
    monkeypatch.setattr(autograd, "MOST_BLOCKS", 3)
    arguments, options = CASES[case]
    T, B, I, H, P = 9, 3, 5, 19, arguments.get("proj_size") or 19
    ours = fusedlstm.LSTM(I, H, **arguments, backend="triton", save="states").to(device, DTYPES[dtype])
    rows = ours.num_layers * (2 if ours.bidirectional else 1)
    leading = (B, T) if ours.batch_first else (T, B)
    if options:
        options = {"lengths": options["lengths"].to(device), "resets": torch.rand(T, B, device=device) < 0.2}
    x, states = torch.randn(*leading, I), (torch.randn(rows, B, P), torch.randn(rows, B, H))
    D = 2 if ours.bidirectional else 1
    grads = [torch.randn(*s) for s in ((*leading, D * P), (rows, B, P), (rows, B, H), (*leading, D * H))]
    x, states, grads = cast([x, list(states), grads], DTYPES[dtype], device)
    found = run(ours, x, states, grads, **options)
    same = fusedlstm.LSTM(I, H, **arguments, backend="reference").to(device, DTYPES[dtype])
    same.load_state_dict(ours.state_dict())
    exact = fusedlstm.LSTM(I, H, **arguments, backend="reference").to(device).double()
    exact.load_state_dict(ours.state_dict())
    same, exact = run(same, x, states, grads, **options), run(exact, x, states, grads, **options)
    for name, value in found.items():
        assert_accurate(name, value.detach(), same[name].detach(), exact[name].detach().cpu())


def test_what_crosses_a_border_is_float32(device, monkeypatch):
    """c and its gradient: rounded to bfloat16 they would not be what one run carries in registers."""
    monkeypatch.setattr(autograd, "FEWEST_STEPS", 2)  # one would be for the kernel of a single step
    monkeypatch.setattr(autograd, "FEWEST_ROWS", 1)
    entered, forward, backward = [], launch.recurrence_fwd, launch.recurrence_bwd

    def spied_forward(spec, preact_x, weights, state, batch):
        entered.append(state.cx.dtype)
        return forward(spec, preact_x, weights, state, batch)

    def spied_backward(spec, grads, *others):
        entered.append(grads.c_n.dtype)
        return backward(spec, grads, *others)

    monkeypatch.setattr(launch, "recurrence_fwd", spied_forward)
    monkeypatch.setattr(launch, "recurrence_bwd", spied_backward)
    ours = fusedlstm.LSTM(3, 5, backend="triton", save="states").to(device, torch.bfloat16)
    x = torch.randn(8, 2, 3, device=device, dtype=torch.bfloat16)
    output, (_, c_n) = ours(x)
    whole = fusedlstm.LSTM(3, 5, backend="triton").to(device, torch.bfloat16)
    whole.load_state_dict(ours.state_dict())
    expected, (_, expected_c) = whole(x)
    assert torch.equal(output, expected) and torch.equal(c_n, expected_c)
    output.sum().backward()
    assert entered == [torch.float32] * 4 + [torch.bfloat16] + [torch.float32] * 4
