"""Find the plans that fit a device: which tiles are considered, and what a program with them needs.

The kernels of a loop run all steps in one launch. For every choice of schedule, tiles and protocol they have variants,
which compute the same but are compiled differently. They differ in the number of warps, the length of the chunks of the
reduction, or the number of chunks that are loaded at once. The variants have an order of preference. The plan is the
first variant that is not known to spill.

A thread has 255 registers. A kernel that needs more moves values to memory and back at every step; that is a spill.
Whether a kernel spills is known only after it is compiled. So `make kernels` compiles the plans for the benchmark
shapes (`bench/shapes.py`) with both versions of Triton that CI tests, and `spills.json` names the kernels that spilled.
For all other sizes the launch on a GPU checks the compiled kernel, and takes the next variant if it spills
(`fusedlstm.engines.launch`).
"""

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fusedlstm import cells
from fusedlstm.plan.devices import DeviceLimits
from fusedlstm.plan.problem import Plan, Problem, power_of_2

SPILLS = Path(__file__).parent / "spills.json"
WITHOUT_SPILLS = ("sm_80", "sm_90")  # the plans of these are chosen so that none spills
DATA_REGISTERS = 96  # of a thread, at most, for what is awaited by data: all of it is loaded at once
AHEAD_REGISTERS = 64  # the same for chunks that are loaded at once after a wait by counter
MOST_VARIANTS = 6  # of a tiling
PADDING = 1 / 8  # of a reduction, at most, if shorter chunks have less


@functools.cache
def known_spills() -> frozenset[str]:
    """`Plan.code` of every kernel that spilled when it was compiled."""
    return frozenset(json.loads(SPILLS.read_text()))


def allowed_bytes(arch: str) -> int:
    """The bytes that a thread may spill. It is 0 if plans are chosen so that none spills, and small elsewhere."""
    return 0 if arch in WITHOUT_SPILLS else 64


class Tiling(NamedTuple):
    """One of the choices of the cost model."""

    schedule: str
    block_b: int
    block_h: int
    protocol: str


class Variant(NamedTuple):
    """One way to compile a tiling."""

    transposed: bool
    split: bool
    num_warps: int
    block_k: int
    ahead: int


def of_a_loop(of: Problem) -> list[Plan]:
    """All plans that fit and compile, in no order. Each tiling gives its first variant that does not spill."""
    by_tiling = [plans for t in _loop_tilings(of) if (plans := _plans(of, t))]
    clean = [p for plans in by_tiling if (p := next((p for p in plans if p.code not in known_spills()), None))]
    return clean or [plans[0] for plans in by_tiling]


def variants(p: Plan, limits: DeviceLimits) -> list[Plan]:
    """The plans with the tiles of `p` that follow it in the order of preference. They take the same tensors."""
    batch, directions = p.tiles_b * p.block_b, p.grid[2]
    sizes = (p.cell, batch, p.hidden, p.dtype, directions, p.pass_, p.precision, p.layout, p.heads, p.stack)
    of, tiling = Problem(*sizes, device_limits=limits), Tiling(p.schedule, p.block_b, p.block_h, p.protocol)
    found = _plans(of, tiling)
    codes = [q.code for q in found]
    after = found[codes.index(p.code) + 1 :] if p.code in codes else []
    return [dataclasses.replace(q, grid=p.grid, tiles_b=p.tiles_b, step_us=p.step_us) for q in after]


def _plans(of: Problem, t: Tiling) -> list[Plan]:
    """The plans of a tiling, in the order of preference. They are few, because if several spill, the others do too."""
    return [*itertools.islice((p for v in _variants(of, t) if (p := _loop_fit(of, t, v))), MOST_VARIANTS)]


def _loop_tilings(of: Problem) -> Iterator[Tiling]:
    for block_b in (16, 32, 64):
        if block_b > 16 and block_b >= 2 * of.batch:
            continue
        if of.head <= 128 and not of.ieee and not of.stack:  # layers exchange h
            yield Tiling("single", block_b, max(16, power_of_2(of.head)), "none")
        # A resident loop is unrolled over its chunks. It spills with IEEE products or with many rows.
        most_rows = 0 if of.ieee else 16 if of.dtype == "fp32" else 64 if of.pass_ == "fwd" else 32
        for block_h in (8, 16, 32, 64):
            if block_h < of.head or block_h == 8:
                if block_b <= most_rows:
                    for protocol in _protocols(of):
                        yield Tiling("resident", block_b, block_h, protocol)
                # Pipelined loads of x may stay in the first-level cache, where new values are never seen.
                if of.protocol != "data":
                    yield Tiling("streamed", block_b, block_h, "counter")


