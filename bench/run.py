"""Run the benchmarks: `python -m bench.run --set cpu`. Every row is written as soon as it is measured.

See bench/README.md.
"""

import argparse
import importlib.util
import multiprocessing
import os
import re
import sys
import time
from pathlib import Path

import torch

from bench import registry, report, rows, shapes, worker
from bench.worker import Case, Settings
from fusedlstm import timing

MAX_RESTARTS = 20
START_LIMIT_S = 90  # for a worker to import torch and open the GPU
WARM_SHARE = 0.25  # of the time limit, for compiling ahead


def plan_cases(
    chosen: list[shapes.Shape],
    providers: list[registry.Provider],
    dtypes: list[str] | None,
    modes: list[str] | None,
    device: str,
) -> list[Case]:
    """The cases of a run, the most important first.

    These are fwdbwd and infer of the headline shapes. The other shapes follow, then fwd, and then the slow rivals.
    """
    fast = tuple(p.name for p in providers if not p.slow)
    slow = tuple(p.name for p in providers if p.slow)
    grid = [
        (shape, dtype, mode)
        for shape in chosen
        for dtype in dtypes or (["float32"] if device == "cpu" else shape.dtypes)
        for mode in shapes.MODES
        if mode in shape.modes and (not modes or mode in modes)
    ]
    grid.sort(key=lambda case: (case[2] == "fwd", case[0].telling))  # stable
    cases = [Case(shape.id, dtype, mode, fast) for shape, dtype, mode in grid]
    if slow:
        # How slow a loop over cells is hardly depends on the dtype, and fwd lies between the other modes.
        slowest = [
            c for c in grid if (dtypes or c[1] == c[0].dtypes[0] or device == "cpu") and (modes or c[2] != "fwd")
        ]
        slowest.sort(key=lambda case: case[0].flops(case[2]))
        baseline = (registry.BASELINE, *slow)
        cases += [Case(shape.id, dtype, mode, baseline, write_baseline=False) for shape, dtype, mode in slowest]
    return cases


class Run:
    """Feeds cases to worker processes until all are done or the time is over."""

    def __init__(self, settings: Settings, out: Path, log: Path, deadline: float, case_limit_s: float):
        self.settings = settings
        self.writer = rows.Writer(out)
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log.open("a")
        self.deadline = deadline
        self.case_limit_s = case_limit_s
        self.count = {"rows": 0, "failed": 0, "left": 0}
        self._broken = False  # a worker failed before its first case
        self._said = set()

    def say(self, line: str, detail: str = "", once: bool = False) -> None:
        """One line on the terminal, with its detail in the log."""
        if once and line in self._said:
            return
        self._said.add(line)
        print(line, flush=True)
        self.log.write(line + "\n" + (detail.rstrip() + "\n" if detail else ""))
        self.log.flush()

    def failed(self, case: Case | None, provider: str, reason: str, detail: str = "") -> None:
        self.count["failed"] += 1
        self.say(f"FAILED {case or 'setup'} {provider}: {reason}", detail)

    def run(self, cases: list[Case]) -> None:
        """Measure; a worker that dies or hangs is replaced, and goes on behind the provider that killed it."""
        left = list(cases)
        for _ in range(MAX_RESTARTS):
            if not left or self._broken or time.monotonic() >= self.deadline:
                break
            left = self._one_worker(left)
        self.count["left"] = len(left)
        if left:
            over = "time is over" if time.monotonic() >= self.deadline else "stopped"
            self.say(f"{over}: {len(left)} cases left out, the first is {left[0]}")

    def _one_worker(self, left: list[Case]) -> list[Case]:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=worker.main, args=(theirs, left, self.settings), daemon=False)
        process.start()
        theirs.close()
        case, at, heard, ready, ended = None, "start", time.monotonic(), False, False
        left = list(left)
        reason = ""
        try:
            while not ended:
                now = time.monotonic()
                if now >= self.deadline:
                    return left
                patience = heard + (self.case_limit_s if ready else max(START_LIMIT_S, self.case_limit_s)) - now
                if patience <= 0:
                    reason = f"no answer in {now - heard:.0f} s"
                    break
                if not ours.poll(min(patience, self.deadline - now, 1.0)):
                    continue
                event, *values = ours.recv()
                heard = time.monotonic()
                if event == "ready":
                    ready, facts = True, values[0]
                    self.say(f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}", once=True)
                elif event == "case":
                    case, at = values[0], "start"
                elif event == "at":
                    at = values[0]
                elif event == "row":
                    self.writer.write(values[0])
                    self.count["rows"] += 1
                    self._show(values[0])
                elif event == "skipped":
                    self.say(f"skipped: {values[0]}: {values[1]}", once=True)
                elif event == "note":
                    self.say(values[0])
                elif event == "failed":
                    self.failed(case, *values)
                elif event == "done":
                    left.remove(values[0])
                elif event == "end":
                    ended = True
        except EOFError:
            process.join(10)
            reason = f"the process ended with {process.exitcode}"
        finally:
            if not ended:
                process.kill()
            process.join(10)
            ours.close()
        if not reason:
            return left
        self.failed(case, at, reason)
        if case is None:  # in setup
            self._broken = True
            return left
        left.remove(case)
        if at in case.providers and at != registry.BASELINE:
            left.insert(0, case.without(at))
        return left

    def _show(self, row: rows.Row) -> None:
        name = f"{row['shape']} {row['dtype']} {row['mode']}"
        print(f"{name:28} {row['provider']:20} {row['metric']:14} {row['p50']:>9} {row['unit']}", flush=True)

    def close(self) -> None:
        self.writer.close()
        self.log.close()


