"""The recurrent product of one step, acc[BLOCK_B, N] = x[BLOCK_B, K] @ w[K, N], in chunks of the reduction axis K.

x is what the group exchanges (h forward, the gradients of the preactivations backward); w is the program's slice of
`weight_hh`. K falls into segments of SEGMENT each, which lie SEGMENT_STRIDE apart in a row of x and in the rows of w: one
segment is all of K, or one a gate where a program's reduction is a part of every gate. No chunk of BLOCK_K crosses a
segment's end.

Two places for w: `RESIDENT`, loaded once into a tuple of tiles that stays on chip for all steps, or streamed from L2.

Three forms of the dot. Plain, x @ w. `TRANSPOSED`, (w^T @ x^T)^T, which gives the matrix unit its 64 rows when the batch
tile has fewer. And in SPLIT parts of every chunk, a warp each, whose sums are added at the end: a small tile has too few
columns for all warps, and one warp's products of a long reduction wait for each other.
"""

import triton
import triton.language as tl


@triton.jit
def _chunk(q, SEGMENT: tl.constexpr, SEGMENT_STRIDE: tl.constexpr, BLOCK_K: tl.constexpr):
    """Where chunk q begins, and how many elements are left of its segment from there."""
    CHUNKS: tl.constexpr = (SEGMENT + BLOCK_K - 1) // BLOCK_K
    start = q % CHUNKS * BLOCK_K
    return q // CHUNKS * SEGMENT_STRIDE + start, SEGMENT - start


