"""How a recurrence runs on a device: a pure function from sizes and device limits to a plan.

A program owns `block_h` hidden units of one batch tile of `block_b` rows. Programs that share a batch tile and a
direction form a group and exchange h (forward) or the gradients of the preactivations (backward) at every step.

| schedule | weights | exchange |
|---|---|---|
| `single` | on chip | none: a group of one, all hidden units in one program |
| `resident` | the program's slice stays on chip for all steps | group barrier |
| `streamed` | read from L2 at every step | group barrier |
| `stepped` | the same | one launch a step, of any number of programs; dense only, and where nothing else fits |

Every other group of a launch must be on the device at once, or its programs would wait for ever; a launch therefore has at
most as many programs as the device holds, and walks the remaining batch tiles one after another.

The choice is the candidate with the least predicted time (`fusedlstm.cost`), of those that fit and compile well. The
prediction's constants are not fitted to measurements (`fusedlstm.devices`), so that it orders candidates and promises nothing;
a choice measured by `fusedlstm.tune` overrides it.
"""

import dataclasses
import math
from dataclasses import dataclass

from fusedlstm import cells, tables
from fusedlstm import cost as costs
from fusedlstm.cost import ITEMSIZE
from fusedlstm.devices import DEVICES, DeviceLimits

# How the rows of a batch lie (`fusedlstm.layout`): all of the same length; sorted and packed; or not, with lengths or resets.
LAYOUTS = ("dense", "packed", "ragged")
COUNTER_STRIDE = 32  # int32 values from one group's counter to the next: a cache line each
SPIN_LIMIT = 1 << 26  # polls of a counter before a wait is an error; tens of seconds
ATTEMPT_LIMIT = 1 << 22  # the same by data, whose poll is a whole product


class PlanError(RuntimeError):
    """No plan fits the device; the text says what was asked and what the device has."""