def _protocols(of: Problem) -> tuple[str, ...]:
    """The protocols of a resident exchange.

    Triton 3.7.1 cannot compile data for sm_100. On AMD the loads of a program see only the L2 of its own die, unless an
    acquire comes before them.
    """
    possible = ("counter",) if of.limits.arch == "sm_100" or of.limits.arch.startswith("gfx") else ("data", "counter")
    return possible if of.protocol is None else tuple(p for p in possible if p == of.protocol)


def _variants(of: Problem, t: Tiling) -> Iterator[Variant]:
    """The variants of a tiling, in the order of preference."""
    columns, _ = of.product(t.block_h)
    can_transpose = of.limits.wide_mma and not of.ieee and t.block_b < 64 <= columns
    for transposed in (True, False) if can_transpose else (False,):
        # A small tile has too few columns for all warps, and the long chain of products of one warp would be slow.
        most = 32 if of.pass_ == "fwd" else 16
        split = t.schedule == "resident" and not transposed and columns <= most and t.block_b <= 32
        for num_warps in _warps(of, t, columns, split):
            for block_k in _chunks(of, t, columns, transposed, split, num_warps):
                for ahead in _aheads(of, t, num_warps, block_k):
                    yield Variant(transposed, split, num_warps, block_k, ahead)


def _warps(of: Problem, t: Tiling, columns: int, split: bool) -> tuple[int, ...]:
    """Eight where the tile of the dot or of the cell is large, or a chunk is split; and the other number next."""
    if t.schedule == "resident" and t.block_b == 64:
        return (4,)  # two groups of warps would share the columns of a matrix instruction, and take twice the registers
    if of.ieee and of.pass_ == "bwd":
        large = t.block_h > 8
    elif of.cell != next(iter(cells.CELLS)) and t.schedule != "streamed":
        # What follows was tried for the first cell; through the steps of most others more values live.
        large = True
    else:
        narrow = of.ieee or not of.limits.wide_mma
        large = columns >= 128 or t.block_b * max(columns, 4 * t.block_h) >= 8192 or (narrow and t.block_b >= 64)
        large = large or (t.schedule == "single" and of.dtype == "fp32" and t.block_h >= 64)
    return (8, 4) if split or large else (4, 8)


