"""The group barrier: programs that share a batch tile wait for each other through one counter in global memory.

The counter starts at zero and only grows (a counter that is reset can be missed). A step is complete when every program
of the group has arrived: `wait(counter_ptr, programs * steps)`.

Triton 3.6 and 3.7 put no CTA barrier between a program's stores and the atomic that announces them, hence the
`debug_barrier`. The acquire of `wait` is followed by a CTA barrier of Triton's own, so that no thread reads too early;
what is read afterwards must be loaded with `.cg`, since the first-level cache is not coherent.
"""

import triton
import triton.language as tl


@triton.jit
def arrive(counter_ptr):
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit
def wait(counter_ptr, target, SPIN_LIMIT: tl.constexpr):
    spins = 0
    # Adding zero compiles to a load: the poll is read-only.
    while (tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < target) & (spins < SPIN_LIMIT):
        spins += 1
    tl.device_assert(spins < SPIN_LIMIT, "fusedlstm: a program of the group never arrived")
