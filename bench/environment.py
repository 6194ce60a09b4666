"""The columns of a row that describe the machine and the code."""

import datetime
import hashlib
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CODE = ("fusedlstm", "kernels", "bench")  # what a number depends on
OF_CODE = (*CODE, ":!bench/results")  # what `dirty` looks at


def _output(*command: str) -> str | None:
    """What a command says; None where it fails or is missing."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@cache
def commit() -> tuple[str, str]:
    """Short commit and whether code is uncommitted, "true" or "false".

    A tree without git has no commit: it is named by its sources, "tree-" and `digest`, and is "unknown" to be
    committed.
    """
    top = _output("git", "rev-parse", "--show-toplevel")
    sha = _output("git", "rev-parse", "--short=10", "HEAD") if top and Path(top).resolve() == ROOT else None
    if not sha:
        return f"tree-{digest(ROOT)}", "unknown"
    changed = _output("git", "status", "--porcelain", "--", *OF_CODE)
    return sha, "unknown" if changed is None else "true" if changed else "false"


def digest(root: Path) -> str:
    """Ten digits of a SHA-1 of all sources under `CODE`. Every copy of a checkout has the same.

    `python -m bench.environment` prints that of a checkout.
    """
    found = hashlib.sha1(usedforsecurity=False)
    for folder in CODE:
        for directory, folders, names in os.walk(root / folder):  # no links: fusedlstm/kernels may be one
            folders[:] = sorted(name for name in folders if name != "results" and not name.startswith((".", "__")))
            for name in sorted(names):
                if name.endswith((".py", ".json")):
                    path = Path(directory, name)
                    found.update(f"{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes())
    return found.hexdigest()[:10]


@cache
def facts(device: str) -> dict[str, str]:
    """Columns device, driver, cuda, torch, triton, commit, dirty."""
    import importlib.metadata

    import torch

    from fusedlstm.commands import info

    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = ""
    sha, dirty = commit()
    found = {
        "device": info.cpu(),
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
            query = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or ""
            found["driver"] = query.split("\n")[0]
    return found


def threads(count: int) -> str:
    """How many threads compute on a CPU, and what they do while they wait, if the caller's environment says so."""
    return f"threads={count} wait={os.environ.get('OMP_WAIT_POLICY', 'default')}"


def today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")


if __name__ == "__main__":
    print(*commit(), f"tree-{digest(ROOT)}")
