"""Everything that a GPU machine has to show, in one command that needs nobody beside it: `python -m bench.gpu --out DIR`.

Facts about the machine, a first run of the kernels, GPU tests, memory and race checkers where present, then the benchmark with the time that is
left. Each part is a process with a limit and a log of its own; a part that fails or hangs does not stop the next. DIR is
flat and small: summary.md, <gpu>.csv and a log per part. Runs with the machine's own Python, torch and Triton, offline.
Exit status 0 means that every correctness part passed. `--rehearse` walks the same way on a CPU in tiny sizes.
"""

import argparse
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench import report, rows

ROOT = Path(__file__).resolve().parent.parent
TOTAL_S = 570  # a minute under the ten that a visit lasts would be wasted, a second over them loses everything
BENCH_RESERVE_S = 20  # for the summary
MAX_LOG_BYTES = 4 << 20

# What pytest runs on the GPU. TRITON_INTERPRET is taken out of the environment, so the kernel tests run compiled.
PYTEST = ("-m", "pytest", "-p", "no:cacheprovider", "--tb=short", "-v", "--maxfail=25")
PYTEST_ARGS = (*PYTEST, "tests/kernels")
PYTEST_WORKERS = 12  # with pytest-xdist, if it is there: nearly all of the time goes into compiling kernels
REHEARSAL_PYTEST_ARGS = (*PYTEST, "tests/cpu/test_bench.py", "-k", "shapes")
REHEARSAL_BENCH_ARGS = "--set rehearsal --seconds-per-case 0.02 --threads 1 --provider fusedlstm --roofs"
OUR_KERNELS = "recurrence"  # in the name of every kernel that racecheck shall look at

PASSED, FAILED, SKIPPED = "passed", "FAILED", "skipped"

SETUP = """
import importlib.util, os, subprocess, sys
def found():
    importlib.invalidate_caches()
    try:
        return importlib.util.find_spec("fusedlstm.kernels") is not None
    except ImportError:
        return False
ok = found()
if not ok:
    # kernels/ is mapped to fusedlstm.kernels by an editable install; where that is refused, a link (ignored by git) does.
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", "."])
    done = subprocess.run([sys.executable, "-c", "import fusedlstm.kernels"])
    if done.returncode:
        os.symlink("../kernels", "fusedlstm/kernels")
    ok = subprocess.run([sys.executable, "-c", "import fusedlstm.kernels"]).returncode == 0
print("fusedlstm.kernels can be imported" if ok else "fusedlstm.kernels CANNOT be imported")
sys.exit(not ok)
"""

FACTS = """
import importlib.metadata, os, platform, shutil, subprocess, sys
print("python", sys.version.split()[0], platform.platform(), os.cpu_count(), "cores")
for name in ("torch", "triton", "numpy", "pytest", "pytest-xdist", "rich"):
    try: print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError: print(name, "absent")
for tool in ("compute-sanitizer", "nvcc", "cuobjdump", "git", "gcc"):
    print(tool, shutil.which(tool))
if shutil.which("nvidia-smi"):
    subprocess.run(["nvidia-smi"])
import torch
print("cuda", torch.version.cuda, "hip", torch.version.hip, "cudnn", torch.backends.cudnn.version())
if torch.cuda.is_available():
    print(torch.cuda.get_device_properties(0))
import fusedlstm, triton
print("fusedlstm", fusedlstm.__version__, fusedlstm.__file__)
"""


@dataclass
class Part:
    """One step. `judge` turns (exit status, log) into a verdict and one line; `None` limits mean what time is left."""

    name: str
    command: list[str]
    limit_s: float | None
    correctness: bool = False
    judge: Callable[[int, str], tuple[str, str]] | None = None
    skip: str = ""  # reason not to run it
    log: str = ""  # file name; parts may share one


@dataclass
class Outcome:
    name: str
    verdict: str
    line: str
    seconds: float
    correctness: bool


