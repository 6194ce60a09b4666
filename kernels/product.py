"""The recurrent product of one step, acc[BLOCK_B, N] = x[BLOCK_B, K] @ w[K, N], in chunks of the reduction axis K.

x is what the group exchanges (h forward, the gradients of the preactivations backward); w is the program's slice of
`weight_hh`. Chunk q holds k in [q * CHUNK, q * CHUNK + BLOCK_K), cut at CHUNK and at K.

Two places for w: `RESIDENT`, loaded once into a tuple of tiles that stays on chip for all steps, or streamed from L2.
Two forms of the dot: plain, x @ w, or `TRANSPOSED`, (w^T @ x^T)^T, which gives the matrix unit its 64 rows when the
batch tile has fewer.
"""

import triton
import triton.language as tl


@triton.jit
def _mask_k(q, K: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr):
    offs_k = tl.arange(0, BLOCK_K)
    return (offs_k < CHUNK) & (q * CHUNK + offs_k < K)


@triton.jit
def weight_tile(
    weight_ptr,
    offs_n,  # [N] element offsets of the columns
    mask_n,  # [N]
    STRIDE_K: tl.constexpr,
    q,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Chunk q of w: [BLOCK_K, N], or [N, BLOCK_K] if TRANSPOSED."""
    offs_k = tl.arange(0, BLOCK_K) * STRIDE_K
    mask_k = _mask_k(q, K, CHUNK, BLOCK_K)
    chunk_ptr = weight_ptr + q * CHUNK * STRIDE_K
    if TRANSPOSED:
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
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """All chunks of w, as a tuple of tiles."""
    w = (weight_tile(weight_ptr, offs_n, mask_n, STRIDE_K, 0, K, CHUNK, BLOCK_K, TRANSPOSED),)
    for q in tl.static_range(1, (K + CHUNK - 1) // CHUNK):
        w = w + (weight_tile(weight_ptr, offs_n, mask_n, STRIDE_K, q, K, CHUNK, BLOCK_K, TRANSPOSED),)
    return w


@triton.jit
def _exchanged_tile(
    p_x,  # [BLOCK_B] pointers to the rows of x
    mask_b,  # [BLOCK_B]
    q,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Chunk q of x: [BLOCK_B, BLOCK_K], or [BLOCK_K, BLOCK_B] if TRANSPOSED."""
    offs_k = q * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    # .cg: other programs wrote it, and the first-level cache is not coherent.
    if TRANSPOSED:
        x = tl.load(
            p_x[None, :] + offs_k[:, None],
            mask=mask_b[None, :] & mask_k[:, None],
            other=0.0,
            cache_modifier=".cg",
        )
    else:
        x = tl.load(
            p_x[:, None] + offs_k[None, :],
            mask=mask_b[:, None] & mask_k[None, :],
            other=0.0,
            cache_modifier=".cg",
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
def _zeros(N: tl.constexpr, BLOCK_B: tl.constexpr, TRANSPOSED: tl.constexpr):
    if TRANSPOSED:
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
    N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RESIDENT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """x comes from global memory, where the whole group wrote it. Returns [BLOCK_B, N] float32."""
    acc = _zeros(N, BLOCK_B, TRANSPOSED)
    if RESIDENT:
        for q in tl.static_range((K + BLOCK_K - 1) // BLOCK_K):
            x = _exchanged_tile(p_x, mask_b, q, K, BLOCK_K, TRANSPOSED)
            acc = _dot(x, w[q], acc, TRANSPOSED, PRECISION)
    else:
        for q in tl.range(0, tl.cdiv(K, BLOCK_K), num_stages=STAGES):
            x = _exchanged_tile(p_x, mask_b, q, K, BLOCK_K, TRANSPOSED)
            w_q = weight_tile(weight_ptr, offs_n, mask_n, STRIDE_K, q, K, BLOCK_K, BLOCK_K, TRANSPOSED)
            acc = _dot(x, w_q, acc, TRANSPOSED, PRECISION)
    if TRANSPOSED:
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
    acc = _zeros(N, BLOCK_B, TRANSPOSED)
    for q in tl.static_range(CHUNKS):
        if TRANSPOSED:
            acc = _dot(tl.trans(x[q].to(w[q].dtype)), w[q], acc, TRANSPOSED, PRECISION)
        else:
            acc = _dot(x[q].to(w[q].dtype), w[q], acc, TRANSPOSED, PRECISION)
    if TRANSPOSED:
        acc = tl.trans(acc)
    return acc
