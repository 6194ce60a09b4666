"""The recurrent product of one step, acc[BLOCK_B, N] = x[BLOCK_B, K] @ w[K, N], in chunks of the reduction axis K.

x is what the group exchanges (h forward, the gradients of the preactivations backward); w is the program's slice of
`weight_hh`. K falls into segments of SEGMENT each, which lie SEGMENT_STRIDE apart in a row of x and in the rows of w:
one segment is all of K, or one a gate where a program's reduction is a part of every gate. No chunk of BLOCK_K crosses
a segment's end.

Two places for w: `RESIDENT`, loaded once into a tuple of tiles that stays on chip for all steps, or streamed from L2.

Three forms of the dot. Plain, x @ w. `TRANSPOSED`, (w^T @ x^T)^T, which gives the matrix unit its 64 rows when the
batch tile has fewer. And in SPLIT parts of every chunk, a warp each, whose sums are added at the end: a small tile has
too few columns for all warps, and one warp's products of a long reduction wait for each other.

The kernels of one step have no group and read both factors once: for them `add_product` streams both, in chunks of
BLOCK_K. Plain or TRANSPOSED as above, and for a single row, BLOCK_B == 1, without a matrix unit: products are summed in
float32 where they lie, element by element of a chunk, and once across the chunk at the end, so that a thread has many
loads on their way.
"""

from dataclasses import dataclass
from typing import NamedTuple

import triton
import triton.language as tl


