"""The benchmark: shapes, rows, timing, report, and a rehearsal of the GPU run on a CPU."""

import contextlib
import csv
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import environment, gpu, registry, report, rows, shapes, timing, worker
from bench import run as bench_run
from bench.worker import Case, Settings

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _passive_threads(monkeypatch):
    # Workers that share two cores with other tests wait without spinning.
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("FUSEDLSTM_BACKEND", raising=False)


def row(**changes) -> rows.Row:
    values = dict.fromkeys(rows.COLUMNS, "")
    values |= {"op": "lstm", "provider": "torch", "mode": "fwdbwd", "shape": "S1", "dtype": "float32"}
    values |= {"T": "100", "B": "32", "I": "32", "H": "32", "layers": "1", "directions": "1", "device": "some cpu"}
    values |= {"metric": "latency", "unit": "ms", "p50": "2", "p20": "1.9", "p80": "2.2", "torch": "2.13.0"}
    return values | changes


def test_shapes_are_sound():
    ids = [shape.id for shape in shapes.SHAPES]
    assert len(set(ids)) == len(ids)
    for shape in shapes.SHAPES:
        assert min(shape.T, shape.B, shape.I, shape.H, shape.layers, shape.heads) >= 1, shape.id
        assert shape.H % shape.heads == 0 and set(shape.sets) <= {"gpu", "cpu", "rehearsal"}, shape.id
        assert set(shape.modes) <= set(shapes.MODES) and set(shape.dtypes) <= set(shapes.GPU_DTYPES), shape.id
        assert shape.source and " " not in shape.id, shape.id
    named = "S1 S2 S3 S4 S5 S6 M1 M3 M4 M5 F1 L1 L2 L3 L5 L6 I2 F2-B2 F2-B256 F3-T2048 F4-48x16 M2-B16 I1-H1024"
    assert set(named.split()) <= set(ids)
    assert shapes.BY_ID["F4-48x16"].needs == ("heads",)
    assert shapes.BY_ID["M4"].needs == ("packed",)
    assert shapes.BY_ID["F1"].pending == ()
    assert shapes.in_set("gpu")[0].telling == 0


def test_shapes_count_operations():
    # Per step: [B, I] and [B, H] times [4H, I] and [4H, H], in two directions and two layers.
    shape = shapes.Shape("x", T=3, B=2, I=5, H=7, layers=2, bidirectional=True)
    by_hand = 2 * 3 * 2 * 2 * 4 * 7 * ((5 + 7) + (14 + 7))
    assert shape.flops("infer") == by_hand
    assert shape.flops("fwdbwd") == 3 * by_hand


def test_shapes_import_without_torch():
    code = "import bench.shapes, bench.registry, bench.report, bench.gpu, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_missing_rival_is_named():
    assert "'haste_pytorch' is not installed" in registry.PROVIDERS["haste"].missing()
    assert registry.PROVIDERS["torch"].missing() is None
    with pytest.raises(KeyError, match="expected one of fusedlstm, torch"):
        registry.select(["cudnn"])
    assert [p.name for p in registry.select(["fusedlstm"])] == ["torch", "fusedlstm"]


def test_rounds_interleave_and_ratios_are_paired():
    order = []

    def work(name, seconds):
        order.append(name)
        time.sleep(seconds)

    calls = {"torch": lambda: work("torch", 0.004), "twice": lambda: work("twice", 0.002)}
    samples = timing.time_cpu(calls, budget_s=0.1)
    assert len(samples.ms["torch"]) == len(samples.ms["twice"]) >= timing.MIN_ROUNDS
    timed = order[2 * 4 :]  # behind the warm-up of each
    assert timed[:4] == ["torch", "twice", "twice", "torch"]
    p50, p20, p80 = timing.percentiles(timing.ratios(samples, "torch", "twice"))
    assert p20 <= p50 <= p80 and 1.2 < p50 < 2.5
    assert timing.percentiles([float(v) for v in range(11)]) == (5.0, 2.0, 8.0)


def test_rerun_replaces_rows(tmp_path):
    path = tmp_path / "cpu.csv"
    for p50 in ("2", "3"):
        writer = rows.Writer(path)
        writer.write(row(p50=p50))
        writer.write(row(provider="fusedlstm", p50=p50))
        assert len(path.read_text().splitlines()) >= 3  # written before close
        writer.close()
    found = rows.read(path)
    assert [r["p50"] for r in found] == ["3", "3"]
    with path.open("a") as file:
        file.write("lstm,torch,infer,S")  # a run that died in the middle of a line
    assert rows.read(path) == found
    with path.open() as file:
        assert tuple(next(csv.reader(file))) == rows.COLUMNS


