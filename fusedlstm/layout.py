"""Where the steps of a batch of sequences lie, and where a state begins anew.

A row is one step of one sequence. Sequence tensors are matrices of rows:

| layout | row (t, b) | |
|---|---|---|
| dense | t * B + b | all sequences have T steps |
| ragged | t * B + b | sequence b has `lengths[b]` steps, and then padding |
| packed | first_row[t] + b | as in `torch.nn.utils.rnn.PackedSequence`: longest first, no padding, R rows in all |

A length beyond 0 to T counts as the nearer of the two. In every layout a reset at row (t, b) cuts sequence b between
the steps t - 1 and t: the state that enters the later of the two, in the order of the direction, is zero. A reset in
the padding is none.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from fusedlstm import transforms


class Layout(NamedTuple):
    """Its tables lie on the device of the data. Its methods wait for no device."""

    lengths: Tensor | None = None  # [B] int32, if ragged or packed; ragged also int64
    first_row: Tensor | None = None  # [T + 1] int64 if packed; the last is R
    resets: Tensor | None = None  # bool, [T, B] or packed [R]

    @classmethod
    def of_packed(
        cls,
        batch_sizes: Tensor,  # [T] int64 on the CPU
        batch: int,
        device: torch.device,
        resets: Tensor | None = None,  # [R] bool
    ) -> "Layout":
        """From the number of sequences at every step, of `batch` sequences in all."""
        first_row = torch.cat([batch_sizes.new_zeros(1), batch_sizes.cumsum(0)])
        # Sequence b has as many steps as have more than b sequences.
        fewer = torch.searchsorted(batch_sizes.flip(0), torch.arange(batch, device=batch_sizes.device), right=True)
        lengths = (len(batch_sizes) - fewer).int()
        return cls(lengths.to(device, non_blocking=True), first_row.to(device, non_blocking=True), resets)

    @property
    def name(self) -> str:
        """Of `fusedlstm.plan.LAYOUTS`: resets need what lengths need."""
        if self.first_row is not None:
            return "packed"
        return "dense" if self.lengths is None and self.resets is None else "ragged"

    def of_steps(self, begin: int, end: int) -> "Layout":
        """Of a dense or ragged batch the steps from `begin` to before `end`, as a batch of its own."""
        lengths, resets = self.lengths, self.resets
        return Layout(
            None if lengths is None else (lengths - begin).clamp(0, end - begin),
            None,
            None if resets is None else resets[begin:end],
        )

    def begin_rows(self, leading: tuple[int, ...], direction: int, device: torch.device) -> Tensor:
        """The row of every sequence's first step in a direction, [B] int64; `leading` is (T, B), or (R,) if packed.

        The other direction ends there. A sequence without steps gets row (0, b).
        """
        if self.first_row is not None:
            sequence = torch.arange(len(self.lengths), device=device)
            return sequence if direction == 0 else self.first_row[self.lengths.long() - 1] + sequence
        T, B = leading
        sequence = torch.arange(B, device=device)
        if direction == 0:
            return sequence
        last = T - 1 if self.lengths is None else (self.lengths.long() - 1).clamp(0, T - 1)
        return sequence + last * B

    def drops_hx(self, leading: tuple[int, ...], direction: int) -> Tensor | None:
        """Whether a reset at the very beginning drops the initial state, [B] bool; None: nowhere."""
        if self.resets is None or direction == 1:
            return None
        return self.resets[: len(self.lengths)] if self.first_row is not None else self.resets[0]

    def states_before(self, seq: Tensor, initial: Tensor, direction: int) -> Tensor:
        """The state that entered every row, [R, H], from those of all rows, [T, B, H] or [R, H], and `initial` [B, H].

        Rows of padding get values of no meaning.
        """
        if self.first_row is not None:
            previous, begins = self._previous_rows(len(seq), direction)
            before = torch.cat([seq, initial])[previous]
            cut = self.resets
            if cut is not None and direction == 1:
                cut = cut[previous.clamp_max(len(seq) - 1)] & ~begins
        elif direction == 0:
            before, cut = torch.cat([initial.unsqueeze(0), seq[:-1]]), self.resets
        else:
            before, cut = torch.cat([seq[1:], initial.unsqueeze(0)]), self.resets
            if self.lengths is not None:
                before.flatten(0, 1)[self.begin_rows(seq.shape[:2], 1, seq.device)] = initial.to(before.dtype)
            if cut is not None:
                cut = torch.cat([cut[1:], torch.zeros_like(cut[:1])])
                if self.lengths is not None:
                    step = torch.arange(1, len(cut) + 1, device=cut.device).unsqueeze(1)
                    cut = cut & (step < self.lengths)
        return before.flatten(0, -2) if cut is None else before.masked_fill_(cut.unsqueeze(-1), 0).flatten(0, -2)

    def positions(self, rows: int) -> tuple[Tensor, Tensor]:
        """Step and sequence of every packed row, each [R] int64."""
        row = torch.arange(rows, device=self.first_row.device)
        step = torch.searchsorted(self.first_row, row, right=True) - 1
        return step, row - self.first_row[step]

    def _previous_rows(self, rows: int, direction: int) -> tuple[Tensor, Tensor]:
        """Of every packed row, that of the step before and whether there is none; R + b then. Each [R]."""
        step, sequence = self.positions(rows)
        if direction == 0:
            begins, before = step == 0, step - 1
        else:
            begins, before = step + 1 == self.lengths[sequence], step + 1
        row = self.first_row[before.clamp_min(0)] + sequence
        return torch.where(begins, rows + sequence, row), begins


DENSE = Layout()


class Pieces(NamedTuple):
    """A batch with lengths and resets as a packed batch of its uncut pieces, longest first.

    A sequence cut into two is two sequences, of which one begins with hx and the other with zeros. So what serves
    packed batches serves these. Waits for the device of lengths and resets.
    """

    batch_sizes: Tensor  # [steps of the longest piece] int64 on the CPU
    rows: Tensor  # [R] int64: of every packed row, the row in the batch
    enters: tuple[
        Tensor, Tensor
    ]  # a direction, [pieces] int64: the sequence whose initial state it gets, or B for zeros
    leaves: tuple[Tensor, Tensor]  # a direction, [B] int64: the piece whose final state is its, or pieces + b for hx

    @classmethod
    def of(cls, layout: Layout, leading: tuple[int, ...], device: torch.device) -> "Pieces":
        """`leading` is (T, B), or (R,) if packed."""
        transforms.not_captured("lengths and resets", device, "a loop of torch operations, which looks at their values")
        if layout.first_row is not None:
            B, T = len(layout.lengths), len(layout.first_row) - 1
            first_row, resets = layout.first_row, torch.zeros(T, B, dtype=torch.bool, device=device)
            step, sequence = layout.positions(leading[0])
            resets[step, sequence] = layout.resets
        else:
            (T, B), resets = leading, layout.resets
            first_row = torch.arange(T, device=device) * B
        lengths = torch.full((B,), T, device=device) if layout.lengths is None else layout.lengths.long().clamp(0, T)
        step = torch.arange(T, device=device).unsqueeze(1)
        begins = step == 0 if resets is None else resets | (step == 0)
        begins = begins & (step < lengths)  # [T, B]

        sequence, start = begins.t().nonzero(as_tuple=True)  # of every piece, sequence by sequence
        is_first = start == 0
        is_last = torch.ones_like(is_first)
        is_last[:-1] = is_first[1:]
        end = torch.where(is_last, lengths[sequence], torch.cat([start[1:], start[:1]]))
        length, order = torch.sort(end - start, descending=True, stable=True)
        sequence, start, is_first, is_last = (x[order] for x in (sequence, start, is_first, is_last))

        pieces = len(length)
        longest = int(length[0]) if pieces else 0
        ascending = length.flip(0).contiguous()
        batch_sizes = pieces - torch.searchsorted(ascending, torch.arange(longest, device=device), right=True)
        step = torch.repeat_interleave(torch.arange(longest, device=device), batch_sizes)
        piece = torch.arange(len(step), device=device) - (batch_sizes.cumsum(0) - batch_sizes)[step]
        rows = first_row[start[piece] + step] + sequence[piece]

        takes_hx = is_first if resets is None else is_first & ~resets[0, sequence]
        enters = torch.where(takes_hx, sequence, B), torch.where(is_last, sequence, B)
        leaves = []
        for ends in (is_last, is_first):
            found = torch.arange(pieces, pieces + B, device=device)
            found[sequence[ends]] = ends.nonzero()[:, 0]
            leaves.append(found)
        return cls(batch_sizes.cpu(), rows, enters, tuple(leaves))

    def gather(self, seq: Tensor) -> Tensor:
        """From [rows of the batch, features] to [R, features]."""
        return take_rows(seq, self.rows)

    def scatter(self, seq: Tensor, rows: int) -> Tensor:
        """From [R, features] to [rows, features], with zeros in the padding."""
        return put_rows(seq, self.rows, rows)

    def enter(self, state: Tensor, direction: int) -> Tensor:
        """The initial states of the pieces, [pieces, H], from those of the sequences, [B, H]."""
        return torch.cat([state, state.new_zeros(1, state.size(1))]).index_select(0, self.enters[direction])

    def leave(self, state: Tensor, initial: Tensor, direction: int) -> Tensor:
        """The final states of the sequences, [B, H], from those of the pieces, [pieces, H]; `initial` where there is
        none.
        """
        return torch.cat([state, initial]).index_select(0, self.leaves[direction])


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of `x`, none of them twice: so the gradient is a copy, and not a sum as that of an index is."""
    return transforms.apply(_Take, x, rows)


def put_rows(x: Tensor, rows: Tensor, size: int) -> Tensor:
    """The reverse: into zeros of `size` rows."""
    return x.new_zeros(size, *x.shape[1:]).index_copy_(0, rows, x)


class _Take(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, rows):
        return x.index_select(0, rows)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, rows = inputs
        ctx.save_for_backward(rows)
        ctx.save_for_forward(rows)
        ctx.size = len(x)

    @staticmethod
    def backward(ctx, grad):
        # By an operation of torch: what is_grads_batched makes of a function of ours loses its second derivatives.
        return put_rows(grad, *ctx.saved_tensors, ctx.size), None

    @staticmethod
    def tangents(ctx, tangent, _):
        return tangent.index_select(0, *ctx.saved_tensors)


def spans(first_row: Tensor | None, leading: tuple[int, ...]) -> list[tuple[int, int]]:
    """First row and number of sequences of every step; `leading` is (T, B) if not packed. Waits for the device."""
    if first_row is None:
        T, B = leading
        return [(t * B, B) for t in range(T)]
    transforms.not_captured("input", first_row.device, "a packed batch for a loop of torch operations")
    return [(row, later - row) for row, later in itertools.pairwise(first_row.tolist())]
