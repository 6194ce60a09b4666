"""The benchmark: shapes, rows, timing, bounds, report, and a rehearsal of the GPU run on a CPU."""

import contextlib
import csv
import math
import os
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import environment, expected, gpu, registry, report, rows, shapes, slowest, worker
from bench import run as bench_run
from bench.worker import Case, Settings
from fusedlstm import timing

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
    named = "S1 S2 S3 S4 S5 S6 M1 M2-B16 M2-B64 M3 M4 M5 F1 L1 L2 L3 L4-I400 L5 L6 B1-I1312 B1-I1024 I1-H1024 I2"
    named += " F2-B2 F2-B8 F2-B32 F2-B64 F2-B128 F2-B256 F3-T256 F3-T512 F3-T2048 X1-T65536 X1-T100000"
    named += " F4-48x16 F4-24x32 F4-12x64 F4-6x128 F4-3x256"
    on_gpu = shapes.in_set("gpu")
    assert set(named.split()) <= {shape.id for shape in on_gpu}
    assert shapes.BY_ID["F4-48x16"].needs == ("heads",) and shapes.BY_ID["M4"].needs == ("packed input",)
    assert {need for shape in shapes.SHAPES for need in shape.needs} == set(registry.FEATURES)
    assert on_gpu[0].telling == 0 and "F1" in [shape.id for shape in on_gpu[:5]]


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


def test_what_a_provider_lacks_is_named():
    def why_not(name, shape, mode="fwdbwd", device="cpu"):
        return registry.PROVIDERS[name].why_not(shapes.BY_ID[shape], "float32", device, mode)

    assert why_not("cell-loop", "R4") == "no projection" and why_not("cell-loop", "R3") == "no heads"
    assert why_not("cell-loop", "R5") is None and why_not("torch", "F4-48x16") is None
    assert why_not("fusedlstm-states", "R1", mode="infer") == "only fwdbwd"
    assert why_not("fusedlstm-triton", "R1") == "needs a GPU, or TRITON_INTERPRET=1"
    assert "only beyond 65535 steps" in why_not("cudnn-stretches", "F1", device="cuda")
    assert why_not("cudnn-stretches", "X1-T100000", device="cuda") is None
    assert (why_not("fusedlstm", "R3") is None) == registry.takes("num_heads")
    assert why_not("fusedlstm-triton", "R1", device="cuda") == "same as fusedlstm on a GPU"
    assert why_not("fusedlstm-auto", "R1") == "needs a GPU: elsewhere it is fusedlstm"


def test_auto_is_measured_where_it_is_cudnn(monkeypatch):
    from fusedlstm import engines

    asked = []

    def fastest(call, index):
        asked.append((call.batch, call.layout, call.dtype, call.training, index))
        return "torch" if call.training else "triton", "predicted"

    monkeypatch.setattr(engines, "fastest", fastest)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    auto = registry.PROVIDERS["fusedlstm-auto"]
    assert auto.why_not(shapes.BY_ID["L1"], "bfloat16", "cuda", "fwdbwd") is None
    assert auto.why_not(shapes.BY_ID["M4"], "float32", "cuda", "infer").startswith("same as fusedlstm: auto is triton")
    assert asked == [(128, "dense", "bf16", True, 3), (64, "packed", "fp32", False, 3)]
    for shape in ("F4-48x16", "M3", "X1-T100000"):
        assert "no other engine" in auto.why_not(shapes.BY_ID[shape], "bfloat16", "cuda", "fwdbwd")
    assert len(asked) == 2


def test_on_a_gpu_ours_is_the_kernels(monkeypatch):
    made = []
    monkeypatch.setattr(registry, "_module", lambda *args, **kwargs: made.append(kwargs))
    for name, device in (("fusedlstm", "cuda"), ("fusedlstm-auto", "cuda"), ("fusedlstm", "cpu")):
        registry.PROVIDERS[name].build(shapes.BY_ID["L1"], "float32", device, {})
    assert made == [{"backend": "triton"}, {"backend": "auto"}, {}]


def test_prediction_of_a_step_takes_its_input_product(monkeypatch):
    from fusedlstm import plan
    from fusedlstm.engines import launch
    from fusedlstm.plan.devices import DEVICES

    monkeypatch.setattr(launch, "device_limits", lambda index: DEVICES["sm_90"])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    shape = shapes.BY_ID["I1-H1024"]
    ms, words = expected.predicted(shape, "bfloat16", "infer", "cuda", "fusedlstm")
    p = plan.step_plan("lstm", 1, 1024, "bf16", 1, DEVICES["sm_90"], "fwd", input_size=1024)
    assert math.isclose(ms, p.step_us / 1e3) and "fwd stepped 1x" in words
    assert expected.predicted(shape, "bfloat16", "infer", "cuda", "fusedlstm-auto") is None


