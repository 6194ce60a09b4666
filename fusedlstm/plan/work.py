"""How many instructions, barriers, waits and rounds of loads one step of the time loop has, estimated from a plan.

The bytes and the matrix products are counted in `fusedlstm.plan.cost`. The estimates here follow machine code:
`bench/results/kernels.csv` has the counted numbers of every plan, in columns of the same names (`fusedlstm.engines.offline.Loop`),
and `tests/cpu/test_cost.py` compares the two. The body of a loop over chunks is counted once for every time that it runs.
"""

import math
from typing import NamedTuple

from fusedlstm.plan.problem import ITEMSIZE, Plan

# Instructions of a warp, fitted to resident plans of sm_90 by least squares of the relative error (2026-11-29): nine of ten
# are within 15 %.
BASE = {"fwd": 203.0, "bwd": 215.0}
OF_ELEMENT = {"fwd": 68.0, "bwd": 5.0}  # of the cell, a thread
OF_LOAD = {"fwd": 10.3, "bwd": 1.8}  # of 16 bytes of an operand, a thread
OF_PRODUCT = {"fwd": 0.0, "bwd": 4.7}  # a matrix instruction of 16 x 8, whose operands a warp loads itself
BY_DATA, LOOK_OF_LOAD = 39.0, 3.2  # the test whether all has come, and what of it goes with what is loaded
SYNCS, SYNCS_OF_ROUND, SYNCS_OF_NORM = 5, 2, 8  # barriers of a program's threads


class Work(NamedTuple):
    """Of one iteration and batch tile."""

    instructions: float  # of a warp
    bar_sync: float
    wgmma_waits: int
    load_rounds: float  # loads of what the group exchanges that wait for each other


def work(p: Plan, wide_mma: bool) -> Work:
    """Estimate it; `wide_mma` as of `devices.DeviceLimits`."""
    products = 2 if p.stack else 1  # of a stack's layer also the input product
    threads = 32 * p.num_warps
    streamed = p.schedule in ("streamed", "stepped")
    by_itself = wide_mma and (p.columns if p.transposed else p.block_b) >= 64  # wgmma
    elements = max(1.0, p.block_b * p.block_h / threads)
    operands = (0 if p.local and not streamed else p.block_b) + (p.columns if streamed else 0)
    loads = operands * p.padded_reduction * ITEMSIZE[p.dtype] / 16 / threads * products
    link = 8 if p.dtype == "fp32" else 16
    matrix = 0.0 if by_itself else p.block_b * p.columns * p.padded_reduction / (128 * link) / p.num_warps * products
    instructions = BASE[p.pass_] + OF_ELEMENT[p.pass_] * elements + OF_LOAD[p.pass_] * loads
    instructions += OF_PRODUCT[p.pass_] * matrix
    if p.protocol == "data":
        rounds = 1.0
        instructions += BY_DATA + LOOK_OF_LOAD * loads
    elif streamed:
        rounds = p.chunks / max(1, p.stages - 1)
    else:
        rounds = 0.0 if p.local else float(math.ceil(p.chunks / p.ahead))
    return Work(
        instructions=instructions,
        bar_sync=SYNCS
        + SYNCS_OF_ROUND * (p.chunks if streamed else max(1.0, rounds)) * products
        + SYNCS_OF_NORM * p.norms_per_step,
        wgmma_waits=p.chunks * products if by_itself else 0,
        load_rounds=rounds * products + p.norms_per_step,
    )
