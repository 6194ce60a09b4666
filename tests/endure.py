"""Hours of use in minutes, on Linux: `python tests/endure.py --minutes 10`.

Each part (`tests/helpers/endurance.py`) trains, interrupts, forks or runs out of memory until its time is over, in a
process of its own, on the engine `torch` and on `triton`. The kernels run on the GPU, or are interpreted without one. A
row of the table has the steps, and what the process held before and after them. Exit status 1 means that something
grew, or that a number was wrong.

`--rehearse` runs all parts with tiny sizes, in one process for each engine.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Parts and their shares of the time.
PARTS = {"shapes": 10, "threads": 4, "processes": 4, "interrupts": 5, "tuning": 1, "memory": 4, "long": 8}
LONG, LONG_INTERPRETED, LONG_REHEARSED = 100_000, 500, 16  # T of the part `long`
MORE_S = 240  # for the first step of every kind, which no part leaves out
GROWTH_MIB = 8  # more than this is a leak; of everything else one is
COLUMNS = ("engine", "part", "steps", "MiB", "tensors", "handles", "threads", "caches", "verdict")
HELD = COLUMNS[3:8]  # as `endurance.Held`
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",  # also in new threads: a sum in two parts has other bits
    # So that freed memory goes back, and a limit holds from the next tensor on.
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
    # oneDNN keeps the code of 1024 sizes, which looks like a leak until it is full.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32",
}


INTERPRETED = ("triton", "cpu")


def work(parts: list[str], rehearse: bool) -> list[tuple[str, str, list[str]]]:
    """What runs in a process each: an engine, a device, and parts of PARTS. The file of choices has no engine."""
    places = [("torch", "cpu"), INTERPRETED]
    if not rehearse:
        import torch

        places = [places[0], ("torch", "cuda"), ("triton", "cuda")] if torch.cuda.is_available() else places
    found = [(*place, [p for p in parts if p != "tuning" or place == places[0]]) for place in places]
    return found if rehearse else [(*place, [part]) for *place, own in found for part in own]


def started(engine: str, device: str, parts: list[str], seconds: float, cache: str, rehearse: bool) -> subprocess.Popen:
    interpreted = (engine, device) == INTERPRETED
    longest = LONG_REHEARSED if rehearse else LONG_INTERPRETED if interpreted else LONG
    arguments = [",".join(parts), engine, device, f"{seconds:.1f}", longest, *(["rehearse"] if rehearse else [])]
    environment = {**os.environ, **ENVIRONMENT, "FUSEDLSTM_CACHE": cache, "TRITON_INTERPRET": str(int(interpreted))}
    return subprocess.Popen(
        [sys.executable, ROOT / "tests" / "helpers" / "endurance.py", *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that what it has forked ends with it
    )


def outcomes(process: subprocess.Popen, parts: list[str], limit_s: float) -> list[dict]:
    """What the process says of its parts, in their order. Its end is waited for."""
    try:
        said, end = process.communicate(timeout=limit_s)[0], f"the process ended with {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, end = process.communicate()[0], f"no end after {limit_s:.0f} s"
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    found = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    return found + [{"part": part, "wrong": end} for part in parts[len(found) :]]


def verdict(outcome: dict) -> str:
    """What the table says: it begins with "passed" if nothing is wrong and nothing has grown."""
    if outcome["wrong"]:
        return f"FAILED: {outcome['wrong']}"
    pairs = zip(HELD, outcome["before"], outcome["after"], strict=True)
    grown = [name for name, before, after in pairs if after - before > (GROWTH_MIB if name == "MiB" else 0)]
    if grown:
        return f"LEAK: {', '.join(grown)}"
    return "passed" + (f", {outcome['told']}" if outcome["told"] else "")


def row(place: str, outcome: dict) -> str:
    held = zip(outcome.get("before") or [""] * 5, outcome.get("after") or [""] * 5, strict=True)
    pairs = [f"{before} → {after}" for before, after in held]
    return _line(place, outcome["part"], outcome.get("count", 0), *pairs, verdict(outcome).split("\n")[0])


def _line(*columns: object) -> str:
    return f"| {' | '.join(map(str, columns))} |"


def _print(*lines: str) -> None:
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="for all parts together")
    parser.add_argument("--part", action="append", choices=PARTS, help="only this one; may be given several times")
    parser.add_argument("--engine", choices=("torch", "triton"), help="only this one")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, every step once")
    args = parser.parse_args()
    parts = args.part or [*PARTS]
    processes = [place for place in work(parts, args.rehearse) if args.engine in (None, place[0])]
    minutes = 0.0 if args.rehearse else args.minutes
    a_share = 60 * minutes / sum(PARTS[part] for *_, own in processes for part in own)
    failed = False
    _print(_line(*COLUMNS), _line(*["---"] * len(COLUMNS)))
    with tempfile.TemporaryDirectory() as folder:
        running = (
            started(*w, a_share * PARTS[w[2][0]], f"{folder}/{k}", args.rehearse) for k, w in enumerate(processes)
        )
        running = [*running] if args.rehearse else running  # side by side; else one after another
        for (engine, device, own), process in zip(processes, running, strict=True):
            place = f"{engine}, {'interpreted' if (engine, device) == INTERPRETED else device}"
            for outcome in outcomes(process, own, a_share * PARTS[own[0]] + MORE_S):
                failed |= not verdict(outcome).startswith("passed")
                _print(row(place, outcome))
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
