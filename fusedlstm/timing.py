"""Take times. `fusedlstm.tune`, `python -m fusedlstm bench` and the benchmarks in `bench/` do it in this way.

All candidates of a case run in rounds, in one process. Each round times every candidate once, and begins with another
one, so a drift of the machine affects all in the same way. A sample is the mean of `inner` calls in a row. The ratio to
the baseline is taken within each round. p20, p50 and p80 are percentiles over the rounds.

On a GPU a sample is the time between two device events. A call shorter than a few hundred microseconds is timed a
second time as a replay of a CUDA graph, which excludes the time of the host. On a CPU the clock is `time.perf_counter`.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

Calls = dict[str, Callable[[], Any]]
Progress = Callable[[int, int], None]  # gets the rounds that are done, and all of them
MIN_ROUNDS, MAX_ROUNDS = 5, 200
CPU_SAMPLE_MS = 2.0  # a sample is at least this long: timer and scheduler noise
GPU_SAMPLE_MS = 0.5
GRAPH_BELOW_MS = 0.4
GRAPH_INFER_BELOW_MS = 20.0


@dataclass(frozen=True)
class Samples:
    """Times of one case: `ms[name]` holds one sample a round, in milliseconds a call."""

    ms: dict[str, list[float]]
    protocol: str


def percentiles(values: list[float]) -> tuple[float, float, float]:
    """p50, p20, p80, linear between neighbours."""
    if len(values) == 1:
        return (values[0],) * 3
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return statistics.median(values), cuts[1], cuts[7]


def ratios(samples: Samples, baseline: str, name: str) -> list[float]:
    """Per round: time of the baseline over time of `name`, so that above 1 is faster."""
    return [b / t for b, t in zip(samples.ms[baseline], samples.ms[name], strict=True)]


def _plan(
    call_ms: dict[str, float], sample_ms: float, budget_s: float, min_rounds: int = MIN_ROUNDS
) -> tuple[dict[str, int], int]:
    """Calls per sample of each candidate, and the number of rounds that the budget pays for."""
    inner = {name: max(1, math.ceil(sample_ms / max(ms, 1e-4))) for name, ms in call_ms.items()}
    round_s = sum(inner[name] * ms for name, ms in call_ms.items()) / 1e3
    return inner, min(MAX_ROUNDS, max(min_rounds, int(budget_s / max(round_s, 1e-6))))


def _rounds(names: list[str], rounds: int, progress: Progress | None) -> Iterator[list[str]]:
    """Names in the order of each round."""
    for r in range(rounds):
        if progress:
            progress(r, rounds)
        k = r % len(names)
        yield names[k:] + names[:k]


def take(calls: Calls, budget_s: float, device: str | torch.device, progress: Progress | None = None) -> Samples:
    """Time calls by the clock of a device."""
    if torch.device(device).type == "cuda":
        return time_gpu(calls, budget_s, progress)
    return time_cpu(calls, budget_s, progress=progress)


def time_cpu(calls: Calls, budget_s: float, min_rounds: int = MIN_ROUNDS, progress: Progress | None = None) -> Samples:
    """Time calls on the host clock; `budget_s` seconds for all of them together, beside the warm-up.

    Fewer than five rounds are a rehearsal: they say that it runs, not how fast.
    """
    clock = time.perf_counter
    call_ms = {}
    for name, call in calls.items():
        call()
        times = []
        for _ in range(min(3, min_rounds)):
            start = clock()
            call()
            times.append((clock() - start) * 1e3)
        call_ms[name] = min(times)
    inner, rounds = _plan(call_ms, CPU_SAMPLE_MS, budget_s, min_rounds)
    ms: dict[str, list[float]] = {name: [] for name in calls}
    for order in _rounds(list(calls), rounds, progress):
        for name in order:
            call, n = calls[name], inner[name]
            start = clock()
            for _ in range(n):
                call()
            ms[name].append((clock() - start) * 1e3 / n)
    return Samples(ms, f"perf_counter interleaved rounds={rounds}")


def _event_samples(
    calls: Calls, call_ms: dict[str, float], budget_s: float, progress: Progress | None = None
) -> tuple[dict[str, list[float]], int]:
    inner, rounds = _plan(call_ms, GPU_SAMPLE_MS, budget_s)
    ms: dict[str, list[float]] = {name: [] for name in calls}
    for order in _rounds(list(calls), rounds, progress):
        events = []
        for name in order:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(inner[name]):
                calls[name]()
            end.record()
            events.append((name, start, end))
        torch.cuda.synchronize()
        for name, start, end in events:
            ms[name].append(start.elapsed_time(end) / inner[name])
    return ms, rounds


def _estimate_ms(calls: Calls) -> dict[str, float]:
    call_ms = {}
    for name, call in calls.items():
        for _ in range(2):
            call()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(3):
            call()
        end.record()
        torch.cuda.synchronize()
        call_ms[name] = start.elapsed_time(end) / 3
    return call_ms


def time_gpu(calls: Calls, budget_s: float, progress: Progress | None = None) -> Samples:
    """Time calls between device events."""
    ms, rounds = _event_samples(calls, _estimate_ms(calls), budget_s, progress)
    return Samples(ms, f"events interleaved rounds={rounds}")


def capture(call: Callable[[], Any], copies: int = 1) -> tuple[torch.cuda.CUDAGraph, list[Any]]:
    """A CUDA graph of `copies` calls in a row, and what they returned (which the graph writes to).

    Raises:
        RuntimeError: the call cannot be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # a capture wants its warm-up on a side stream
        for _ in range(max(2, copies)):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for _ in range(copies)]
    return graph, kept


def time_gpu_graph(calls: Calls, budget_s: float, copies: int = 1) -> tuple[Samples, dict[str, str]]:
    """Time replays of a CUDA graph of `copies` calls (as many as there are sets of inputs).

    Returns times a call, and who could not be captured and why.
    """
    graphs, refused = {}, {}
    for name, call in calls.items():
        try:
            graphs[name] = capture(call, copies)
        except Exception as error:  # whatever a library raises; the others can still be timed
            refused[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
    if not graphs:
        return Samples({}, "graph"), refused
    replays = {name: graph.replay for name, (graph, _) in graphs.items()}
    ms, rounds = _event_samples(replays, _estimate_ms(replays), budget_s)
    ms = {name: [value / copies for value in values] for name, values in ms.items()}
    return Samples(ms, f"graph interleaved rounds={rounds}"), refused