def _last_line(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return lines[-1][:160] if lines else ""


def judge_exit(status: int, log: str) -> tuple[str, str]:
    return (PASSED if status == 0 else FAILED), _last_line(log)


def judge_smoke(status: int, log: str) -> tuple[str, str]:
    done = len(re.findall(r"^done T", log, re.M))
    return (PASSED if status == 0 and done else FAILED), f"{_last_line(log)} ({done} runs)"


def judge_tests(status: int, log: str) -> tuple[str, str]:
    """pytest's own status; no test collected (5) proves nothing, so it is a failure."""
    counts = re.findall(r"^=*\s*((?:\d+ \w+,? ?)+ in [\d.]+s.*?)=*$", log, re.M)
    line = counts[-1].strip() if counts else _last_line(log)
    failed = re.findall(r"^FAILED (\S+)", log, re.M)
    if failed:
        line += "; first: " + failed[0]
    return (PASSED if status == 0 else FAILED), line if status != 5 else "no test was collected"


def judge_sanitizer(status: int, log: str) -> tuple[str, str]:
    """A checker that the machine does not let run is skipped; one that ran must have reached the end of its target."""
    summary = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY:.*)", log)
    done = len(re.findall(r"^done T", log, re.M))
    refused = re.search(r".*(?:Device not supported|Unable to find injection|not permitted).*", log)
    if refused and not done:
        return SKIPPED, "the checker cannot run on this machine: " + refused[0].strip()[:120]
    line = f"{summary[-1] if summary else _last_line(log)} ({done} runs)"
    return (PASSED if status == 0 and done else FAILED), line


