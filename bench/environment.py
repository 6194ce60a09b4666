"""What a row says about the machine and the code."""

import datetime
import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CODE = ("fusedlstm", "kernels", "bench", ":!bench/results")  # what `dirty` looks at


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


@cache
def commit() -> tuple[str, str]:
    """Short commit and "true"/"false" for uncommitted code; without git from BENCH_COMMIT, or unknown."""
    sha = _output("git", "rev-parse", "--short=10", "HEAD")
    if not sha:
        return os.environ.get("BENCH_COMMIT", "unknown"), "unknown"
    return sha, "true" if _output("git", "status", "--porcelain", "--", *CODE) else "false"


def cpu_name() -> str:
    """Model and number of usable cores."""
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


@cache
def facts(device: str) -> dict[str, str]:
    """Columns device, driver, cuda, torch, triton, commit, dirty."""
    import importlib.metadata

    import torch

    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = ""
    sha, dirty = commit()
    found = {
        "device": cpu_name(),
        "driver": "",
        "cuda": "",
        "torch": torch.__version__,
        "triton": triton,
        "commit": sha,
        "dirty": dirty,
    }
    if device != "cpu":
        found["device"] = torch.cuda.get_device_name(0)
        found["cuda"] = torch.version.cuda or f"rocm {torch.version.hip}"
        if shutil.which("nvidia-smi"):
            query = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
            found["driver"] = query.split("\n")[0]
    return found


def today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
