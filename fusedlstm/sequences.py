"""Conversions between the three forms that PyTorch has for a batch of sequences of different lengths, and `Stream`.

| form | what it is |
|---|---|
| padded | a tensor [T, B, ...] or [B, T, ...] and lengths [B], as `lstm(input, lengths=lengths)` takes them |
| packed | `torch.nn.utils.rnn.PackedSequence`, sorted with the longest first; no sequence may be empty |
| jagged | a tensor of `torch.nested` with `layout=torch.jagged`, [B, *, ...], one sequence after another |

All conversions are differentiable, and padding is filled with zeros. torch does the packing. Jagged tensors are read
and made here, because torch 2.13 pads a jagged tensor to the sum of its lengths, and cannot pad one with holes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from fusedlstm import checks
from fusedlstm.layout import put_rows, take_rows


def padded_from_packed(
    packed: PackedSequence, *, batch_first: bool = False, total_length: int | None = None
) -> tuple[Tensor, Tensor]:
    """Convert a packed batch into a padded one.

    Args:
        packed: The packed batch.
        batch_first: Whether the result is [B, T, ...].
        total_length: T. If it is not given, T is the longest length.

    Returns:
        The padded batch [T, B, ...] or [B, T, ...], and its lengths [B] int64 on the same device.

    Raises:
        TypeError: `packed` is not a PackedSequence.
        ValueError: `total_length` is less than the longest length.
    """
    checks.instance("packed", packed, PackedSequence)
    padded, lengths = pad_packed_sequence(packed, batch_first, total_length=total_length)
    return padded, lengths.to(padded.device)


def packed_from_padded(padded: Tensor, lengths: Tensor, *, batch_first: bool = False) -> PackedSequence:
    """Convert a padded batch into a packed one. This waits for the device of `lengths`.

    Args:
        padded: The padded batch [T, B, ...] or [B, T, ...].
        lengths: The number of valid steps of each sequence, integers [B] from 1 to T, on any device.
        batch_first: Whether `padded` is [B, T, ...].

    Returns:
        A PackedSequence, which stores the order of the batch.

    Raises:
        TypeError, ValueError: An argument has a wrong type or shape.
        ValueError: A sequence is longer than T, or empty. A PackedSequence cannot have empty sequences.
    """
    lengths = _checked_lengths(padded, lengths, batch_first).cpu()
    if empty := (lengths == 0).nonzero()[:, 0].tolist():
        raise ValueError(f"lengths: expected at least 1, as a PackedSequence has it, got 0 for the sequences {empty}")
    return pack_padded_sequence(padded, lengths, batch_first, enforce_sorted=False)


def padded_from_jagged(
    jagged: Tensor, *, batch_first: bool = False, total_length: int | None = None
) -> tuple[Tensor, Tensor]:
    """Convert a jagged batch into a padded one. This waits for the device of `jagged`.

    Args:
        jagged: A nested tensor [B, *, ...] with `layout=torch.jagged`, with or without holes.
        batch_first: Whether the result is [B, T, ...].
        total_length: T. If it is not given, T is the longest length.

    Returns:
        The padded batch [T, B, ...] or [B, T, ...], and its lengths [B] int64 on the same device.

    Raises:
        TypeError, ValueError: `jagged` is not such a tensor.
        ValueError: `total_length` is less than the longest length.
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
    """Convert a padded batch into a jagged one. This waits for the device of `lengths`.

    Args:
        padded: The padded batch [T, B, ...] or [B, T, ...].
        lengths: The number of valid steps of each sequence, integers [B] from 0 to T, on any device.
        batch_first: Whether `padded` is [B, T, ...].

    Returns:
        A nested tensor [B, *, ...] with `layout=torch.jagged`, without holes.

    Raises:
        TypeError, ValueError: An argument has a wrong type or shape, or a length is below 0 or above T.
    """
    lengths = _checked_lengths(padded, lengths, batch_first).to(padded.device)
    T, B = padded.size(1 if batch_first else 0), len(lengths)
    sequence, step = _places(lengths, T)
    values = take_rows(padded.flatten(0, 1), sequence * T + step if batch_first else step * B + sequence)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return torch.nested.nested_tensor_from_jagged(values, offsets)


def packed_from_jagged(jagged: Tensor) -> PackedSequence:
    """Convert a jagged batch, a nested tensor [B, *, ...], into a packed one. This waits for its device.

    Returns:
        A PackedSequence, which stores the order of the batch.

    Raises:
        TypeError, ValueError: `jagged` is not a nested tensor with `layout=torch.jagged`, or a sequence is empty.
    """
    return packed_from_padded(*padded_from_jagged(jagged))


def jagged_from_packed(packed: PackedSequence) -> Tensor:
    """Convert a packed batch into a jagged one.

    Returns:
        A nested tensor [B, *, ...] with `layout=torch.jagged`, in the order of the batch.

    Raises:
        TypeError: `packed` is not a PackedSequence.
    """
    return jagged_from_padded(*padded_from_packed(packed))


