"""The group barrier: programs that share a batch tile wait for each other through one counter in global memory.

The counter starts at zero and only grows (a counter that is reset can be missed). A step is complete when every program
of the group has arrived: `wait(counter_ptr, programs * steps)`.

Triton 3.6 and 3.7 put no CTA barrier between a program's stores and the atomic that announces them, hence the
`debug_barrier`. The acquire of `wait` is followed by a CTA barrier of Triton's own, so that no thread reads too early;
what is read afterwards must be loaded with `.cg`, since the first-level cache is not coherent.

No wait lasts for ever: after EXCHANGE.LIMIT polls the launch ends with an error (`docs/on_a_gpu.md`).
"""

import triton
import triton.language as tl

NVIDIA_TRAP = "trap; mov.b32 $0, $1;"  # `Exchange.TRAP` of a kernel that is compiled for NVIDIA


@triton.jit
def arrive(counter_ptr):
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit
def wait(
    counter_ptr,
    target,  # arrivals
    EXCHANGE: tl.constexpr,  # `exchange.Exchange`
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
