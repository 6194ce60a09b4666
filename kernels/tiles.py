"""Tiles and tuples of them: a gate or a state is one tile [BLOCK_B, BLOCK_H], and a cell has a tuple of these."""

from typing import NamedTuple

import triton
import triton.language as tl


class Units(NamedTuple):
    """The hidden units of a program."""

    head: object
    program: object  # its number among those of its head
    of_head: object  # [BLOCK_H] their numbers in the head
    offs: object  # [BLOCK_H] their numbers in the layer
    mask: object  # [BLOCK_H] which exist


class States(NamedTuple):
    """Where states lie: h in one tensor, and the states beside it in another."""

    h_ptr: object
    c_ptr: object
    offs: object  # [BLOCK_B, BLOCK_H]
    stride: object  # elements from one of the states beside h to the next


class Given(NamedTuple):
    """Gradients of the states of every step, as the caller gives them."""

    h_ptr: object
    offs_h: object  # [BLOCK_B, BLOCK_H]
    c_ptr: object
    offs_c: object  # [BLOCK_B, BLOCK_H]
    stride_c: object  # elements from one of the states beside h to the next
    mask: object  # [BLOCK_H] units of which there are any


@triton.jit
def units_of_program(GROUP: tl.constexpr, DH: tl.constexpr, BLOCK_H: tl.constexpr):
    """With GROUP programs a head, and BLOCK_H of its DH units a program."""
    head = tl.program_id(0) // GROUP
    program = tl.program_id(0) % GROUP
    of_head = program * BLOCK_H + tl.arange(0, BLOCK_H)
    return Units(head, program, of_head, head * DH + of_head, of_head < DH)


