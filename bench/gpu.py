"""All checks and measurements on a GPU machine, unattended: `python -m bench.gpu --out DIR`.

The parts are facts about the machine, a first run of the kernels, litmus tests of their exchange, GPU tests, the
machine's ceilings, and memory and race checkers if they are installed. The table takes the time that is left. The
profile of its slowest row, and tables and a plot of all rows follow. Each part is a process with a time limit and a
log. If a part fails or hangs, the next one still runs. Every row is written when it is measured. DIR has no folders and
at most eight files: summary.md, <gpu>.csv, speedup.png and logs. The run needs no network and uses the Python, torch
and Triton of the machine. Exit status 0 means that every correctness part passed.

`--rehearse` runs the same parts on a CPU, with interpreted kernels and tiny sizes.
"""

import argparse
import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bench import report, rows

ROOT = Path(__file__).resolve().parent.parent
TOTAL_S = 570  # a minute under the ten that a visit lasts would be wasted, a second over them loses everything
TABLE_AT_S = 300  # what comes before the table is cut short or left out so that it begins by then
TABLE_RESERVE_S = 65  # for what comes after it
LEAST_S = 5  # no part begins with less
STOP_S = 8  # for the table to end by itself
KILL_S = 10  # for a process to go when it is killed: one that waits for a driver may never
MAX_LOG_BYTES = 4 << 20

# On the GPU TRITON_INTERPRET is taken out of the environment, so the kernel tests run compiled; in a rehearsal it is
# set. -vv: the configuration's own -q takes one away, and a name a line tells how far a run that was stopped had come.
PYTEST_OPTIONS = ("-p", "no:cacheprovider", "--tb=short", "-vv", "--maxfail=25")
PYTEST_WORKERS = 12  # nearly all of the time goes into compiling kernels
BY_FILE = ("-m", "bench.by_file", "--at-once", str(PYTEST_WORKERS))
PYTEST_PATHS = ("tests/kernels",)
# Of the modules' tests those that want a GPU; torch's own list of modules needs expecttest.
MODULE_TESTS = tuple(
    f"tests/cpu/test_torch_module_db.py::{name}" for name in ("test_multiple_device_transfer", "test_cpu_gpu_parity")
)
REHEARSAL_PATHS = ("tests/kernels/test_recurrence_fwd.py", "tests/kernels/test_activations.py")
REHEARSAL_PYTEST_OPTIONS = (*PYTEST_OPTIONS, "-k", "two_directions or saturation")
TABLE_ARGS = "--set gpu --warm 0 --seconds-per-case 0.4 --case-limit 60"
REHEARSAL_TABLE_ARGS = (
    "--set rehearsal --seconds-per-case 0.01 --min-rounds 2 --threads 1 "
    "--provider fusedlstm-triton --provider fusedlstm-states"
)
OUR_KERNELS = "recurrence"  # in the name of every kernel that racecheck shall look at
MACHINE_LOG, CORRECTNESS_LOG, TABLE_LOG, LAST_LOG = (
    f"log-{name}.txt" for name in ("machine", "correctness", "table", "slowest")
)

NO_MEMORY = "Skipped: no row of a GPU, the only memory that torch counts."

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
    # An editable install maps kernels/ to fusedlstm.kernels; where that is refused, a link (ignored by git) does.
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
rivals = ("flashrnn", "haste_pytorch", "fastlstm", "torchrl")
for name in ("torch", "triton", "numpy", "pytest", "pytest-xdist", "rich", "matplotlib", *rivals):
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
    """One step. `judge` turns (exit status, log) into a verdict and one line."""

    name: str
    command: list[str]
    limit_s: float  # at most
    log: str  # file name; parts may share one
    correctness: bool = False
    judge: Callable[[int, str], tuple[str, str]] | None = None
    skip: str = ""  # reason not to run it
    background: bool = False  # goes on beside the next parts, until the table begins
    environment: dict[str, str] = field(default_factory=dict)


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
    if not counts:  # stopped: what had been seen by then
        seen = re.findall(r"\b(PASSED|FAILED|ERROR)\b", log)
        line = f"{seen.count('PASSED')} passed, {len(seen) - seen.count('PASSED')} failed; {line}"
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", log, re.M)
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
    """Options that keep racecheck away from kernels of libraries. The name of the option changed over time."""
    text = _output("compute-sanitizer", "--help")
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


def judge_slowest(status: int, log: str) -> tuple[str, str]:
    told = re.findall(r"^slowest: .*", log, re.M)
    return (PASSED if status == 0 else FAILED), told[-1] if told else _last_line(log)


