"""Where the steps of sequences of different lengths lie: the layout of `torch.nn.utils.rnn.PackedSequence`.

Sequences are sorted, longest first. Step t of sequence b is row `first_row[t] + b`, for the b that are that long: the rows
of a step lie together, and there are R = sum of all lengths of them.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor


class Packing(NamedTuple):
    """The two tables of a packed batch, on the device of its data. Its methods wait for no device."""

    lengths: Tensor  # [B] int32, descending, at least 1
    first_row: Tensor  # [T + 1] int64; the last is R

    @classmethod
    def of(cls, batch_sizes: Tensor, batch: int, device: torch.device) -> "Packing":
        """From the number of sequences at every step ([T] int64 on the CPU), of `batch` sequences in all."""
        first_row = torch.cat([batch_sizes.new_zeros(1), batch_sizes.cumsum(0)])
        # Sequence b has as many steps as have more than b sequences.
        lengths = (batch_sizes.unsqueeze(1) > torch.arange(batch)).sum(0, dtype=torch.int32)
        return cls(lengths.to(device, non_blocking=True), first_row.to(device, non_blocking=True))

    def positions(self, rows: int) -> tuple[Tensor, Tensor]:
        """Step and sequence of every row, each [R] int64."""
        row = torch.arange(rows, device=self.first_row.device)
        step = torch.searchsorted(self.first_row, row, right=True) - 1
        return step, row - self.first_row[step]

    def previous_rows(self, rows: int, direction: int) -> Tensor:
        """The row of the step before, for every row, [R] int64; a sequence's first step in that direction has R + b."""
        step, sequence = self.positions(rows)
        if direction == 0:
            begins, before = step == 0, step - 1
        else:
            begins, before = step + 1 == self.lengths[sequence], step + 1
        row = self.first_row[before.clamp_min(0)] + sequence
        return torch.where(begins, rows + sequence, row)


def begin_rows(packing: Packing | None, leading: tuple[int, ...], direction: int, device: torch.device) -> Tensor:
    """The row of every sequence's first step in a direction, [B] int64; `leading` is (T, B), or (R,) if packed.

    The other direction ends there.
    """
    if packing is None:
        T, B = leading
        return torch.arange(B, device=device) + (T - 1) * B * direction
    sequence = torch.arange(len(packing.lengths), device=device)
    return sequence if direction == 0 else packing.first_row[packing.lengths.long() - 1] + sequence


def spans(first_row: Tensor | None, leading: tuple[int, ...]) -> list[tuple[int, int]]:
    """First row and number of sequences of every step; `leading` is (T, B) if not packed. Waits for the device."""
    if first_row is None:
        T, B = leading
        return [(t * B, B) for t in range(T)]
    return [(row, later - row) for row, later in itertools.pairwise(first_row.tolist())]
