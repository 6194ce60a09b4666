"""How the programs of a group hand each other a tile at every step: two protocols behind one interface.

| PROTOCOL | a reader waits for | on the way from one program's store to another's product |
|---|---|---|
| "counter" | the group's counter (`barrier`) | the store, a fence and an atomic; a poll; the load |
| "data" | the very values that it needs | the store; the load |

By "data", the buffer is filled before the launch with a pattern that no program ever stores: all bits one, a NaN in every
type, and a NaN of that very pattern is stored as another one. A reader forms its product at once; what had not arrived
makes the result NaN, and then it forms it again. A NaN of the user's own would look the same, so every few
attempts the reader looks at the patterns themselves, and once they are complete takes the product as it is.
"""

import triton
import triton.language as tl

from fusedlstm.kernels import barrier
from fusedlstm.kernels.product import exchanged_product, exchanged_tile
from fusedlstm.kernels.tiles import store_tuple

ABSENT = tl.constexpr(-1)  # all bits one, as a signed integer
LOOK_EVERY = tl.constexpr(4)  # attempts


@triton.jit
def _bits(ptr):
    """A pointer to 16- or 32-bit numbers as one to integers."""
    if ptr.dtype.element_ty.primitive_bitwidth == 16:
        bits_ptr = ptr.to(tl.pointer_type(tl.int16))
    else:
        bits_ptr = ptr.to(tl.pointer_type(tl.int32))
    return bits_ptr


@triton.jit
def publish(
    ptr,
    offs,  # [BLOCK_B, BLOCK_H]
    mask,  # [BLOCK_B, BLOCK_H]
    stride,
    tiles,
    COUNT: tl.constexpr,
    counter_ptr,
    PROTOCOL: tl.constexpr,
):
    """Store the first COUNT tiles for the group to read."""
    if PROTOCOL == "data":
        bits_ptr = _bits(ptr)
        for k in tl.static_range(COUNT):
            bits = tiles[k].to(ptr.dtype.element_ty).to(bits_ptr.dtype.element_ty, bitcast=True)
            bits = tl.where(bits == ABSENT, ABSENT - 1, bits)
            tl.store(bits_ptr + k * stride + offs, bits, mask=mask)
    else:
        store_tuple(ptr, offs, mask, stride, tiles, 0, COUNT)
        if PROTOCOL == "counter":
            barrier.arrive(counter_ptr)


@triton.jit
def _is_complete(
    p_x,  # [BLOCK_B]
    mask_b,  # [BLOCK_B]
    K: tl.constexpr,
    SEGMENT: tl.constexpr,
    SEGMENT_STRIDE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """1 if every value of the rows of x has arrived, else 0."""
    p_bits = _bits(p_x)
    absent = tl.zeros((), tl.int32)
    for q in range(K // SEGMENT * ((SEGMENT + BLOCK_K - 1) // BLOCK_K)):
        bits = exchanged_tile(p_bits, mask_b, q, SEGMENT, SEGMENT_STRIDE, BLOCK_K, False, 1)
        absent += tl.sum(tl.sum((bits == ABSENT).to(tl.int32), 1), 0)
    return (absent == 0).to(tl.int32)


@triton.jit
def awaited_product(
    counter_ptr,
    target,  # arrivals
    p_x,  # [BLOCK_B] pointers to the rows of x
    mask_b,  # [BLOCK_B]
    published,  # [BLOCK_B] which of these rows the group stores in this launch
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
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    PROTOCOL: tl.constexpr,
    SPIN_LIMIT: tl.constexpr,
):
    """`exchanged_product` of rows that the whole group has stored. Returns [BLOCK_B, N] float32."""
    if PROTOCOL == "counter":
        barrier.wait(counter_ptr, target, SPIN_LIMIT)
        acc = exchanged_product(
            p_x,
            mask_b,
            w,
            weight_ptr,
            offs_n,
            mask_n,
            STRIDE_K,
            K,
            SEGMENT,
            SEGMENT_STRIDE,
            N,
            BLOCK_B,
            BLOCK_K,
            RESIDENT,
            TRANSPOSED,
            SPLIT,
            PRECISION,
            STAGES,
        )
    else:
        acc = tl.zeros((BLOCK_B, N), tl.float32)
        complete = 0
        pending = 1
        attempts = 0
        while (pending != 0) & (attempts < SPIN_LIMIT):
            if attempts % LOOK_EVERY == LOOK_EVERY - 1:
                complete = _is_complete(p_x, mask_b & published, K, SEGMENT, SEGMENT_STRIDE, BLOCK_K)
            acc = exchanged_product(
                p_x,
                mask_b,
                w,
                weight_ptr,
                offs_n,
                mask_n,
                STRIDE_K,
                K,
                SEGMENT,
                SEGMENT_STRIDE,
                N,
                BLOCK_B,
                BLOCK_K,
                RESIDENT,
                TRANSPOSED,
                SPLIT,
                PRECISION,
                STAGES,
            )
            pending = tl.max(tl.max((acc != acc).to(tl.int32), 1), 0) * (1 - complete)
            attempts += 1
        tl.device_assert(pending == 0, "fusedlstm: a program of the group never arrived")
    return acc
