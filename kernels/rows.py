"""Where the rows of a step lie, and which sequences have it; the layouts are told in `recurrence_fwd`."""

import triton
import triton.language as tl


@triton.jit
def packed_rows(
    first_row_ptr,  # [T+1]
    t,
    exists,  # whether t is a step
):
    """The first row of step t of a packed batch, and how many sequences have it; 0 and 0 if it does not exist."""
    first_row = tl.load(first_row_ptr + t, mask=exists, other=0)
    return first_row, tl.load(first_row_ptr + t + 1, mask=exists, other=0) - first_row


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
def load_resets(
    resets_ptr,  # [R]
    t,
    reverse,  # 1 in the reverse direction, else 0
    row,  # the first sequence of the tile
    offs_b,  # [BLOCK_B]
    B,
    steps,
    length,  # [BLOCK_B], if RAGGED
    mask_t,  # [BLOCK_B] sequences that have step t
    first_row,  # of step t, if PACKED, and of the step before it in the order of the direction
    prev_row,
    sequences_prev,  # that have the step before, if PACKED
    PACKED: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """Nonzero where the state that enters step t is cut, [BLOCK_B]: the reset stands at the later of the two steps."""
    if PACKED:
        reset_row = prev_row * reverse + first_row * (1 - reverse)
        mask = mask_t & ((row + offs_b < sequences_prev) | (reverse == 0))
    else:
        reset_row = (t + reverse) * B
        mask = mask_t & (t + reverse < steps)
        if RAGGED:
            mask = mask_t & (t + reverse < length)
    return tl.load(resets_ptr + reset_row + row + offs_b, mask=mask, other=0)