def _chunks(of: Problem, t: Tiling, columns: int, transposed: bool, split: bool, num_warps: int) -> list[int]:
    """Chunks of the reduction, the longest first that do not pad it much: an unrolled loop should have few."""
    if t.schedule == "single":
        return [t.block_h]
    K = of.product(t.block_h)[1]
    segment = _segment(of, t, K)
    shortest = 16 * num_warps if split else 16  # the reduction of one matrix instruction, for every part
    if of.ieee:
        longest = 16
    elif t.schedule == "streamed":
        longest = 64 if of.itemsize == 2 else 32
    elif split:
        longest = 256 if of.itemsize == 2 else 128
    elif of.itemsize == 2:
        longest = 256 if t.block_b < 64 else 64
    else:
        longest = 128
    longest = max(shortest, min(longest, power_of_2(segment)))
    sizes = [longest >> k for k in range(longest.bit_length()) if longest >> k >= shortest]
    padded = {size: K // segment * math.ceil(segment / size) * size for size in sizes}
    least = min(padded.values())
    sizes = [size for size in sizes if padded[size] <= (1 + PADDING) * least]
    return sizes[:1] if t.schedule == "streamed" else sizes[:2]


def _segment(of: Problem, t: Tiling, reduction: int) -> int:
    """The elements of the reduction that are side by side.

    In the backward they are those of one gate, if there are heads or if a program has all units.
    """
    return of.head if of.pass_ == "bwd" and (of.heads > 1 or t.schedule == "single") else reduction


def _aheads(of: Problem, t: Tiling, num_warps: int, block_k: int) -> list[int]:
    """How many chunks may be loaded at once after a wait by counter: as many as registers are free, or fewer."""
    if t.schedule != "resident" or t.protocol == "data":
        return [1]
    threads = num_warps * of.limits.warp_size
    most = AHEAD_REGISTERS * 4 * threads // (t.block_b * block_k * of.itemsize)
    most = max(1, min(most, _count_of_chunks(of, t, block_k)))
    return sorted({max(1, most >> k) for k in range(3)}, reverse=True)


def _count_of_chunks(of: Problem, t: Tiling, block_k: int) -> int:
    reduction = of.product(t.block_h)[1]
    segment = _segment(of, t, reduction)
    return reduction // segment * math.ceil(segment / block_k)


def _loop_fit(of: Problem, t: Tiling, v: Variant) -> Plan | None:
    """The plan with these tiles, or None if it does not fit."""
    limits, itemsize = of.limits, of.itemsize
    local = t.schedule == "single"
    columns, _ = of.product(t.block_h)
    group = 1 if local else math.ceil(of.head / t.block_h)
    group_of_heads = group * of.heads
    if not local and group_of_heads * of.directions > limits.num_sms:
        return None
    chunks = _count_of_chunks(of, t, v.block_k)
    threads = v.num_warps * limits.warp_size
    chunk_bytes = t.block_b * v.block_k * itemsize
    at_once = chunks if t.protocol == "data" or (local and of.pass_ == "bwd") else v.ahead
    if t.protocol == "data" and chunks * chunk_bytes > DATA_REGISTERS * 4 * threads:
        return None
    slice_bytes = chunks * v.block_k * columns * itemsize * (2 if of.stack else 1)
    stages = 1 if t.schedule != "streamed" else 2 if of.ieee else 3
    if t.schedule == "streamed":
        smem_bytes = stages * (v.block_k * columns * itemsize + chunk_bytes)
    else:
        in_registers = limits.weights_in_registers and t.schedule == "resident"  # one chunk passes through all the same
        smem_bytes = at_once * chunk_bytes + (v.block_k * columns * itemsize if in_registers else slice_bytes)
    # A change of layout may stage the accumulators there, and the sums of the parts of a chunk meet there.
    # The factor is not less than that of any plan in the table.
    smem_bytes += 4 * t.block_b * columns * (max(t.block_b // 8, v.num_warps) if v.split else 1)
    if smem_bytes > limits.smem_bytes or _unfit_for_amd(of, t, v, columns, slice_bytes):
        return None
    regs = _registers(t, at_once * chunk_bytes, columns, threads, slice_bytes, limits.weights_in_registers)
    if regs > 255:
        return None
    tiles_b = math.ceil(of.batch / t.block_b)
    groups = tiles_b if local else min(tiles_b, limits.num_sms // (group_of_heads * of.directions))
    return of.planned(
        schedule=t.schedule,
        block_b=t.block_b,
        block_h=t.block_h,
        block_k=v.block_k,
        protocol=t.protocol,
        transposed=v.transposed,
        split=v.num_warps if v.split else 1,
        ahead=v.ahead,
        num_warps=v.num_warps,
        stages=stages,
        grid=(group_of_heads, groups, of.directions),
        tiles_b=tiles_b,
        smem_bytes=smem_bytes,
        regs=regs,
        why=_why(t.schedule, slice_bytes, group, limits.weights_in_registers),
    )


def _unfit_for_amd(of: Problem, t: Tiling, v: Variant, columns: int, slice_bytes: int) -> bool:
    """Whether weights do not fit into 64 registers of a thread, or have fewer columns than a matrix instruction."""
    if not of.limits.weights_in_registers:
        return False
    if columns < 16 and not of.ieee:
        return True
    if of.pass_ == "bwd" and of.hidden > 2048 and t.block_b * t.block_h >= 2048:
        return True
    return t.schedule == "resident" and (slice_bytes > 256 * v.num_warps * of.limits.warp_size or t.block_b == 64)


def _registers(
    t: Tiling, exchanged_bytes: int, columns: int, threads: int, slice_bytes: int, weights_in_registers: bool
) -> int:
    """A rough count of the 32-bit registers of a thread: accumulators, the tiles of the cell, and pending loads."""
    accumulators = t.block_b * columns / threads
    cell_tiles = 14 * t.block_b * t.block_h / threads
    weights = slice_bytes / 4 / threads if weights_in_registers and t.schedule != "streamed" else 0
    return round(48 + accumulators + cell_tiles + exchanged_bytes / 4 / threads + weights)


def _why(schedule: str, slice_bytes: int, group: int, weights_in_registers: bool) -> str:
    place = "registers" if weights_in_registers else "shared memory"
    if schedule == "single":
        return f"all of weight_hh ({slice_bytes >> 10} KiB) stays in the {place} of one program; nobody waits"
    if schedule == "resident":
        return f"{group} programs hold {slice_bytes >> 10} KiB of weight_hh each in {place} for all steps"
    return f"a slice of weight_hh ({slice_bytes >> 10} KiB a program) is read from L2 at every step"


def of_a_step(of: Problem) -> list[Plan]:
    """All plans that fit, in no order. No program waits, so there may be more than the device holds at once."""
    return [p for tiling in _step_tilings(of) if (p := _step_fit(of, *tiling))]


def _step_tilings(of: Problem) -> list[tuple[int, int]]:
    """(block_b, block_h)"""
    if of.batch == 1:
        return [(1, _units_of_a_row(of.hidden * of.directions, of.limits, of.pass_))]
    # An element of the cell needs a dozen registers. Unaligned rows need more, and so do two products at once.
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
    """The hidden units of a program for a single sequence, so that each multiprocessor has four programs.

    In the backward there are at least 32, which are side by side in memory.
    """
    most = max(1, units // (4 * limits.num_sms))
    block_h = min(8, power_of_2(most + 1) // 2)
    return max(32, block_h) if pass_ == "bwd" else block_h


def _step_fit(of: Problem, block_b: int, block_h: int) -> Plan | None:
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