def test_report_rewrites_its_block_only(tmp_path):
    measured = [
        row(),
        row(provider="fusedlstm", p50="1"),
        row(provider="fusedlstm", metric="speedup", unit="x", p50="2"),
        row(provider="torch-again", metric="speedup", unit="x", p50="1", p20="0.98", p80="1.03"),
        row(op="roof", metric="matmul", unit="TFLOP/s", p50="0.1"),
        row(op="roof", metric="copy", unit="GB/s", p50="10"),
    ]
    readme = tmp_path / "README.md"
    readme.write_text(
        "before\n<!-- bench:cpu -->\nold\n<!-- /bench -->\nbetween\n<!-- bench:gpu -->\n<!-- /bench -->\n"
    )
    text = report.markdown(measured, "make bench")
    report.rewrite_block(readme, "cpu", text)
    once = readme.read_text()
    assert "old" not in once and once.startswith("before\n") and "between\n<!-- bench:gpu -->\n<!-- /bench -->" in once
    # 100 steps, 32 x (32 + 32) x 128 products, three times over, at 0.1 TFLOP/s: 1.57 ms.
    assert "| S1 | 100, 32, 32, 32 | forward + backward | float32 | 2 | 1 | 2.00 | 0.98 … 1.03 | 1.57 |" in once
    report.rewrite_block(readme, "cpu", text)
    assert readme.read_text() == once
    with pytest.raises(ValueError, match="found 0"):
        report.rewrite_block(readme, "tpu", text)


PLUGIN = """
import os
from bench.registry import Layer, provider, PROVIDERS

@provider("dies")
def _(shape, dtype, device, weights):
    os._exit(9)

@provider("hangs")
def _(shape, dtype, device, weights):
    import time
    time.sleep(600)

@provider("raises")
def _(shape, dtype, device, weights):
    raise ValueError("no such kernel")

@provider("wrong")
def _(shape, dtype, device, weights):
    good = PROVIDERS["torch"].build(shape, dtype, device, weights)
    return Layer(lambda x: good.forward(x) * 1.5, good.parameters, good.train)
"""


def test_run_survives_providers_that_fail(tmp_path, capsys):
    plugin = tmp_path / "plugin.py"
    plugin.write_text(PLUGIN)
    settings = Settings("cpu", threads=1, seconds_per_case=0.02, plugin=str(plugin))
    run = bench_run.Run(settings, tmp_path / "r.csv", tmp_path / "log", time.monotonic() + 180, case_limit_s=15)
    cases = [Case("R1", "float32", "fwdbwd", ("torch", "raises", "wrong", "dies", "hangs", "fusedlstm"))]
    cases += [Case("R2", "float32", "infer", ("torch", "fusedlstm"))]
    run.run(cases, [])
    run.close()
    said, log = capsys.readouterr().out, (tmp_path / "log").read_text()
    assert "FAILED R1 float32 fwdbwd raises: ValueError: no such kernel" in said
    assert "FAILED R1 float32 fwdbwd wrong: wrong result" in said
    assert "FAILED R1 float32 fwdbwd dies: the process ended with 9" in said
    assert "FAILED R1 float32 fwdbwd hangs: no answer in 15 s" in said
    assert "Traceback" in log
    measured = {(r["shape"], r["provider"], r["metric"]) for r in rows.read(tmp_path / "r.csv")}
    both = [(shape, provider) for shape in ("R1", "R2") for provider in ("torch", "fusedlstm")]
    assert measured >= {(*pair, "latency") for pair in both} and run.count["left"] == 0
    assert not {provider for _, provider, _ in measured} & {"raises", "wrong", "dies", "hangs"}


class FakeEvent:
    """A device event on the host clock."""

    def __init__(self, enable_timing):
        self.at = 0.0

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


class FakeGraph:
    def replay(self):
        time.sleep(1e-4)


