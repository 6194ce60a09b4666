"""reference.py: equal to torch.nn.LSTM, to autograd, and to an oracle that shares no code with it. All in float64."""

import pytest
import torch
from torch import nn

import oracle
from fusedlstm.cells import CELLS, Grads, State, Weights
from fusedlstm.engines import reference
from support import recurrence

T, B, I, H = 5, 3, 4, 6
EXACT = {"rtol": 1e-11, "atol": 1e-12}


def random_layer(directions):
    parameters = [
        [torch.randn(4 * H, I), torch.randn(4 * H, H), torch.randn(4 * H), torch.randn(4 * H)]
        for _ in range(directions)
    ]
    tensors = [torch.randn(T, B, I), torch.randn(directions, B, H), torch.randn(1, directions, B, H)]
    double = [x.double().requires_grad_() for x in tensors]
    return double, [[p.double().requires_grad_() for p in direction] for direction in parameters]


@pytest.mark.parametrize("directions", [1, 2])
def test_equals_torch(directions):
    (input, hx, cx), parameters = random_layer(directions)
    stock = nn.LSTM(I, H, bidirectional=directions == 2).double()
    names = ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"]
    with torch.no_grad():
        for d, suffix in enumerate(("", "_reverse")[:directions]):
            for name, value in zip(names, parameters[d], strict=True):
                getattr(stock, name + suffix).copy_(value)
    expected, (h_n, c_n) = stock(input, (hx, cx[0]))
    ours = reference.layer(recurrence(), input, State(hx, cx), parameters)[:3]
    for a, b in zip(ours, (expected, h_n, c_n.unsqueeze(0)), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("directions", [1, 2])
def test_written_out_backward_equals_autograd(directions):
    generator = torch.Generator().manual_seed(3)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    preact_x = randn(directions, T, B, 4 * H).requires_grad_()
    weight_hh = [randn(4 * H, H) for _ in range(directions)]
    hx, cx = randn(directions, B, H).requires_grad_(), randn(1, directions, B, H).requires_grad_()
    saved = reference.recurrence_fwd(recurrence(), preact_x, Weights(weight_hh), State(hx, cx))
    results = [getattr(saved, name) for name in Grads._fields]
    grads = Grads(*(randn(*x.shape) for x in results))
    by_autograd = torch.autograd.grad(results, [preact_x, hx, cx], grads)
    with torch.no_grad():
        grad_preact, grad_hx, grad_cx = reference.recurrence_bwd(
            recurrence(), grads, saved, Weights(weight_hh), State(hx, cx)
        )
    grad_preact = grad_preact.unflatten(-1, (directions, 4 * H)).permute(2, 0, 1, 3)
    for a, b in zip((grad_preact, grad_hx, grad_cx), by_autograd, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_equals_the_oracle():
    (input, hx, cx), parameters = random_layer(1)
    values = [x.detach().numpy() for x in (input, hx[0], cx[0, 0], *parameters[0])]
    outputs, h, c, tape = oracle.lstm_layer(*values)
    output, h_n, c_n, _, _ = reference.layer(recurrence(), input, State(hx, cx), parameters)
    for ours, exact in ((output, outputs), (h_n[0], h), (c_n[0, 0], c)):
        torch.testing.assert_close(ours.detach(), torch.from_numpy(exact), **EXACT)

    grads = [torch.randn(x.shape, dtype=torch.float64) for x in (output, h_n, c_n)]
    torch.autograd.backward([output, h_n, c_n], grads)
    d_outputs, d_h, d_c = grads[0].numpy(), grads[1][0].numpy(), grads[2][0, 0].numpy()
    d_x, d_h, d_c, d_w_ih, d_w_hh, d_b = oracle.lstm_layer_gradients(
        values[0], values[3], values[4], tape, d_outputs, d_h, d_c
    )
    ours = [input.grad, hx.grad[0], cx.grad[0, 0], *(p.grad for p in parameters[0])]
    for a, b in zip(ours, (d_x, d_h, d_c, d_w_ih, d_w_hh, d_b, d_b), strict=True):
        torch.testing.assert_close(a, torch.from_numpy(b), **EXACT)


def test_saved_tensors_mean_what_they_say():
    """gates are after the nonlinearity; c_seq holds c of every step; the reverse direction ends at step 0."""
    preact_x = torch.randn(2, T, B, 4 * H, dtype=torch.float64)
    weight_hh = [torch.zeros(4 * H, H, dtype=torch.float64)] * 2
    zeros = torch.zeros(2, B, H, dtype=torch.float64)
    output, h_n, c_n, gates, c_seq = reference.recurrence_fwd(
        recurrence(), preact_x, Weights(weight_hh), State(zeros, zeros[None])
    )
    i, f, g, o = preact_x[1, -1].chunk(4, -1)  # the reverse direction begins at the last step
    expected = torch.cat([i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()], -1)
    torch.testing.assert_close(gates[-1, :, 4 * H :], expected, **EXACT)
    torch.testing.assert_close(c_seq[0, -1, :, H:], i.sigmoid() * g.tanh(), **EXACT)
    torch.testing.assert_close(h_n[1], output[0, :, H:], **EXACT)
    torch.testing.assert_close(c_n[0, 1], c_seq[0, 0, :, H:], **EXACT)


def test_custom_ops_without_a_gpu():
    """The ops as a loop of torch operations: gradcheck holds through them, twice."""
    from fusedlstm.autograd import Layer, LoopFunction

    (input, hx, cx), parameters = random_layer(2)
    flat = [p for direction in parameters for p in direction]

    def run(*tensors):
        return LoopFunction.apply(
            Layer(CELLS["lstm"], "torch", 2, None, False, "gates"),
            *[None] * 4,
            *tensors[:3],
            None,
            *tensors[3:],
        )[:3]

    assert torch.autograd.gradcheck(run, (input[:2].detach().requires_grad_(), hx, cx, *flat))
    one = (input[:2, :1].detach().requires_grad_(), hx[:, :1], cx[:, :, :1], *flat)
    assert torch.autograd.gradgradcheck(run, one, fast_mode=True)


def test_custom_ops_pass_opcheck():
    from fusedlstm import ops

    generator = torch.Generator().manual_seed(3)
    preact_x = torch.randn(2, 3, B, 4 * H, generator=generator)
    weight_hh = [torch.randn(4 * H, H, generator=generator) for _ in range(2)]
    hx, cx = torch.randn(2, B, H, generator=generator), torch.randn(1, 2, B, H, generator=generator)
    checks = ("test_schema", "test_faketensor")
    lengths = torch.randint(0, 4, (B,), generator=generator, dtype=torch.int32)
    resets = torch.rand(3, B, generator=generator) < 0.3
    states = ("lstm", "torch", preact_x, weight_hh, None, hx, cx)
    for layout in ((None, None, None), (lengths, None, resets)):
        for saves in ((True, True), (False, True), (False, False)):
            torch.library.opcheck(ops.recurrence_fwd, (*states, [*layout, None], [], [0, 0], *saves), test_utils=checks)
        output, h_n, c_n, gates, c_seq = ops.recurrence_fwd(*states, [*layout, None], [], [0, 0], True, True)
        for grads, clip in (((output, None, h_n, c_n), None), ((None, c_seq, h_n, c_n), 0.5)):
            arguments = (
                "lstm",
                "torch",
                [*grads],
                weight_hh,
                None,
                hx,
                cx,
                [output, gates, c_seq],
                [*layout, None],
                [],
                [0, 0],
                clip,
            )
            torch.library.opcheck(ops.recurrence_bwd, arguments, test_utils=checks)
