"""Profile the slowest row: `python -m bench.slowest ROWS.csv`.

It is the row with the smallest speed-up if that is below 1, and otherwise the row that is furthest above its bound.
Ours and `torch.nn.LSTM` run again under torch's profiler. Each gets a table of kernels, or of operators on a CPU.
"""

import argparse
import sys
from pathlib import Path

from bench import expected, registry, rows, worker
from bench.shapes import BY_ID
from bench.worker import Case, Settings

CALLS = 3
LINES = 12  # of each provider


def slowest(measured: list[rows.Row]) -> tuple[rows.Row, str] | None:
    """The latency row of our kernels that most needs a look, and why; None without one."""
    known = expected.rates(measured)
    case = ("provider", "shape", "mode", "dtype")
    ours = {
        tuple(row[k] for k in case): row
        for row in measured
        if row["op"] == "lstm"
        and row["metric"] == "latency"
        and row["provider"].startswith("fusedlstm")
        and row["provider"] != "fusedlstm-auto"  # that is cuDNN
    }
    speedups = {
        key: float(row["p50"])
        for row in measured
        if row["op"] == "lstm" and row["metric"] == "speedup" and (key := tuple(row[k] for k in case)) in ours
    }
    worst = min(speedups, key=speedups.get, default=None)
    if worst and speedups[worst] < 1:
        return ours[worst], f"{speedups[worst]:.3g} times as fast as torch.nn.LSTM"
    above = {
        key: float(row["p50"]) / bound[0]
        for key, row in ours.items()
        if (bound := expected.bound_ms(row, known)) and bound[0]
    }
    if above:
        worst = max(above, key=above.get)
        return ours[worst], f"{above[worst]:.1f} times its bound"
    return (ours[worst], f"{speedups[worst]:.3g} times as fast as torch.nn.LSTM") if worst else None


def table(profile, gpu: bool) -> list[str]:
    """Lines of a profile: microseconds a call of LSTM, share, launches a call, name."""
    from torch.autograd import DeviceType

    events = [e for e in profile.key_averages() if not gpu or e.device_type == DeviceType.CUDA]
    events = [(e.self_device_time_total if gpu else e.self_cpu_time_total, e.count, e.key) for e in events]
    events = sorted((e for e in events if e[0] > 0), reverse=True)
    total = sum(us for us, _, _ in events) or 1.0
    lines = [f"{'us':>10} {'share':>6} {'count':>6}  {'kernel' if gpu else 'operator'}"]
    for us, count, key in events[:LINES]:
        lines.append(f"{us / CALLS:10.1f} {us / total:6.1%} {count / CALLS:6.0f}  {key[:90]}")
    if len(events) > LINES:
        rest = sum(us for us, _, _ in events[LINES:])
        lines.append(f"{rest / CALLS:10.1f} {rest / total:6.1%} {'':6}  {len(events) - LINES} others")
    return [*lines, f"{total / CALLS:10.1f}  all"]


def profile(case: Case, settings: Settings) -> None:
    """Run a case's providers under the profiler and print their tables."""
    import torch
    from torch.profiler import ProfilerActivity

    worker.setup(settings)
    shape, gpu = BY_ID[case.shape], settings.device != "cpu"
    dtype = getattr(torch, case.dtype)
    weights = registry.baseline_weights(shape, case.dtype, settings.device)
    for name in case.providers:
        provider = registry.PROVIDERS[name]
        if reason := provider.why_not(shape, case.dtype, settings.device, case.mode):
            print(f"\n{name}: skipped, {reason}")
            continue
        call = worker.case_call(provider, case, shape, settings.device, weights, dtype)
        for _ in range(2):
            call()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
        with torch.profiler.profile(activities=activities) as found:
            for _ in range(CALLS):
                call()
            if gpu:
                torch.cuda.synchronize()
        print(f"\n{name}, mean of {CALLS} calls:")
        print("\n".join(table(found, gpu)), flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.slowest", description=__doc__.splitlines()[0])
    parser.add_argument("csv", type=Path)
    options = parser.parse_args(argv)
    found = slowest(rows.read(options.csv))
    if found is None:
        print("no row of ours to profile")
        return 1
    row, why = found
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"slowest: {row['shape']} {row['mode']} {row['dtype']}, {row['provider']} {row['p50']} ms, {why}", flush=True)
    case = Case(row["shape"], row["dtype"], row["mode"], (row["provider"], registry.BASELINE))
    profile(case, Settings(device, threads=1, seconds_per_case=0.0))
    return 0


if __name__ == "__main__":
    sys.exit(main())
