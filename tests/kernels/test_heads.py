"""Heads in the kernels, through fusedlstm.LSTM, against dense layers with block-diagonal weights."""

import copy

import pytest
import torch

import fusedlstm
from support import DTYPES, assert_accurate
from twins import SEQUENCES, case_id, dense_twin, outcome, pairwise, with_heads

# What no kernel sees has one value.
CASES = pairwise(
    sizes=((21, 3), (34, 2), (5, 5)),
    dtype=tuple(DTYPES.values()),
    sequence=tuple(name for name in SEQUENCES if name != "unbatched"),
    bias=(True,),
    dropout=(0.0,),
    num_layers=(1,),
)


def check(device, case):
    lstm = with_heads(case).to(case["dtype"])
    lstm.backend = "triton"
    same_dtype = outcome(dense_twin(lstm, case, "reference"), case)
    exact = outcome(dense_twin(copy.deepcopy(lstm).double(), case, "reference"), case)
    found = outcome(lstm.to(device), case)
    assert list(found) == list(exact)
    for name, value in found.items():
        assert value.dtype == same_dtype[name].dtype
        assert_accurate(name, value, same_dtype[name], exact[name])


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_equals_a_dense_layer(device, case):
    """With the plan's own tiles; heads of one unit, of fewer than a tile and of more."""
    check(device, case)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_heads_do_not_see_each_other(device, dtype):
    """What is changed in h of one head changes that head, and not a bit of another; so in the backward."""
    lstm = fusedlstm.LSTM(5, 21, num_heads=3, backend="triton").to(device, DTYPES[dtype])
    x, h, c = (torch.randn(s).to(device, DTYPES[dtype]) for s in ((3, 2, 5), (1, 2, 21), (1, 2, 21)))
    output = lstm(x, (h, c))[0].unflatten(-1, (3, 7))
    other = h.clone()
    other[..., 7:14] += 1
    changed = (lstm(x, (other, c))[0].unflatten(-1, (3, 7)) != output).any(-1)
    assert changed[..., 1].all() and not changed[..., 0].any() and not changed[..., 2].any()
    h.requires_grad_()
    lstm(x, (h, c))[0][-1, :, 7:14].float().square().sum().backward()
    touched = (h.grad.unflatten(-1, (3, 7)) != 0).any(-1)
    assert touched[..., 1].all() and not touched[..., 0].any() and not touched[..., 2].any()


def test_cell(device):
    cell = fusedlstm.LSTMCell(5, 21, num_heads=3, backend="triton").to(device)
    layer = fusedlstm.LSTM(5, 21, num_heads=3, backend="reference").double()
    layer.load_state_dict({f"{name}_l0": w for name, w in cell.state_dict().items()})
    x, h, c = torch.randn(3, 5), torch.randn(3, 21), torch.randn(3, 21)
    found = cell(x.to(device), (h.to(device), c.to(device)))
    sum(y.square().sum() for y in found).backward()
    expected = layer(x.double().unsqueeze(0), (h.double().unsqueeze(0), c.double().unsqueeze(0)))[1]
    sum(y.square().sum() for y in expected).backward()
    found = [*found, *(p.grad for p in cell.parameters())]
    expected = [*(y.squeeze(0) for y in expected), *(p.grad for p in layer.parameters())]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=1e-5, atol=1e-6)


def test_double_backward(device):
    lstm = fusedlstm.LSTM(3, 6, num_heads=2, backend="triton").to(device)
    twin = dense_twin(copy.deepcopy(lstm).cpu().double())
    x, found = torch.randn(3, 2, 3), []
    for module in (lstm, twin):
        weight = module.weight_ih_l0
        own = x.detach().to(weight.device, weight.dtype).requires_grad_()
        (grad,) = torch.autograd.grad(module(own)[0].square().sum(), own, create_graph=True)
        grad.square().sum().backward()
        found.append([y.cpu().double() for y in (grad.detach(), own.grad, weight.grad)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
