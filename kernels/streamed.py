"""x[BLOCK_B, K] @ w[K, N] for the kernels of one step: both factors pass by once, in chunks of BLOCK_K.

Three forms. Plain: x @ w. TRANSPOSED: (w^T @ x^T)^T, which gives the matrix unit its 64 rows when the batch tile has
fewer. And for a single row, BLOCK_B == 1, no matrix unit at all: products are summed in float32 where they lie, element
by element of a chunk, and once across the chunk at the end, so that a thread has many loads on their way.
"""

import triton
import triton.language as tl


@triton.jit
def no_product(N: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Zero, in the form of `add_product`."""
    if BLOCK_B == 1:
        acc = tl.zeros((N, BLOCK_K), tl.float32)
    elif TRANSPOSED:
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
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """acc + x @ w; `product_of` makes [BLOCK_B, N] of it."""
    for q in tl.range(0, chunks, num_stages=STAGES):
        offs_k = q * BLOCK_K + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        offs_w = offs_k
        if K * STRIDE_K >= 2**31:
            offs_w = offs_k.to(tl.int64)
        offs_w = offs_w * STRIDE_K
        if BLOCK_B == 1 or TRANSPOSED:
            w = tl.load(p_w[:, None] + offs_w[None, :], mask=mask_n[:, None] & mask_k[None, :], other=0.0)
        else:
            w = tl.load(p_w[None, :] + offs_w[:, None], mask=mask_n[None, :] & mask_k[:, None], other=0.0)
        if TRANSPOSED:
            x = tl.load(p_x[None, :] + offs_k[:, None], mask=mask_b[None, :] & mask_k[:, None], other=0.0)
        else:
            x = tl.load(p_x[:, None] + offs_k[None, :], mask=mask_b[:, None] & mask_k[None, :], other=0.0)
        if BLOCK_B == 1:
            acc += w.to(tl.float32) * x.to(tl.float32)
        elif TRANSPOSED:
            acc = tl.dot(w, x, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
    return acc


@triton.jit
def product_of(acc, BLOCK_B: tl.constexpr, TRANSPOSED: tl.constexpr):
    """[BLOCK_B, N] float32."""
    if BLOCK_B == 1:
        acc = tl.sum(acc, 1)[None, :]
    elif TRANSPOSED:
        acc = tl.trans(acc)
    return acc