@triton.jit
def _split_k(SPLIT: tl.constexpr, BLOCK_K: tl.constexpr):
    """The elements of a chunk by parts, [SPLIT, BLOCK_K / SPLIT]."""
    return tl.arange(0, SPLIT)[:, None] * (BLOCK_K // SPLIT) + tl.arange(0, BLOCK_K // SPLIT)[None, :]


@triton.jit
def weight_tile(
    weight_ptr,
    offs_n,  # [N] element offsets of the columns
    mask_n,  # [N]
    STRIDE_K: tl.constexpr,
    q,
    SEGMENT: tl.constexpr,
    SEGMENT_STRIDE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Chunk q of w: [BLOCK_K, N], or [N, BLOCK_K] if TRANSPOSED, or [SPLIT, BLOCK_K / SPLIT, N] in parts."""
    start, left = _chunk(q, SEGMENT, SEGMENT_STRIDE, BLOCK_K)
    k = tl.arange(0, BLOCK_K)
    offs_k, mask_k = k * STRIDE_K, k < left
    chunk_ptr = weight_ptr + start * STRIDE_K
    if SPLIT > 1:
        k = _split_k(SPLIT, BLOCK_K)[:, :, None]
        w = tl.load(
            chunk_ptr + offs_n[None, None, :] + k * STRIDE_K, mask=mask_n[None, None, :] & (k < left), other=0.0
        )
    elif TRANSPOSED:
        w = tl.load(chunk_ptr + offs_n[:, None] + offs_k[None, :], mask=mask_n[:, None] & mask_k[None, :], other=0.0)
    else:
        w = tl.load(chunk_ptr + offs_n[None, :] + offs_k[:, None], mask=mask_n[None, :] & mask_k[:, None], other=0.0)
    return w


@triton.jit
def resident_weight(
    weight_ptr,
    offs_n,  # [N]
    mask_n,  # [N]
    STRIDE_K: tl.constexpr,
    K: tl.constexpr,
    SEGMENT: tl.constexpr,
    SEGMENT_STRIDE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """All chunks of w, as a tuple of tiles."""
    CHUNKS: tl.constexpr = K // SEGMENT * ((SEGMENT + BLOCK_K - 1) // BLOCK_K)
    w = ()
    for q in tl.static_range(CHUNKS):
        w = w + (
            weight_tile(weight_ptr, offs_n, mask_n, STRIDE_K, q, SEGMENT, SEGMENT_STRIDE, BLOCK_K, TRANSPOSED, SPLIT),
        )
    return w


@triton.jit
def exchanged_tile(
    p_x,  # [BLOCK_B] pointers to the rows of x
    mask_b,  # [BLOCK_B]
    q,
    SEGMENT: tl.constexpr,
    SEGMENT_STRIDE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Chunk q of x: [BLOCK_B, BLOCK_K], or [BLOCK_K, BLOCK_B] if TRANSPOSED, or [SPLIT, BLOCK_B, BLOCK_K / SPLIT]."""
    start, left = _chunk(q, SEGMENT, SEGMENT_STRIDE, BLOCK_K)
    k = tl.arange(0, BLOCK_K)
    offs_k, mask_k = start + k, k < left
    # .cg: other programs wrote it, and the first-level cache is not coherent.
    if SPLIT > 1:
        k = _split_k(SPLIT, BLOCK_K)[:, None, :]
        x = tl.load(
            p_x[None, :, None] + (start + k),
            mask=mask_b[None, :, None] & (k < left),
            other=0,
            cache_modifier=".cg",
        )
    elif TRANSPOSED:
        x = tl.load(
            p_x[None, :] + offs_k[:, None], mask=mask_b[None, :] & mask_k[:, None], other=0, cache_modifier=".cg"
        )
    else:
        x = tl.load(
            p_x[:, None] + offs_k[None, :], mask=mask_b[:, None] & mask_k[None, :], other=0, cache_modifier=".cg"
        )
    return x


@triton.jit
def _dot(x, w, acc, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr):
    if TRANSPOSED:
        acc = tl.dot(w, x, acc, input_precision=PRECISION)
    else:
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _zeros(N: tl.constexpr, BLOCK_B: tl.constexpr, TRANSPOSED: tl.constexpr, SPLIT: tl.constexpr):
    if SPLIT > 1:
        acc = tl.zeros((SPLIT, BLOCK_B, N), tl.float32)
    elif TRANSPOSED:
        acc = tl.zeros((N, BLOCK_B), tl.float32)
    else:
        acc = tl.zeros((BLOCK_B, N), tl.float32)
    return acc


@triton.jit
def exchanged_product(
    p_x,  # [BLOCK_B] pointers to the rows of x
    mask_b,  # [BLOCK_B]
    w,  # tuple of tiles, if RESIDENT
    weight_ptr,
    offs_n,  # [N]
    mask_n,  # [N]
    STRIDE_K: tl.constexpr,
    K: tl.constexpr,
    SEGMENT: tl.constexpr,
    SEGMENT_STRIDE: tl.constexpr,
    N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RESIDENT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SPLIT: tl.constexpr,  # 1 unless RESIDENT
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """x comes from global memory, where the whole group wrote it. Returns [BLOCK_B, N] float32."""
    CHUNKS: tl.constexpr = K // SEGMENT * ((SEGMENT + BLOCK_K - 1) // BLOCK_K)
    acc = _zeros(N, BLOCK_B, TRANSPOSED, SPLIT)
    if RESIDENT:
        for q in tl.static_range(CHUNKS):
            x = exchanged_tile(p_x, mask_b, q, SEGMENT, SEGMENT_STRIDE, BLOCK_K, TRANSPOSED, SPLIT)
            acc = _dot(x, w[q], acc, TRANSPOSED, PRECISION)
    else:
        for q in tl.range(0, CHUNKS, num_stages=STAGES):
            x = exchanged_tile(p_x, mask_b, q, SEGMENT, SEGMENT_STRIDE, BLOCK_K, TRANSPOSED, SPLIT)
            w_q = weight_tile(weight_ptr, offs_n, mask_n, STRIDE_K, q, SEGMENT, SEGMENT_STRIDE, BLOCK_K, TRANSPOSED, 1)
            acc = _dot(x, w_q, acc, TRANSPOSED, PRECISION)
    if SPLIT > 1:
        acc = tl.sum(acc, 0)
    elif TRANSPOSED:
        acc = tl.trans(acc)
    return acc


@triton.jit
def local_product(
    x,  # tuple of tiles [BLOCK_B, BLOCK_K], one a chunk
    w,  # tuple of tiles, resident
    CHUNKS: tl.constexpr,
    N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x is in registers: the group is this one program. Returns [BLOCK_B, N] float32."""
    acc = _zeros(N, BLOCK_B, TRANSPOSED, 1)
    for q in tl.static_range(CHUNKS):
        if TRANSPOSED:
            acc = _dot(tl.trans(x[q].to(w[q].dtype)), w[q], acc, TRANSPOSED, PRECISION)
        else:
            acc = _dot(x[q].to(w[q].dtype), w[q], acc, TRANSPOSED, PRECISION)
    if TRANSPOSED:
        acc = tl.trans(acc)
    return acc