def only_our_kernels() -> list[str]:
    """Options that keep racecheck off the libraries' kernels, whose hazards are not ours; the name changed over time."""
    try:
        text = subprocess.run(["compute-sanitizer", "--help"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    for option in ("--kernel-name", "--kernel-regex"):
        if option in text:
            return [option, f"kns={OUR_KERNELS}"]
    return []


def sanitizer(tool: str, *options: str) -> list[str]:
    return [
        shutil.which("compute-sanitizer") or "compute-sanitizer",
        f"--tool={tool}",
        "--error-exitcode=9",
        "--print-limit=20",
        *options,
        sys.executable,
        "-m",
        "bench.sanitize_target",
    ]


def parts(out: Path, csv: Path, rehearse: bool) -> list[Part]:
    python = sys.executable
    checker = "" if shutil.which("compute-sanitizer") else "compute-sanitizer is not on this machine"
    bench = [python, "-m", "bench.run", "--out", str(csv), "--log", str(out / "log-bench-errors.txt")]
    if rehearse:
        target = [python, "-m", "bench.sanitize_target", "--device", "cpu", "--backend", "auto"]
        return [
            Part("setup", [python, "-c", SETUP], 60, log="log-facts.txt"),
            Part("facts", [python, "-c", FACTS], 60, log="log-facts.txt"),
            Part("smoke", target, 60, True, judge_smoke, log="log-facts.txt"),
            Part("tests", [python, *REHEARSAL_PYTEST_ARGS], 60, True, judge_tests),
            Part("memcheck", target, 60, True, judge_sanitizer),
            Part("racecheck", [], 60, True, judge_sanitizer, skip="rehearsal"),
            Part("bench", [*bench, *REHEARSAL_BENCH_ARGS.split()], None),
        ]
    workers = ["-n", str(PYTEST_WORKERS)] if importlib.util.find_spec("xdist") else []
    return [
        Part("setup", [python, "-c", SETUP], 60, log="log-facts.txt"),
        Part("facts", [python, "-c", FACTS], 60, log="log-facts.txt"),
        # Also compiles what the checkers run, so that their time goes into checking.
        Part("smoke", [python, "-m", "bench.sanitize_target"], 90, True, judge_smoke, log="log-facts.txt"),
        Part("tests", [python, *PYTEST_ARGS, *workers], 150, True, judge_tests),
        Part("memcheck", sanitizer("memcheck"), 60, True, judge_sanitizer, checker),
        Part("racecheck", sanitizer("racecheck", *only_our_kernels()), 60, True, judge_sanitizer, checker),
        Part("bench", [*bench, "--set", "gpu"], None),
    ]


def execute(part: Part, limit_s: float, out: Path) -> Outcome:
    """Run a part in a process group of its own and judge it; never raises."""
    start = time.monotonic()
    if part.skip:
        return Outcome(part.name, SKIPPED, part.skip, 0.0, part.correctness)
    command = list(part.command)
    if part.name == "bench":
        command += ["--time-limit", str(int(max(5, limit_s - BENCH_RESERVE_S)))]
    log_path = out / (part.log or f"log-{part.name}.txt")
    environment = dict(os.environ, PYTHONUNBUFFERED="1")
    environment.pop("TRITON_INTERPRET", None)
    if part.name in ("memcheck", "racecheck"):
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # else reads past a tensor end inside its cached block
    status, note, begin = -1, "", log_path.stat().st_size if log_path.exists() else 0
    with log_path.open("ab") as log:
        log.write(f"$ {' '.join(command[:1] + [c for c in command[1:] if chr(10) not in c])}\n".encode())
        log.flush()
        begin = log_path.stat().st_size
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
            try:
                status = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                note = f"stopped after {limit_s:.0f} s"
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        except OSError as error:
            note = f"could not start: {error}"
    text = log_path.read_bytes()[begin:].decode(errors="replace")
    verdict, line = (part.judge or judge_exit)(status, text)
    if note:
        verdict, line = FAILED, f"{note}; {line}"
    _shorten(log_path)
    return Outcome(part.name, verdict, line, time.monotonic() - start, part.correctness)


def _shorten(path: Path) -> None:
    """Keep the beginning and the end of a log that grew too long to be carried home."""
    data = path.read_bytes()
    if len(data) > MAX_LOG_BYTES:
        half = MAX_LOG_BYTES // 2
        path.write_bytes(data[:half] + b"\n[...]\n" + data[-half:])


def _gpu_name(rehearse: bool) -> str:
    if rehearse:
        return "rehearsal"
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        name = subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.split("\n")[0]
    except (OSError, subprocess.TimeoutExpired):
        name = ""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "gpu"


def write_summary(out: Path, outcomes: list[Outcome], csv: Path) -> str:
    """Write summary.md; returns the short table of the parts."""
    lines = [f"{o.verdict:8} {o.name:10} {o.seconds:5.0f} s  {o.line}" for o in outcomes]
    measured = rows.read(csv)
    text = ["# GPU run", "", "```", *lines, "```", "", "# Benchmark", "", report.markdown(measured, "make gpu")]
    (out / "summary.md").write_text("\n".join(text) + "\n")
    return "\n".join(lines)


def exit_status(outcomes: list[Outcome]) -> int:
    """0 if no correctness part failed and at least one passed: a checker that is absent is no failure."""
    verdicts = [o.verdict for o in outcomes if o.correctness]
    return 0 if FAILED not in verdicts and PASSED in verdicts else 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for what is to be kept")
    parser.add_argument("--seconds", type=float, default=TOTAL_S, help="limit of the whole run")
    parser.add_argument("--rehearse", action="store_true", help="the same on a CPU, tiny")
    parser.add_argument("--break", dest="broken", action="append", default=[], help="replace a part by a failing one")
    options = parser.parse_args(argv)
    end = time.monotonic() + options.seconds
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for stale in out.glob("log-*.txt"):
        stale.unlink()
    csv = out / f"{_gpu_name(options.rehearse)}.csv"

    outcomes = []
    for part in parts(out, csv, options.rehearse):
        if part.name in options.broken:
            part.command, part.skip = [sys.executable, "-c", "raise SystemExit('broken on purpose')"], ""
        left = end - time.monotonic()
        limit_s = left if part.limit_s is None else min(part.limit_s, left)
        print(f"... {part.name}", flush=True)
        if limit_s <= 5:
            outcomes.append(Outcome(part.name, SKIPPED, "no time left", 0.0, part.correctness))
            continue
        try:
            outcomes.append(execute(part, limit_s, out))
        except Exception as error:  # whatever it is, the next part may still tell something
            outcomes.append(Outcome(part.name, FAILED, f"{type(error).__name__}: {error}", 0.0, part.correctness))
        write_summary(out, outcomes, csv)  # after each part: a run that is cut off keeps what it has
    short = write_summary(out, outcomes, csv)
    measured = rows.read(csv)
    report.show(measured)
    print(short)
    print(f"{len(measured)} rows; {', '.join(sorted(p.name for p in out.iterdir()))}")
    return exit_status(outcomes)


if __name__ == "__main__":
    sys.exit(main())
