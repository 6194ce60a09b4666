"""Which plan: of those that fit and compile well, the one with the least predicted time."""

import dataclasses

from fusedlstm.plan import cost as costs
from fusedlstm.plan import one_step, time_loop
from fusedlstm.plan.devices import DeviceLimits
from fusedlstm.plan.problem import Plan, PlanError, Problem


def plan(*arguments, **more) -> Plan:
    """Choose how one layer runs: the first of `candidates`, whose arguments these are."""
    return candidates(*arguments, **more)[0]


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
    if min(steps, batch, hidden) < 1:
        raise PlanError(f"steps, batch and hidden: expected at least 1, got {steps}, {batch} and {hidden}")
    precision = _precision(limits, precision)
    of = Problem(cell, batch, hidden, dtype, directions, limits, pass_, precision, layout, heads, stack, protocol)
    if of.norms and (heads > 1 or stack):
        raise PlanError(
            f"heads and stack: expected one head and one layer a launch of {cell}, whose norms are over all units of a layer, got "
            f"{heads} head(s){' and a stack' if stack else ''}"
        )
    found = _ranked(time_loop.fitting(of), of)
    stepped = [] if of.masked or stack or of.norms else _ranked(one_step.fitting(of), of)
    if not found and not stepped:
        raise PlanError(
            f"hidden={hidden} with {directions} direction(s) in {dtype}, {layout}, does not fit {limits.name}: a group must be on "
            f"the device at once, and {limits.num_sms} programs of {limits.smem_bytes >> 10} KiB are too few"
        )
    return found + stepped[: 1 if found else None]


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
    if min(batch, hidden) < 1 or input_size < 0:
        raise PlanError(
            f"batch and hidden: expected at least 1, input_size at least 0, got {batch}, {hidden} and {input_size}"
        )
    problem = (cell, batch, hidden, dtype, directions, limits, pass_, _precision(limits, precision))
    of = Problem(*problem, heads=heads, input_size=input_size)
    return _ranked(one_step.fitting(of), of)


def _precision(limits: DeviceLimits, precision: str) -> str:
    return "ieee" if limits.arch.startswith("gfx") else precision  # Triton takes tf32 on few AMD targets


def _ranked(plans: list[Plan], of: Problem) -> list[Plan]:
    """By predicted time, least first, and with it."""
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
    layout: str = "dense",
    proj_size: int = 0,
) -> tuple[float, float]:
    """Predicted microseconds a step of the kernels and of cuDNN (`cost.cudnn_step_us`); training: of both passes.

    Of a packed batch, that of a step that all sequences have. Of a projection the kernels know nothing (docs/lstm.md).
    """
    ours = cudnn = 0.0
    for pass_ in ("fwd", "bwd") if training else ("fwd",):
        sizes = (batch, hidden, dtype, directions, limits, pass_, precision)
        ours += plan(cell, 1, *sizes, layout).step_us
        cudnn += costs.cudnn_step_us(cell, *sizes, saves=training, proj_size=proj_size)
    return ours, cudnn
