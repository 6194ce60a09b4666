"""Predict what a plan costs, and compute a bound that no plan can beat.

These are pure functions of counted work and of the constants of a device. Times are in microseconds and sizes in bytes.
A TB/s is 1e6 bytes per microsecond, and a TFLOP/s is 1e6 operations per microsecond. One time step takes:

    wait    = what the exchange takes, and an exchange_us for every norm:
                  by counter                 barrier_us
                  by data                    exchange_us, and half of operand, because it is loaded once too early
                  with a launch per step     the larger of launch_us and host_us
                  with one program           nothing
    operand = (rows x K + streamed weights) bytes / the multiprocessor's share of l2_tbps,
                  at least L2_US for every round of loads (`work`)
    product = 2 x block_b x N x K, padded to the tiles / the multiprocessor's share of the rate of the instruction,
                  at least LINK_US for every instruction along K, because each waits for the sum of the one before
    issue   = instructions of a warp x warps / SCHEDULERS x ISSUE_US + barriers x SYNC_US + waits for wgmma x WGMMA_US
    chain   = max(fetch_us, wait + operand + product) + issue
                  the parts run one after another, but loads from memory are issued before the wait
    port    = operand + the program's part of traffic / its share of l2_tbps
                  what one multiprocessor has to move
    traffic = (preactivations, gates, states, gradients, and weights that the L2 cannot hold) bytes / memory_tbps

    step    = max(walked x chain, walked x port, traffic)
    all     = launch_us + weights / memory_tbps + T x step, where a wave over L layers has T + L - 1 steps

Nothing of this was fitted to a measurement of time. Bank conflicts are not counted, nor are instructions that wait for
each other.
"""

import math
from typing import NamedTuple

from fusedlstm import cells
from fusedlstm.plan.devices import DeviceLimits
from fusedlstm.plan.problem import ITEMSIZE, Plan

STATE_ITEMSIZE = 4  # states beside h are saved in float32
SCHEDULERS = 4  # of a multiprocessor; each issues an instruction a cycle at most
ISSUE_US, SYNC_US, WGMMA_US = 0.00057, 0.02, 0.03  # assumed: a cycle at 1.755 GHz; some 35 cycles; some 50
L2_US = 0.25  # assumed: from a load to its data, from the L2
LINK_US = 0.018  # assumed: from one matrix instruction to the next that adds to its result, some 32 cycles
LINK_K = {"fp32": 8, "fp16": 16, "bf16": 16}  # of the reduction, an instruction
GEMM_EFFICIENCY = 0.7  # assumed: of a large product's share of the peak
# Instructions of a warp, fitted to resident plans of sm_90 by least squares of the relative error (2026-11-29): nine of
# ten are within 15 %.
BASE = {"fwd": 203.0, "bwd": 215.0}
OF_ELEMENT = {"fwd": 68.0, "bwd": 5.0}  # of the cell, a thread
OF_LOAD = {"fwd": 10.3, "bwd": 1.8}  # of 16 bytes of an operand, a thread
OF_PRODUCT = {"fwd": 0.0, "bwd": 4.7}  # a matrix instruction of 16 x 8, whose operands a warp loads itself
BY_DATA, LOOK_OF_LOAD = 39.0, 3.2  # the test whether all has come, and what of it goes with what is loaded
SYNCS, SYNCS_OF_ROUND, SYNCS_OF_NORM = 5, 2, 8  # barriers of a program's threads


class Work(NamedTuple):
    """Estimated numbers of one iteration and batch tile."""

    instructions: float  # of a warp
    bar_sync: float
    wgmma_waits: int
    load_rounds: float  # loads of what the group exchanges that wait for each other


def work(p: Plan, wide_mma: bool) -> Work:
    """Estimate the instructions, barriers, waits and rounds of loads of one step of the time loop.

    The estimate follows machine code: `bench/results/kernels.csv` has the counted numbers of every plan, in columns of
    the same names (`fusedlstm.engines.offline.Loop`), and `tests/cpu/test_cost.py` compares the two. The body of a loop
    over chunks is counted once for every time that it runs. `wide_mma` as of `devices.DeviceLimits`.
    """
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