@triton.jit
def gate_columns(
    units,  # Units
    STRIDE: tl.constexpr,  # rows of a weight from one gate to the next
    G: tl.constexpr,
    G_PADDED: tl.constexpr,
    DH: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """The rows of a weight, which are columns of a product, that make a program's gates, and which of them exist, [N].

    Gate-major: column n is gate n // BLOCK_H of unit n % BLOCK_H.
    """
    column = tl.arange(0, G_PADDED * BLOCK_H)
    unit = units.program * BLOCK_H + column % BLOCK_H
    mask = (unit < DH) & (column // BLOCK_H < G)
    return column // BLOCK_H * STRIDE + units.head * DH + unit, mask


@triton.jit
def fetch_tuple(
    ptr,  # element (0, 0) of the first tile
    offs,  # [BLOCK_B, BLOCK_H]
    mask,  # [BLOCK_B, BLOCK_H]
    stride,  # elements from one tile to the next
    COUNT: tl.constexpr,
):
    """COUNT >= 1 tiles as they are in memory: nothing waits for them before they are used, `as_float32`."""
    tiles = (tl.load(ptr + offs, mask=mask, other=0.0),)
    for k in tl.static_range(1, COUNT):
        tiles = tiles + (tl.load(ptr + k * stride + offs, mask=mask, other=0.0),)
    return tiles


@triton.jit
def as_float32(tiles_in):
    tiles = ()
    for k in tl.static_range(len(tiles_in)):
        tiles = tiles + (tiles_in[k].to(tl.float32),)
    return tiles


@triton.jit
def load_tuple(
    ptr,  # element (0, 0) of the first tile
    offs,  # [BLOCK_B, BLOCK_H]
    mask,  # [BLOCK_B, BLOCK_H]
    stride,  # elements from one tile to the next
    COUNT: tl.constexpr,
):
    """COUNT >= 1 tiles, as float32."""
    return as_float32(fetch_tuple(ptr, offs, mask, stride, COUNT))


@triton.jit
def at_row(
    states,  # States
    row,
    H: tl.constexpr,
):
    """Where the states lie that begin with another row of H units."""
    return States(states.h_ptr + row * H, states.c_ptr + row * H, states.offs, states.stride)


@triton.jit
def fetch_state(
    states,  # States
    mask,  # [BLOCK_B, BLOCK_H]
    S: tl.constexpr,
):
    """A state, h and S tiles beside it, as they are in memory."""
    state = fetch_tuple(states.h_ptr, states.offs, mask, 0, 1)
    if S > 0:
        state = state + fetch_tuple(states.c_ptr, states.offs, mask, states.stride, S)
    return state


@triton.jit
def fetch_given(
    given,  # Given
    mask_b,  # [BLOCK_B]
    start_h,  # elements to the tile's first row
    start_c,
    S: tl.constexpr,
    HAS_C: tl.constexpr,
):
    """Gradients of h, and if there are any of the S states beside it, as they are in memory."""
    mask = mask_b[:, None] & given.mask[None, :]
    fetched = fetch_tuple(given.h_ptr + start_h, given.offs_h, mask, 0, 1)
    if HAS_C:
        fetched = fetched + fetch_tuple(given.c_ptr + start_c, given.offs_c, mask, given.stride_c, S)
    return fetched


@triton.jit
def load_state(
    states,  # States
    mask,  # [BLOCK_B, BLOCK_H]
    S: tl.constexpr,
):
    """A state, as float32."""
    return as_float32(fetch_state(states, mask, S))


@triton.jit
def store_state(
    states,  # States
    mask,  # [BLOCK_B, BLOCK_H]
    state,
    S: tl.constexpr,
):
    store_tuple(states.h_ptr, states.offs, mask, 0, state, 0, 1)
    store_tuple(states.c_ptr, states.offs, mask, states.stride, state, 1, S)


@triton.jit
def store_tuple(
    ptr,
    offs,  # [BLOCK_B, BLOCK_H]
    mask,  # [BLOCK_B, BLOCK_H]
    stride,
    tiles,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Tiles FIRST to FIRST + COUNT - 1, rounded to the type of `ptr`."""
    for k in tl.static_range(COUNT):
        tl.store(ptr + k * stride + offs, tiles[FIRST + k].to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def round_tuple(tiles_in, ptr):
    """Tiles rounded to the type of `ptr`."""
    tiles = ()
    for k in tl.static_range(len(tiles_in)):
        tiles = tiles + (tiles_in[k].to(ptr.dtype.element_ty),)
    return tiles


@triton.jit
def zero_tuple(COUNT: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr):
    """COUNT tiles of zeros, float32."""
    zero = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    tiles = (zero,)
    for _ in tl.static_range(1, COUNT):
        tiles = tiles + (zero,)
    return tiles


@triton.jit
def select_tuple(
    condition,  # [BLOCK_B, 1]
    yes,
    no,
):
    """Tile by tile, rows of `yes` where the condition holds and of `no` where not."""
    tiles = ()
    for k in tl.static_range(len(yes)):
        tiles = tiles + (tl.where(condition, yes[k], no[k]),)
    return tiles


@triton.jit
def mask_tuple(
    tiles_in,
    mask,  # [BLOCK_B, 1], or [1, BLOCK_H]
):
    """Tile by tile, zero where the mask does not hold."""
    tiles = ()
    for k in tl.static_range(len(tiles_in)):
        tiles = tiles + (tl.where(mask, tiles_in[k], 0.0),)
    return tiles


@triton.jit
def keep_units(
    tiles,
    mask_h,  # [BLOCK_H]
    SOME: tl.constexpr,  # whether there may be others
):
    """Tile by tile, zero where there is no unit: a cell may make anything of it, and zero weights times NaN are NaN."""
    if SOME:
        tiles = mask_tuple(tiles, mask_h[None, :])
    return tiles


@triton.jit
def add_tuple(a, b):
    """Tile by tile, a + b; as many as a has, of which those that b does not have stay."""
    tiles = ()
    for k in tl.static_range(len(a)):
        if k < len(b):
            tiles = tiles + (a[k] + b[k],)
        else:
            tiles = tiles + (a[k],)
    return tiles


@triton.jit
def clamp_tuple(tiles_in, limit):
    """Tile by tile, kept within -limit and limit; NaN stays NaN."""
    tiles = ()
    for k in tl.static_range(len(tiles_in)):
        tiles = tiles + (tl.clamp(tiles_in[k], -limit, limit, tl.PropagateNan.ALL),)
    return tiles


@triton.jit
def split_gates(
    acc,  # [BLOCK_B, GATES_PADDED * BLOCK_H], gate-major: column = gate * BLOCK_H + unit
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GATES_PADDED: tl.constexpr,
):
    """One tile a gate. Gate-major columns make the split a renaming of registers."""
    tl.static_assert(GATES_PADDED == 1 or GATES_PADDED == 2 or GATES_PADDED == 4, "gates: 1, 2 or up to 4")
    if GATES_PADDED == 1:
        gates = (acc,)
    elif GATES_PADDED == 2:
        gates = tl.split(tl.permute(tl.reshape(acc, (BLOCK_B, 2, BLOCK_H)), (0, 2, 1)))
    else:
        even, odd = tl.split(tl.permute(tl.reshape(acc, (BLOCK_B, 2, 2, BLOCK_H)), (0, 3, 1, 2)))
        gate_0, gate_2 = tl.split(even)
        gate_1, gate_3 = tl.split(odd)
        gates = (gate_0, gate_1, gate_2, gate_3)
    return gates
