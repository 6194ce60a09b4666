"""Stream: chunks equal one run; what is detached, what is not, and what begins anew."""

import pytest
import torch
from torch import nn

import fusedlstm

T, B, I, H = 12, 3, 4, 5
EXACT = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture
def lstm():
    return fusedlstm.LSTM(I, H, num_layers=2, dtype=torch.float64)


def gradients(lstm, loss):
    return torch.autograd.grad(loss, list(lstm.parameters()))


@pytest.mark.parametrize("cls", [fusedlstm.LSTM, nn.LSTM])
def test_chunks_equal_one_run(lstm, cls):
    """Of any size, with gradients through all of them while nothing is detached."""
    module = cls(I, H, num_layers=2, dtype=torch.float64)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    stream = fusedlstm.Stream(module, detach=False)
    output = torch.cat([stream(chunk) for chunk in x.split([1, 5, 4, 2])])
    expected, state = module(x)
    leaves = [x, *module.parameters()]
    torch.testing.assert_close(output, expected, **EXACT)
    torch.testing.assert_close(stream.state, state, **EXACT)
    found = torch.autograd.grad(output.square().sum(), leaves), torch.autograd.grad(expected.square().sum(), leaves)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_truncated_backpropagation(lstm):
    """Detached: every chunk's gradients are those of the chunk by itself, from a state that is a constant."""
    x = torch.randn(T, B, I, dtype=torch.float64)
    stream, state = fusedlstm.Stream(lstm), None
    for chunk in x.split(4):
        ours = gradients(lstm, stream(chunk).square().sum())
        output, state = lstm(chunk, state)
        state = tuple(s.detach() for s in state)
        for a, b in zip(ours, gradients(lstm, output.square().sum()), strict=True):
            assert torch.equal(a, b)
        assert not any(s.requires_grad for s in stream.state)


def test_resets_and_lengths_inside_chunks(lstm):
    x, resets = torch.randn(T, B, I, dtype=torch.float64), torch.rand(T, B) < 0.2
    lengths = torch.tensor([12, 7, 3])
    stream = fusedlstm.Stream(lstm)
    outputs, cells = [], []
    for k, (chunk, begins) in enumerate(zip(x.split(4), resets.split(4), strict=True)):
        output, c_seq = stream(chunk, resets=begins, lengths=(lengths - 4 * k).clamp(0, 4), return_cell_states=True)
        outputs.append(output)
        cells.append(c_seq)
    expected, state, c_seq = lstm(x, lengths=lengths, resets=resets, return_cell_states=True)
    torch.testing.assert_close(torch.cat(outputs), expected, **EXACT)
    torch.testing.assert_close(torch.cat(cells), c_seq, **EXACT)
    torch.testing.assert_close(stream.state, state, **EXACT)


def test_clipped_gradients_through_chunks(lstm):
    """What crosses a chunk is clipped once, as inside."""
    x = torch.randn(T, B, I, dtype=torch.float64)
    stream = fusedlstm.Stream(lstm, detach=False)
    ours = gradients(lstm, torch.cat([stream(c, grad_clip=0.01) for c in x.split(5)]).sum())
    for a, b in zip(ours, gradients(lstm, lstm(x, grad_clip=0.01)[0].sum()), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_reset_of_some_sequences(lstm):
    """Equals a reset at the first step of the next chunk."""
    x = torch.randn(T, B, I, dtype=torch.float64)
    which = torch.tensor([True, False, True])
    stream = fusedlstm.Stream(lstm)
    stream(x[:6])
    kept = stream.state[0].clone()
    stream.reset(which)
    assert not stream.state[0][:, which].any() and torch.equal(stream.state[0][:, 1], kept[:, 1])
    resets = torch.zeros(6, B, dtype=torch.bool)
    resets[0] = which
    other = fusedlstm.Stream(lstm)
    other(x[:6])
    torch.testing.assert_close(stream(x[6:]), other(x[6:], resets=resets), **EXACT)
    stream.reset()
    assert stream.state is None
    stream.reset(which)  # of what has not begun
    assert torch.equal(stream(x), lstm(x)[0])


def test_a_later_detach(lstm):
    x = torch.randn(T, B, I, dtype=torch.float64)
    stream = fusedlstm.Stream(lstm, detach=False)
    stream.detach()
    stream(x[:6])
    assert stream.state[0].requires_grad
    stream.detach()
    assert not stream.state[0].requires_grad


def test_a_state_that_is_a_tensor():
    """As that of a GRU."""
    gru = nn.GRU(I, H)
    x = torch.randn(T, B, I)
    stream = fusedlstm.Stream(gru)
    torch.testing.assert_close(torch.cat([stream(c) for c in x.split(5)]), gru(x)[0])
    stream.reset(torch.tensor([True, False, False]))
    assert not stream.state[:, 0].any() and stream.state[:, 1].any()


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU])
def test_reset_without_a_batch_axis(cls):
    stream = fusedlstm.Stream(cls(I, H))
    for which in (torch.tensor([True]), torch.tensor(True), None):
        first = stream(x := torch.randn(3, I))
        again = stream(x)
        assert not torch.equal(first, again)
        stream.reset(torch.tensor([False]))
        stream.reset(which)
        assert torch.equal(stream(x), first)
        stream.reset()
    stream(torch.randn(3, I))
    with pytest.raises(ValueError, match=r"which: expected shape \[1\], got \[5\]"):
        stream.reset(torch.ones(H, dtype=torch.bool))


def test_errors(lstm):
    with pytest.raises(TypeError, match="module: expected a Module, got str"):
        fusedlstm.Stream("lstm")
    with pytest.raises(ValueError, match="module: expected one direction"):
        fusedlstm.Stream(fusedlstm.LSTM(I, H, bidirectional=True))
    stream = fusedlstm.Stream(lstm)
    stream(torch.randn(2, B, I, dtype=torch.float64))
    with pytest.raises(ValueError, match="which: expected torch.bool, got torch.int64"):
        stream.reset(torch.tensor([0, 1, 0]))
    with pytest.raises(ValueError, match=r"which: expected shape \[3\], got \[2\]"):
        stream.reset(torch.tensor([True, False]))
    with pytest.raises(RuntimeError, match="Expected hidden"):
        stream(torch.randn(2, B + 1, I, dtype=torch.float64))
