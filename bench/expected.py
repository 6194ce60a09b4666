"""What a case should take: the plan's prediction, and the bound that no implementation passes at the measured rates."""

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

    The largest of: products over the matrix rate, bytes over the bandwidth, exchanges in a row times the barrier among as
    few programs as can hold `weight_hh`. Layers of a stack may overlap: L layers take T + L - 1 steps in a row.
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

    The plans predict the loops; the products around them are added at the matrix rate that the planner assumes.
    """
    import torch

    from fusedlstm import engines

    if device == "cpu" and not (engines.interpreting() and provider != "fusedlstm"):
        return None
    from fusedlstm import launch, plan

    limits = launch.device_limits(torch.cuda.current_device() if device == "cuda" else None)
    options = {"layout": "packed" if shape.lengths else "ragged" if shape.resets else "dense"}
    if shape.heads > 1:
        name = next((n for n in ("num_heads", "heads") if n in inspect.signature(plan.plan).parameters), None)
        if name is None:
            return None
        options[name] = shape.heads
    T, name = max(shape.row_lengths), DTYPE_NAMES[dtype]
    passes = ("fwd", "bwd") if mode == "fwdbwd" else ("fwd",)
    try:
        plans = [
            plan.plan("lstm", T, shape.B, shape.H, name, shape.directions, limits, pass_, **options) for pass_ in passes
        ]
    except plan.PlanError:
        return None
    loops_us = shape.layers * T * sum(p.step_us for p in plans)
    inside = shape.flops("infer") - _input_flops(shape)
    outside = shape.flops(mode) - inside * len(passes)
    tflops = getattr(limits, "tf32_tflops" if name == "fp32" else "half_tflops", math.inf)
    words = "; ".join(
        f"{p.pass_} {p.schedule} {p.block_b}x{p.block_h} grid {'x'.join(map(str, p.grid))}" for p in plans
    )
    return loops_us / 1e3 + outside / (tflops * 1e9), re.sub(r"\s+", " ", f"plan: {words}")


def _input_flops(shape: Shape) -> float:
    rows = sum(shape.row_lengths) * 4 * shape.H * shape.directions
    return sum(2.0 * rows * inputs for inputs in shape.layer_inputs)
