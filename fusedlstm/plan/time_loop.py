"""Plans of the kernels that do all steps: tiles worth a look, and what a program with these tiles takes."""

import math
from collections.abc import Iterator

from fusedlstm.devices import DeviceLimits
from fusedlstm.plan import spills
from fusedlstm.plan.one_launch import Plan, Problem, power_of_2


def fitting(of: Problem) -> list[Plan]:
    """All that fit and compile, in no order."""
    found = [p for tiling in _tilings(of) if (p := _fit(of, *tiling)) and not spills.much(p, of.limits)]
    return [p for p in found if not spills.some(p, of.limits)] or found


def _tilings(of: Problem) -> Iterator[tuple[str, int, int]]:
    """Schedules and tiles worth a look: (schedule, block_b, block_h). What spills is left out (see `docs/design.md`)."""
    for block_b in (16, 32, 64):
        if block_b > 16 and block_b >= 2 * of.batch:
            continue
        if of.head <= 128 and not of.ieee:
            yield "single", block_b, max(16, power_of_2(of.head))
        # A resident loop is unrolled over its chunks, and spills with IEEE products or with many rows.
        most_rows = 0 if of.ieee else 16 if of.dtype == "fp32" else 64 if of.pass_ == "fwd" else 32
        for block_h in (8, 16, 32, 64):
            if block_h < of.head or block_h == 8:
                if block_b <= most_rows:
                    yield "resident", block_b, block_h
                yield "streamed", block_b, block_h


