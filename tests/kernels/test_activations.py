"""kernels/activations.py against float64, over the whole range of float32."""

import pytest
import torch
import triton
import triton.language as tl

from fusedlstm.kernels import activations


@triton.jit
def activate(x_ptr, y_ptr, n, TANH: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n)
    y = activations.tanh(x) if TANH else activations.sigmoid(x)
    tl.store(y_ptr + offs, y, mask=offs < n)


def run(x, is_tanh):
    y = torch.empty_like(x)
    activate[(triton.cdiv(x.numel(), 1 << 16),)](x, y, x.numel(), TANH=is_tanh, BLOCK=1 << 16)
    return y


@pytest.mark.parametrize("is_tanh", [True, False], ids=["tanh", "sigmoid"])
def test_relative_error(device, is_tanh):
    small = torch.logspace(-30, 0, 20001)
    x = torch.cat([-small, small, torch.linspace(-30, 30, 100001), torch.linspace(0.62, 0.63, 1001)]).to(device)
    exact = (torch.tanh if is_tanh else torch.sigmoid)(x.double())
    worst = ((run(x, is_tanh).double() - exact) / exact).abs().nan_to_num(0).max().item()
    # sigmoid on the far left inherits the rounding of the exponent, |x| ulps
    limit = 3e-7 if is_tanh else 4e-6
    assert worst <= limit


@pytest.mark.parametrize("is_tanh", [True, False], ids=["tanh", "sigmoid"])
def test_saturation(device, is_tanh):
    x = torch.tensor([0.0, 50.0, -50.0, 1e4, -1e4, 3e38, -3e38, float("inf"), float("-inf")], device=device)
    low = -1.0 if is_tanh else 0.0
    middle = 0.0 if is_tanh else 0.5
    expected = torch.tensor([middle, *[1.0, low] * 4], device=device)
    torch.testing.assert_close(run(x, is_tanh), expected, rtol=0, atol=1e-20)
    assert run(torch.tensor([float("nan")], device=device), is_tanh).isnan().all()
