"""Layers on the kernels at the edges: axes with one element, two directions in half precision, numbers nobody uses."""

import pytest
import torch

import fusedlstm
from support import assert_accurate

MEMBERS = (
    fusedlstm.LSTM,
    fusedlstm.GRU,
    fusedlstm.PeepholeLSTM,
    fusedlstm.LayerNormLSTM,
    fusedlstm.LayerNormGRU,
    fusedlstm.SLSTM,
)


def gradients(module, x, **options):
    module.zero_grad()
    x = x.clone().requires_grad_()
    output, _ = module(x, **options)
    output.square().sum().backward()
    return [output.detach(), x.grad, *(p.grad for p in module.parameters())]


def check(module, x, **options):
    """The kernels beside the specification in the same dtype and in float64."""
    ours = gradients(module, x, **options)
    module.backend = "reference"
    same = gradients(module, x, **options)
    exact = gradients(module.double(), x.double(), **options)
    for k, values in enumerate(zip(ours, same, exact, strict=True)):
        assert_accurate(f"tensor {k}", *values)


@pytest.mark.parametrize("save", ["gates", "states"])
@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("member", MEMBERS)
def test_the_stride_of_an_axis_with_one_element_means_nothing(device, member, shape, save):
    batch, steps = shape
    module = member(4, 6, batch_first=True, save=save, backend="triton", device=device)
    check(module, torch.randn(batch, steps, 4, device=device))
    strange = torch.randn(batch, steps, 4, device=device).as_strided((batch, steps, 4), (3 if batch == 1 else 4, 4, 1))
    module.backend = "triton"
    check(module.float(), strange)


@pytest.mark.parametrize("save", ["gates", "states"])
@pytest.mark.parametrize("member", MEMBERS)
def test_two_directions_with_lengths_in_half_precision(device, member, save):
    module = member(4, 6, bidirectional=True, save=save, backend="triton", device=device, dtype=torch.bfloat16)
    x = torch.randn(4, 3, 4, device=device, dtype=torch.bfloat16)
    check(module, x, lengths=torch.tensor([4, 2, 0], device=device))


@pytest.mark.parametrize("member", MEMBERS)
def test_what_a_sequence_without_steps_begins_with_is_not_used(device, member):
    module = member(4, 6, backend="triton", device=device)
    x, found = torch.randn(3, 2, 4, device=device), []
    states = module(x)[1]
    for value in (0.0, float("nan")):
        hx = [torch.zeros_like(s) for s in (states if isinstance(states, tuple) else (states,))]
        for state in hx:
            state[:, 1] = value
        hx = tuple(hx) if len(hx) > 1 else hx[0]
        found.append(gradients(module, x, hx=hx, lengths=torch.tensor([3, 0], device=device)))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("member", MEMBERS)
def test_final_states_may_be_changed_in_place(device, member):
    module = member(4, 6, backend="triton", device=device)
    states = module(torch.randn(3, 2, 4, device=device))[1]
    for state in states if isinstance(states, tuple) else (states,):
        state[:, 0] = 0
    sum(s.square().sum() for s in (states if isinstance(states, tuple) else (states,))).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("save", ["gates", "states"])
@pytest.mark.parametrize(
    ("level", "dtype"), [(-20.0, torch.float16), (-20.0, torch.bfloat16), (-100.0, torch.float32)], ids=str
)
def test_an_slstm_that_forgets_strongly(device, level, dtype, save):
    """f is zero in these dtypes, and the gradient through time is not."""
    module = fusedlstm.SLSTM(3, 5, backend="triton", device=device, dtype=dtype, save=save)
    with torch.no_grad():
        module.bias_ih_l0[:10] += level  # i and f
    check(module, torch.randn(5, 2, 3, device=device, dtype=dtype))
