"""Tuples of tiles: a gate or a state is one tile [BLOCK_B, BLOCK_H], a cell has a tuple of them."""

import triton
import triton.language as tl


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
def as_float32(tiles_in, COUNT: tl.constexpr):
    tiles = ()
    for k in tl.static_range(COUNT):
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
    return as_float32(fetch_tuple(ptr, offs, mask, stride, COUNT), COUNT)


@triton.jit
def fetch_state(
    h_ptr,
    c_ptr,  # the states beside h: float32, `stride` elements from one to the next
    offs,  # [BLOCK_B, BLOCK_H]
    mask,  # [BLOCK_B, BLOCK_H]
    stride,
    S: tl.constexpr,
):
    """A state, h and S tiles beside it, as they are in memory."""
    state = fetch_tuple(h_ptr, offs, mask, 0, 1)
    if S > 0:
        state = state + fetch_tuple(c_ptr, offs, mask, stride, S)
    return state


@triton.jit
def load_state(
    h_ptr,
    c_ptr,
    offs,  # [BLOCK_B, BLOCK_H]
    mask,  # [BLOCK_B, BLOCK_H]
    stride,
    S: tl.constexpr,
):
    """A state, as float32."""
    return as_float32(fetch_state(h_ptr, c_ptr, offs, mask, stride, S), 1 + S)


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
def round_tuple(tiles_in, ptr, COUNT: tl.constexpr):
    """Tiles rounded to the type of `ptr`."""
    tiles = ()
    for k in tl.static_range(COUNT):
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
    COUNT: tl.constexpr,
):
    """Tile by tile, rows of `yes` where the condition holds and of `no` where not."""
    tiles = (tl.where(condition, yes[0], no[0]),)
    for k in tl.static_range(1, COUNT):
        tiles = tiles + (tl.where(condition, yes[k], no[k]),)
    return tiles


@triton.jit
def keep_units(
    tiles_in,
    mask_h,  # [BLOCK_H]
    COUNT: tl.constexpr,
):
    """Tile by tile, zero where there is no unit."""
    tiles = ()
    for k in tl.static_range(COUNT):
        tiles = tiles + (tl.where(mask_h[None, :], tiles_in[k], 0.0),)
    return tiles


@triton.jit
def add_tuple(a, b, COUNT: tl.constexpr):
    """Tile by tile, a + b; COUNT may be zero."""
    tiles = ()
    for k in tl.static_range(COUNT):
        tiles = tiles + (a[k] + b[k],)
    return tiles


@triton.jit
def clamp_tuple(tiles_in, limit, COUNT: tl.constexpr):
    """Tile by tile, kept within -limit and limit; NaN stays NaN."""
    tiles = (tl.clamp(tiles_in[0], -limit, limit, tl.PropagateNan.ALL),)
    for k in tl.static_range(1, COUNT):
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