@dataclass(frozen=True)
class Plan:
    """One launch: every compile-time number of a kernel, its grid, and what it is expected to cost."""

    cell: str
    pass_: str  # "fwd" or "bwd"
    arch: str
    dtype: str
    hidden: int
    heads: int  # block-diagonal blocks of weight_hh
    stack: bool  # whether the recurrences of the launch are layers, and not directions
    layout: str  # one of LAYOUTS
    schedule: str  # "single", "resident", "streamed" or "stepped"
    block_b: int
    block_h: int
    block_k: int
    protocol: str  # of the exchange: "counter", "data" or "none"
    transposed: bool
    split: int  # parts of a chunk, a warp each
    precision: str  # of float32 products: "tf32" or "ieee"
    num_warps: int
    stages: int  # of the streamed loop
    grid: tuple[int, int, int]  # programs of all heads' groups, batch tiles that run side by side, directions or layers
    tiles_b: int  # batch tiles; grid[1] of them run at once
    smem_bytes: int  # at most, a program
    regs: int  # roughly, a thread
    step_us: float  # predicted, all batch tiles
    why: str

    @property
    def group(self) -> int:
        """Programs that exchange data."""
        return self.grid[0] // self.heads

    @property
    def columns(self) -> int:
        """N of the program's product: gates and units forward, units backward."""
        return _product_sizes(self.cell, self.hidden // self.heads, self.block_h, self.pass_)[0]

    @property
    def reduction(self) -> int:
        """K of the program's product: units forward, gates and units backward."""
        return _product_sizes(self.cell, self.hidden // self.heads, self.block_h, self.pass_)[1]

    @property
    def chunks(self) -> int:
        """Of the reduction: `block_k` each, cut where a gate ends if gates are taken one by one."""
        by_gate = self.schedule == "single" or self.heads > 1
        segments = cells.CELLS[self.cell].num_gates if self.pass_ == "bwd" and by_gate else 1
        return segments * math.ceil(self.reduction // segments / self.block_k)

    @property
    def padded_reduction(self) -> int:
        """K with the padding of its chunks."""
        return self.chunks * self.block_k

    @property
    def local(self) -> bool:
        """Whether nothing is exchanged."""
        return self.protocol == "none"

    @property
    def resident(self) -> bool:
        return self.schedule in ("single", "resident")

    @property
    def barriers_per_step(self) -> int:
        return 0 if self.local else 1 + self.norms_per_step  # in a launch

    @property
    def norms_per_step(self) -> int:
        """Exchanges of sums, by a counter whatever the protocol."""
        return 2 if cells.CELLS[self.cell].norms and not self.local else 0

    @property
    def walked(self) -> int:
        """Batch tiles that a program walks, one after another."""
        return math.ceil(self.tiles_b / self.grid[1])


def plan(
    cell: str,
    steps: int,
    batch: int,
    hidden: int,
    dtype: str,
    directions: int,
    limits: DeviceLimits,
    pass_: str,
    precision: str = "tf32",
    layout: str = "dense",
    heads: int = 1,
    stack: bool = False,
    protocol: str | None = None,
) -> Plan:
    """Choose how one layer runs: the first of `candidates`, whose arguments these are."""
    problem = (cell, steps, batch, hidden, dtype, directions, limits, pass_, precision, layout, heads, stack, protocol)
    p, c = _choices(*problem)[0]
    return dataclasses.replace(p, step_us=c.step)


def candidates(
    cell: str,
    steps: int,
    batch: int,
    hidden: int,
    dtype: str,
    directions: int,
    limits: DeviceLimits,
    pass_: str,
    precision: str = "tf32",
    layout: str = "dense",
    heads: int = 1,
    stack: bool = False,
    protocol: str | None = None,
) -> list[Plan]:
    """All plans with which one layer can run, by predicted time, least first; at least one.

    The best of those with a launch a step comes last, until a GPU has told what launches cost (`fusedlstm.tune` tries it).

    Args:
        cell: a name of `fusedlstm.cells.CELLS`.
        steps, batch, hidden: T, B, H; at least 1. T does not change the order.
        dtype: "fp32", "fp16" or "bf16".
        directions: 1 or 2, or the layers of a stack; all run in one launch.
        limits: of the device; `devices.DEVICES` has one an architecture.
        pass_: "fwd" or "bwd".
        precision: of float32 products, "tf32" or "ieee".
        layout: one of `LAYOUTS`; with lengths of their own, the tiles of a group end at different steps.
        heads: blocks of a block-diagonal `weight_hh`.
        stack: whether the recurrences are the layers of a stack, as a wave.
        protocol: of the exchange, "counter" or "data"; None leaves it to the plan.

    Raises:
        PlanError: nothing fits; the text names the size and the limit.
    """
    problem = (cell, steps, batch, hidden, dtype, directions, limits, pass_, precision, layout, heads, stack, protocol)
    return [dataclasses.replace(p, step_us=c.step) for p, c in _choices(*problem)]


def _choices(
    cell: str,
    steps: int,
    batch: int,
    hidden: int,
    dtype: str,
    directions: int,
    limits: DeviceLimits,
    pass_: str,
    precision: str,
    layout: str,
    heads: int,
    stack: bool,
    protocol: str | None,
) -> list[tuple[Plan, costs.Cost]]:
    """Plans without their time, and their costs, best first."""
    if min(steps, batch, hidden) < 1:
        raise PlanError(f"steps, batch and hidden: expected at least 1, got {steps}, {batch} and {hidden}")
    if limits.arch.startswith("gfx"):
        precision = "ieee"  # Triton takes tf32 on few AMD targets
    if cells.CELLS[cell].norms and (heads > 1 or stack):
        raise PlanError(
            f"heads and stack: expected one head and one layer a launch of {cell}, whose norms are over all units of a layer, got "
            f"{heads} head(s){' and a stack' if stack else ''}"
        )
    problem = (cell, batch, hidden, dtype, directions, limits, pass_, precision, layout, heads, stack, protocol)
    tilings = _tilings(hidden // heads, batch, dtype, precision, pass_)
    found = [p for tiling in tilings if (p := _fit(*problem, *tiling)) and not _spills(p, limits)]
    steppable = layout == "dense" and not (stack or cells.CELLS[cell].norms)
    stepped = _steps(cell, batch, hidden, dtype, directions, limits, pass_, precision, heads, 0) if steppable else []
    if not found and not stepped:
        raise PlanError(
            f"hidden={hidden} with {directions} direction(s) in {dtype}, {layout}, does not fit {limits.name}: a group must be on "
            f"the device at once, and {limits.num_sms} programs of {limits.smem_bytes >> 10} KiB are too few"
        )
    masked = layout != "dense"
    clean = [p for p in found if not (_spills_some(p, limits) or (masked and _spills_with_masks(p, limits)))]
    return _ranked(clean or found, batch, limits) + stepped[: 1 if found else None]


def step_plan(*arguments, **more) -> Plan:
    """The first of `step_plans`, whose arguments these are."""
    return step_plans(*arguments, **more)[0]


def step_plans(
    cell: str,
    batch: int,
    hidden: int,
    dtype: str,
    directions: int,
    limits: DeviceLimits,
    pass_: str,
    precision: str = "tf32",
    heads: int = 1,
    input_size: int = 0,
) -> list[Plan]:
    """All plans of the kernels of one step, by predicted time: nobody waits, so there may be more programs than the device
    holds at once.

    Args: as `candidates`, and
        input_size: I, if the input product is taken in the same launch; 0: the preactivations come ready-made. Both products
            being of one form, it does not change the order.

    Raises:
        PlanError: a size is less than it can be.
    """
    problem = (cell, batch, hidden, dtype, directions, limits, pass_, precision, heads, input_size)
    return [dataclasses.replace(p, step_us=c.step) for p, c in _steps(*problem)]


def _steps(
    cell: str,
    batch: int,
    hidden: int,
    dtype: str,
    directions: int,
    limits: DeviceLimits,
    pass_: str,
    precision: str,
    heads: int,
    input_size: int,
) -> list[tuple[Plan, costs.Cost]]:
    """As `_choices`, of the kernels of one step."""
    if min(batch, hidden) < 1 or input_size < 0:
        raise PlanError(
            f"batch and hidden: expected at least 1, input_size at least 0, got {batch}, {hidden} and {input_size}"
        )
    if limits.arch.startswith("gfx"):
        precision = "ieee"  # Triton takes tf32 on few AMD targets
    if batch == 1:
        tilings = [(1, _units_of_a_row(hidden * directions, limits, pass_))]
    else:
        # An element of the cell needs a dozen registers; unaligned rows need more, and so do two products at once.
        unaligned = hidden // heads * ITEMSIZE[dtype] % 16 or (dtype == "fp32" and precision == "ieee")
        most = 2048 if unaligned or input_size or limits.arch.startswith("gfx") else 4096
        tilings = [
            (block_b, block_h)
            for block_b in (16, 32, 64, 128)
            for block_h in (4, 8, 16, 32, 64)
            if (block_b == 16 or block_b < 2 * batch)
            and block_b * block_h <= most
            and block_h < max(5, 2 * hidden // heads)
        ]
    problem = (cell, batch, hidden, dtype, directions, limits, pass_, precision, heads, input_size)
    found = [p for tiling in tilings if (p := _fit_step(*problem, *tiling))]
    return _ranked(found, batch, limits)


def _ranked(plans: list[Plan], batch: int, limits: DeviceLimits) -> list[tuple[Plan, costs.Cost]]:
    """By predicted time."""
    costed = [(p, costs.cost(p, 1, batch, limits)) for p in plans]
    return sorted(costed, key=lambda x: (*x[1].rank, x[0].grid[0] * x[0].grid[1], x[0].block_b, x[0].block_h))


def wave(
    cell: str,
    layers: int,
    batch: int,
    hidden: int,
    dtype: str,
    limits: DeviceLimits,
    precision: str = "tf32",
    layout: str = "dense",
    training: bool = True,
) -> int:
    """How many layers of a stack should share a launch, one step apart: what is predicted to take least; at least 1.

    Sizes as in `plan`; `training` if a backward will follow.
    """

    def stack_us(together: int) -> float:
        """A step of all layers, in launches of `together` and one of the rest."""
        total = 0.0
        for n, launches in ((together, layers // together), (layers % together, 1)):
            for pass_ in ("fwd", "bwd") if training else ("fwd",):
                if n:
                    p = plan(cell, 1, batch, hidden, dtype, n, limits, pass_, precision, layout, stack=n > 1)
                    total += p.step_us * launches
        return total

    best, least = 1, stack_us(1)
    for together in range(2, layers + 1):
        try:
            predicted = stack_us(together)
        except PlanError:
            break  # nor do more fit
        if predicted < least:
            best, least = together, predicted
    return best


CLEARLY = 1.5  # cuDNN is taken without a measurement where it is predicted to be this much faster


def beside_cudnn(
    cell: str,
    batch: int,
    hidden: int,
    dtype: str,
    directions: int,
    limits: DeviceLimits,
    precision: str = "tf32",
    training: bool = True,
) -> tuple[float, float]:
    """Predicted microseconds a step of the kernels and of cuDNN (`cost.cudnn_step_us`), dense; training: of both passes."""
    ours = cudnn = 0.0
    for pass_ in ("fwd", "bwd") if training else ("fwd",):
        sizes = (batch, hidden, dtype, directions, limits, pass_, precision)
        ours += plan(cell, 1, *sizes).step_us
        cudnn += costs.cudnn_step_us(cell, *sizes, saves=training)
    return ours, cudnn


def explain(
    hidden: int,
    batch: int = 64,
    steps: int = 100,
    dtype: str = "bf16",
    arch: str = "sm_90",
    directions: int = 1,
    heads: int = 1,
    runners_up: int = 4,
) -> str:
    """Both plans of an LSTM layer in words, as `python -m fusedlstm plan` prints them."""
    limits = DEVICES[arch]
    text = [f"LSTM layer: T={steps} B={batch} H={hidden} {dtype}, {directions} direction(s), {arch} ({limits.name})"]
    if heads > 1:
        text[0] += f", {heads} heads"
    for pass_, title in (("fwd", "forward"), ("bwd", "backward")):
        found = candidates("lstm", steps, batch, hidden, dtype, directions, limits, pass_, heads=heads)
        p, c = found[0], costs.cost(found[0], steps, batch, limits)
        bound = costs.bound("lstm", steps, batch, hidden, dtype, directions, limits, pass_, heads=heads)
        text += [
            f"\n{title}: {p.schedule} - {p.why}",
            f"  tile           {p.block_b} batch rows x {p.block_h} hidden units, reduction in chunks of {p.block_k}"
            + (", transposed dot" if p.transposed else ""),
            f"  grid           {p.group} programs a group x {p.grid[1]} groups x {p.grid[2]} direction(s), "
            f"{p.num_warps} warps each; {p.walked} batch tile(s) a group, one after another",
            f"  shared memory  at most {p.smem_bytes / 1024:.0f} of {limits.smem_bytes >> 10} KiB; "
            f"about {p.regs} registers a thread",
            f"  synchronised   {p.barriers_per_step} barrier(s) a step, protocol {p.protocol}",
            f"  predicted      {c.step:.2f} us a step, set by {c.limit}; {c.total / 1000:.3f} ms in all "
            "(an ordering of candidates, not a measurement)",
            f"                 wait {c.wait:.2f}, operand {c.operand:.2f}, product {c.product:.2f}, pointwise "
            f"{c.pointwise:.2f}, x {c.walked} walked; memory {c.traffic:.2f}; launch and weights {c.launch:.1f}",
            f"  bound          {bound.step:.2f} us a step, set by {bound.limit}: arithmetic {bound.arithmetic:.2f}, "
            f"memory {bound.memory:.2f}, latency {bound.latency:.2f}",
        ]
        rows = [
            (
                f"{k}.",
                q.schedule,
                f"{q.block_b}x{q.block_h}x{q.block_k}{'T' if q.transposed else ''}",
                q.num_warps,
                "x".join(map(str, q.grid)),
                q.walked,
                f"{q.smem_bytes / 1024:.0f}",
                f"{q.step_us:.2f}",
            )
            for k, q in enumerate(found[: 1 + runners_up], 1)
        ]
        text.append(tables.text(["", "schedule", "tiles", "warps", "grid", "walked", "smem KiB", "us a step"], rows))
    if heads == 1:
        text.append("")
        for training, title in ((True, "training"), (False, "inference")):
            ours, cudnn = beside_cudnn("lstm", batch, hidden, dtype, directions, limits, training=training)
            engine = "torch" if ours > CLEARLY * cudnn else "triton"
            text.append(
                f"auto, {title}: {engine} - predicted {ours:.2f} us a step, cuDNN {cudnn:.2f} (a product and a pointwise "
                f"kernel a step); torch is taken from {CLEARLY} times its time on, or where `fusedlstm.tune` measured it faster"
            )
    return "\n".join(text)


def _product_sizes(cell: str, hidden: int, block_h: int, pass_: str) -> tuple[int, int]:
    """N and K of a program's product: gates of its units by all units forward, its units by all gates backward."""
    gates = cells.CELLS[cell].num_gates
    return (block_h * _power_of_2(gates), hidden) if pass_ == "fwd" else (block_h, gates * hidden)


def _tilings(hidden: int, batch: int, dtype: str, precision: str, pass_: str):
    """Schedules and tiles worth a look: (schedule, block_b, block_h). What spills is left out (see `docs/design.md`)."""
    ieee = dtype == "fp32" and precision == "ieee"
    for block_b in (16, 32, 64):
        if block_b > 16 and block_b >= 2 * batch:
            continue
        if hidden <= 128 and not ieee:
            yield "single", block_b, max(16, _power_of_2(hidden))
        # A resident loop is unrolled over its chunks, and spills with IEEE products or with many rows.
        most_rows = 0 if ieee else 16 if dtype == "fp32" else 64 if pass_ == "fwd" else 32
        for block_h in (8, 16, 32, 64):
            if block_h < hidden or block_h == 8:
                if block_b <= most_rows:
                    yield "resident", block_b, block_h
                yield "streamed", block_b, block_h


def _block_k(
    schedule: str,
    block_b: int,
    block_h: int,
    dtype: str,
    ieee: bool,
    reduction: int,
    columns: int,
    pass_: str,
    layout: str,
    transposed: bool,
    split: bool,
) -> int:
    """Chunk of the reduction: long enough that an unrolled loop has few, short enough that one fits into registers."""
    if schedule == "single":
        return block_h
    if ieee:
        widest = 16
    elif schedule == "streamed":
        widest = 64 if dtype != "fp32" else 32
    elif dtype == "fp32":
        widest = 64 if transposed or (split and columns > 16) else 256 if split else 128
    elif transposed:
        widest = 256 if block_b == 16 else 128
    elif split:
        widest = 512 if block_b == 16 else 256 if columns <= 16 else 128
    else:
        widest = 64 if block_b == 64 else 256 if pass_ == "bwd" and block_b == 16 else 128
    if layout != "dense" and schedule == "resident":  # rows that come and go need registers, too
        widest = min(widest, 128 if dtype == "fp32" or block_b == 32 else widest)
        widest = min(widest, 64 if pass_ == "fwd" and block_b == 32 else widest)
    return min(widest, max(16, _power_of_2(reduction)))


def _longest_chunk(cell: str, pass_: str, dtype: str, masked: bool, wide: bool, block_h: int) -> int:
    """Of a resident reduction of cells beside the LSTM, found where the compiler spilled; `wide`: a transposed product
    of a large tile."""
    if cells.CELLS[cell].norms and dtype == "fp32":
        if pass_ == "fwd":
            return 32 if masked or block_h <= 16 else 64
        return 128 if masked else 2048 // block_h
    if cells.CELLS[cell].norms:
        return (64 if masked and pass_ == "bwd" and block_h == 8 else 128) if pass_ == "fwd" or masked else 256
    if dtype == "fp32":
        return 32 if masked else 128 if cell == "gru" and pass_ == "bwd" and block_h > 8 else 256
    if pass_ == "fwd":
        return 64 if wide else 512
    return 256 // (2 if cell == "slstm" and masked else 1) if cell == "slstm" or masked else 512


def _fit(
    cell: str,
    batch: int,
    hidden: int,
    dtype: str,
    directions: int,
    limits: DeviceLimits,
    pass_: str,
    precision: str,
    layout: str,
    heads: int,
    stack: bool,
    protocol: str | None,
    schedule: str,
    block_b: int,
    block_h: int,
) -> Plan | None:
    """The plan with these tiles, or None if it does not fit."""
    itemsize = ITEMSIZE[dtype]
    ieee = dtype == "fp32" and precision == "ieee"
    columns, reduction = _product_sizes(cell, hidden // heads, block_h, pass_)
    group = 1 if schedule == "single" else math.ceil(hidden // heads / block_h)
    if schedule == "single":
        if stack:
            return None  # layers exchange h
        protocol = "none"
    elif schedule == "streamed":
        if protocol == "data":
            return None  # pipelined loads of x may be kept in the first-level cache, where what is new is never seen
        protocol = "counter"
    elif protocol is None:
        protocol = "data"  # one trip through the L2 and not three; and fewer registers, as `make kernels` finds
        if limits.arch == "sm_100":
            protocol = "counter"  # Triton 3.7.1 fails to compile the other there
    group_of_heads = group * heads
    if protocol != "none" and group_of_heads * directions > limits.num_sms:
        return None

    transposed = limits.wide_mma and not ieee and block_b < 64 <= columns
    if schedule == "resident" and dtype == "fp32" and reduction * columns > 1 << 15:
        transposed = False  # spills, where the plain form does not
    if cells.CELLS[cell].norms and schedule == "resident" and dtype == "fp32":
        transposed = False  # the same
    by_gate = pass_ == "bwd" and (schedule == "single" or heads > 1)  # a head's columns are a part of every gate
    segment = hidden // heads if by_gate else reduction
    # A small tile has too few columns for all warps, and one warp's long chain of products would wait for itself.
    splits = schedule == "resident" and not transposed and columns <= (32 if pass_ == "fwd" else 16) and block_b <= 32
    block_k = _block_k(schedule, block_b, block_h, dtype, ieee, segment, columns, pass_, layout, transposed, splits)
    norms, masked = cells.CELLS[cell].norms, layout != "dense"
    if norms and _spills_with_norms(schedule, pass_, block_b, block_h, dtype, reduction, masked, transposed):
        return None
    if cell != "lstm" and schedule == "resident":  # more lives through a step, and a shorter chunk leaves registers
        block_k = min(
            block_k, _longest_chunk(cell, pass_, dtype, masked, transposed and block_b * block_h >= 512, block_h)
        )
    chunks = reduction // segment * math.ceil(segment / block_k)
    slice_bytes = chunks * block_k * columns * itemsize * (2 if stack else 1)
    exchange_bytes = block_b * block_k * itemsize
    stages = 1 if schedule != "streamed" else 2 if ieee else 3
    if schedule == "streamed":
        smem_bytes = stages * (block_k * columns * itemsize + exchange_bytes)
    else:
        if schedule == "single" and pass_ == "bwd":
            exchange_bytes *= chunks  # the gradients of all gates are on their way at once
        in_registers = limits.weights_in_registers and schedule == "resident"  # one chunk passes through all the same
        smem_bytes = exchange_bytes + (block_k * columns * itemsize if in_registers else slice_bytes)
    num_warps = _num_warps(schedule, block_b, block_h, columns, dtype, narrow=ieee or not limits.wide_mma)
    if pass_ == "bwd" and ieee and block_h > 8 and not limits.weights_in_registers:
        num_warps = 8
    if layout == "packed" and schedule == "resident" and chunks > 3 and block_b < 64:
        num_warps = 8  # rows that come and go need registers, which long unrolled loops do not leave
    if norms and not (transposed and pass_ == "fwd"):
        # On sm_80 eight warps spill what four do not.
        narrow = splits and block_h == 8 and not limits.wide_mma
        num_warps = 4 if narrow and pass_ == "bwd" else 8
    largest = 256 if cell == "slstm" and pass_ == "bwd" else 1024  # of a streamed tile with four
    if cell != "lstm" and not norms and (schedule != "streamed" or block_b * block_h >= largest):
        num_warps = 8  # the same; the LSTM's tiles were tried one by one
    # A change of layout may stage the accumulators, and the sums of a chunk's parts meet there.
    # (How often: not less than any plan of the table was found to take.)
    parts = max(block_b // 8, num_warps if cell != "lstm" else 0)
    smem_bytes += 4 * block_b * columns * (parts if splits else 1)
    if smem_bytes > limits.smem_bytes:
        return None
    split = min(num_warps, block_k // 16) if splits else 1
    threads = num_warps * limits.warp_size
    regs = _registers(block_b, block_h, block_k, columns, itemsize, threads, schedule, slice_bytes, limits)
    if regs > 255:
        return None
    tiles_b = math.ceil(batch / block_b)
    groups = tiles_b if protocol == "none" else min(tiles_b, limits.num_sms // (group_of_heads * directions))
    return Plan(
        cell=cell,
        pass_=pass_,
        arch=limits.arch,
        dtype=dtype,
        hidden=hidden,
        heads=heads,
        stack=stack,
        layout=layout,
        schedule=schedule,
        block_b=block_b,
        block_h=block_h,
        block_k=block_k,
        protocol=protocol,
        transposed=transposed,
        split=split,
        precision=precision if dtype == "fp32" else "tf32",
        num_warps=num_warps,
        stages=stages,
        grid=(group_of_heads, groups, directions),
        tiles_b=tiles_b,
        smem_bytes=smem_bytes,
        regs=regs,
        step_us=math.nan,  # that is for `_ranked` to say
        why=_why(schedule, slice_bytes, group, limits),
    )


def _units_of_a_row(units: int, limits: DeviceLimits, pass_: str) -> int:
    """Hidden units of a program for a single sequence: as many as leave four programs to a multiprocessor.

    Backward at least 32: those lie side by side in memory.
    """
    most = max(1, units // (4 * limits.num_sms))
    block_h = min(8, _power_of_2(most + 1) // 2)
    return max(32, block_h) if pass_ == "bwd" else block_h


def _fit_step(
    cell: str,
    batch: int,
    hidden: int,
    dtype: str,
    directions: int,
    limits: DeviceLimits,
    pass_: str,
    precision: str,
    heads: int,
    input_size: int,
    block_b: int,
    block_h: int,
) -> Plan | None:
    """The plan of one step with these tiles, or None if it does not fit."""
    itemsize = ITEMSIZE[dtype]
    ieee = dtype == "fp32" and precision == "ieee"
    columns, reduction = _product_sizes(cell, hidden // heads, block_h, pass_)
    longest = _power_of_2(max(hidden // heads if heads > 1 else reduction, input_size))
    row_bytes = math.gcd(hidden // heads, input_size) * itemsize  # at these the rows of weights are aligned
    if block_b == 1:
        most = 8192 if itemsize == 2 and row_bytes % 16 == 0 else 4096  # products that are summed apart
        block_k, stages, transposed = min(longest, 1024, most // columns), 2, False
        smem_bytes = stages * columns * block_k * itemsize
        num_warps = max(1, min(4, columns * block_k // (limits.warp_size * 8)))
        regs = 64 + 2 * columns * block_k // (limits.warp_size * num_warps)
    else:
        transposed = limits.wide_mma and not ieee and block_b < 64 <= columns
        num_warps = 8 if block_b * columns >= 4096 or block_b * block_h >= 2048 else 4
        threads = num_warps * limits.warp_size
        widest = 16 if ieee else min(128, max(32, (16 << 10) // (itemsize * max(columns, block_b))))
        at_once = math.gcd(row_bytes, 16) // itemsize  # elements of a load
        few_loads = _power_of_2(32 * threads * at_once // (columns + block_b) + 1) // 2  # of a thread and chunk: 32
        block_k = max(16, min(widest, few_loads, longest))
        stages = 2 if ieee else 3
        smem_bytes = stages * block_k * (columns + block_b) * itemsize + 4 * block_b * columns
        products = 2 if input_size else 1
        regs = 48 + (products * block_b * columns + 6 * block_b * block_h) // threads
    if smem_bytes > limits.smem_bytes:
        return None
    group, tiles_b = math.ceil(hidden // heads / block_h) * heads, math.ceil(batch / block_b)
    return Plan(
        cell=cell,
        pass_=pass_,
        arch=limits.arch,
        dtype=dtype,
        hidden=hidden,
        heads=heads,
        stack=False,
        layout="dense",
        schedule="stepped",
        block_b=block_b,
        block_h=block_h,
        block_k=block_k,
        protocol="none",
        transposed=transposed,
        split=1,
        precision=precision if dtype == "fp32" else "tf32",
        num_warps=num_warps,
        stages=stages,
        grid=(group, tiles_b, directions),
        tiles_b=tiles_b,
        smem_bytes=smem_bytes,
        regs=regs,
        step_us=math.nan,  # that is for `_ranked` to say
        why="one launch a step: weights pass by once, h goes through memory, nobody waits",
    )


def _spills(p: Plan, limits: DeviceLimits) -> bool:
    """Whether the compiler is known to make a mess of this plan: found by `make kernels`, see docs/design.md."""
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


def _spills_some(p: Plan, limits: DeviceLimits) -> bool:
    """The same, of a few bytes: better that than no plan."""
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


def _spills_with_masks(p: Plan, limits: DeviceLimits) -> bool:
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


def _spills_with_norms(
    schedule: str, pass_: str, block_b: int, block_h: int, dtype: str, reduction: int, masked: bool, transposed: bool
) -> bool:
    """The same, of cells with norms: more lives through a step."""
    if schedule == "single":
        return pass_ == "bwd" and dtype == "fp32" and block_h >= 64
    if schedule == "streamed":
        return False
    if pass_ == "fwd":
        return block_b == 64 or (transposed and block_b > 16)
    return (masked and max(block_b, block_h) == 32) or (dtype == "fp32" and reduction >= 4096)


def _why(schedule: str, slice_bytes: int, group: int, limits: DeviceLimits) -> str:
    place = "registers" if limits.weights_in_registers else "shared memory"
    if schedule == "single":
        return f"all of weight_hh ({slice_bytes >> 10} KiB) stays in the {place} of one program; nobody waits"
    if schedule == "resident":
        return f"{group} programs hold {slice_bytes >> 10} KiB of weight_hh each in {place} for all steps"
    return f"a slice of weight_hh ({slice_bytes >> 10} KiB a program) is read from L2 at every step"


def _num_warps(schedule: str, block_b: int, block_h: int, columns: int, dtype: str, narrow: bool) -> int:
    """Four warps, or eight where the tile of the dot or of the cell is large."""
    large = columns >= 128 or block_b * max(columns, 4 * block_h) >= 8192 or (narrow and block_b >= 64)
    return 8 if large or (schedule == "single" and dtype == "fp32" and block_h >= 64) else 4


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


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
