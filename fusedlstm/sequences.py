"""A batch of sequences of different lengths in the three forms that PyTorch has for it, and the ways between them.

| form | what it is |
|---|---|
| padded | a tensor [T, B, ...] or [B, T, ...], and lengths [B]: what `lstm(input, lengths=lengths)` takes |
| packed | `torch.nn.utils.rnn.PackedSequence`: longest first, no sequence empty |
| jagged | a tensor of `torch.nested` with `layout=torch.jagged`, [B, *, ...]: sequence after sequence |

All ways are differentiable, and padding is zero. `torch` packs and pads; jagged tensors are made and read here, because
torch 2.13 pads one to the sum of its lengths, and pads none that has holes.
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
    sequence, step = (torch.arange(steps, device=lengths.device) < lengths.unsqueeze(1)).nonzero(as_tuple=True)
    return sequence, step


class Stream:
    """Carries the state of a layer from chunk to chunk, so that the chunks equal one long run.

    Example::

        stream = fusedlstm.Stream(lstm)
        for chunk, begins in loader:  # [T, B, I], [T, B]
            loss = head(stream(chunk, resets=begins)).sum()
            loss.backward()  # through this chunk: truncated backpropagation through time

    Args:
        module: a `fusedlstm.LSTM` or another of the family, or whatever is called as `module(input, hx, ...)` and
            returns its output first and its state next. In one direction: the reverse one would begin with what has not
            come yet.
        detach: whether gradients stop at the beginning of a chunk. If not, the graph grows until `detach()` is called.
    """

    def __init__(self, module: nn.Module, *, detach: bool = True) -> None:
        checks.instance("module", module, nn.Module)
        if getattr(module, "bidirectional", False):
            raise ValueError("module: expected one direction, got a bidirectional one, which begins with the end")
        self.module = module
        self.detaches = detach
        self.state: Tensor | tuple[Tensor, ...] | None = (
            None  # after the last chunk, as the module returns it; None is zeros
        )

    def __call__(self, input: Tensor, **options: Any) -> Any:
        """Run a chunk; `options` are those of the module. Returns what it returns, without the state."""
        output, state, *more = self.module(input, self.state, **options)
        self.state = state
        if self.detaches:
            self.detach()
        return (output, *more) if more else output

    def __repr__(self) -> str:
        state = "at the beginning" if self.state is None else "carrying a state"
        return f"Stream({self.module!r}, detach={self.detaches}), {state}"

    def detach(self) -> None:
        """Let no gradient flow further back than here."""
        self._change(Tensor.detach)

    def reset(self, which: Tensor | None = None) -> None:
        """Begin anew: all sequences, or those where `which` is true, [B] bool ([1] or [] without a batch axis).

        Inside a chunk, that is `resets=`.
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