def _fit(of: Problem, schedule: str, block_b: int, block_h: int) -> Plan | None:
    """The plan with these tiles, or None if it does not fit."""
    limits, itemsize = of.limits, of.itemsize
    columns, reduction = of.product(block_h)
    group = 1 if schedule == "single" else math.ceil(of.head / block_h)
    protocol = _protocol(of, schedule)
    if protocol is None:
        return None
    group_of_heads = group * of.heads
    if protocol != "none" and group_of_heads * of.directions > limits.num_sms:
        return None

    transposed = limits.wide_mma and not of.ieee and block_b < 64 <= columns
    if schedule == "resident" and spills.transposed(of, columns, reduction):
        transposed = False
    by_gate = of.pass_ == "bwd" and (schedule == "single" or of.heads > 1)  # a head's columns are a part of every gate
    segment = of.head if by_gate else reduction
    # A small tile has too few columns for all warps, and one warp's long chain of products would wait for itself.
    splits = (
        schedule == "resident" and not transposed and columns <= (32 if of.pass_ == "fwd" else 16) and block_b <= 32
    )
    if of.norms and spills.with_norms(of, schedule, block_b, block_h, reduction, transposed):
        return None
    block_k = _block_k(of, schedule, block_b, block_h, segment, columns, transposed, splits)
    chunks = reduction // segment * math.ceil(segment / block_k)
    slice_bytes = chunks * block_k * columns * itemsize * (2 if of.stack else 1)
    exchange_bytes = block_b * block_k * itemsize
    stages = 1 if schedule != "streamed" else 2 if of.ieee else 3
    if schedule == "streamed":
        smem_bytes = stages * (block_k * columns * itemsize + exchange_bytes)
    else:
        if schedule == "single" and of.pass_ == "bwd":
            exchange_bytes *= chunks  # the gradients of all gates are on their way at once
        in_registers = limits.weights_in_registers and schedule == "resident"  # one chunk passes through all the same
        smem_bytes = exchange_bytes + (block_k * columns * itemsize if in_registers else slice_bytes)
    num_warps = _num_warps(of, schedule, block_b, block_h, columns, chunks, transposed, splits)
    # A change of layout may stage the accumulators, and the sums of a chunk's parts meet there.
    # (How often: not less than any plan of the table was found to take.)
    parts = max(block_b // 8, num_warps if of.cell != "lstm" else 0)
    smem_bytes += 4 * block_b * columns * (parts if splits else 1)
    if smem_bytes > limits.smem_bytes:
        return None
    split = min(num_warps, block_k // 16) if splits else 1
    threads = num_warps * limits.warp_size
    regs = _registers(block_b, block_h, block_k, columns, itemsize, threads, schedule, slice_bytes, limits)
    if regs > 255:
        return None
    tiles_b = math.ceil(of.batch / block_b)
    groups = tiles_b if protocol == "none" else min(tiles_b, limits.num_sms // (group_of_heads * of.directions))
    return of.planned(
        schedule=schedule,
        block_b=block_b,
        block_h=block_h,
        block_k=block_k,
        protocol=protocol,
        transposed=transposed,
        split=split,
        num_warps=num_warps,
        stages=stages,
        grid=(group_of_heads, groups, of.directions),
        tiles_b=tiles_b,
        smem_bytes=smem_bytes,
        regs=regs,
        why=_why(schedule, slice_bytes, group, limits),
    )


def _protocol(of: Problem, schedule: str) -> str | None:
    """Of the exchange; None if the schedule has not the one that is asked for."""
    if schedule == "single":
        return None if of.stack else "none"  # layers exchange h
    if schedule == "streamed":
        # Pipelined loads of x may be kept in the first-level cache, where what is new is never seen.
        return None if of.protocol == "data" else "counter"
    if of.protocol is not None:
        return of.protocol
    # By data it is one trip through the L2 and not three; and fewer registers, as `make kernels` finds. Triton 3.7.1 fails to
    # compile it for sm_100.
    return "counter" if of.limits.arch == "sm_100" else "data"


def _block_k(
    of: Problem, schedule: str, block_b: int, block_h: int, reduction: int, columns: int, transposed: bool, split: bool
) -> int:
    """Chunk of the reduction: long enough that an unrolled loop has few, short enough that one fits into registers."""
    if schedule == "single":
        return block_h
    if of.ieee:
        widest = 16
    elif schedule == "streamed":
        widest = 64 if of.dtype != "fp32" else 32
    elif of.dtype == "fp32":
        widest = 64 if transposed or (split and columns > 16) else 256 if split else 128
    elif transposed:
        widest = 256 if block_b == 16 else 128
    elif split:
        widest = 512 if block_b == 16 else 256 if columns <= 16 else 128
    else:
        widest = 64 if block_b == 64 else 256 if of.pass_ == "bwd" and block_b == 16 else 128
    if schedule == "resident":
        widest = min(widest, spills.longest_chunk(of, block_b, block_h, transposed) or widest)
    return min(widest, max(16, power_of_2(reduction)))


def _num_warps(
    of: Problem,
    schedule: str,
    block_b: int,
    block_h: int,
    columns: int,
    chunks: int,
    transposed: bool,
    splits: bool,
) -> int:
    """Four warps, or eight where the tile of the dot or of the cell is large, or four spill what eight do not."""
    limits = of.limits
    if of.cell != "lstm" and not of.norms:  # the LSTM's tiles were tried one by one
        largest = 256 if of.cell == "slstm" and of.pass_ == "bwd" else 1024  # of a streamed tile with four
        if schedule != "streamed" or block_b * block_h >= largest:
            return 8
    if of.norms and not (transposed and of.pass_ == "fwd"):
        # On sm_80 eight warps spill what four do not.
        narrow = splits and block_h == 8 and not limits.wide_mma
        return 4 if narrow and of.pass_ == "bwd" else 8
    if of.pass_ == "bwd" and of.ieee and block_h > 8 and not limits.weights_in_registers:
        return 8
    if of.layout == "packed" and schedule == "resident" and chunks > 3 and block_b < 64:
        return 8  # rows that come and go need registers, which long unrolled loops do not leave
    narrow = of.ieee or not limits.wide_mma
    large = columns >= 128 or block_b * max(columns, 4 * block_h) >= 8192 or (narrow and block_b >= 64)
    return 8 if large or (schedule == "single" and of.dtype == "fp32" and block_h >= 64) else 4


def _registers(
    block_b: int,
    block_h: int,
    block_k: int,
    columns: int,
    itemsize: int,
    threads: int,
    schedule: str,
    slice_bytes: int,
    limits: DeviceLimits,
) -> int:
    """A rough count of 32-bit registers a thread: accumulators, the tiles of the cell, one chunk on its way."""
    accumulators = block_b * columns / threads
    cell_tiles = 14 * block_b * block_h / threads
    chunk = block_b * block_k * itemsize / 4 / threads
    weights = slice_bytes / 4 / threads if limits.weights_in_registers and schedule != "streamed" else 0
    return round(48 + accumulators + cell_tiles + chunk + weights)


def _why(schedule: str, slice_bytes: int, group: int, limits: DeviceLimits) -> str:
    place = "registers" if limits.weights_in_registers else "shared memory"
    if schedule == "single":
        return f"all of weight_hh ({slice_bytes >> 10} KiB) stays in the {place} of one program; nobody waits"
    if schedule == "resident":
        return f"{group} programs hold {slice_bytes >> 10} KiB of weight_hh each in {place} for all steps"
    return f"a slice of weight_hh ({slice_bytes >> 10} KiB a program) is read from L2 at every step"