def jagged_like(jagged: Tensor, padded: Tensor, lengths: Tensor, batch_first: bool) -> Tensor:
    """A padded batch with the structure of a jagged one, so that both can be added; a new one if that has holes."""
    found = jagged_from_padded(padded, lengths, batch_first=batch_first)
    if jagged.lengths() is not None:  # type: ignore[attr-defined]
        return found
    return torch.nested.nested_tensor_from_jagged(found.values(), jagged.offsets())  # type: ignore[attr-defined]


def _checked_lengths(padded: Tensor, lengths: Tensor, batch_first: bool) -> Tensor:
    """`lengths` as int64 on their own device, when they are lengths of `padded`."""
    checks.instance("padded", padded, Tensor)
    if padded.dim() < 2:
        raise ValueError(f"padded: expected at least 2D, got {padded.dim()}D")
    steps, batch = padded.shape[:2] if not batch_first else (padded.size(1), padded.size(0))
    return checks.sequence_lengths(lengths, steps, [batch], on_any_device=True).long()


def _parts(jagged: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The values of a jagged tensor, [R, ...], and the first row and the length of every sequence, each [B] int64."""
    checks.instance("jagged", jagged, Tensor)
    if not jagged.is_nested or jagged.layout != torch.jagged or isinstance(jagged.shape[1], int):
        raise ValueError("jagged: expected a nested tensor [B, *, ...] with layout=torch.jagged")
    offsets = jagged.offsets().long()
    lengths = offsets.diff() if jagged.lengths() is None else jagged.lengths().long()
    return jagged.values(), offsets[: len(lengths)], lengths


def _places(lengths: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The sequence and the step of every row, one sequence after another, each [R] int64."""
    sequence, step = (torch.arange(steps, device=lengths.device) < lengths.unsqueeze(1)).nonzero(as_tuple=True)
    return sequence, step


class Stream:
    """Runs a long sequence in chunks, and hands the state of the layer on from each chunk to the next.

    The outputs equal those of one long run.

    Example::

        stream = fusedlstm.Stream(lstm)
        for chunk, begins in loader:  # [T, B, I], [T, B]
            loss = head(stream(chunk, resets=begins)).sum()
            loss.backward()  # through this chunk: truncated backpropagation through time

    Args:
        module: A layer of this package, or any module that is called as `module(input, hx, ...)` and returns its output
            and its state. It must have one direction, because a reverse direction would have to start at the end.
        detach: Whether gradients stop at the beginning of each chunk. If they do not, the graph grows until you call
            `detach()` yourself.

    Attributes:
        state: The state after the last chunk, as the module returns it. None means zeros.

    Raises:
        TypeError: `module` is not a module.
        ValueError: `module` is bidirectional.
    """

    def __init__(self, module: nn.Module, *, detach: bool = True) -> None:
        checks.instance("module", module, nn.Module)
        if getattr(module, "bidirectional", False):
            raise ValueError("module: expected one direction, got a bidirectional one, which begins with the end")
        self.module = module
        self.detaches = detach
        self.state: Tensor | tuple[Tensor, ...] | None = None

    def __call__(self, input: Tensor, **options: Any) -> Any:
        """Run the next chunk.

        Args:
            input: The chunk, as the module takes it.
            options: Further arguments of the module, such as `lengths` or `resets`.

        Returns:
            The output of the module. If the module returns more than output and state, a tuple of all but the state.
        """
        output, state, *more = self.module(input, self.state, **options)
        self.state = state
        if self.detaches:
            self.detach()
        return (output, *more) if more else output

    def __repr__(self) -> str:
        state = "at the beginning" if self.state is None else "carrying a state"
        return f"Stream({self.module!r}, detach={self.detaches}), {state}"

    def detach(self) -> None:
        """Stop gradients here: those of later chunks do not flow into earlier ones."""
        self._change(Tensor.detach)

    def reset(self, which: Tensor | None = None) -> None:
        """Set the state to zero, of all sequences or of some. To do so inside of a chunk, pass `resets` instead.

        Args:
            which: Which sequences begin anew, bool [B], or [1] or [] if the chunks have no batch axis. None is all.

        Raises:
            TypeError, ValueError: `which` is not a bool tensor of this shape.
        """
        if which is None:
            self.state = None
            return
        checks.instance("which", which, Tensor)
        if which.dtype != torch.bool:
            raise ValueError(f"which: expected torch.bool, got {which.dtype}")
        if self.state is None:
            return
        state = self.state if isinstance(self.state, Tensor) else self.state[0]
        batch = state.size(1) if state.dim() == 3 else 1
        if which.shape != (batch,) and (state.dim() == 3 or which.dim() > 0):
            raise ValueError(f"which: expected shape [{batch}], got {list(which.shape)}")
        which = which.to(state.device).reshape(-1, 1)
        self._change(lambda s: s.masked_fill(which, 0))

    def _change(self, f: Callable[[Tensor], Tensor]) -> None:
        """The state is a tensor, or a tuple of them."""
        if self.state is not None:
            self.state = f(self.state) if isinstance(self.state, Tensor) else tuple(map(f, self.state))
