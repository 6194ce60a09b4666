"""Which rows a step of a batch tile has, and where they lie.

A row is one step of one sequence; row (t, b) is t * B + b. Sequences may have lengths of their own, in two ways:

- RAGGED: in any order, zero among them. A row past its sequence's end is padding, and holds zeros.
- PACKED: longest first, none zero; row (t, b) is first_row[t] + b for the b that are that long: the layout of
  `torch.nn.utils.rnn.PackedSequence`. So which sequences have a step is a number, and not a mask.

A batch tile ends with its longest sequence. With RESETS a true at row (t, b) cuts its sequence between the steps t - 1
and t: the state that enters the later of them in the order of the direction is zero.

The recurrences of a launch are the directions of a layer, side by side in a row: direction 1 runs from the last step to
the first, in each sequence from its own last. Or, with STACK, they are the layers of a stack: all run forward, and
their rows lie one layer after another.
"""

from dataclasses import dataclass
from typing import NamedTuple

import triton
import triton.language as tl

from fusedlstm.kernels.tiles import States, add_tuple, as_float32, at_row, fetch_state, mask_tuple, select_tuple


@dataclass(frozen=True)
class RowLayout:
    """Which rows there are, and how they lie: one compile-time value of a kernel."""

    PACKED: bool
    RAGGED: bool
    RESETS: bool
    STACK: bool

    @property
    def UNEVEN(self) -> bool:
        """Whether sequences have lengths of their own."""
        return self.PACKED or self.RAGGED


class Batch(NamedTuple):
    """The sizes of a launch, and the tables that tell of its rows."""

    T: object
    B: object
    D: object
    R: object
    lengths_ptr: object  # [B]
    first_row_ptr: object  # [T+1]
    resets_ptr: object  # [R]


class Recurrence(NamedTuple):
    """A direction of a layer, or a layer of a stack, and where its rows lie among those of the others."""

    number: object  # int64
    reverse: object  # int64: 1 in the reverse direction, else 0
    side_by_side: object  # recurrences in a row
    first: object  # int64: where its own first row is


class Tile(NamedTuple):
    """The sequences of a batch tile."""

    first: object  # int64: the number of the first of them
    offs: object  # [BLOCK_B] the others, counted from it
    mask: object  # [BLOCK_B] which exist
    length: object  # [BLOCK_B] int32: steps of each, if RAGGED
    steps: object  # of the longest


class Rows(NamedTuple):
    """The rows of a tile at one step."""

    t: object
    first: object  # int64: row (t, 0)
    sequences: object  # int64: how many of all sequences have the step, if PACKED
    mask: object  # [BLOCK_B] which of the tile's have it
    stored: object  # [BLOCK_B] which are written: those, and if RAGGED the padding too
    reset: object  # [BLOCK_B] nonzero where the state that enters is cut, if RESETS
    start: object  # int64: where they begin among the rows of all recurrences


@triton.jit
def recurrence_of(
    number,  # int64
    batch,  # Batch
    LAYOUT: tl.constexpr,  # `RowLayout`
):
    if LAYOUT.STACK:
        recurrence = Recurrence(number, number * 0, 1, number * batch.R)
    else:
        recurrence = Recurrence(number, number, batch.D, number)
    return recurrence


