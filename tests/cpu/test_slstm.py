"""sLSTM is stable: gates far from zero, beside a closed form that needs no stabiliser, forward and backward."""

import pytest
import torch
from torch.nn.functional import logsigmoid

import fusedlstm
from support import assert_accurate


def closed_form(preact):
    """h of every step without recurrent weights, from preact [T, B, 4, H]: an average of g with weights of a softmax.

    The weight of step s at step t is i of s times all f from s + 1 to t, so its logarithm is a sum.
    """
    i, f, g, o = preact.unbind(2)
    log_f = logsigmoid(f).cumsum(0)
    hs = []
    for t in range(len(i)):
        weights = torch.softmax(i[: t + 1] + (log_f[t] - log_f[: t + 1]), 0)
        hs.append(torch.sigmoid(o[t]) * (weights * torch.tanh(g[: t + 1])).sum(0))
    return torch.stack(hs)


def check(module, level, dtype):
    """All gates near `level`, of which i and f decide; weights of one let the input be the preactivations."""
    H = module.hidden_size
    with torch.no_grad():
        module.weight_ih_l0.copy_(torch.eye(4 * H))
        module.weight_hh_l0.zero_()
    x = torch.randn(6, 3, 4, H, generator=torch.Generator().manual_seed(1))
    x[:, :, :2] += level
    x[::2, :, 0] -= level  # some inputs weigh far more than others
    x = x.to(dtype)
    weight = torch.randn(6, 3, H, generator=torch.Generator().manual_seed(2)).to(dtype)
    results = []
    for p, run in (
        (dtype, lambda leaf: module(leaf.flatten(2))[0]),
        (dtype, closed_form),
        (torch.float64, closed_form),
    ):
        leaf = x.to(p).requires_grad_()
        h = run(leaf)
        (gradient,) = torch.autograd.grad((h * weight.to(p)).sum(), leaf)
        results.append((h.detach(), gradient))
    for name, *values in zip(("h", "gradient"), *results, strict=True):
        assert_accurate(f"{name} at {level}", *values)


@pytest.mark.parametrize("save", ["gates", "states"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(
    ("level", "dtype"),
    [(0.0, torch.float32), (-30.0, torch.float32), (-100.0, torch.float32), (-800.0, torch.float64)],
    ids=str,
)
def test_strong_forgetting(backend, level, dtype, save):
    check(fusedlstm.SLSTM(20, 5, bias=False, backend=backend, save=save, dtype=dtype), level, dtype)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_m_of_an_empty_state_is_ignored(backend):
    module = fusedlstm.SLSTM(3, 4, backend=backend, dtype=torch.float64)
    x, h, empty = torch.randn(5, 2, 3).double(), torch.randn(1, 2, 4).double(), torch.zeros(1, 2, 4).double()
    expected = module(x, (h, empty, empty, empty))
    for m in (-1000.0, 3.0, 1000.0):
        torch.testing.assert_close(module(x, (h, empty, empty, empty + m)), expected)
