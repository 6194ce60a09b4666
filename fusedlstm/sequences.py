"""A batch of sequences of different lengths in the three forms that PyTorch has for it, and the ways between them.

| form | what it is |
|---|---|
| padded | a tensor [T, B, ...] or [B, T, ...], and lengths [B]: what `fusedlstm.LSTM(...)(input, lengths=lengths)` takes |
| packed | `torch.nn.utils.rnn.PackedSequence`: longest first, no sequence empty |
| jagged | a tensor of `torch.nested` with `layout=torch.jagged`, [B, *, ...]: sequence after sequence |

All ways are differentiable, and padding is zero. `torch` packs and pads; jagged tensors are made and read here, because
torch 2.13 pads one to the sum of its lengths, and pads none that has holes.
"""

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from fusedlstm import checks
from fusedlstm.layout import put_rows, take_rows


def padded_from_packed(
    packed: PackedSequence, *, batch_first: bool = False, total_length: int | None = None
) -> tuple[Tensor, Tensor]:
    """Padded [T, B, ...] and lengths [B] int64, on the device of the data; T is the longest, or `total_length`."""
    checks.instance("packed", packed, PackedSequence)
    padded, lengths = pad_packed_sequence(packed, batch_first, total_length=total_length)
    return padded, lengths.to(padded.device)


def packed_from_padded(padded: Tensor, lengths: Tensor, *, batch_first: bool = False) -> PackedSequence:
    """A PackedSequence that remembers the order of the batch. Waits for the device of `lengths`.

    Raises:
        ValueError: a sequence is longer than `padded`, or empty, which none of a PackedSequence can be.
    """
    lengths = _checked_lengths(padded, lengths, batch_first).cpu()
    if empty := (lengths == 0).nonzero()[:, 0].tolist():
        raise ValueError(f"lengths: expected at least 1, as a PackedSequence has it, got 0 for the sequences {empty}")
    return pack_padded_sequence(padded, lengths, batch_first, enforce_sorted=False)


def padded_from_jagged(
    jagged: Tensor, *, batch_first: bool = False, total_length: int | None = None
) -> tuple[Tensor, Tensor]:
    """Padded [T, B, ...] and lengths [B] int64; T is the longest, or `total_length`. Waits for the device of `jagged`.

    Raises:
        ValueError: `total_length` is less than the longest sequence.
    """
    values, starts, lengths = _parts(jagged)
    longest = int(lengths.max()) if len(lengths) else 0
    T, B = longest if total_length is None else total_length, len(lengths)
    if longest > T:
        raise ValueError(f"total_length: expected at least the longest length, {longest}, got {total_length}")
    sequence, step = _places(lengths, T)
    place = sequence * T + step if batch_first else step * B + sequence
    padded = put_rows(take_rows(values, starts[sequence] + step), place, T * B)
    return padded.unflatten(0, (B, T) if batch_first else (T, B)), lengths


def jagged_from_padded(padded: Tensor, lengths: Tensor, *, batch_first: bool = False) -> Tensor:
    """A nested tensor [B, *, ...] with `layout=torch.jagged`, without holes. Waits for the device of `lengths`."""
    lengths = _checked_lengths(padded, lengths, batch_first).to(padded.device)
    T, B = padded.size(1 if batch_first else 0), len(lengths)
    sequence, step = _places(lengths, T)
    values = take_rows(padded.flatten(0, 1), sequence * T + step if batch_first else step * B + sequence)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return torch.nested.nested_tensor_from_jagged(values, offsets)


def packed_from_jagged(jagged: Tensor) -> PackedSequence:
    """A PackedSequence that remembers the order of the batch. Raises as `packed_from_padded` does."""
    return packed_from_padded(*padded_from_jagged(jagged))


def jagged_from_packed(packed: PackedSequence) -> Tensor:
    """A nested tensor [B, *, ...] with `layout=torch.jagged`, in the order of the batch."""
    return jagged_from_padded(*padded_from_packed(packed))


def _checked_lengths(padded: Tensor, lengths: Tensor, batch_first: bool) -> Tensor:
    """`lengths` as int64 on their own device, when they are lengths of `padded`."""
    checks.instance("padded", padded, Tensor)
    if padded.dim() < 2:
        raise ValueError(f"padded: expected at least 2D, got {padded.dim()}D")
    steps, batch = padded.shape[:2] if not batch_first else (padded.size(1), padded.size(0))
    return checks.sequence_lengths(lengths, steps, [batch], on_any_device=True).long()


def _parts(jagged: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The values of a jagged tensor, [R, ...], and of every sequence the first row and the length, each [B] int64."""
    checks.instance("jagged", jagged, Tensor)
    if not jagged.is_nested or jagged.layout != torch.jagged or isinstance(jagged.shape[1], int):
        raise ValueError("jagged: expected a nested tensor [B, *, ...] with layout=torch.jagged")
    offsets = jagged.offsets().long()
    lengths = offsets.diff() if jagged.lengths() is None else jagged.lengths().long()
    return jagged.values(), offsets[: len(lengths)], lengths


def _places(lengths: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Sequence and step of every row, sequence after sequence, each [R] int64."""
    return (torch.arange(steps, device=lengths.device) < lengths.unsqueeze(1)).nonzero(as_tuple=True)
