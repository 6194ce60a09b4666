"""Choose a plan: the one with the least predicted time of those that fit and compile well. Explain a plan in words."""

import dataclasses
from collections.abc import Iterable, Sequence

from fusedlstm import cells
from fusedlstm.plan import cost as costs
from fusedlstm.plan import devices, tiles
from fusedlstm.plan.devices import DeviceLimits
from fusedlstm.plan.problem import Plan, PlanError, Problem


def plan(
    cell: str,
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
    """Choose how one layer runs: the first of `candidates`. Arguments: the fields of a `Problem`."""
    sizes = (cell, batch, hidden, dtype, directions, pass_, precision, layout, heads, stack)
    return candidates(Problem(*sizes, limits, protocol))[0]


def candidates(of: Problem) -> list[Plan]:
    """All plans with which one layer can run, at least one, ordered by predicted time with the least first.

    The best plan with one launch per step comes last, because no GPU has measured yet what launches cost.
    `fusedlstm.tune` tries it too. If sequences have lengths, the tiles of a group end at different steps.

    Raises:
        PlanError: No plan fits. The text names the size and the limit.
    """
    if min(of.batch, of.hidden) < 1:
        raise PlanError(f"batch and hidden: expected at least 1, got {of.batch} and {of.hidden}")
    limits = of.limits
    of = of._replace(precision=_precision(limits, of.precision))
    if of.norms and (of.heads > 1 or of.stack):
        raise PlanError(
            f"heads and stack: expected one head and one layer a launch of {of.cell}, whose norms are over all units "
            f"of a layer, got {of.heads} head(s){' and a stack' if of.stack else ''}"
        )
    found = _ranked(tiles.of_a_loop(of), of)
    stepped = [] if of.masked or of.stack or of.norms else _ranked(tiles.of_a_step(of), of)
    if not found and not stepped:
        raise PlanError(
            f"hidden={of.hidden} with {of.directions} direction(s) in {of.dtype}, {of.layout}, does not fit "
            f"{limits.name}: a group must be on the device at once, and {limits.num_sms} programs of "
            f"{limits.smem_bytes >> 10} KiB are too few"
        )
    return found + stepped[: 1 if found else None]


def step_plan(*arguments, **more) -> Plan:
    """The first of `step_plans`, with the same arguments."""
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
    """All plans of the kernels of one step, by predicted time, least first.

    No program waits, so there may be more programs than the device holds at once.

    Args: The fields of a `Problem`, and
        input_size: I if the launch also computes the input product, or 0 if it gets the preactivations. It does not
            change the order, because both products have the same form.

    Raises:
        PlanError: A size is too small.
    """
    if min(batch, hidden) < 1 or input_size < 0:
        raise PlanError(
            f"batch and hidden: expected at least 1, input_size at least 0, got {batch}, {hidden} and {input_size}"
        )
    problem = (cell, batch, hidden, dtype, directions, pass_, _precision(limits, precision))
    of = Problem(*problem, heads=heads, device_limits=limits, input_size=input_size)
    return _ranked(tiles.of_a_step(of), of)


def _precision(limits: DeviceLimits, precision: str) -> str:
    return "ieee" if limits.arch.startswith("gfx") else precision  # Triton takes tf32 on few AMD targets


def _ranked(plans: list[Plan], of: Problem) -> list[Plan]:
    """The plans with their predicted times, least first."""
    costed = [(p, costs.cost(p, 1, of.batch, of.limits)) for p in plans]
    costed.sort(key=lambda x: (*x[1].rank, x[0].grid[0] * x[0].grid[1], x[0].block_b, x[0].block_h))
    return [dataclasses.replace(p, step_us=c.step) for p, c in costed]


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
    """How many layers of a stack should share a launch, one step apart. It is the number with the least predicted time.

    The sizes are those of `plan`. `training` says whether a backward will follow.
    """

    def stack_us(together: int) -> float:
        """A step of all layers, in launches of `together` and one of the rest."""
        total = 0.0
        for n, launches in ((together, layers // together), (layers % together, 1)):
            for pass_ in ("fwd", "bwd") if training else ("fwd",):
                if n:
                    p = plan(cell, batch, hidden, dtype, n, limits, pass_, precision, layout, stack=n > 1)
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
    layout: str = "dense",
    proj_size: int = 0,
) -> tuple[float, float]:
    """The predicted microseconds per step of the kernels and of cuDNN (`cost.cudnn_step_us`).

    In training they are of forward and backward together. For a packed batch they are those of a step that all
    sequences have. A projection changes the time of cuDNN only.
    """
    ours = cudnn = 0.0
    for pass_ in ("fwd", "bwd") if training else ("fwd",):
        sizes = (batch, hidden, dtype, directions, limits, pass_, precision)
        ours += plan(cell, *sizes, layout).step_us
        cudnn += costs.cudnn_step_us(cell, *sizes, saves=training, proj_size=proj_size)
    return ours, cudnn


GLOSSARY = """\
Words: a tile is the batch rows and hidden units that one program computes. A
group is the programs that need each other's results at every step. An exchange
is the moment when they pass them on. The schedule says where weight_hh is: all
of it in one program (single), a slice in each program (resident), read at every
step (streamed), or one launch a step (stepped)."""


def explain(
    hidden: int,
    batch: int = 64,
    steps: int = 100,
    dtype: str = "bf16",
    arch: str = "sm_90",
    directions: int = 1,
    heads: int = 1,
    runners_up: int = 4,
    cell: str = next(iter(cells.CELLS)),
) -> str:
    """Explain the plans of a layer, forward and backward, in words. `python -m fusedlstm plan` prints this.

    Args:
        hidden, batch, steps: H, B and T, each at least 1.
        dtype: "fp32", "fp16" or "bf16".
        arch: A GPU or an architecture, as `devices.find` takes it.
        directions: 1 or 2.
        heads: The number of heads.
        runners_up: How many further candidates to list for each pass.
        cell: A name in `fusedlstm.cells.CELLS`.

    Raises:
        ValueError: `arch` is unknown, or `FUSEDLSTM_SMS` is wrong.
        RuntimeError: The kernels do not serve the device, or no plan fits.
    """
    if steps < 1:
        raise PlanError(f"steps: expected at least 1, got {steps}")
    whole = devices.find(arch)
    limits = devices.capped(whole, devices.sms())
    title = f"{cell} layer: T={steps} B={batch} H={hidden} {dtype}, {directions} direction(s)"
    title += f", {heads} heads" if heads > 1 else ""
    text = [f"{title}, {devices.described(limits)}"]
    if limits.num_sms < whole.num_sms:
        text[0] += f", {limits.num_sms} of {whole.num_sms} multiprocessors (FUSEDLSTM_SMS)"
    for pass_, name in (("fwd", "forward"), ("bwd", "backward")):
        plans = candidates(Problem(cell, batch, hidden, dtype, directions, pass_, heads=heads, device_limits=limits))
        cost = costs.cost(plans[0], steps, batch, limits)
        bound = costs.bound(cell, steps, batch, hidden, dtype, directions, limits, pass_, heads=heads)
        text += [f"\n{name}: {plans[0].schedule} - {plans[0].why}", *_lines(plans[0], cost, bound, limits)]
        text.append(_compared(plans[: 1 + runners_up]))
    if heads == 1 and cells.CELLS[cell].aten:
        text.append("")
        for training, name in ((True, "training"), (False, "inference")):
            ours, cudnn = beside_cudnn(cell, batch, hidden, dtype, directions, limits, training=training)
            engine = "torch" if ours > CLEARLY * cudnn else "triton"
            text.append(
                f"auto, {name}: {engine} - predicted {ours:.2f} us a step, "
                f"cuDNN {cudnn:.2f} (a product and a pointwise kernel a step); "
                f"torch is taken from {CLEARLY} times its time on, or where `fusedlstm.tune` measured it faster"
            )
    return "\n".join([*text, "", GLOSSARY])


def _lines(p: Plan, cost: costs.Cost, bound: costs.Bound, limits: DeviceLimits) -> list[str]:
    return [
        f"  tile           {p.block_b} batch rows x {p.block_h} hidden units, reduction in chunks of {p.block_k}"
        + (", transposed dot" if p.transposed else ""),
        f"  grid           {p.group} programs a group x {p.grid[1]} groups x {p.grid[2]} direction(s), "
        f"{p.num_warps} warps each; {p.walked} batch tile(s) a group, one after another",
        f"  shared memory  at most {p.smem_bytes / 1024:.0f} of {limits.smem_bytes >> 10} KiB; "
        f"about {p.regs} registers a thread",
        f"  synchronised   {p.barriers_per_step} exchange(s) a step, protocol {p.protocol}",
        f"  predicted      {cost.step:.2f} us a step, set by {cost.limit}; {cost.total / 1000:.3f} ms in all "
        "(an ordering of candidates, not a measurement)",
        f"                 wait {cost.wait:.2f}, operand {cost.operand:.2f}, product {cost.product:.2f}, issue "
        f"{cost.issue:.2f}, x {cost.walked} walked; memory {cost.traffic:.2f}; launch and weights {cost.launch:.1f}",
        f"  bound          {bound.step:.2f} us a step, set by {bound.limit}: arithmetic {bound.arithmetic:.2f}, "
        f"memory {bound.memory:.2f}, latency {bound.latency:.2f}",
    ]


def _compared(plans: list[Plan]) -> str:
    rows = [
        (
            f"{k}.",
            p.schedule,
            f"{p.block_b}x{p.block_h}x{p.block_k}{'T' if p.transposed else ''}",
            p.num_warps,
            "x".join(map(str, p.grid)),
            p.walked,
            f"{p.smem_bytes / 1024:.0f}",
            f"{p.step_us:.2f}",
        )
        for k, p in enumerate(plans, 1)
    ]
    return table(["", "schedule", "tiles", "warps", "grid", "walked", "smem KiB", "us a step"], rows)


def table(columns: list[str], rows: Iterable[Sequence]) -> str:
    """A text table of rows under the names of the columns, without a newline at the end."""
    lines = [columns, *([str(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(v.ljust(w) for v, w in zip(line, widths, strict=True)).rstrip() for line in lines)