class Cost(NamedTuple):
    """The parts of one time step of a plan, in microseconds. The module's docstring explains them."""

    fetch: float
    wait: float
    operand: float
    product: float
    issue: float
    port: float  # of one batch tile
    traffic: float  # of all batch tiles
    walked: int
    launch: float  # once
    steps: int  # in a row, for the T that was asked

    @property
    def chain(self) -> float:
        return max(self.fetch, self.wait + self.operand + self.product) + self.issue

    @property
    def rank(self) -> tuple[float, float]:
        """The key by which plans are sorted: the time, and then the work of those that all wait for the same memory."""
        own = self.wait + self.operand + self.product + self.issue
        return self.step, self.walked * own

    @property
    def step(self) -> float:
        return max(self.walked * self.chain, self.walked * self.port, self.traffic)

    @property
    def total(self) -> float:
        """All steps and the launch."""
        return self.launch + self.steps * self.step

    @property
    def limit(self) -> str:
        """The part that determines the time of the step."""
        return "memory" if self.traffic >= self.step else "L2" if self.port > self.chain else "the chain of a step"


class Bound(NamedTuple):
    """The least time of a step, whatever runs it, in microseconds."""

    arithmetic: float
    memory: float
    latency: float

    @property
    def step(self) -> float:
        return max(self)

    @property
    def limit(self) -> str:
        return self._fields[self.index(max(self))]


def cost(p: Plan, steps: int, batch: int, limits: DeviceLimits, *, saves: bool = True) -> Cost:
    """Predict the time of a plan.

    Args:
        steps, batch: T and B.
        saves: Whether a forward saves gates and states, as in training.
    """
    item, recurrences = ITEMSIZE[p.dtype], p.grid[2]
    products = 2 if p.stack else 1  # of a stack's layer also the input product
    share = limits.l2_tbps / limits.num_sms * 1e6  # bytes a microsecond
    rows = min(p.block_b, batch)
    stepped = p.schedule == "stepped"
    exchanges = p.protocol != "none" or stepped
    operand_bytes = rows * p.reduction * item * products if exchanges else 0
    if not p.resident:
        operand_bytes += p.reduction * p.columns * item * products
    done = work(p, limits.wide_mma)
    operand = max(operand_bytes / share, done.load_rounds * L2_US if exchanges else 0.0)
    product = 2 * p.block_b * p.columns * p.padded_reduction * products / (_rate(p, limits) / limits.num_sms * 1e6)
    if not (p.dtype == "fp32" and p.precision == "ieee"):
        product = max(product, p.padded_reduction * products / p.split / LINK_K[p.dtype] * LINK_US)
    issue = done.instructions * p.num_warps / SCHEDULERS * ISSUE_US
    issue += done.bar_sync * SYNC_US + done.wgmma_waits * WGMMA_US
    waits = {
        "counter": limits.barrier_us,
        "data": limits.exchange_us + operand / 2,
        "none": max(limits.launch_us, limits.host_us) if stepped else 0.0,
    }

    unit_bytes = _unit_bytes(p.cell, item, p.pass_, saves)
    if p.protocol == "data":  # what is exchanged is filled before
        unit_bytes += item * (1 if p.pass_ == "fwd" else cells.CELLS[p.cell].num_kept)
    port = operand + rows * min(p.block_h, p.hidden) * unit_bytes / share
    programs = p.grid[0] * p.tiles_b * recurrences
    walked = math.ceil(programs / limits.num_sms) if p.protocol == "none" else p.walked
    moved = batch * p.hidden * recurrences * unit_bytes
    if p.stack:  # between layers nothing passes through memory that the wave has not in the L2
        moved -= batch * p.hidden * (recurrences - 1) * item * _between_layers(p.cell, p.pass_)
    weights = _weight_bytes(p.cell, p.hidden, p.heads, recurrences, p.stack, item)
    if not p.resident and weights > limits.l2_bytes:
        moved += weights * p.walked
    return Cost(
        fetch=limits.fetch_us,
        wait=waits[p.protocol] / (walked if stepped else 1)  # once a launch
        + p.norms_per_step * limits.exchange_us,
        operand=operand,
        product=product,
        issue=issue,
        port=port,
        traffic=moved / (limits.memory_tbps * 1e6),
        walked=walked,
        launch=(0.0 if stepped else limits.launch_us) + weights / (limits.memory_tbps * 1e6),
        steps=steps + (recurrences - 1 if p.stack else 0),
    )