def test_gpu_path_with_a_make_believe_device(monkeypatch):
    """All of `measure` that only a GPU takes, on the device "cpu:0" with torch.cuda replaced."""
    nothing = {name: lambda *args: None for name in ("synchronize", "reset_peak_memory_stats")}
    stream = SimpleNamespace(wait_stream=lambda other: None)
    context = {name: lambda *args: contextlib.nullcontext() for name in ("stream", "graph")}
    made = {"Event": FakeEvent, "CUDAGraph": FakeGraph, "Stream": lambda: stream, "current_stream": lambda: stream}
    told = {"memory_allocated": lambda: 1 << 20, "max_memory_allocated": lambda: 3 << 20}
    for name, value in (nothing | context | made | told | {"get_device_name": lambda index: "Make-believe"}).items():
        monkeypatch.setattr(torch.cuda, name, value)
    environment.facts.cache_clear()
    events = []
    settings = Settings("cpu:0", threads=1, seconds_per_case=0.02)
    case = Case("R1", "float32", "fwdbwd", ("torch", "fusedlstm", "fusedlstm-triton"))
    worker.measure(case, settings, lambda *event: events.append(event))
    environment.facts.cache_clear()
    measured = {(e[1]["provider"], e[1]["metric"]): e[1] for e in events if e[0] == "row"}
    assert measured["fusedlstm", "peak_memory"]["p50"] == "2"
    assert measured["torch", "latency"]["protocol"].startswith("events interleaved rounds=")
    assert measured["torch", "latency"]["protocol"].endswith(" tf32=1")
    assert measured["fusedlstm", "latency"]["device"] == "Make-believe"
    assert ("fusedlstm", "speedup") in measured and ("torch", "speedup") not in measured
    # fusedlstm-triton has no kernels for CPU tensors and must say so, not fall back.
    assert [e[1] for e in events if e[0] == "failed"] == ["fusedlstm-triton"]

    samples = timing.time_gpu_graph({"torch": lambda: 1, "fusedlstm": lambda: 2}, budget_s=0.01)
    assert samples.protocol.startswith("graph") and all(0.05 < ms < 5 for ms in samples.ms["fusedlstm"])


def test_rehearsal_goes_on_behind_a_broken_part(tmp_path):
    command = [sys.executable, "-m", "bench.gpu", "--out", str(tmp_path), "--rehearse", "--break", "memcheck"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stdout + done.stderr
    files = {path.name for path in tmp_path.iterdir()}
    assert {"summary.md", "rehearsal.csv", "log-tests.txt", "log-bench.txt"} <= files and len(files) <= 8
    summary = (tmp_path / "summary.md").read_text()
    for verdict, part in (
        ("passed", "smoke"),
        ("passed", "tests"),
        ("FAILED", "memcheck"),
        ("skipped", "racecheck"),
        ("passed", "bench"),
    ):
        assert f"{verdict:8} {part}" in summary
    assert "broken on purpose" in summary and "| R1 | 7, 3, 8, 8 |" in summary
    assert "pending, not served yet: R3 (heads)" in (tmp_path / "log-bench.txt").read_text()
    measured = rows.read(tmp_path / "rehearsal.csv")
    assert {r["provider"] for r in measured if r["op"] == "lstm"} == {"torch", "fusedlstm"}
    assert {r["metric"] for r in measured if r["op"] == "roof"} == {"matmul", "copy"}
    assert all(r["device"] and r["torch"] and r["commit"] and r["date"] and r["protocol"] for r in measured)
    assert done.stdout.rstrip().splitlines()[-1].startswith(f"{len(measured)} rows; ")


def test_verdicts_of_checkers():
    assert gpu.judge_sanitizer(1, "Error: Device not supported\n========= ERROR SUMMARY: 1 error")[0] == gpu.SKIPPED
    assert gpu.judge_sanitizer(0, "done T3-B2\n========= ERROR SUMMARY: 0 errors")[0] == gpu.PASSED
    assert gpu.judge_sanitizer(9, "done T3-B2\n========= ERROR SUMMARY: 2 errors")[0] == gpu.FAILED
    assert gpu.judge_sanitizer(0, "nothing ran")[0] == gpu.FAILED
    assert gpu.judge_tests(5, "no tests ran in 0.1s") == (gpu.FAILED, "no test was collected")
    assert gpu.judge_tests(0, "==== 12 passed, 3 skipped in 4.20s ====") == (
        gpu.PASSED,
        "12 passed, 3 skipped in 4.20s",
    )
    parts = [gpu.Outcome("tests", gpu.PASSED, "", 1.0, True), gpu.Outcome("memcheck", gpu.SKIPPED, "", 0.0, True)]
    assert gpu.exit_status(parts) == 0
    assert gpu.exit_status([*parts, gpu.Outcome("bench", gpu.FAILED, "", 0.0, False)]) == 0
    assert gpu.exit_status([*parts, gpu.Outcome("racecheck", gpu.FAILED, "", 0.0, True)]) == 1
    assert gpu.exit_status(parts[1:]) == 1
