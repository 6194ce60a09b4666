"""Plans of the kernels of one step: nobody waits, so there may be more programs than the device holds at once."""

import math

from fusedlstm.plan.devices import DeviceLimits
from fusedlstm.plan.problem import Plan, Problem, power_of_2


def fitting(of: Problem) -> list[Plan]:
    """All that fit, in no order."""
    return [p for tiling in _tilings(of) if (p := _fit(of, *tiling))]


def _tilings(of: Problem) -> list[tuple[int, int]]:
    """(block_b, block_h)"""
    if of.batch == 1:
        return [(1, _units_of_a_row(of.hidden * of.directions, of.limits, of.pass_))]
    # An element of the cell needs a dozen registers; unaligned rows need more, and so do two products at once.
    unaligned = of.head * of.itemsize % 16 or of.ieee
    most = 2048 if unaligned or of.input_size or of.limits.arch.startswith("gfx") else 4096
    return [
        (block_b, block_h)
        for block_b in (16, 32, 64, 128)
        for block_h in (4, 8, 16, 32, 64)
        if (block_b == 16 or block_b < 2 * of.batch)
        and block_b * block_h <= most
        and block_h < max(5, 2 * of.hidden // of.heads)
    ]


def _units_of_a_row(units: int, limits: DeviceLimits, pass_: str) -> int:
    """Hidden units of a program for a single sequence: as many as leave four programs to a multiprocessor.

    Backward at least 32: those lie side by side in memory.
    """
    most = max(1, units // (4 * limits.num_sms))
    block_h = min(8, power_of_2(most + 1) // 2)
    return max(32, block_h) if pass_ == "bwd" else block_h


def _fit(of: Problem, block_b: int, block_h: int) -> Plan | None:
    """The plan with these tiles, or None if it does not fit."""
    limits, itemsize = of.limits, of.itemsize
    columns, reduction = of.product(block_h)
    longest = power_of_2(max(of.head if of.heads > 1 else reduction, of.input_size))
    row_bytes = math.gcd(of.head, of.input_size) * itemsize  # at these the rows of weights are aligned
    if block_b == 1:
        most = 8192 if itemsize == 2 and row_bytes % 16 == 0 else 4096  # products that are summed apart
        block_k, stages, transposed = min(longest, 1024, most // columns), 2, False
        smem_bytes = stages * columns * block_k * itemsize
        num_warps = max(1, min(4, columns * block_k // (limits.warp_size * 8)))
        regs = 64 + 2 * columns * block_k // (limits.warp_size * num_warps)
    else:
        transposed = limits.wide_mma and not of.ieee and block_b < 64 <= columns
        num_warps = 8 if block_b * columns >= 4096 or block_b * block_h >= 2048 else 4
        threads = num_warps * limits.warp_size
        widest = 16 if of.ieee else min(128, max(32, (16 << 10) // (itemsize * max(columns, block_b))))
        at_once = math.gcd(row_bytes, 16) // itemsize  # elements of a load
        few_loads = power_of_2(32 * threads * at_once // (columns + block_b) + 1) // 2  # of a thread and chunk: 32
        block_k = max(16, min(widest, few_loads, longest))
        stages = 2 if of.ieee else 3
        smem_bytes = stages * block_k * (columns + block_b) * itemsize + 4 * block_b * columns
        products = 2 if of.input_size else 1
        regs = 48 + (products * block_b * columns + 6 * block_b * block_h) // threads
    if smem_bytes > limits.smem_bytes:
        return None
    group, tiles_b = math.ceil(of.head / block_h) * of.heads, math.ceil(of.batch / block_b)
    return of.planned(
        schedule="stepped",
        block_b=block_b,
        block_h=block_h,
        block_k=block_k,
        protocol="none",
        transposed=transposed,
        split=1,
        ahead=1,
        num_warps=num_warps,
        stages=stages,
        grid=(group, tiles_b, of.directions),
        tiles_b=tiles_b,
        smem_bytes=smem_bytes,
        regs=regs,
        why="one launch a step: weights pass by once, h goes through memory, nobody waits",
    )
