"""kernels/noise.py: the words are Philox's, and the kernels see the same masks as all engines, also when recomputed."""

import pytest
import torch
import triton
import triton.language as tl

import fusedlstm
from fusedlstm import autograd, noise
from fusedlstm.kernels.noise import step_words
from support import assert_accurate

RATES = {"zoneout": (0.3, 0.2), "candidate_dropout": 0.3, "recurrent_dropout": 0.4, "weight_dropout": 0.2}


@triton.jit
def words_kernel(seed_ptr, found_ptr, recurrence, row, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr):
    offs_b, offs_h = tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_H)
    words = step_words(seed_ptr, recurrence, row, offs_b, offs_h)
    for k in tl.static_range(3):
        tl.store(found_ptr + (k * BLOCK_B + offs_b[:, None]) * BLOCK_H + offs_h[None, :], words[k])


@pytest.mark.parametrize("row", [0, 5, (1 << 33) + 3])
def test_words(device, row):
    """The upper 24 bits of the words that `fusedlstm.noise` finds for the same counter."""
    seed = torch.tensor([(77 << 32) | 0xFFFFFFF0], device=device)
    found = torch.zeros(3, 4, 8, dtype=torch.int32, device=device)
    words_kernel[(1,)](seed, found, 3, torch.tensor(row).item(), BLOCK_B=4, BLOCK_H=8)
    rows = torch.arange(row, row + 4, device=device).unsqueeze(1)
    words = noise.philox(seed, torch.arange(8, device=device), rows & 0xFFFFFFFF, rows >> 32, 3 * 4 + noise.OF_ROWS)
    for ours, word in zip(found, words[:3], strict=True):
        assert torch.equal(ours.long(), word >> 8)


def run(module, x, **options):
    torch.manual_seed(1)
    x = x.detach().requires_grad_()
    output, states = module(x, **options)
    states = (states,) if isinstance(states, torch.Tensor) else states
    grads = [torch.linspace(-1, 1, y.numel()).view_as(y).to(y) for y in (output, *states)]
    torch.autograd.backward([output, *states], grads)
    found = [output, *states, x.grad, *(p.grad for p in module.parameters())]
    module.zero_grad(set_to_none=True)
    return [y.detach().cpu() for y in found]


@pytest.mark.parametrize(
    ("layer", "save"),
    [
        ("LSTM", "states"),
        ("GRU", "states"),
        *((layer, "gates") for layer in ("LSTM", "RNN", "PeepholeLSTM", "CoupledLSTM")),
    ],
)
def test_layers_see_the_masks_of_the_specification(device, monkeypatch, layer, save):
    monkeypatch.setattr(autograd, "FEWEST_STEPS", 2)
    monkeypatch.setattr(autograd, "FEWEST_ROWS", 1)
    torch.manual_seed(0)
    module = getattr(fusedlstm, layer)(3, 7, 2, **RATES, save=save).to(device)
    x, lengths = torch.randn(5, 4, 3, device=device), torch.tensor([5, 0, 3, 4])
    assert len(autograd.begins_of_blocks(5, 4)) > 2
    for options in ({}, {"lengths": lengths}):
        module.backend = "triton"
        ours = run(module, x, **options)
        module.backend = "reference"
        same = run(module, x, **options)
        exact = run(module.double(), x.double(), **options)
        module.float()
        for k, (a, b, c) in enumerate(zip(ours, same, exact, strict=True)):
            assert_accurate(f"tensor {k}", a, b, c)


def test_packed_with_strided_states_and_the_mean(device):
    torch.manual_seed(0)
    module = fusedlstm.LSTM(3, 7, bidirectional=True, **RATES).to(device)
    x = torch.nn.utils.rnn.pack_padded_sequence(torch.randn(5, 3, 3, device=device), [5, 3, 2])
    hx = tuple(torch.randn(3, 2, 7, device=device).transpose(0, 1) for _ in range(2))
    for training in (True, False):
        module.train(training)
        found = []
        for backend in ("triton", "reference"):
            module.backend = backend
            torch.manual_seed(1)
            found.append(module(x, hx)[0].data)
        torch.testing.assert_close(*found)