def bound(
    cell: str,
    steps: int,
    batch: int,
    hidden: int,
    dtype: str,
    directions: int,
    limits: DeviceLimits,
    pass_: str,
    precision: str = "tf32",
    heads: int = 1,
    stack: bool = False,
    *,
    saves: bool = True,
) -> Bound:
    """The least time of a step on a device, whatever runs it. The arguments are those of `plan.plan` and `cost`.

    It has three parts, and the largest counts:

    - arithmetic: the operations divided by the matrix rate of the whole device.
    - memory: the bytes that have to pass through memory, divided by memory_tbps. What the L2 can hold does not count.
      Weights count at every step as far as neither chip nor L2 can hold them.
    - latency: T - 1 exchanges of one trip each. If it is less, the time in which a single program would read its
      weights from the L2 at every step.
    """
    item, gates = ITEMSIZE[dtype], cells.CELLS[cell].num_gates
    weights = _weight_bytes(cell, hidden, heads, directions, stack, item)
    operations = 2 * batch * weights / item
    moved = batch * hidden * directions * _unit_bytes(cell, item, pass_, saves)
    if stack:
        moved -= batch * hidden * (directions - 1) * item * _between_layers(cell, pass_)
    on_chip = limits.smem_bytes + limits.register_bytes
    moved += max(0, weights - limits.num_sms * on_chip - limits.l2_bytes)
    memory_bytes = max(0.0, moved + (weights - limits.l2_bytes) / steps)
    head = gates * (hidden // heads) ** 2 * item
    streaming = max(0, head - on_chip) / (limits.l2_tbps / limits.num_sms * 1e6)
    return Bound(
        arithmetic=operations / (_matrix_rate(dtype, precision, limits) * 1e6),
        memory=memory_bytes / (limits.memory_tbps * 1e6),
        latency=min(limits.exchange_us, streaming) * (steps - 1) / steps,
    )


def cudnn_step_us(
    cell: str,
    batch: int,
    hidden: int,
    dtype: str,
    directions: int,
    limits: DeviceLimits,
    pass_: str,
    precision: str = "tf32",
    *,
    saves: bool = True,
    proj_size: int = 0,
) -> float:
    """Predict a step of cuDNN's standard algorithm, in microseconds: one product and one pointwise kernel.

    product   = max(launch_us, operations / (GEMM_EFFICIENCY x matrix rate), weights / (l2_tbps or memory_tbps))
    pointwise = max(launch_us, bytes of gates and states / memory_tbps)

    With a projection to P, the product has rows of P values, and a second product of H and P follows the pointwise
    kernel. Directions run one after another. cuDNN has faster kernels for small H (192 forward, 128 backward) and
    persistent kernels for float16. Only a measurement (`fusedlstm.tune`) takes these into account.
    """
    item, gates = ITEMSIZE[dtype], cells.CELLS[cell].num_gates
    factors = [(gates * hidden, proj_size or hidden), *([(proj_size, hidden)] if proj_size else [])]
    weights = sum(n * k for n, k in factors) * item
    bandwidth = limits.memory_tbps if weights * directions > limits.l2_bytes else limits.l2_tbps
    rate = _matrix_rate(dtype, precision, limits) * GEMM_EFFICIENCY
    product = sum(
        max(limits.launch_us, 2 * batch * n * k / (rate * 1e6), n * k * item / (bandwidth * 1e6)) for n, k in factors
    )
    moved = batch * hidden * _unit_bytes(cell, item, pass_, saves)
    return directions * (product + max(limits.launch_us, moved / (limits.memory_tbps * 1e6)))


def _unit_bytes(cell: str, item: int, pass_: str, saves: bool) -> int:
    """The bytes that a step reads from memory and writes to it, per hidden unit and sequence."""
    of = cells.CELLS[cell]
    saved = of.num_kept * item + of.num_cell_states * STATE_ITEMSIZE
    if pass_ == "fwd":
        return (of.num_gates + 1) * item + (saved if saves else 0)  # preact_x, h
    return saved + (1 + of.num_kept) * item  # grad_output, grad_preact


def _weight_bytes(cell: str, hidden: int, heads: int, recurrences: int, stack: bool, item: int) -> int:
    """The bytes of weight_hh of all recurrences. In a stack also of weight_ih of the layers above the first."""
    above = (recurrences - 1) * hidden if stack else 0
    return cells.CELLS[cell].num_gates * hidden * (recurrences * (hidden // heads) + above) * item


def _between_layers(cell: str, pass_: str) -> int:
    """The elements per unit that only the outermost layer of a stack reads: preact_x, or grad_output."""
    return cells.CELLS[cell].num_gates if pass_ == "fwd" else 1


def _matrix_rate(dtype: str, precision: str, limits: DeviceLimits) -> float:
    if dtype != "fp32":
        return limits.half_tflops
    return limits.fp32_tflops if precision == "ieee" else limits.tf32_tflops


def _rate(p: Plan, limits: DeviceLimits) -> float:
    """The TFLOP/s of the whole device with the matrix instruction that the compiler chooses for the tiles."""
    rate = _matrix_rate(p.dtype, p.precision, limits)
    matrix_rows = p.columns if p.transposed else p.block_b
    # Float32 has no matrix instruction, but few rows have little to reuse.
    return rate * limits.narrow_mma if limits.wide_mma and matrix_rows < 64 else rate
