"""sequences.py: padded, packed and jagged are one batch, in every direction and with gradients."""

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fusedlstm
from fusedlstm import sequences

LENGTHS = [3, 0, 5, 1, 5]


def batch(lengths, *features, dtype=torch.float64):
    """A list of sequences, [n, *features] each."""
    values = torch.arange(1, 1 + sum(lengths) * max(1, torch.Size(features).numel())).to(dtype)
    return list(values.view(sum(lengths), *features).split(lengths))


def jagged_of(parts):
    return torch.nested.nested_tensor(parts, layout=torch.jagged)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("features", [(), (2,), (2, 3)], ids=str)
def test_padded_from_jagged(features, batch_first):
    parts = batch(LENGTHS, *features)
    for total, T in ((None, 5), (7, 7)):
        padded, lengths = sequences.padded_from_jagged(jagged_of(parts), batch_first=batch_first, total_length=total)
        padded = padded.transpose(0, 1) if batch_first else padded
        assert lengths.tolist() == LENGTHS and padded.shape == (T, 5, *features)
        for b, part in enumerate(parts):
            assert torch.equal(padded[: len(part), b], part) and not padded[len(part) :, b].any()


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("features", [(), (2,), (2, 3)], ids=str)
def test_jagged_round_trip_with_gradients(features, batch_first):
    """Jagged to padded and back: the same values, and the identity as the gradient; padding gets none."""
    values = torch.cat(batch(LENGTHS, *features)).requires_grad_()
    offsets = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)])
    jagged = torch.nested.nested_tensor_from_jagged(values, offsets)
    padded, lengths = sequences.padded_from_jagged(jagged, batch_first=batch_first)
    padded.retain_grad()
    back = sequences.jagged_from_padded(padded, lengths, batch_first=batch_first)
    assert torch.equal(back.values(), values) and torch.equal(back.offsets(), offsets) and back.layout == torch.jagged
    weights = torch.randn_like(values)
    back.values().mul(weights).sum().backward()
    assert torch.equal(values.grad, weights)
    assert padded.grad.ne(0).sum() == weights.numel()
    assert torch.autograd.gradcheck(
        lambda v: sequences.padded_from_jagged(torch.nested.nested_tensor_from_jagged(v, offsets))[0].square(),
        (values.detach().requires_grad_(),),
    )


def test_jagged_with_holes():
    padded = torch.randn(4, 6, 2)
    jagged = torch.nested.narrow(padded, 1, 0, torch.tensor([3, 0, 6, 1]), layout=torch.jagged)
    assert jagged.lengths() is not None
    found, lengths = sequences.padded_from_jagged(jagged, batch_first=True)
    assert lengths.tolist() == [3, 0, 6, 1]
    for b, n in enumerate(lengths.tolist()):
        assert torch.equal(found[b, :n], padded[b, :n]) and not found[b, n:].any()


@pytest.mark.parametrize("batch_first", [False, True])
def test_packed_round_trip_with_gradients(batch_first):
    lengths = torch.tensor([3, 1, 5, 1, 4])
    padded = torch.randn(*((5, 6) if batch_first else (6, 5)), 2, requires_grad=True)
    packed = sequences.packed_from_padded(padded, lengths, batch_first=batch_first)
    expected = pack_padded_sequence(padded, lengths, batch_first, enforce_sorted=False)
    assert torch.equal(packed.data, expected.data) and torch.equal(packed.sorted_indices, expected.sorted_indices)
    back, found = sequences.padded_from_packed(packed, batch_first=batch_first, total_length=6)
    assert torch.equal(found, lengths) and back.shape == padded.shape
    back.sum().backward()
    steps = torch.arange(6).unsqueeze(1) < lengths
    assert torch.equal(padded.grad.transpose(0, 1) if batch_first else padded.grad, steps.unsqueeze(-1).expand(6, 5, 2))


def test_packed_and_jagged():
    parts = batch([3, 1, 5, 1], 2)
    packed = sequences.packed_from_jagged(jagged_of(parts))
    assert isinstance(packed, PackedSequence)
    back = sequences.jagged_from_packed(packed)
    for ours, part in zip(back.unbind(), parts, strict=True):
        assert torch.equal(ours, part)


def test_all_forms_are_one_batch_to_a_layer():
    """A jagged batch through the layer, by lengths and packed."""
    lstm = fusedlstm.LSTM(2, 3, bidirectional=True, dtype=torch.float64)
    jagged = jagged_of(batch([3, 1, 5, 1], 2))
    padded, lengths = sequences.padded_from_jagged(jagged)
    by_lengths = sequences.jagged_from_padded(lstm(padded, lengths=lengths)[0], lengths)
    packed = sequences.jagged_from_packed(lstm(sequences.packed_from_jagged(jagged))[0])
    torch.testing.assert_close(by_lengths.values(), packed.values())


def test_no_sequences():
    padded, lengths = sequences.padded_from_jagged(
        torch.nested.nested_tensor_from_jagged(torch.zeros(0, 2), torch.tensor([0]))
    )
    assert padded.shape == (0, 0, 2) and lengths.shape == (0,)


def test_errors():
    x = torch.zeros(4, 3, 2)
    with pytest.raises(ValueError, match=r"lengths: expected at least 1.* got 0 for the sequences \[1\]"):
        sequences.packed_from_padded(x, torch.tensor([1, 0, 2]))
    with pytest.raises(ValueError, match="lengths: expected 0 to 4, got 5"):
        sequences.jagged_from_padded(x, torch.tensor([1, 5, 2]))
    with pytest.raises(ValueError, match=r"lengths: expected shape \[4\], got \[3\]"):
        sequences.jagged_from_padded(x, torch.tensor([1, 1, 2]), batch_first=True)
    with pytest.raises(ValueError, match="padded: expected at least 2D, got 1D"):
        sequences.jagged_from_padded(torch.zeros(3), torch.tensor([1]))
    with pytest.raises(TypeError, match="packed: expected a PackedSequence, got Tensor"):
        sequences.padded_from_packed(x)
    for not_jagged in (x, torch.nested.nested_tensor([x[0], x[1]], layout=torch.strided)):
        with pytest.raises(ValueError, match="jagged: expected a nested tensor"):
            sequences.padded_from_jagged(not_jagged)
    with pytest.raises(ValueError, match="total_length: expected at least the longest length, 5, got 4"):
        sequences.padded_from_jagged(jagged_of(batch(LENGTHS, 2)), total_length=4)
