"""What the compiler is known to spill: rules found by `make kernels`, whose table has no spill on sm_80 and sm_90.

They are of Triton 3.7.1, and of nothing else: a new compiler wants a new table, and may want other rules. See `docs/design.md`.
"""

import math

from fusedlstm.devices import DeviceLimits
from fusedlstm.plan.one_launch import ITEMSIZE, Plan, Problem


def transposed(of: Problem, columns: int, reduction: int) -> bool:
    """Of a resident product that is taken transposed, where the plain form is clean."""
    most = 1 << 14 if of.layout == "ragged" else 1 << 15
    return of.dtype == "fp32" and (of.norms or reduction * columns > most)


def longest_chunk(of: Problem, block_b: int, block_h: int, transposed: bool) -> float:
    """Of a resident reduction, as rows that come and go and states of other cells than the LSTM need registers, too."""
    longest, is_fp32 = math.inf, of.dtype == "fp32"
    if of.masked and (is_fp32 or block_b == 32):
        longest = 64 if of.pass_ == "fwd" and block_b == 32 else 128
    if of.cell == "lstm":
        return longest
    return min(
        longest, _longest_of_norms(of, block_h) if of.norms else _longest_of_others(of, block_b, block_h, transposed)
    )


def _longest_of_norms(of: Problem, block_h: int) -> int:
    if of.dtype == "fp32":
        if of.pass_ == "fwd":
            return 32 if of.masked or block_h <= 16 else 64
        return 128 if of.masked else 2048 // block_h
    if of.pass_ == "fwd":
        return 128
    if of.masked:
        return 64 if block_h == 8 else 128
    return 256


def _longest_of_others(of: Problem, block_b: int, block_h: int, transposed: bool) -> int:
    if of.dtype == "fp32":
        return 32 if of.masked else 128 if of.cell == "gru" and of.pass_ == "bwd" and block_h > 8 else 256
    if of.pass_ == "fwd":
        return 64 if transposed and block_b * block_h >= 512 else 512
    if of.cell == "slstm":
        return 128 if of.masked else 256
    return 256 if of.masked else 512


def with_norms(of: Problem, schedule: str, block_b: int, block_h: int, reduction: int, transposed: bool) -> bool:
    """Of cells with norms, in which more lives through a step."""
    if schedule == "single":
        return of.pass_ == "bwd" and of.dtype == "fp32" and block_h >= 64
    if schedule == "streamed":
        return False
    if of.pass_ == "fwd":
        return block_b == 64 or (transposed and block_b > 16)
    return (of.masked and max(block_b, block_h) == 32) or (of.dtype == "fp32" and reduction >= 4096)


def much(p: Plan, limits: DeviceLimits) -> bool:
    """Whether the compiler is known to make a mess of this plan."""
    ieee = p.dtype == "fp32" and p.precision == "ieee"
    chunks = math.ceil(p.reduction / p.block_k)
    if limits.arch.startswith("gfx"):
        if p.columns < 16 and not ieee:
            return True  # no matrix instruction
        if p.pass_ == "bwd" and p.hidden > 2048 and p.block_b * p.block_h >= 2048:
            return True
        slice_bytes = chunks * p.block_k * p.columns * ITEMSIZE[p.dtype]
        if p.schedule == "resident" and (slice_bytes > 256 * p.num_warps * limits.warp_size or p.block_b == 64):
            return True  # weights need registers: 64 a thread at most
    if p.schedule == "resident":
        if limits.arch != "sm_90" and chunks > 8 and p.hidden * ITEMSIZE[p.dtype] % 16:
            return True  # rows that are not aligned; Triton 3.7.1 compiles one of these for sm_100 to a trap
        if not limits.wide_mma and p.block_b == 64 and p.block_h == 8:
            return True
    return False


def some(p: Plan, limits: DeviceLimits) -> bool:
    """The same, of a few bytes: better that than no plan."""
    if p.layout != "dense" and _with_masks(p, limits):
        return True
    ieee = p.dtype == "fp32" and p.precision == "ieee"
    tile = p.block_b * p.block_h
    largest = 512 if p.dtype == "fp32" else 2048
    if p.cell != "lstm" and p.pass_ == "fwd" and p.schedule == "resident" and (p.block_b == 64 or tile >= largest):
        return True
    if p.cell == "slstm" and p.schedule == "single" and p.pass_ == "bwd" and p.dtype == "fp32" and p.block_h >= 64:
        return True
    if p.schedule == "resident":
        if p.pass_ == "bwd" and tile >= (512 if p.cell == "slstm" else 1024):
            return True
        if limits.arch == "sm_120" and p.block_b == 32:
            return True
        if p.pass_ == "fwd" and p.dtype == "fp32" and p.split > 1 and p.columns == 32 and p.block_h == 16:
            return True  # two gates
        return not limits.wide_mma and p.block_b == 64 and p.chunks > 8
    unaligned = p.hidden * ITEMSIZE[p.dtype] % 16 != 0
    if p.schedule == "streamed" and (ieee or limits.arch == "sm_120"):
        return tile >= 1024 and unaligned
    return p.schedule == "streamed" and tile >= 2048 and not limits.wide_mma


def _with_masks(p: Plan, limits: DeviceLimits) -> bool:
    """The same, of the plans that are clean without rows that come and go."""
    ieee = p.dtype == "fp32" and p.precision == "ieee"
    chunks, tile = math.ceil(p.reduction / p.block_k), p.block_b * p.block_h
    if p.cell != "lstm" and p.schedule == "streamed" and p.pass_ == "bwd" and tile >= 1024:
        return True
    if p.cell in ("peephole", "slstm") and p.schedule == "resident" and p.pass_ == "bwd" and tile >= 256:
        return True
    if not limits.wide_mma and ((ieee and tile >= 2048) or (p.block_b == 64 and chunks > 8)):
        return True
    largest = 1024 if p.hidden * ITEMSIZE[p.dtype] % 16 else 2048 if p.dtype == "fp32" else math.inf
    if (ieee or not limits.wide_mma) and tile >= largest:
        return True
    if p.schedule == "resident":
        if p.layout == "packed" and limits.wide_mma and p.split > 4 and p.block_h == 16 and p.chunks >= 8:
            return True
        return (tile >= 1024 and chunks >= 16) or (p.pass_ == "bwd" and tile >= 512 and chunks >= 32)
    return p.schedule == "single" and p.pass_ == "bwd" and p.dtype == "fp32" and p.block_h >= 64