def test_prediction_of_a_stack_is_that_of_a_wave(monkeypatch):
    from fusedlstm import plan
    from fusedlstm.engines import launch
    from fusedlstm.plan.devices import DEVICES

    limits = DEVICES["sm_90"]
    monkeypatch.setattr(launch, "device_limits", lambda index: limits)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    shape = shapes.Shape("Z", T=40, B=16, I=24, H=256, layers=5)

    def predicted(provider):
        return expected.predicted(shape, "bfloat16", "fwdbwd", "cuda", provider)[0]

    alone = predicted("fusedlstm-states")
    for together in (1, 2):
        monkeypatch.setattr(plan, "wave", lambda *args, together=together, **kwargs: together)
        loops, flops = 0.0, 3 * 2.0 * 40 * 16 * 1024 * (24 + 9 * 256)
        for n in [2, 2, 1] if together == 2 else [1] * 5:
            for pass_ in ("fwd", "bwd"):
                p = plan.plan("lstm", 16, 256, "bf16", n, limits, pass_, stack=n > 1)
                loops += p.step_us * (40 + n - 1)
                flops -= 2.0 * 40 * 16 * 1024 * 256 * (n + n - 1)  # recurrent, and input of the layers above
        assert math.isclose(predicted("fusedlstm"), loops / 1e3 + flops / (limits.half_tflops * 1e9))
        assert (predicted("fusedlstm") == alone) == (together == 1)
        assert predicted("fusedlstm-states") == alone, "which keeps layers apart"