def parts(out: Path, csv: Path, rehearse: bool) -> list[Part]:
    """All parts in their order; in a rehearsal the same ones, tiny and interpreted."""

    def python(*arguments: str) -> list[str]:
        return [sys.executable, *arguments]

    table = ["-m", "bench.run", "--out", str(csv), "--log", str(out / "log-table-errors.txt")]
    checker = "" if shutil.which("compute-sanitizer") else "compute-sanitizer is not on this machine"
    compiled = "" if importlib.util.find_spec("triton") else "the package triton is not on this machine"
    smoke, table_args = ["-m", "bench.sanitize_target"], TABLE_ARGS
    paths = (*PYTEST_PATHS, *(MODULE_TESTS if importlib.util.find_spec("expecttest") else ()))
    tests = [*BY_FILE, *paths, "--", *PYTEST_OPTIONS]
    if rehearse:
        smoke += ["--device", "cpu", "--tiny"]
        tests, table_args = [*BY_FILE, *REHEARSAL_PATHS, "--", *REHEARSAL_PYTEST_OPTIONS], REHEARSAL_TABLE_ARGS
        checker = compiled = "rehearsal: needs a GPU"
    elif importlib.util.find_spec("xdist"):
        tests = ["-m", "pytest", *paths, *PYTEST_OPTIONS, "-n", str(PYTEST_WORKERS)]
    report_args = ["-m", "bench.report", str(csv), "--block", "gpu", "--overview", "--plot", str(out / "speedup.png")]
    # Reads past the end of a tensor would stay inside a cached block.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    quiet = {"KINETO_LOG_LEVEL": "99"}
    found = [
        Part("setup", python("-c", SETUP), 60, MACHINE_LOG),
        Part("facts", python("-c", FACTS), 60, MACHINE_LOG),
        Part("smoke", python(*smoke), 90, MACHINE_LOG, True, judge_smoke),
        Part("litmus", python("-m", "bench.litmus"), 40, CORRECTNESS_LOG, True),
        Part("tests", python(*tests), 150, CORRECTNESS_LOG, True, judge_tests),
        Part("ceilings", python("-m", "bench.ceilings", "--out", str(csv)), 80, MACHINE_LOG),
        # The checkers leave all but one core idle: compile what the table needs.
        Part(
            "compile", python(*table, "--set", "gpu", "--compile-only"), 110, TABLE_LOG, skip=compiled, background=True
        ),
        Part(
            "memcheck", sanitizer("memcheck"), 50, CORRECTNESS_LOG, True, judge_sanitizer, checker, environment=uncached
        ),
        Part("racecheck", [], 50, CORRECTNESS_LOG, True, judge_sanitizer, checker, environment=uncached),
        Part("table", python(*table, *table_args.split()), TOTAL_S, TABLE_LOG),
        Part("slowest", python("-m", "bench.slowest", str(csv)), 40, LAST_LOG, judge=judge_slowest, environment=quiet),
        Part("report", python(*report_args), 20, LAST_LOG),
    ]
    if not checker:
        found[-4].command = sanitizer("racecheck", *only_our_kernels())
    if rehearse:
        for part in found:
            part.environment |= {"TRITON_INTERPRET": "1", "OMP_WAIT_POLICY": "passive"}
    return found


