"""Compute what a case should take: the prediction of the plan, and a lower bound from measured rates."""

import inspect
import math
import re

from bench.shapes import BY_ID, Shape

ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}
DTYPE_NAMES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
ON_CHIP_BYTES = 227 << 10  # of one multiprocessor; what holds weight_hh decides how many programs must exchange h

Rates = dict[tuple[str, str], float]  # (metric, dtype or shape) of the "roof" rows


def rates(measured: list[dict]) -> Rates:
    """The measured rates among rows: matrix products and copies by dtype, barriers by number of programs.

    Of several exchange protocols the fastest counts.
    """
    found: Rates = {}
    for row in measured:
        if row["op"] == "roof":
            value = float(row["p50"])
            if row["metric"] in ("barrier", "exchange"):
                key = ("barrier", row["shape"])
                found[key] = min(value, found.get(key, math.inf))
            else:
                found[row["metric"], row["dtype"]] = value
    return found


def bound_ms(row: dict, known: Rates) -> tuple[float, str] | None:
    """Lower bound of a case in milliseconds and what sets it: "matrix", "memory" or "barrier"; None without rates.

    The largest of: products over the matrix rate, bytes over the bandwidth, exchanges in a row times the barrier among
    as few programs as can hold `weight_hh`. Layers of a stack may overlap: L layers take T + L - 1 steps in a row.
    """
    shape = BY_ID.get(row["shape"])
    rate, bandwidth = known.get(("matmul", row["dtype"])), known.get(("copy", "float32"))
    if shape is None or not rate or not bandwidth:
        return None
    mode, itemsize = row["mode"], ITEMSIZE[row["dtype"]]
    exchanges = (max(shape.row_lengths) + shape.layers - 2) * (2 if mode == "fwdbwd" else 1)
    return max(
        (shape.flops(mode) / (rate * 1e9), "matrix"),
        (shape.min_bytes(mode, itemsize) / (bandwidth * 1e6), "memory"),
        (exchanges * _barrier_us(shape, itemsize, known) / 1e3, "barrier"),
    )


def _barrier_us(shape: Shape, itemsize: int, known: Rates) -> float:
    H = shape.H // shape.heads  # heads exchange nothing
    programs = 4 * H * (shape.proj or H) * itemsize / ON_CHIP_BYTES
    if programs <= 1:
        return 0.0
    measured = {int(name[1:]): us for (metric, name), us in known.items() if metric == "barrier" and name != "P1"}
    wide = [p for p in measured if p >= programs]
    return measured[min(wide) if wide else max(measured)] if measured else 0.0


def predicted(shape: Shape, dtype: str, mode: str, device: str, provider: str) -> tuple[float, str] | None:
    """Milliseconds that our kernels' plans predict, and those plans in words; None where no kernel runs.

    The plans predict the launches; the products around them are added at the matrix rate that the planner assumes.
    """
    import torch

    from fusedlstm import engines

    if provider == "fusedlstm-auto" or (device == "cpu" and not (engines.interpreting() and provider != "fusedlstm")):
        return None
    from fusedlstm import plan
    from fusedlstm.engines import launch

    limits = launch.device_limits(torch.cuda.current_device() if device == "cuda" else None)
    options = {"layout": "packed" if shape.lengths else "ragged" if shape.resets else "dense"}
    if shape.heads > 1:
        name = next((n for n in ("num_heads", "heads") if n in inspect.signature(plan.plan).parameters), None)
        if name is None:
            return None
        options[name] = shape.heads
    name = DTYPE_NAMES[dtype]
    passes = ("fwd", "bwd") if mode == "fwdbwd" else ("fwd",)
    try:
        found = _launches(shape, name, mode, limits, passes, provider != "fusedlstm-states", **options)
    except plan.PlanError:
        return None
    loops_us = sum(p.step_us * steps for p, steps, _ in found)
    # A step's launch takes the input product too, and that of a wave those of all its layers but the first.
    inside = (shape.flops("infer") - _input_flops(shape)) * len(passes) + sum(flops for _, _, flops in found)
    tflops = getattr(limits, "tf32_tflops" if name == "fp32" else "half_tflops", math.inf)
    plans = dict.fromkeys(
        f"{p.pass_} {p.schedule} {p.block_b}x{p.block_h} grid {'x'.join(map(str, p.grid))}" for p, _, _ in found
    )
    words = "; ".join(plans)
    return (
        loops_us / 1e3 + max(0.0, shape.flops(mode) - inside) / (tflops * 1e9),
        re.sub(r"\s+", " ", f"plan: {words}"),
    )


def _launches(shape: Shape, dtype: str, mode: str, limits, passes: tuple[str, ...], waves: bool, layout: str, **heads):
    """Plan, steps in a row and operations of input products inside of every launch, as `functional.run` makes them.

    `waves`: whether layers may share a launch.
    """
    from fusedlstm import plan

    T, D = max(shape.row_lengths), shape.directions
    inputs = [_input_flops(shape, k) for k in range(shape.layers)]
    one_step = T == 1 and layout == "dense" and not shape.proj
    together = 1
    if waves and not (one_step or shape.layers == 1 or D == 2 or shape.proj or shape.heads > 1 or shape.alternating):
        sizes = ("lstm", shape.layers, shape.B, shape.H, dtype, limits)
        together = plan.wave(*sizes, layout=layout, training=mode != "infer")
    found = []
    for first in range(0, shape.layers, together):
        n = min(together, shape.layers - first)
        for pass_ in passes:
            if one_step and pass_ == "fwd":
                sizes = ("lstm", shape.B, shape.H, dtype, D, limits, pass_)
                found.append((plan.step_plan(*sizes, input_size=shape.layer_inputs[first], **heads), 1, inputs[first]))
                continue
            sizes = ("lstm", shape.B, shape.H, dtype, D * n, limits, pass_)
            p = plan.plan(*sizes, layout=layout, stack=n > 1, **heads)
            found.append((p, T + n - 1, sum(inputs[first + 1 : first + n])))
    return found


def _input_flops(shape: Shape, layer: int | None = None) -> float:
    """Operations of the input products, forward, of one layer or of all."""
    rows = sum(shape.row_lengths) * 4 * shape.H * shape.directions
    sizes = shape.layer_inputs if layer is None else shape.layer_inputs[layer : layer + 1]
    return sum(2.0 * rows * inputs for inputs in sizes)