def test_tests_by_file(tmp_path):
    for name, body in {
        "good": "def test_a(): pass\ndef test_b(): pass",
        "bad": "def test_a(): assert 0",
        "none": "",
        "dead": "import os\ndef test_a(): os._exit(9)",
    }.items():
        (tmp_path / f"test_{name}.py").write_text(body)

    def by_file(*names):
        paths = [str(tmp_path / f"test_{name}.py") for name in names] or [str(tmp_path)]
        command = [sys.executable, "-m", "bench.by_file", *paths, "--", *gpu.PYTEST_OPTIONS, "--rootdir", str(tmp_path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        return done.returncode, done.stdout

    status, log = by_file()
    verdict, line = gpu.judge_tests(status, log)
    assert status == 1 and verdict == gpu.FAILED, log
    assert line.startswith("1 ended, 1 failed, 2 passed in ") and "first: " in line, log
    assert "test_dead.py ended with status 9" in log
    status, log = by_file("good", "none")
    verdict, line = gpu.judge_tests(status, log)
    assert verdict == gpu.PASSED and line.startswith("2 passed in "), log
    assert by_file("none")[0] == 5


def test_heads_are_the_blocks_of_a_dense_weight():
    """A dense `torch.nn.LSTM` with zeros outside of the blocks is what a layer with heads is checked against."""
    H, heads = 6, 3
    weight = torch.arange(4.0 * H * H).reshape(4 * H, H) + 1
    cut = registry.block_diagonal({"weight_hh_l0": weight, "bias_hh_l0": weight[:, 0]}, heads)
    assert torch.equal(cut["bias_hh_l0"], weight[:, 0])
    blocks = registry.blocks(weight, heads)
    assert blocks.shape == (4 * H, 2) and torch.equal(registry.blocks(cut["weight_hh_l0"], heads), blocks)
    for row in range(4 * H):
        head = row % H // 2
        assert torch.equal(blocks[row], weight[row, 2 * head : 2 * head + 2])
        assert torch.equal(cut["weight_hh_l0"][row, 2 * head : 2 * head + 2], blocks[row])
    assert cut["weight_hh_l0"].count_nonzero() == blocks.numel()


def test_alternating_directions_are_flips():
    shape = shapes.Shape("x", T=4, B=2, I=3, H=5, layers=2, alternating=True)
    weights = registry.baseline_weights(shape, "float32", "cpu")
    x = torch.randn(4, 2, 3)
    by_torch, by_loop, by_ours = (
        registry.PROVIDERS[name].layer(shape, "float32", "cpu", weights) for name in ("torch", "cell-loop", "fusedlstm")
    )
    first, second = torch.nn.LSTM(3, 5), torch.nn.LSTM(5, 5)
    first.load_state_dict({n: w for n, w in weights.items() if n.endswith("l0")})
    second.load_state_dict({n.replace("l1", "l0"): w for n, w in weights.items() if n.endswith("l1")})
    expected_output = second(first(x)[0].flip(0))[0].flip(0)
    for layer in (by_torch, by_loop, by_ours):
        assert registry.relative_error(layer.forward(x), expected_output) < 1e-5
        assert len(layer.parameters) == 8


def test_inputs_rotate_until_they_do_not_fit_the_cache():
    assert worker.input_sets(shapes.BY_ID["S1"], 2) == worker.MOST_INPUTS
    assert worker.input_sets(shapes.BY_ID["S6"], 2) == 1  # 134 MB
    assert worker.input_sets(shapes.BY_ID["I1-H1024"], 2) == 8  # 17 MB of weights each


def test_bound_is_the_largest_of_three():
    known = {("matmul", "bfloat16"): 700.0, ("copy", "float32"): 4000.0, ("barrier", "P1"): 0.1}
    known |= {("barrier", "P8"): 0.8, ("barrier", "P32"): 1.0}

    def bound(shape, mode="infer"):
        return expected.bound_ms({"shape": shape, "mode": mode, "dtype": "bfloat16"}, known)

    assert bound("F1") == (pytest.approx(1023 * 1e-3), "barrier")  # 4.7 MB of weights: 21 programs or more
    assert bound("F1", "fwdbwd") == (pytest.approx(2 * 1023 * 1e-3), "barrier")
    assert bound("M5") == (pytest.approx(40 * 1e-3), "barrier")  # two layers, one step apart
    assert bound("F4-48x16")[1] == "matrix"  # heads of 16 units exchange nothing
    # 512 x 512 x (128 + 128) x 512 products at 700 TFLOP/s.
    assert bound("S6") == (pytest.approx(2 * 512**3 * 256 / 700e9), "matrix")
    # One step reads its weights once: 8 x 1024 x 1024 numbers, and two vectors.
    assert bound("I1-H1024") == (pytest.approx((8 * 1024**2 + 2048) * 2 / 4000e6), "memory")
    assert expected.bound_ms({"shape": "F1", "mode": "infer", "dtype": "float16"}, known) is None


def test_slowest_row():
    def case(shape, ms, ratio):
        mine = {"provider": "fusedlstm", "shape": shape}
        return [row(**mine, p50=str(ms)), row(**mine, metric="speedup", unit="x", p50=str(ratio))]

    measured = [*case("S1", 1, 1.5), *case("S3", 9, 1.2), row(provider="torch", shape="L5", p50="9")]
    assert slowest.slowest(measured)[0]["shape"] == "S3"  # no bound is known
    roofs = [row(op="roof", metric="matmul", unit="TFLOP/s", p50="0.1"), row(op="roof", metric="copy", p50="10")]
    # 100 x 16 x (128 + 128) x 512 products at 0.1 TFLOP/s take 12.6 ms, three times the bound is S1's 1.57.
    found, why = slowest.slowest([*measured, *case("S1", 5, 1.5), *roofs])
    assert (found["shape"], why) == ("S1", "3.2 times its bound")
    found, why = slowest.slowest([*measured, *case("M5", 9, 0.9), *roofs])
    assert (found["shape"], why) == ("M5", "0.9 times as fast as torch.nn.LSTM")
    assert slowest.slowest([row()]) is None


def test_overview_and_memory():
    mine = {"provider": "fusedlstm", "dtype": "bfloat16"}
    measured = [row(**mine, p50="1"), row(**mine, metric="speedup", unit="x", p50="4")]
    measured += [row(**mine, shape="S3", metric="speedup", unit="x", p50="0.25", p20="0.2", p80="0.3")]
    measured += [row(metric=m, unit="MiB", p50=v) for m, v in (("peak_memory", "30"), ("kept_memory", "20"))]
    text = report.overview(measured)
    assert "**forward + backward**: geometric mean bfloat16 1.00 over 2 shapes, 1 below 1" in text
    assert "| S1 | 100, 32, 32, 32 | 1 | 4.00 | - | - |" in text  # bfloat16, then float32
    told = report.memory(measured)
    assert "| shape | dtype | torch peak | torch kept for the backward |" in told
    assert "| S1 | float32 | 30 | 20 |" in told and report.memory([row()]) == ""


def test_rounds_interleave_and_ratios_are_paired(monkeypatch):
    order, now = [], [0.0]
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def work(name, seconds):
        order.append(name)
        now[0] += seconds

    calls = {"torch": lambda: work("torch", 0.004), "twice": lambda: work("twice", 0.002)}
    told = []
    samples = timing.take(calls, 0.1, "cpu", lambda *done: told.append(done))
    assert told[0] == (0, len(told)) and told[-1] == (len(told) - 1, len(samples.ms["torch"]))
    assert len(samples.ms["torch"]) == len(samples.ms["twice"]) >= timing.MIN_ROUNDS
    timed = order[2 * 4 :]  # behind the warm-up of each
    assert timed[:4] == ["torch", "twice", "twice", "torch"]
    p50, p20, p80 = timing.percentiles(timing.ratios(samples, "torch", "twice"))
    assert [p20, p50, p80] == pytest.approx([2.0] * 3)
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
    assert "| S1 | 100, 32, 32, 32 | forward + backward | float32 | 2 | 1 | 2.00 | 0.98 … 1.03 | 1.57 | 0.636 |" in once
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
    import pathlib, time
    pathlib.Path(__file__).with_name("hangs").write_text(str(os.getpid()))
    time.sleep(3600)

@provider("raises")
def _(shape, dtype, device, weights):
    raise ValueError("no such kernel")

@provider("wrong")
def _(shape, dtype, device, weights):
    good = PROVIDERS["torch"].build(shape, dtype, device, weights)
    return Layer(lambda x: good.forward(x) * 1.5, good.parameters, good.train)
"""


class RunThatKnows(bench_run.Run):
    """Loses patience with a worker that is known to hang and with no other, however busy the machine is."""

    def __init__(self, settings, folder):
        super().__init__(settings, folder / "r.csv", folder / "log", math.inf, 0.0)
        self.hangs = folder / "hangs"

    @property
    def case_limit_s(self):
        return 1.0 if self.hangs.exists() and Path(f"/proc/{self.hangs.read_text()}").exists() else 3600.0

    @case_limit_s.setter
    def case_limit_s(self, value):
        pass


def test_run_survives_providers_that_fail(tmp_path, capsys):
    plugin = tmp_path / "plugin.py"
    plugin.write_text(PLUGIN)
    settings = Settings("cpu", threads=1, seconds_per_case=0.02, plugin=str(plugin))
    run = RunThatKnows(settings, tmp_path)
    cases = [Case("R1", "float32", "fwdbwd", ("torch", "raises", "wrong", "dies", "hangs", "fusedlstm"))]
    cases += [Case("R2", "float32", "infer", ("torch", "fusedlstm"))]
    run.run(cases)
    run.close()
    said, log = capsys.readouterr().out, (tmp_path / "log").read_text()
    assert "FAILED R1 float32 fwdbwd raises: ValueError: no such kernel" in said
    assert "FAILED R1 float32 fwdbwd wrong: wrong result" in said
    assert "FAILED R1 float32 fwdbwd dies: the process ended with 9" in said
    assert re.search(r"FAILED R1 float32 fwdbwd hangs: no answer in \d+ s", said)
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


class SteadyEvent(FakeEvent):
    """A device event on a clock of its own, in seconds, which recording moves by a microsecond."""

    now = 0.0

    def record(self):
        SteadyEvent.now += 1e-6
        self.at = SteadyEvent.now


class FakeGraph:
    def replay(self):
        time.sleep(1e-4)


@pytest.fixture
def make_believe(monkeypatch):
    """torch.cuda replaced, so that what only a GPU takes can run on the device "cpu:0"."""
    nothing = {name: lambda *args: None for name in ("synchronize", "reset_peak_memory_stats")}
    stream = SimpleNamespace(wait_stream=lambda other: None)
    context = {name: lambda *args: contextlib.nullcontext() for name in ("stream", "graph")}
    made = {"Event": FakeEvent, "CUDAGraph": FakeGraph, "Stream": lambda: stream, "current_stream": lambda: stream}
    told = {"memory_allocated": lambda: 1 << 20, "max_memory_allocated": lambda: 3 << 20}
    for name, value in (nothing | context | made | told | {"get_device_name": lambda index: "Make-believe"}).items():
        monkeypatch.setattr(torch.cuda, name, value)
    environment.facts.cache_clear()
    yield
    environment.facts.cache_clear()


def test_measuring_on_a_make_believe_gpu(make_believe, monkeypatch):
    monkeypatch.setattr(timing, "GRAPH_BELOW_MS", math.inf)
    events = []
    settings = Settings("cpu:0", threads=1, seconds_per_case=0.02)
    case = Case("R1", "float32", "fwdbwd", ("torch", "fusedlstm", "fusedlstm-triton"))
    worker.measure(case, settings, lambda *event: events.append(event))
    measured = {(e[1]["provider"], e[1]["metric"]): e[1] for e in events if e[0] == "row"}
    assert measured["fusedlstm", "peak_memory"]["p50"] == "2"
    assert measured["torch", "kept_memory"]["mode"] == "fwdbwd"
    assert measured["torch", "latency"]["protocol"].startswith("events interleaved rounds=")
    assert measured["torch", "latency"]["protocol"].endswith(f" tf32=1 inputs={worker.MOST_INPUTS}")
    assert measured["fusedlstm", "predicted"]["protocol"].startswith("plan: fwd single")
    assert ("fusedlstm", "latency_graph") in measured and ("torch-again", "latency") not in measured
    assert measured["fusedlstm", "latency"]["device"] == "Make-believe"
    assert ("fusedlstm", "speedup") in measured and ("torch", "speedup") not in measured
    # fusedlstm-triton has no kernels for CPU tensors and must say so, not fall back.
    assert [e[1] for e in events if e[0] == "failed"] == ["fusedlstm-triton"]

    def cannot():
        raise RuntimeError("operation not permitted when stream is capturing")

    calls = {"torch": lambda: 1, "fusedlstm": lambda: 2, "eager": cannot}
    samples, refused = timing.time_gpu_graph(calls, budget_s=0.01, copies=2)
    assert samples.protocol.startswith("graph") and 0.02 < min(samples.ms["fusedlstm"]) < 5
    assert list(samples.ms) == ["torch", "fusedlstm"] and "not permitted" in refused["eager"]


@pytest.mark.parametrize(("sms", "widest"), [(132, 128), (108, 64), (40, 32), (7, 2)])
def test_ceilings_of_a_make_believe_gpu(make_believe, monkeypatch, tmp_path, capsys, sms, widest):
    """Every group as on a GPU, with launches that take no time and leave what the exchange must leave."""
    from bench import ceilings

    def launch(self, kernel, programs, *args, waits=False, **constants):
        if kernel is ceilings.exchange_kernel:
            _, seen, _, steps = args
            seen.copy_(steps * (torch.arange(programs) % 7 + 1).repeat_interleave(ceilings.UNITS))
        if waits and args[1:]:
            SteadyEvent.now += 1e-5 * args[-1]  # 10 us a step

    def machine():
        made = ceilings.Machine.__new__(ceilings.Machine)
        made.gpu, made.device, made.sms, made.matrix, made.copy_mib, made.steps = True, "cpu:0", sms, 16, 1, (1, 101)
        made.l2_bytes = 1 << 20
        return made

    monkeypatch.setattr(FakeEvent, "synchronize", lambda self: None, raising=False)
    monkeypatch.setattr(torch.cuda, "Event", SteadyEvent)
    monkeypatch.setattr(ceilings.Machine, "launch", launch)
    monkeypatch.setattr(ceilings, "STEP_SIZES", ((2, 4),))
    made = machine()
    monkeypatch.setattr(ceilings, "Machine", lambda: made)
    groups = [
        part for name in ceilings.GROUPS if name != "loops" for part in ("--only", name)
    ]  # the rehearsal has loops
    assert ceilings.main(["--out", str(tmp_path / "r.csv"), *groups]) == 0, capsys.readouterr().out
    measured = rows.read(tmp_path / "r.csv")
    told = {(r["metric"], r["shape"], r["provider"]): r for r in measured}
    assert len(told) < len(measured)  # dtypes
    assert {shape for metric, shape, _ in told if metric == "barrier"} == {
        f"P{n}" for n in (1, 2, 8, 32, 64, 128) if n <= widest
    }
    assert {shape for metric, shape, _ in told if metric == "launch"} == {"host", "device", "cooperative", "graph"}
    assert len([r for r in measured if r["metric"] == "step_matmul"]) == 3
    assert float(told["barrier", f"P{widest}", "counter"]["p50"]) == pytest.approx(10)
    assert expected.rates(measured)["barrier", "P2"] == pytest.approx(10)
    found = ceilings.beside_constants(measured)[1]
    assert set(found) == set(ceilings.MEASURED_AS) and found["barrier_us"] == found["exchange_us"] == pytest.approx(10)
    printed = capsys.readouterr().out
    assert "barrier_us" in printed and printed.count("as constants: {") == 2, "the last group may not come to its end"
    assert printed.index("as constants: {") < printed.index("exchange ")

    def wrong(self, kernel, programs, *args, waits=False, **constants):
        if kernel is ceilings.exchange_kernel:
            args[1].zero_()

    monkeypatch.setattr(type(made), "launch", wrong)
    assert ceilings.main(["--out", str(tmp_path / "r.csv"), "--only", "barriers"]) == 1
    assert (
        "FAILED barriers: RuntimeError: exchange of 1 programs, by data False: wrong numbers" in capsys.readouterr().out
    )


def test_a_loop_that_does_not_fit_is_left_out(monkeypatch, capsys):
    import dataclasses

    from bench import ceilings
    from fusedlstm.engines import launch
    from fusedlstm.plan.devices import DEVICES

    monkeypatch.setattr(launch, "device_limits", lambda index: dataclasses.replace(DEVICES["sm_80"], num_sms=2))
    machine = SimpleNamespace(gpu=False, loop_steps=(1, 2), loop_sizes=((128, 8192),))
    assert list(ceilings.loops(machine)) == []
    assert "loop of B128 H8192: skipped, " in capsys.readouterr().out


def test_rehearsal(tmp_path):
    """The GPU run from end to end: every part passes, or is skipped for a reason that the summary names."""
    command = [sys.executable, "-m", "bench.gpu", "--out", str(tmp_path), "--rehearse"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    files = {path.name for path in tmp_path.iterdir()}
    assert {"summary.md", "rehearsal.csv", "log-correctness.txt", "log-table.txt"} <= files and len(files) <= 8
    summary = (tmp_path / "summary.md").read_text()
    for part in gpu.parts(tmp_path, tmp_path / "rehearsal.csv", rehearse=True):
        told = (
            f"skipped  {part.name:10}     0 s  rehearsal: needs a GPU\n" if part.skip else f"passed   {part.name:10} "
        )
        assert told in summary, done.stdout
    assert [p.name for p in gpu.parts(tmp_path, tmp_path, True)] == [
        p.name for p in gpu.parts(tmp_path, tmp_path, False)
    ]
    assert f"\n{gpu.NO_MEMORY}\n" in summary and "slowest: " in summary and "aten::lstm" in summary
    for line in ("| R1 | 3, 3, 16, 16 | ", "barrier_us                1.2", "as constants: {"):
        assert line in summary
    assert re.search(r"test_two_directions\[\w+\] PASSED", (tmp_path / "log-correctness.txt").read_text())
    assert "memory: skipped" in (tmp_path / "log-table.txt").read_text()
    measured = rows.read(tmp_path / "rehearsal.csv")
    latencies = {(r["provider"], r["shape"], r["mode"]) for r in measured if r["metric"] == "latency"}
    for shape in shapes.in_set("rehearsal"):
        ours = {"torch", "fusedlstm-triton"} if shape.heads == 1 or registry.takes("num_heads") else {"torch"}
        assert {(name, shape.id, mode) for name in ours for mode in shape.modes} <= latencies
    told = {r["metric"] for r in measured if r["op"] == "roof"}
    assert told == {"matmul", "copy", "l2_shared", "l2_sliced", "launch", "barrier", "exchange", "loop"}
    for metric in ("exchange", "loop"):
        assert {r["provider"] for r in measured if r["metric"] == metric} == {"counter", "data"}
    assert all(r["device"] and r["torch"] and r["commit"] and r["date"] and r["protocol"] for r in measured)
    assert all(float(r["p50"]) > 0 for r in measured)
    assert done.stdout.rstrip().splitlines()[-1].startswith(f"{len(measured)} rows; ")


def runs(state):
    """Whether a process, whose /proc/…/stat this is, is there and no zombie."""
    try:
        return state.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_nothing_of_a_part_outlives_it(tmp_path):
    """Neither what a process that ended has started, nor does one that cannot be killed keep the run waiting."""
    child = (
        "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(3600)']).pid)"
    )
    running = gpu.Running(gpu.Part("ends", [sys.executable, "-c", child], 600.0, "log.txt"), 600.0, tmp_path)
    outcome = running.end()
    assert outcome.verdict == gpu.PASSED
    state = Path(f"/proc/{int(outcome.line)}/stat")
    deadline = time.monotonic() + 600
    while runs(state) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not runs(state)

    running = gpu.Running(gpu.Part("stays", [sys.executable, "-c", ""], 600.0, "log.txt"), 600.0, tmp_path)
    process, waits = running.process, []

    def wait(timeout=None):
        waits.append(timeout)
        raise subprocess.TimeoutExpired("stays", timeout)

    running.process = SimpleNamespace(pid=process.pid, wait=wait)
    outcome = running.end(0.1)
    process.wait()
    assert outcome.verdict == gpu.FAILED and "it is still there" in outcome.line
    assert waits == [0.1, gpu.KILL_S]
    assert gpu._output(sys.executable, "-c", "print(1)") == "1\n" and gpu._output("/no/such/program") == ""


def test_a_run_that_dies_keeps_its_rows(tmp_path, monkeypatch):
    path = tmp_path / "r.csv"
    writer = rows.Writer(path)
    writer.write(row())

    def die(self, rows):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(csv.DictWriter, "writerows", die)
        writer.close()
    assert len(rows.read(path)) == 1
    rows.Writer(path).close()
    assert len(rows.read(path)) == 1 and [p.name for p in tmp_path.iterdir()] == ["r.csv"]


def test_a_row_always_says_which_code_made_it(tmp_path, monkeypatch):
    """A copy without git, even inside of another repository, is named by its sources, the same in every copy."""
    for folder in ("one", "two"):
        for name in ("fusedlstm/a.py", "kernels/b.py", "bench/c.py", "fusedlstm/measured.json"):
            file = tmp_path / folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(name)
    one, two = tmp_path / "one", tmp_path / "two"
    (two / "fusedlstm" / "kernels").symlink_to("../kernels")
    for name in ("bench/results/x.json", "fusedlstm/__pycache__/a.py", "fusedlstm/.cache/a.py", "bench/notes.txt"):
        (two / name).parent.mkdir(parents=True, exist_ok=True)
        (two / name).write_text("no source")
    told = environment.digest(one)
    assert re.fullmatch("[0-9a-f]{10}", told) and environment.digest(two) == told
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.setattr(environment, "ROOT", one)
    environment.commit.cache_clear()
    assert environment.commit() == (f"tree-{told}", "unknown")
    for name in ("fusedlstm/a.py", "kernels/b.py", "bench/c.py", "fusedlstm/measured.json"):
        (two / name).write_text("changed")
        assert environment.digest(two) != told
        (two / name).write_text(name)
    monkeypatch.undo()
    environment.commit.cache_clear()
    sha, dirty = environment.commit()
    assert re.fullmatch("[0-9a-f]{10}|tree-[0-9a-f]{10}", sha) and dirty in ("true", "false", "unknown")
    environment.commit.cache_clear()


def test_a_broken_part_stops_no_other(tmp_path, monkeypatch, capsys):
    def part(name, code, limit_s=600.0, **options):
        return gpu.Part(name, [sys.executable, "-c", code], limit_s, f"log-{name}.txt", **options)

    def parts(out, csv, rehearse):
        return [
            part("smoke", "print('done T3')", correctness=True, judge=gpu.judge_smoke),
            part("tests", "raise SystemExit('broken on purpose')", correctness=True),
            part("compile", "import time; time.sleep(3600)", background=True),
            gpu.Part("memcheck", ["/no/such/program"], 600.0, "log-memcheck.txt", True),
            gpu.Part("racecheck", [], 600.0, "log-racecheck.txt", True, skip="no such checker"),
            part("ceilings", "import time; time.sleep(3600)", limit_s=1.0),
            part("table", "import sys; print(sys.argv[1:])"),
            part("report", "print('reported')"),
        ]

    monkeypatch.setattr(gpu, "parts", parts)
    monkeypatch.setattr(gpu, "TABLE_AT_S", gpu.TOTAL_S / 60)  # the table begins after ten seconds
    monkeypatch.setattr(gpu, "LEAST_S", 0.5)
    assert gpu.main(["--out", str(tmp_path), "--rehearse", "--seconds", "600"]) == 1
    summary = (tmp_path / "summary.md").read_text()
    for told in (
        "passed   smoke ",
        "FAILED   tests ",
        "broken on purpose",
        "FAILED   memcheck       0 s  FileNotFoundError",
        "skipped  racecheck      0 s  no such checker",
        "passed   table ",
        "['--time-limit', ",
        "passed   report ",
    ):
        assert told in summary, summary
    for part in ("ceilings", "compile"):  # the one by its limit, the other when the table began
        assert re.search(rf"FAILED   {part} +\d+ s  stopped after \d+ s", summary), summary
    assert capsys.readouterr().out.rstrip().splitlines()[-1].startswith("0 rows; ")


def test_verdicts_of_checkers():
    assert gpu.judge_sanitizer(1, "Error: Device not supported\n========= ERROR SUMMARY: 1 error")[0] == gpu.SKIPPED
    assert gpu.judge_sanitizer(0, "done T3-B2\n========= ERROR SUMMARY: 0 errors")[0] == gpu.PASSED
    assert gpu.judge_sanitizer(9, "done T3-B2\n========= ERROR SUMMARY: 2 errors")[0] == gpu.FAILED
    assert gpu.judge_sanitizer(0, "nothing ran")[0] == gpu.FAILED
    assert gpu.judge_tests(5, "no tests ran in 0.1s") == (gpu.FAILED, "no test was collected")
    assert gpu.judge_tests(-9, "a.py::b PASSED\nc.py::d FAILED\ne.py::f")[1] == "1 passed, 1 failed; e.py::f"
    assert gpu.judge_tests(0, "==== 12 passed, 3 skipped in 4.20s ====") == (
        gpu.PASSED,
        "12 passed, 3 skipped in 4.20s",
    )
    parts = [gpu.Outcome("tests", gpu.PASSED, "", 1.0, True), gpu.Outcome("memcheck", gpu.SKIPPED, "", 0.0, True)]
    assert gpu.exit_status(parts) == 0
    assert gpu.exit_status([*parts, gpu.Outcome("bench", gpu.FAILED, "", 0.0, False)]) == 0
    assert gpu.exit_status([*parts, gpu.Outcome("racecheck", gpu.FAILED, "", 0.0, True)]) == 1
    assert gpu.exit_status(parts[1:]) == 1


@pytest.mark.parametrize("has_a_gpu", [True, False])
def test_kernels_are_interpreted_where_there_is_no_gpu(monkeypatch, has_a_gpu):
    """Whatever the environment says: interpreted on a GPU, programs that wait for each other would never end."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_a_gpu)
    monkeypatch.setenv("TRITON_INTERPRET", "1" if has_a_gpu else "0")
    runpy.run_path(str(ROOT / "tests" / "kernels" / "conftest.py"))
    assert os.environ.get("TRITON_INTERPRET") == (None if has_a_gpu else "1")


def test_make_runs_every_folder_whatever_fails(tmp_path):
    """A stand-in for pytest notes the folders and what the environment says of interpretation, and fails in one."""
    told = tmp_path / "told"
    pytest_ = tmp_path / "pytest"
    pytest_.write_text(f'#!/bin/sh\necho "$1 $TRITON_INTERPRET" >> {told}\ntest "$1" != tests/$BROKEN\n')
    pytest_.chmod(0o755)
    folders = {path.name for path in (ROOT / "tests").iterdir() if any(path.glob("test_*.py"))} - {"thirdparty"}

    def make(broken):
        of_make = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "TRITON_INTERPRET"}  # this test may run under make itself
        environment = {name: value for name, value in os.environ.items() if name not in of_make}
        command = ["make", "-s", "-o", ".venv/ready", "test", f"BIN={tmp_path}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**environment, "BROKEN": broken})
        ran = told.read_text().splitlines()
        told.unlink()
        assert sorted(ran) == sorted(f"tests/{folder} " for folder in folders)
        return done.returncode, done.stdout.splitlines()[-1]

    assert make("") == (0, "passed: cpu kernels compiled fake_cuda; failed: none")
    code, last = make("kernels")
    assert code and last == "passed: cpu compiled fake_cuda; failed: kernels"


def test_a_gpu_run_has_all_tests_that_want_a_gpu():
    wanted = set()
    for file in (ROOT / "tests" / "cpu").glob("test_*.py"):
        for found in re.findall(r"^@needs_a_gpu\n(?:@.*\n)*def (\w+)", file.read_text(), re.M):
            wanted.add(f"tests/cpu/{file.name}::{found}")
    assert wanted == {*gpu.MODULE_TESTS} and wanted
