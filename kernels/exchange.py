"""How the programs of a group hand each other a tile at every step: two protocols behind one interface.

| PROTOCOL | a reader waits for | on the way from one program's store to another's product |
|---|---|---|
| "counter" | the group's counter | the store, a fence and an atomic; a poll; the load |
| "data" | the very values that it needs | the store; the load |

By "counter", one number in global memory starts at zero and only grows (a counter that is reset can be missed). A step
is complete when every program of the group has arrived: `wait(counter_ptr, programs * steps)`. Triton 3.6 and 3.7 put
no CTA barrier between a program's stores and the atomic that announces them, hence the `debug_barrier` of `arrive`. The
acquire of `wait` is followed by a CTA barrier of Triton's own, so that no thread reads too early; what is read
afterwards must be loaded with `.cg`, since the first-level cache is not coherent.

By "data", the buffer is filled before the launch with a pattern that no program ever stores: all bits one, a NaN in
every type, and a NaN of that very pattern is stored as another one. A reader loads all of x into registers and looks
for a NaN, which costs an instruction a register, and as long as there is one it loads again. If the user's data
contains a NaN, the reader would keep waiting. So every few attempts it looks for the pattern itself, and once the
pattern is gone, it accepts whatever it loads next. This protocol suits an x that fits into registers; the plan decides.

No wait lasts for ever: after EXCHANGE.LIMIT polls the launch ends with an error (`docs/on_a_gpu.md`).
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from fusedlstm.kernels.product import exchanged_product, exchanged_tile, exchanged_tiles, no_tiles, product_of_tiles
from fusedlstm.kernels.tiles import store_tuple

ABSENT = tl.constexpr(-1)  # all bits one, as a signed integer
LOOK_EVERY = tl.constexpr(4)  # attempts
NVIDIA_TRAP = "trap; mov.b32 $0, $1;"  # `Exchange.TRAP` of a kernel that is compiled for NVIDIA


@dataclass(frozen=True)
class Exchange:
    """Who exchanges, and how: one compile-time value of a kernel."""

    GROUP: int  # programs that need each other's tiles
    PROTOCOL: str  # "counter" or "data"; "none": a group of one, which keeps its tile in registers
    LIMIT: int  # polls before a wait is an error
    TRAP: str  # the instruction that ends a launch, or "" for an assertion: interpreted, and on AMD
    PREFETCH: str  # the instruction that brings a line into the L2, or "" for none
    ACQUIRES: bool  # whether a load sees what others stored only after an acquire, as on AMD

    @property
    def LOCAL(self) -> bool:
        return self.PROTOCOL == "none"


@triton.jit
def arrive(counter_ptr):
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit
def wait(
    counter_ptr,
    target,  # arrivals
    EXCHANGE: tl.constexpr,  # `Exchange`
):
    spins = 0
    # Adding zero compiles to a load: the poll is read-only.
    while (tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < target) & (spins < EXCHANGE.LIMIT):
        spins += 1
    end_unless(spins < EXCHANGE.LIMIT, EXCHANGE)


@triton.jit
def end_unless(
    arrived,  # scalar: whether the group is there
    EXCHANGE: tl.constexpr,
):
    """End the launch with an error if a program of the group never arrived.

    By an instruction, and not by an assertion: that calls a function, and a kernel that calls one waits for every
    wgmma.
    """
    TRAP: tl.constexpr = EXCHANGE.TRAP
    if TRAP == "":
        tl.device_assert(arrived, "fusedlstm: a program of the group never arrived")
    else:
        if not arrived:
            tl.inline_asm_elementwise(TRAP, "=r,r", [tl.full((), 0, tl.int32)], tl.int32, is_pure=False, pack=1)


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
    EXCHANGE: tl.constexpr,
):
    """Store the first COUNT tiles for the group to read."""
    if EXCHANGE.PROTOCOL == "data":
        bits_ptr = _bits(ptr)
        for k in tl.static_range(COUNT):
            bits = tiles[k].to(ptr.dtype.element_ty).to(bits_ptr.dtype.element_ty, bitcast=True)
            bits = tl.where(bits == ABSENT, ABSENT - 1, bits)
            tl.store(bits_ptr + k * stride + offs, bits, mask=mask)
    else:
        store_tuple(ptr, offs, mask, stride, tiles, 0, COUNT)
        if EXCHANGE.PROTOCOL == "counter":
            arrive(counter_ptr)


@triton.jit
def prefetch(
    p,  # pointers, of any shape
    EXCHANGE: tl.constexpr,
):
    """Bring lines that will be polled into the L2, and wait for nothing: what filled them may have pushed them out."""
    PREFETCH: tl.constexpr = EXCHANGE.PREFETCH
    if PREFETCH != "":
        tl.inline_asm_elementwise(PREFETCH, "=r,l", [p.to(tl.uint64, bitcast=True)], tl.int32, is_pure=False, pack=1)


@triton.jit
def _larger_or_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _has_nan(x, COUNT: tl.constexpr):
    """1 if a value of the tiles is NaN, else 0."""
    largest = x[0].to(tl.float32)
    for q in tl.static_range(1, COUNT):
        largest = _larger_or_nan(largest, x[q])
    # in whatever order it lies with the threads
    largest = tl.reduce(tl.reshape(largest, (largest.numel,), can_reorder=True), 0, _larger_or_nan)
    return (largest != largest).to(tl.int32)


@triton.jit
def _is_complete(
    p_x,  # [BLOCK_B] pointers to the rows of x
    published,  # [BLOCK_B] rows that the group stores in this launch
    DOT: tl.constexpr,
):
    """1 if every value of these rows has arrived, else 0."""
    p_bits = _bits(p_x)
    absent = (exchanged_tile(p_bits, published, 0, DOT) == ABSENT).to(tl.int32)
    for q in range(1, DOT.CHUNKS):
        absent = absent | (exchanged_tile(p_bits, published, q, DOT) == ABSENT).to(tl.int32)
    return 1 - tl.max(tl.reshape(absent, (absent.numel,), can_reorder=True), 0)


@triton.jit
def awaited_product(
    counter_ptr,
    target,  # arrivals
    p_x,  # [BLOCK_B] pointers to the rows of x
    mask_b,  # [BLOCK_B]
    published,  # [BLOCK_B] which of these rows the group stores in this launch
    w,  # Weight
    DOT: tl.constexpr,
    EXCHANGE: tl.constexpr,
):
    """Wait until the group has stored x, then multiply. Returns [BLOCK_B, N] float32."""
    if EXCHANGE.PROTOCOL == "counter":
        wait(counter_ptr, target, EXCHANGE)
        acc = exchanged_product(p_x, mask_b, w, DOT)
    else:
        CHUNKS: tl.constexpr = DOT.CHUNKS
        x = no_tiles(p_x.dtype.element_ty, DOT)
        pending = 1
        complete = 0
        attempts = 0
        while (pending != 0) & (attempts < EXCHANGE.LIMIT):
            x = exchanged_tiles(p_x, mask_b, 0, CHUNKS, DOT)
            pending = _has_nan(x, CHUNKS) * (1 - complete)
            attempts += 1
            if (pending != 0) & (attempts % LOOK_EVERY == 0):  # a NaN of the user's own, perhaps
                complete = _is_complete(p_x, mask_b & published, DOT)
        end_unless(pending == 0, EXCHANGE)
        acc = product_of_tiles(x, w, DOT)
    return acc