def compile_ahead(cases: list[Case], settings: Settings, processes: int, limit_s: float) -> str:
    """Fill Triton's cache from several processes, so that the timing process finds its kernels compiled."""
    cases = [case for case in cases if case.write_baseline]  # without the second look at slow rivals
    context = multiprocessing.get_context("spawn")
    start = time.monotonic()
    running = [
        context.Process(target=worker.warm, args=(cases[k::processes], settings), daemon=True)
        for k in range(min(processes, len(cases)))
    ]
    for process in running:
        process.start()
    for process in running:
        process.join(max(0.0, start + limit_s - time.monotonic()))
    for process in running:
        if process.is_alive():
            process.kill()
            process.join(10)
    late = sum(process.exitcode is None or process.exitcode != 0 for process in running)
    cut = f", {late} of {len(running)} processes stopped early" if late else ""
    return f"compiled ahead: {len(cases)} cases, {time.monotonic() - start:.0f} s{cut}"


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    parser.add_argument("--set", choices=("cpu", "gpu", "rehearsal", "all"), help="default: cpu or gpu, what there is")
    parser.add_argument("--shape", action="append", help="shape id; may be repeated")
    parser.add_argument("--mode", action="append", choices=shapes.MODES)
    parser.add_argument("--provider", action="append", help=f"may be repeated: {', '.join(registry.PROVIDERS)}")
    parser.add_argument("--dtype", action="append", choices=shapes.GPU_DTYPES)
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda if there is one, for the sets it serves"
    )
    parser.add_argument("--out", type=Path, help="CSV file; default bench/results/<cpu or GPU name>.csv")
    parser.add_argument("--log", type=Path, default=Path("out/bench.log"), help="errors in full")
    parser.add_argument("--time-limit", type=float, default=3600.0, metavar="SECONDS")
    parser.add_argument(
        "--case-limit", type=float, default=120.0, metavar="SECONDS", help="then a silent case is killed"
    )
    parser.add_argument("--seconds-per-case", type=float, help="timing of three providers; default 2 (CPU), 0.6 (GPU)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--warm", type=int, help="processes that compile ahead; default up to 12 on a GPU")
    parser.add_argument("--compile-only", action="store_true", help="fill Triton's cache and measure nothing")
    parser.add_argument("--min-rounds", type=int, default=timing.MIN_ROUNDS, help="on a CPU; fewer are a rehearsal")
    parser.add_argument("--plugin", help="Python file that registers more providers")
    return parser.parse_args(argv)


def _gpu_name() -> str | None:
    """Name of the GPU for a file name, or None."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # a look that opens no context
    if not torch.cuda.is_available():
        return None
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()).strip("-")


def main(argv: list[str] | None = None) -> int:
    """Returns 0 if at least one row was measured and every chosen case was tried or the time was over."""
    start = time.monotonic()
    options = _arguments(argv)
    if options.plugin:
        registry.load_plugin(options.plugin)
    try:
        providers = registry.select(options.provider)
    except KeyError as error:
        sys.exit(error.args[0])
    gpu = None if options.device == "cpu" or options.set in ("cpu", "rehearsal") else _gpu_name()
    device = "cpu" if gpu is None else "cuda"
    if "cuda" in (options.device, {"gpu": "cuda"}.get(options.set)) and gpu is None:
        sys.exit("no GPU here: choose --set cpu, or --device cpu with --shape")
    chosen = shapes.in_set(options.set or ("all" if options.shape else {"cpu": "cpu"}.get(device, "gpu")))
    for shape in options.shape or ():
        if shape not in shapes.BY_ID:
            sys.exit(f"shape {shape!r}: expected one of {', '.join(shapes.BY_ID)}")
    if options.shape:
        chosen = [shape for shape in chosen if shape.id in options.shape]

    settings = Settings(
        device=device,
        threads=min(options.threads, len(os.sched_getaffinity(0))),
        seconds_per_case=options.seconds_per_case or (2.0 if gpu is None else 0.6),
        min_rounds=options.min_rounds,
        plugin=options.plugin,
    )
    out = options.out
    if out is None:
        out = Path("out/rehearsal.csv") if options.set == "rehearsal" else Path(f"bench/results/{gpu or 'cpu'}.csv")
    present = [p for p in providers if not p.missing()]
    cases = plan_cases(chosen, present, options.dtype, options.mode, device)
    warm = options.warm if options.warm is not None else (max(1, min(12, (os.cpu_count() or 1) - 2)) if gpu else 0)
    ahead = warm and importlib.util.find_spec("triton")
    if options.compile_only:
        print(compile_ahead(cases, settings, warm or 1, options.time_limit))
        return 0
    run = Run(settings, out, options.log, start + options.time_limit, options.case_limit)
    try:
        for provider in providers:
            if line := provider.missing():
                run.say(line)
        if gpu is None:
            run.say("memory: skipped, torch counts the memory of a GPU alone")
        if ahead:
            run.say(compile_ahead(cases, settings, warm, WARM_SHARE * options.time_limit))
        run.run(cases)
    finally:
        run.close()
    report.show(rows.read(out))
    counts = run.count
    print(
        f"{counts['rows']} rows in {out}, {counts['failed']} failures (in {options.log}), "
        f"{counts['left']} cases left out, {time.monotonic() - start:.0f} s"
    )
    return 0 if counts["rows"] else 1


if __name__ == "__main__":
    sys.exit(main())
