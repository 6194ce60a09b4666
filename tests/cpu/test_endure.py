"""`make endure`: its rehearsal passes, and what has grown or is wrong does not."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import endurance
from tests import endure

ROOT = Path(__file__).resolve().parents[2]
linux = pytest.mark.skipif(sys.platform != "linux", reason="counts by /proc")


@linux
@pytest.mark.parametrize(
    ("engine", "parts", "place"),
    [("torch", [*endure.PARTS], "| torch, cpu"), ("triton", ["shapes"], "| triton, interpreted")],
)
def test_the_rehearsal_passes(engine, parts, place):
    """All parts; where the kernels are interpreted one, because that takes long."""
    chosen = [argument for part in parts for argument in ("--part", part)]
    command = [sys.executable, ROOT / "tests" / "endure.py", "--rehearse", "--engine", engine, *chosen]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines()[2:]]
    assert [row[:2] for row in rows] == [[place, part] for part in parts]


HELD = [400, 10, 4, 1, 125]


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        ({"after": HELD}, "passed"),
        ({"after": [400 + endure.GROWTH_MIB, 9, 3, 1, 125]}, "passed"),
        ({"after": [401 + endure.GROWTH_MIB, 11, 4, 1, 125]}, "LEAK: MiB, tensors"),
        ({"after": [400, 10, 5, 2, 126]}, "LEAK: handles, threads, caches"),
        ({"after": HELD, "wrong": "AssertionError: 1 and 2"}, "FAILED: AssertionError: 1 and 2"),
        ({"after": HELD, "told": "3 errors"}, "passed, 3 errors"),
    ],
)
def test_what_has_grown_or_is_wrong_does_not_pass(outcome, expected):
    outcome = {"part": "shapes", "before": HELD, "wrong": None, "told": ""} | outcome
    assert endure.verdict(outcome) == expected
    assert endure.row("torch, cpu", outcome).endswith(f"| {expected} |")


@linux
def test_what_is_held_is_counted():
    from fusedlstm.plan import tuned

    before = endurance.Held.now()
    kept, handle = [torch.zeros(3), torch.zeros(1 << 23)], os.open(os.devnull, os.O_RDONLY)
    kept[1].fill_(1.0)
    wait = threading.Event()
    thread = threading.Thread(target=wait.wait)
    thread.start()
    tuned._warned.add("a test")
    after = endurance.Held.now()
    wait.set()
    thread.join()
    os.close(handle)
    tuned._warned.discard("a test")
    grown = [y - x for x, y in zip(before, after, strict=True)]
    assert grown[0] >= 30 and grown[1:] == [2, 1, 1, 1]


@linux
def test_a_part_says_what_is_wrong(monkeypatch, tmp_path):
    monkeypatch.setenv("FUSEDLSTM_CACHE", str(tmp_path))
    place = endurance.Place("torch", "cpu", 16, True)

    def wrong(place):
        def step(k):
            if k == 3:
                raise AssertionError("a wrong number")

        return endurance.Work(step, 2)

    monkeypatch.setitem(endurance.PARTS, "wrong", wrong)
    found = endurance.outcome("wrong", place, 60.0)
    assert (found["count"], found["wrong"]) == (3, "AssertionError: a wrong number")
    assert endure.verdict(found).startswith("FAILED")