class Running:
    """A part that was started in a process group of its own."""

    def __init__(self, part: Part, limit_s: float, out: Path):
        self.part, self.start, self.limit_s = part, time.monotonic(), limit_s
        self.path = out / part.log
        command = list(part.command)
        if part.name in ("table", "compile"):
            command += ["--time-limit", str(int(max(5, limit_s - STOP_S)))]
        environment = dict(os.environ, PYTHONUNBUFFERED="1")
        environment.pop("TRITON_INTERPRET", None)
        environment |= part.environment
        with self.path.open("ab") as log:
            said = [c if "\n" not in c else "..." for c in command]
            log.write(f"$ {' '.join(said)}\n".encode())
            log.flush()
            self.begin = self.path.stat().st_size
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def end(self, limit_s: float | None = None) -> Outcome:
        """Wait until the end of its time (or `limit_s` from now), stop what still runs, and judge."""
        part, note = self.part, ""
        left = self.start + self.limit_s - time.monotonic()
        try:
            status = self.process.wait(max(0.0, left if limit_s is None else min(left, limit_s)))
        except subprocess.TimeoutExpired:
            status, note = -1, f"stopped after {time.monotonic() - self.start:.0f} s"
        finally:
            if not self.stop():
                note = f"killed after {time.monotonic() - self.start:.0f} s, and it is still there"
        text = self.path.read_bytes()[self.begin :].decode(errors="replace")
        verdict, line = (part.judge or judge_exit)(status, text)
        if note:
            verdict, line = FAILED, f"{note}; {line}"
        _shorten(self.path)
        return Outcome(part.name, verdict, line, time.monotonic() - self.start, part.correctness)

    def stop(self) -> bool:
        """Kill what is left of the group, also of one whose first process has ended; whether that one is gone."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        try:
            self.process.wait(KILL_S)
        except subprocess.TimeoutExpired:
            return False
        return True


def _output(*command: str) -> str:
    """What a command of the machine says, if it does so soon; one that hangs in a driver is left behind."""
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
        )
    except OSError:
        return ""
    try:
        return process.communicate(timeout=15)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        return ""


def _shorten(path: Path) -> None:
    """Keep the beginning and the end of a log that grew too long to be carried home."""
    data = path.read_bytes()
    if len(data) > MAX_LOG_BYTES:
        half = MAX_LOG_BYTES // 2
        path.write_bytes(data[:half] + b"\n[...]\n" + data[-half:])


def _gpu_name(rehearse: bool) -> str:
    if rehearse:
        return "rehearsal"
    name = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").split("\n")[0]
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "gpu"


def _failed(part: Part, error: Exception) -> Outcome:
    return Outcome(part.name, FAILED, f"{type(error).__name__}: {error}", 0.0, part.correctness)


def _lines(outcomes: list[Outcome]) -> str:
    """The short table of the parts."""
    return "\n".join(f"{o.verdict:8} {o.name:10} {o.seconds:5.0f} s  {o.line}" for o in outcomes)


def write_summary(out: Path, outcomes: list[Outcome], csv: Path) -> None:
    """Write summary.md."""
    measured = rows.read(csv)
    roofs = [
        f"{row['metric']:12} {row['shape']:12} {row['provider']:8} {row['dtype']:9} {row['p50']:>9} {row['unit']}"
        for row in measured
        if row["op"] == "roof"
    ]
    told = _said(out / MACHINE_LOG, r"^constant  .*(?:\n.+)*")
    profile = _said(out / LAST_LOG, r"^slowest: .*(?:\n(?!\$ ).*)*")
    sections = {
        "Ceilings": "\n".join(["```", *roofs, "", told, "```"]) if roofs else "",
        "Benchmark": report.overview(measured),
        "Memory of a training step, MiB above inputs and weights": report.memory(measured) or NO_MEMORY,
        "Slowest row": f"```\n{profile.rstrip()}\n```" if profile else "",
        "All rows": report.markdown(measured, "make gpu"),
    }
    text = ["# GPU run", "", "```", _lines(outcomes), "```"]
    for title, body in sections.items():
        text += ["", f"## {title}", "", body or "Nothing was measured."]
    (out / "summary.md").write_text("\n".join(text) + "\n")


def _summarise(out: Path, outcomes: list[Outcome], csv: Path) -> None:
    """The summary so far; what goes wrong in it must not stop the run."""
    try:
        write_summary(out, outcomes, csv)
    except Exception:
        traceback.print_exc()


def _said(path: Path, pattern: str) -> str:
    """The last passage of a log that matches."""
    found = re.findall(pattern, path.read_text(errors="replace"), re.M) if path.exists() else []
    return found[-1] if found else ""


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
    for stale in (*out.glob("log-*.txt"), *out.glob("speedup.png")):
        stale.unlink()
    csv = out / f"{_gpu_name(options.rehearse)}.csv"

    outcomes: list[Outcome] = []
    running: list[Running] = []

    def ended(outcome: Outcome) -> None:
        outcomes.append(outcome)
        _summarise(out, outcomes, csv)  # after each part: a run that is cut off keeps what it has

    todo = parts(out, csv, options.rehearse)
    last = [part.name for part in todo].index("table")
    table_at = end - options.seconds * (1 - TABLE_AT_S / TOTAL_S)
    for k, part in enumerate(todo):
        if part.name in options.broken:
            part.command, part.skip = [sys.executable, "-c", "raise SystemExit('broken on purpose')"], ""
        if part.name == "table":
            for other in running:
                try:
                    ended(other.end(table_at - time.monotonic()))
                except Exception as error:
                    ended(_failed(other.part, error))
        now = time.monotonic()
        left = table_at - now if k < last else end - now - (TABLE_RESERVE_S * options.seconds / TOTAL_S) * (k == last)
        print(f"... {part.name}", flush=True)
        if part.skip or left <= LEAST_S:
            ended(Outcome(part.name, SKIPPED, part.skip or "no time left", 0.0, part.correctness))
            continue
        try:
            started = Running(part, min(part.limit_s, left), out)
            if part.background:
                running.append(started)
            else:
                ended(started.end())
        except Exception as error:  # whatever it is, the next part may still tell something
            ended(_failed(part, error))
    _summarise(out, outcomes, csv)
    measured = rows.read(csv)
    report.show(measured)
    print("\n".join(line for line in report.overview(measured).splitlines() if line.startswith("**")))
    print(_lines(outcomes))
    print(f"{len(measured)} rows; {', '.join(sorted(p.name for p in out.iterdir()))}")
    return exit_status(outcomes)


if __name__ == "__main__":
    sys.exit(main())