@triton.jit
def batch_tile(
    number,  # int64
    batch,  # Batch
    BLOCK_B: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    first = number * BLOCK_B
    offs = tl.arange(0, BLOCK_B)
    mask = first + offs < batch.B
    length = 0
    if LAYOUT.PACKED:
        steps = tl.load(batch.lengths_ptr + first)
    elif LAYOUT.RAGGED:
        length = load_lengths(batch.lengths_ptr, first + offs, mask, batch.T)
        steps = tl.max(length)
    else:
        steps = batch.T
    return Tile(first, offs, mask, length, steps)


@triton.jit
def load_lengths(
    lengths_ptr,  # [B]
    offs,
    mask,
    T,
):
    """Steps of the sequences at `offs`, int32, none without `mask`. What is out of range is taken for 0 or T."""
    length = tl.load(lengths_ptr + offs, mask=mask, other=0)
    return tl.minimum(tl.maximum(length, 0), T).to(tl.int32)


@triton.jit
def no_rows(
    tile,  # Tile
    LAYOUT: tl.constexpr,
):
    """What comes before the first step."""
    zero = tl.full((), 0, tl.int64)
    none = tile.offs < 0
    reset = 0
    if LAYOUT.RESETS:
        reset = none.to(tl.int8)
    return Rows(zero, zero, zero, none, none, reset, zero)


@triton.jit
def forward_rows(
    step,
    tile,  # Tile
    recurrence,  # Recurrence
    batch,  # Batch
    LAYOUT: tl.constexpr,
):
    """The rows of a step, counted in the order of the direction."""
    t = step + recurrence.reverse * (tile.steps - 1 - 2 * step)
    first, sequences = _first_row(t, True, batch, LAYOUT)
    return _rows(t, True, first, sequences, tile, recurrence, LAYOUT)


@triton.jit
def last_rows(
    tile,  # Tile
    recurrence,  # Recurrence
    batch,  # Batch
    LAYOUT: tl.constexpr,
):
    """The rows of the last step in the order of the direction."""
    t = tl.maximum(tile.steps - 1, 0) * (1 - recurrence.reverse)
    first, sequences = _first_row(t, True, batch, LAYOUT)
    return _rows(t, True, first, sequences, tile, recurrence, LAYOUT)


@triton.jit
def backward_rows(
    step,
    rows,  # Rows, as the call for the step after this one in the order of the direction left them
    tile,  # Tile
    recurrence,  # Recurrence
    batch,  # Batch
    LAYOUT: tl.constexpr,
):
    """The rows of a step, counted from the last in the order of the direction, and those of the step before it.

    There are none at `step == tile.steps`, nor before the first step.
    """
    t = tile.steps - 1 - step - recurrence.reverse * (tile.steps - 1 - 2 * step)
    t_before = t - 1 + 2 * recurrence.reverse
    rows = _rows(t, step < tile.steps, rows.first, rows.sequences, tile, recurrence, LAYOUT)
    exists = (t_before >= 0) & (t_before < batch.T)
    first, sequences = _first_row(t_before, exists, batch, LAYOUT)
    before = _rows(t_before, t_before >= 0, first, sequences, tile, recurrence, LAYOUT)
    return rows, before


@triton.jit
def _first_row(
    t,
    exists,  # whether t is a step
    batch,  # Batch
    LAYOUT: tl.constexpr,
):
    """Row (t, 0); and if PACKED, how many sequences have the step, 0 if it does not exist."""
    sequences = tl.full((), 0, tl.int64)
    if LAYOUT.PACKED:
        first = tl.load(batch.first_row_ptr + t, mask=exists, other=0)
        sequences = tl.load(batch.first_row_ptr + t + 1, mask=exists, other=0) - first
    else:
        first = t * batch.B
    return first, sequences


@triton.jit
def _rows(t, exists, first, sequences, tile, recurrence, LAYOUT: tl.constexpr):
    """Rows, without resets; none unless the step exists."""
    if LAYOUT.PACKED:
        mask = tile.first + tile.offs < sequences
        stored = mask
    else:
        stored = tile.mask & exists
        mask = stored
        if LAYOUT.RAGGED:
            mask = (t < tile.length) & exists
    start = (first + tile.first) * recurrence.side_by_side + recurrence.first
    return Rows(t, first, sequences, mask, stored, 0, start)


@triton.jit
def with_resets(
    rows,  # Rows
    before,  # Rows of the step before
    tile,  # Tile
    recurrence,  # Recurrence
    batch,  # Batch
    LAYOUT: tl.constexpr,
):
    """The same rows, with resets. A reset stands at the later of the two steps that it separates."""
    reset = 0
    if LAYOUT.RESETS:
        reverse = recurrence.reverse
        if LAYOUT.PACKED:
            row = before.first * reverse + rows.first * (1 - reverse)
            mask = rows.mask & ((tile.first + tile.offs < before.sequences) | (reverse == 0))
        else:
            row = (rows.t + reverse) * batch.B
            ends = tile.length if LAYOUT.RAGGED else tile.steps
            mask = rows.mask & (rows.t + reverse < ends)
        reset = tl.load(batch.resets_ptr + row + tile.first + tile.offs, mask=mask, other=0)
    return Rows(rows.t, rows.first, rows.sequences, rows.mask, rows.stored, reset, rows.start)


@triton.jit
def beginnings(
    step,
    rows,  # Rows
    before,  # Rows of the step before
    tile,  # Tile
    recurrence,  # Recurrence
    LAYOUT: tl.constexpr,
):
    """Of which sequences this is the first step in the order of the direction, [BLOCK_B]."""
    if LAYOUT.PACKED:
        begins = tile.first + tile.offs >= before.sequences
    else:
        begins = tl.zeros_like(tile.offs) + step == 0
        if LAYOUT.RAGGED:
            begins = begins | ((rows.t + 1 == tile.length) & (recurrence.reverse == 1))
    return begins


@triton.jit
def strided_start(
    rows,  # Rows
    tile,  # Tile
    rows_t,  # rows from a step to the next, if not PACKED
    rows_b,  # rows from a sequence to the next
    LAYOUT: tl.constexpr,
):
    """Where the rows begin in a tensor that has strides of its own."""
    if LAYOUT.PACKED:
        start = (rows.first + tile.first) * rows_b
    else:
        start = rows.t * rows_t + tile.first * rows_b
    return start


@triton.jit
def start_later(
    rows,  # Rows
    steps,  # int64: from t on, or back if less than zero
    tile,  # Tile
    recurrence,  # Recurrence
    batch,  # Batch
):
    """About where the rows of another step lie among those of all recurrences, [BLOCK_B]; always a row that exists."""
    row = rows.first + tile.first + tile.offs + steps * batch.B
    row = tl.minimum(tl.maximum(row, 0), batch.R - 1)
    return row * recurrence.side_by_side + recurrence.first


@triton.jit
def cut(
    tiles,
    rows,  # Rows
    LAYOUT: tl.constexpr,
):
    """Tile by tile, zero where a reset cuts the state that enters these rows."""
    if LAYOUT.RESETS:
        tiles = mask_tuple(tiles, rows.reset[:, None] == 0)
    return tiles


@triton.jit
def unless_ended(
    tiles,
    ended,  # tiles
    mask,  # [BLOCK_B]
    SOME: tl.constexpr,  # whether there may be others
):
    """Tile by tile, rows of `tiles` where the mask holds, and of `ended` elsewhere."""
    if SOME:
        tiles = select_tuple(mask[:, None], tiles, ended)
    return tiles


@triton.jit
def zero_padding(
    tiles,
    rows,  # Rows
    LAYOUT: tl.constexpr,
):
    """Tile by tile, zero where a sequence has no such step."""
    if LAYOUT.RAGGED:
        tiles = mask_tuple(tiles, rows.mask[:, None])
    return tiles


@triton.jit
def fetch_before(
    step,  # as of `backward_rows`
    rows,  # Rows
    before,  # Rows of the step before
    saved,  # States of all steps
    initial,  # States before the first, of this tile
    units,  # Units
    tile,  # Tile
    recurrence,  # Recurrence
    H: tl.constexpr,
    S: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """The state that enters a step, as it is in memory; `as_one_state` makes a state of it.

    If UNEVEN, two tuples of tiles, which are zero in each other's rows: each sequence begins at a step of its own, and
    what is saved of the step before is also the last state of sequences that end there.
    """
    mask_h = units.mask[None, :]
    saved = at_row(saved, before.start, H)
    if LAYOUT.UNEVEN:
        fetched = fetch_state(saved, before.mask[:, None] & mask_h, S)
        fetched = fetched + fetch_state(initial, (rows.mask & ~before.mask)[:, None] & mask_h, S)
    else:
        begins = step == tile.steps - 1
        h_ptr = tl.where(begins, initial.h_ptr, saved.h_ptr)
        c_ptr = tl.where(begins, initial.c_ptr, saved.c_ptr)
        offs = tile.offs[:, None] * tl.where(begins, H, recurrence.side_by_side * H) + units.offs[None, :]
        stride = tl.where(begins, initial.stride, saved.stride)
        fetched = fetch_state(States(h_ptr, c_ptr, offs, stride), rows.mask[:, None] & mask_h, S)
    return fetched


@triton.jit
def as_one_state(fetched, S: tl.constexpr, LAYOUT: tl.constexpr):
    """What `fetch_before` fetched, as float32."""
    state = as_float32(fetched[: 1 + S])
    if LAYOUT.UNEVEN:
        state = add_tuple(state, as_float32(fetched[1 + S :]))
    return state