@dataclass(frozen=True)
class Dot:
    """The shape of one product and how it is taken: one compile-time value of a kernel."""

    N: int
    K: int
    SEGMENT: int
    SEGMENT_STRIDE: int
    STRIDE_K: int  # elements from one row of w to the next
    BLOCK_B: int
    BLOCK_K: int
    RESIDENT: bool
    TRANSPOSED: bool
    SPLIT: int  # 1 unless RESIDENT
    AHEAD: int  # chunks of x that are loaded at once, if RESIDENT
    PRECISION: str  # of float32: "tf32" or "ieee"
    STAGES: int  # of the streamed loop

    @property
    def CHUNKS_OF_SEGMENT(self) -> int:
        return -(-self.SEGMENT // self.BLOCK_K)

    @property
    def CHUNKS(self) -> int:
        return self.K // self.SEGMENT * self.CHUNKS_OF_SEGMENT

    @property
    def PART(self) -> int:
        """Elements of a chunk that one of its SPLIT parts has."""
        return self.BLOCK_K // self.SPLIT

    @property
    def WHOLE(self) -> bool:
        """Whether every chunk is full, so that nothing of K needs a mask."""
        return self.SEGMENT % self.BLOCK_K == 0


@dataclass(frozen=True)
class StreamedDot:
    """The same of a product of one step, whose reductions are told apart from it."""

    N: int
    BLOCK_B: int
    BLOCK_K: int
    TRANSPOSED: bool
    PRECISION: str
    STAGES: int


class Weight(NamedTuple):
    """A program's columns of a recurrent weight."""

    tiles: tuple  # resident, one a chunk; else none
    ptr: object  # row 0
    offs: object  # [N] element offsets of the columns
    mask: object  # [N] columns that exist


@triton.jit
def _chunk(q, DOT: tl.constexpr):
    """Where chunk q begins, and how many elements are left of its segment from there."""
    start = q % DOT.CHUNKS_OF_SEGMENT * DOT.BLOCK_K
    return q // DOT.CHUNKS_OF_SEGMENT * DOT.SEGMENT_STRIDE + start, DOT.SEGMENT - start


@triton.jit
def _parts_of_k(DOT: tl.constexpr):
    """The elements of a chunk by parts, [SPLIT, PART]."""
    return tl.arange(0, DOT.SPLIT)[:, None] * DOT.PART + tl.arange(0, DOT.PART)[None, :]


@triton.jit
def _weight_tile(
    w,  # Weight
    q,
    DOT: tl.constexpr,
):
    """Chunk q of w: [BLOCK_K, N], or [N, BLOCK_K] if TRANSPOSED, or [SPLIT, PART, N]."""
    start, left = _chunk(q, DOT)
    chunk_ptr = w.ptr + start * DOT.STRIDE_K
    if DOT.SPLIT > 1:
        k = _parts_of_k(DOT)[:, :, None]
        offs, mask = w.offs[None, None, :], w.mask[None, None, :]
    elif DOT.TRANSPOSED:
        k = tl.arange(0, DOT.BLOCK_K)[None, :]
        offs, mask = w.offs[:, None], w.mask[:, None]
    else:
        k = tl.arange(0, DOT.BLOCK_K)[:, None]
        offs, mask = w.offs[None, :], w.mask[None, :]
    if not DOT.WHOLE:
        mask = mask & (k < left)
    return tl.load(chunk_ptr + offs + k * DOT.STRIDE_K, mask=mask, other=0.0)


@triton.jit
def resident_weight(
    ptr,
    offs,  # [N]
    mask,  # [N]
    DOT: tl.constexpr,
):
    """A Weight, with all chunks as tiles if RESIDENT."""
    w = Weight((), ptr, offs, mask)
    CHUNKS: tl.constexpr = DOT.CHUNKS
    tiles = ()
    if DOT.RESIDENT:
        for q in tl.static_range(CHUNKS):
            tiles = tiles + (_weight_tile(w, q, DOT),)
    return Weight(tiles, ptr, offs, mask)


@triton.jit
def exchanged_tile(
    p_x,  # [BLOCK_B] pointers to the rows of x
    mask_b,  # [BLOCK_B]
    q,
    DOT: tl.constexpr,
):
    """Chunk q of x: [BLOCK_B, BLOCK_K], or [BLOCK_K, BLOCK_B] if TRANSPOSED, or [SPLIT, BLOCK_B, PART]."""
    start, left = _chunk(q, DOT)
    if DOT.SPLIT > 1:
        k = _parts_of_k(DOT)[:, None, :]
        p, mask = p_x[None, :, None], mask_b[None, :, None]
    elif DOT.TRANSPOSED:
        k = tl.arange(0, DOT.BLOCK_K)[:, None]
        p, mask = p_x[None, :], mask_b[None, :]
    else:
        k = tl.arange(0, DOT.BLOCK_K)[None, :]
        p, mask = p_x[:, None], mask_b[:, None]
    if not DOT.WHOLE:
        mask = mask & (k < left)
    # .cg: other programs wrote it, and the first-level cache is not coherent.
    return tl.load(p + (start + k), mask=mask, other=0, cache_modifier=".cg")


@triton.jit
def exchanged_tiles(
    p_x,  # [BLOCK_B] pointers to the rows of x
    mask_b,  # [BLOCK_B]
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    DOT: tl.constexpr,
):
    """At most COUNT chunks of x from the FIRST on, all under way at once."""
    x = ()
    for q in tl.static_range(FIRST, FIRST + COUNT):
        if q < DOT.CHUNKS:
            x = x + (exchanged_tile(p_x, mask_b, q, DOT),)
    return x


@triton.jit
def no_tiles(DTYPE: tl.constexpr, DOT: tl.constexpr):
    """Zeros in the form of all chunks of x."""
    CHUNKS: tl.constexpr = DOT.CHUNKS
    BLOCK_B: tl.constexpr = DOT.BLOCK_B
    BLOCK_K: tl.constexpr = DOT.BLOCK_K
    SPLIT: tl.constexpr = DOT.SPLIT
    PART: tl.constexpr = DOT.PART
    x = ()
    for _ in tl.static_range(CHUNKS):
        if SPLIT > 1:
            x = x + (tl.zeros((SPLIT, BLOCK_B, PART), DTYPE),)
        elif DOT.TRANSPOSED:
            x = x + (tl.zeros((BLOCK_K, BLOCK_B), DTYPE),)
        else:
            x = x + (tl.zeros((BLOCK_B, BLOCK_K), DTYPE),)
    return x


@triton.jit
def _dot(x, w, acc, DOT: tl.constexpr):
    if DOT.TRANSPOSED:
        acc = tl.dot(w, x, acc, input_precision=DOT.PRECISION)
    else:
        acc = tl.dot(x, w, acc, input_precision=DOT.PRECISION)
    return acc


@triton.jit
def _zeros(DOT: tl.constexpr):
    BLOCK_B: tl.constexpr = DOT.BLOCK_B
    N: tl.constexpr = DOT.N
    SPLIT: tl.constexpr = DOT.SPLIT
    if SPLIT > 1:
        acc = tl.zeros((SPLIT, BLOCK_B, N), tl.float32)
    elif DOT.TRANSPOSED:
        acc = tl.zeros((N, BLOCK_B), tl.float32)
    else:
        acc = tl.zeros((BLOCK_B, N), tl.float32)
    return acc


@triton.jit
def _sum_of_parts(acc, DOT: tl.constexpr):
    """[SPLIT, BLOCK_B, N] to [BLOCK_B, N], by halves. A sum over the axis would leave every warp a copy of all sums."""
    B: tl.constexpr = DOT.BLOCK_B
    N: tl.constexpr = DOT.N
    tl.static_assert(DOT.SPLIT == 2 or DOT.SPLIT == 4 or DOT.SPLIT == 8, "parts of a chunk: 1, 2, 4 or 8")
    if DOT.SPLIT == 8:
        a, b = tl.split(tl.permute(tl.reshape(acc, (2, 2, 2, B, N)), (3, 4, 1, 2, 0)))
        a, b = tl.split(tl.permute(a + b, (0, 1, 3, 2)))
        a, b = tl.split(a + b)
    elif DOT.SPLIT == 4:
        a, b = tl.split(tl.permute(tl.reshape(acc, (2, 2, B, N)), (2, 3, 1, 0)))
        a, b = tl.split(a + b)
    else:
        a, b = tl.split(tl.permute(acc, (1, 2, 0)))
    return a + b


@triton.jit
def _finished(acc, DOT: tl.constexpr):
    """[BLOCK_B, N] of what `_zeros` began."""
    if DOT.SPLIT > 1:
        acc = _sum_of_parts(acc, DOT)
    elif DOT.TRANSPOSED:
        acc = tl.trans(acc)
    return acc


@triton.jit
def product_of_tiles(
    x,  # tuple of tiles, one a chunk
    w,  # Weight, resident
    DOT: tl.constexpr,
):
    """x lies in registers, in the form of `exchanged_tile`. Returns [BLOCK_B, N] float32."""
    CHUNKS: tl.constexpr = DOT.CHUNKS
    acc = _zeros(DOT)
    for q in tl.static_range(CHUNKS):
        acc = _dot(x[q], w.tiles[q], acc, DOT)
    return _finished(acc, DOT)


@triton.jit
def exchanged_product(
    p_x,  # [BLOCK_B] pointers to the rows of x
    mask_b,  # [BLOCK_B]
    w,  # Weight
    DOT: tl.constexpr,
):
    """x comes from global memory, where the whole group wrote it. Returns [BLOCK_B, N] float32."""
    CHUNKS: tl.constexpr = DOT.CHUNKS
    AHEAD: tl.constexpr = DOT.AHEAD
    STAGES: tl.constexpr = DOT.STAGES
    acc = _zeros(DOT)
    if DOT.RESIDENT:
        for first in tl.static_range(0, CHUNKS, AHEAD):
            x = exchanged_tiles(p_x, mask_b, first, AHEAD, DOT)
            for q in tl.static_range(len(x)):
                acc = _dot(x[q], w.tiles[first + q], acc, DOT)
    else:
        for q in tl.range(0, CHUNKS, num_stages=STAGES):
            acc = _dot(exchanged_tile(p_x, mask_b, q, DOT), _weight_tile(w, q, DOT), acc, DOT)
    return _finished(acc, DOT)


@triton.jit
def local_product(
    x,  # tuple of tiles [BLOCK_B, BLOCK_K], one a chunk
    w,  # Weight, resident
    DOT: tl.constexpr,
):
    """x is what this program made itself: the group is this one program. Returns [BLOCK_B, N] float32."""
    CHUNKS: tl.constexpr = DOT.CHUNKS
    tiles = ()
    for q in tl.static_range(CHUNKS):
        tile = x[q].to(w.tiles[q].dtype)
        if DOT.TRANSPOSED:
            tile = tl.trans(tile)
        tiles = tiles + (tile,)
    return product_of_tiles(tiles, w, DOT)


@triton.jit
def no_product(DOT: tl.constexpr):
    """Zero, in the form of `add_product`."""
    N: tl.constexpr = DOT.N
    BLOCK_B: tl.constexpr = DOT.BLOCK_B
    BLOCK_K: tl.constexpr = DOT.BLOCK_K
    if BLOCK_B == 1:
        acc = tl.zeros((N, BLOCK_K), tl.float32)
    elif DOT.TRANSPOSED:
        acc = tl.zeros((N, BLOCK_B), tl.float32)
    else:
        acc = tl.zeros((BLOCK_B, N), tl.float32)
    return acc


@triton.jit
def add_product(
    acc,
    p_x,  # [BLOCK_B] pointers to the rows of x
    mask_b,  # [BLOCK_B]
    p_w,  # [N] pointers to the columns of w
    mask_n,  # [N]
    chunks,  # 0, or all of K
    K: tl.constexpr,
    STRIDE_K: tl.constexpr,  # of w
    DOT: tl.constexpr,  # `StreamedDot`
):
    """acc + x @ w; `product_of` makes [BLOCK_B, N] of it."""
    BLOCK_K: tl.constexpr = DOT.BLOCK_K
    STAGES: tl.constexpr = DOT.STAGES
    for q in tl.range(0, chunks, num_stages=STAGES):
        offs_k = q * BLOCK_K + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        offs_w = offs_k
        if K * STRIDE_K >= 2**31:
            offs_w = offs_k.to(tl.int64)
        offs_w = offs_w * STRIDE_K
        if DOT.BLOCK_B == 1 or DOT.TRANSPOSED:
            w = tl.load(p_w[:, None] + offs_w[None, :], mask=mask_n[:, None] & mask_k[None, :], other=0.0)
        else:
            w = tl.load(p_w[None, :] + offs_w[:, None], mask=mask_n[None, :] & mask_k[:, None], other=0.0)
        if DOT.TRANSPOSED:
            x = tl.load(p_x[None, :] + offs_k[:, None], mask=mask_b[None, :] & mask_k[:, None], other=0.0)
        else:
            x = tl.load(p_x[:, None] + offs_k[None, :], mask=mask_b[:, None] & mask_k[None, :], other=0.0)
        if DOT.BLOCK_B == 1:
            acc += w.to(tl.float32) * x.to(tl.float32)
        else:
            acc = _dot(x, w, acc, DOT)
    return acc


@triton.jit
def product_of(acc, DOT: tl.constexpr):
    """[BLOCK_B, N] float32."""
    if DOT.BLOCK_B == 1:
        acc = tl.sum(acc, 1)[None, :]
    elif DOT.TRANSPOSED:
        acc = tl.trans(acc)
    return acc
