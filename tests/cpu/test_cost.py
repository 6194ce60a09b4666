"""plan/cost.py and devices.py: predictions respect their bound, more work never costs less, constants have sources."""

import dataclasses
import itertools
import json

import pytest
import torch

from bench import kernels
from fusedlstm import plan
from fusedlstm.plan import cost, devices
from fusedlstm.plan.devices import DEVICES
from fusedlstm.plan.problem import DeviceLimits, Problem

PROBLEMS = list(
    itertools.product(
        (1, 7, 33, 64, 129, 400, 1024, 1150, 2048, 4096),  # H
        (1, 17, 64, 513),  # B
        (("fp32", "tf32"), ("fp32", "ieee"), ("bf16", "tf32")),
        (1, 2),
        ("fwd", "bwd"),
    )
)
SM_90 = DEVICES["sm_90"]


def plans(limits, **options):
    for hidden, batch, (dtype, precision), directions, pass_ in PROBLEMS:
        if hidden % options.get("heads", 1):
            continue
        try:
            sizes = (batch, hidden, dtype, directions, pass_, precision)
            found = plan.candidates(Problem("lstm", *sizes, **options, device_limits=limits))
        except plan.PlanError:
            continue
        yield batch, found


def bound(p, steps, batch, limits, **options):
    sizes = (steps, batch, p.hidden, p.dtype, p.grid[2], limits, p.pass_, p.precision, p.heads, p.stack)
    return cost.bound(p.cell, *sizes, **options)


@pytest.mark.parametrize("options", [{}, {"protocol": "data"}, {"heads": 4}], ids=str)
@pytest.mark.parametrize("arch", DEVICES)
def test_no_candidate_is_predicted_below_the_bound(arch, options):
    count = 0
    for batch, found in plans(DEVICES[arch], **options):
        for p in found[:: max(1, len(found) // 3)]:
            for steps, saves in ((1, True), (3, False), (1000, True)):
                least = bound(p, steps, batch, DEVICES[arch], saves=saves)
                predicted = cost.cost(p, steps, batch, DEVICES[arch], saves=saves)
                assert predicted.total / steps >= least.step > 0, (p, predicted, least)
                assert steps == 1 or predicted.step >= max(least.arithmetic, least.latency), (p, predicted, least)
                count += 1
    assert count > 500


@pytest.mark.parametrize("pass_", ["fwd", "bwd"])
def test_a_wave_is_above_its_bound_and_walks_more_steps(pass_):
    for hidden, batch in ((64, 1), (256, 16), (512, 33)):
        wave = plan.plan("lstm", batch, hidden, "bf16", 3, SM_90, pass_, stack=True)
        c = cost.cost(wave, 10, batch, SM_90)
        assert c.steps == 12 and c.total >= 10 * bound(wave, 10, batch, SM_90).step
        one = plan.plan("lstm", batch, hidden, "bf16", 1, SM_90, pass_)
        assert bound(wave, 10, batch, SM_90).arithmetic == pytest.approx(5 * bound(one, 10, batch, SM_90).arithmetic)


@pytest.mark.parametrize(("batch", "hidden"), [(1, 64), (16, 256), (65, 1000)])
def test_layers_share_a_launch_where_all_launches_together_take_the_least_time(batch, hidden):
    def step_us(layers):
        sizes = ("lstm", batch, hidden, "bf16", layers, SM_90)
        return sum(plan.plan(*sizes, pass_, stack=layers > 1).step_us for pass_ in ("fwd", "bwd")) if layers else 0.0

    for layers in (2, 5):
        times = {n: layers // n * step_us(n) + step_us(layers % n) for n in range(1, layers + 1)}
        assert plan.wave("lstm", layers, batch, hidden, "bf16", SM_90) == min(times, key=times.get)


def test_candidates_are_sorted_and_the_plan_is_the_first():
    for batch, found in plans(SM_90):
        times = [p.step_us for p in found if p.schedule != "stepped"]  # which comes last
        assert times == sorted(times)
        p = found[0]
        sizes = (batch, p.hidden, p.dtype, p.grid[2], SM_90, p.pass_, p.precision)
        assert plan.plan("lstm", *sizes) == p
        assert p.step_us == cost.cost(p, 1, batch, SM_90).step


# So slow that bytes and operations outweigh every latency.
SLOW = dataclasses.replace(SM_90, l2_tbps=0.55, half_tflops=99.0)


def one(**changes):
    sizes = {"batch": 64, "hidden": 1024, "dtype": "bf16", "directions": 1, "limits": SM_90, "pass_": "fwd"}
    return plan.plan("lstm", **(sizes | {"protocol": "counter"} | changes))


def test_parts_by_hand():
    """H 1024, B 64, bf16, forward: 64 programs with 16 units and 32 rows each."""
    p = one()
    p = dataclasses.replace(p, block_b=32, block_h=16, grid=(64, 2, 1), tiles_b=2, transposed=True, schedule="resident")
    c = cost.cost(p, 100, 64, SLOW)
    assert c.operand == pytest.approx(32 * 1024 * 2 / (0.55e6 / 132))  # h of 32 rows
    assert c.product == pytest.approx(2 * 32 * 64 * 1024 / (99e6 / 132))  # four gates of 16 units
    unit_bytes = 4 * 2 + 2 + 4 * 2 + 4  # preactivations, h, gates, c
    assert c.traffic == pytest.approx(64 * 1024 * unit_bytes / 4.8e6)
    assert c.wait == SLOW.barrier_us and c.walked == 1
    done = cost.work(p, wide_mma=True)
    cycles = done.instructions * p.num_warps / 4
    assert c.issue == pytest.approx(0.00057 * cycles + 0.02 * done.bar_sync + 0.03 * done.wgmma_waits)
    assert c.step == c.chain == pytest.approx(c.wait + c.operand + c.product + c.issue)
    assert c.total == pytest.approx(3.0 + 8 * 2**20 / 4.8e6 + 100 * c.step)
    least = cost.bound("lstm", 100, 64, 1024, "bf16", 1, SM_90, "fwd")
    assert least.arithmetic == pytest.approx(2 * 64 * 4096 * 1024 / 990e6)
    assert least.latency == pytest.approx(0.99 * SM_90.exchange_us)


def test_what_each_choice_changes():
    p = dataclasses.replace(one(), transposed=True)
    counter = cost.cost(p, 1, 64, SLOW)
    by_data = cost.cost(dataclasses.replace(p, protocol="data"), 1, 64, SLOW)
    attempt = by_data.operand / 2  # one that began too early
    assert counter.wait - by_data.wait == pytest.approx(SM_90.barrier_us - SM_90.exchange_us - attempt)
    assert by_data.traffic > counter.traffic, "what is exchanged is filled before"
    streamed = cost.cost(dataclasses.replace(p, schedule="streamed"), 1, 64, SLOW)
    assert streamed.operand - counter.operand == pytest.approx(1024 * p.columns * 2 / (0.55e6 / 132))
    narrow = cost.cost(dataclasses.replace(p, transposed=False), 1, 64, SLOW)
    assert narrow.product == pytest.approx(counter.product / SM_90.narrow_mma)
    single = cost.cost(one(hidden=64), 1, 64, SM_90)
    assert single.wait == single.operand == 0 and single.chain >= SM_90.fetch_us
    walked = cost.cost(one(batch=4096), 1, 4096, SM_90)
    assert walked.walked > 1 and walked.step >= walked.walked * walked.chain
    large = cost.cost(one(hidden=4096), 1, 64, SM_90)
    assert large.traffic >= 4 * 4096 * 4096 * 2 / 4.8e6, (
        "weights that the L2 cannot hold come from memory at every step"
    )
    assert cost.cost(p, 1, 64, SLOW, saves=False).traffic < counter.traffic
    stepped = cost.cost(dataclasses.replace(p, schedule="stepped", protocol="none"), 10, 64, SM_90)
    assert stepped.wait == max(SM_90.launch_us, SM_90.host_us)


def test_what_a_step_consists_of_is_what_the_compiler_made():
    """The estimates of `cost.work` beside bench/results/kernels.csv: a shorter step is predicted to be shorter."""
    estimated, compiled, same_rounds = [], [], []
    rows = kernels.rows_of(kernels.RESULTS)
    for shape, dtype, p in kernels.plans():
        row = rows.get(kernels.row_key(shape, dtype, p))
        if (
            row is None
            or p.schedule != "resident"
            or p.layout != "dense"
            or p.stack
            or p.arch not in ("sm_80", "sm_90")
        ):
            continue
        found, done = kernels.numbers_of(row), cost.work(p, DEVICES[p.arch].wide_mma)
        assert found.wgmma_waits == done.wgmma_waits, p
        same_rounds.append(found.load_rounds == done.load_rounds)
        estimated.append(done.instructions * (2 if p.norms_per_step else 1))
        compiled.append(found.instructions)
    # On sm_80 the assembler moves a few loads behind the products of the round before.
    assert len(same_rounds) > 300 and sum(same_rounds) >= 0.95 * len(same_rounds)
    ratios = sorted(x / y for x, y in zip(estimated, compiled, strict=True))
    assert (
        0.85 < ratios[len(ratios) // 2] < 1.15 and ratios[len(ratios) // 10] > 0.7 and ratios[-len(ratios) // 10] < 1.3
    )
    ranks = torch.tensor([estimated, compiled]).argsort(1).argsort(1).double()
    assert torch.corrcoef(ranks)[0, 1] > 0.7


def test_faster_devices_never_cost_more():
    for field in devices.MEASURABLE:
        factor = 0.5 if field.endswith("_us") else 2
        better = dataclasses.replace(SM_90, **{field: getattr(SM_90, field) * factor})
        for hidden in (64, 512, 1024, 4096):
            p = one(hidden=hidden)
            before, after = cost.cost(p, 10, 64, SM_90), cost.cost(p, 10, 64, better)
            assert after.total <= before.total, field


def test_cudnn_is_launch_bound_where_it_is_small():
    sizes = ("bf16", 1, SM_90)
    assert cost.cudnn_step_us("lstm", 1, 64, *sizes, "fwd") == 2 * SM_90.launch_us
    assert cost.cudnn_step_us("lstm", 4096, 4096, *sizes, "fwd") > 100
    ours, cudnn = plan.beside_cudnn("lstm", 16, 256, *sizes)
    assert ours < cudnn


def test_cudnn_multiplies_twice_with_a_projection():
    """A second launch where all is small; where products count, they are of the projected size."""
    sizes = ("bf16", 1, SM_90, "fwd")
    assert cost.cudnn_step_us("lstm", 1, 64, *sizes, proj_size=32) == 3 * SM_90.launch_us
    whole, half = (cost.cudnn_step_us("lstm", 4096, 4096, *sizes, proj_size=p) for p in (0, 2048))
    pointwise = cost.cudnn_step_us("lstm", 4096, 4096, *sizes) - 2 * 4096 * 4 * 4096**2 / (
        0.7 * SM_90.half_tflops * 1e6
    )
    assert half - pointwise == pytest.approx((whole - pointwise) * (0.5 + 0.125))  # 4H x P, and P x H
    ours = {plan.beside_cudnn("lstm", 64, 512, "bf16", 1, SM_90, proj_size=p)[0] for p in (0, 128)}
    assert len(ours) == 1


def test_weights_beyond_the_l2_are_read_for_every_tile_that_is_walked():
    weights = 4 * 4096 * 4096 * 4
    of = Problem("lstm", 4096, 4096, "fp32", 1, "fwd", device_limits=SM_90)
    walking = [p for p in plan.candidates(of) if p.schedule == "streamed" and p.walked > 1]
    assert walking and weights > SM_90.l2_bytes
    for p in walking:
        assert cost.cost(p, 10, 4096, SM_90).traffic > weights * p.walked / (SM_90.memory_tbps * 1e6)


@pytest.mark.parametrize("training", [False, True])
def test_cudnn_is_compared_in_all_passes_and_directions(training):
    sizes, passes = ("lstm", 65, 1000, "bf16", 2, SM_90), ("fwd", "bwd") if training else ("fwd",)
    ours, cudnn = plan.beside_cudnn(*sizes, training=training)
    assert ours == pytest.approx(sum(plan.plan(*sizes, pass_).step_us for pass_ in passes))
    assert cudnn == pytest.approx(sum(cost.cudnn_step_us(*sizes, pass_, saves=training) for pass_ in passes))
    one = cost.cudnn_step_us("lstm", 65, 1000, "bf16", 1, SM_90, "fwd")
    assert cost.cudnn_step_us(*sizes, "fwd") == pytest.approx(2 * one), "one direction runs after the other"


def test_every_constant_has_a_source():
    fields = {f.name for f in dataclasses.fields(DeviceLimits)}
    words = {"arch", "name", "warp_size", "wide_mma", "weights_in_registers", "measured"}
    assert set(devices.SOURCES) == fields - words
    assert set(devices.MEASURABLE) < set(devices.SOURCES)
    assert len({row.name for row in devices._TABLE}) == len(devices._TABLE)
    for row in devices._TABLE:
        assert all(getattr(row, field) > 0 for field in devices.SOURCES), row.name
        assert row.exchange_us <= row.barrier_us and row.narrow_mma <= 1


@pytest.fixture
def measured(tmp_path, monkeypatch):
    def write(table):
        monkeypatch.setattr(devices, "MEASURED", tmp_path / "measured.json")
        devices.MEASURED.write_text(json.dumps(table))
        devices.measurements.cache_clear()

    yield write
    devices.measurements.cache_clear()


def test_measured_values_override_the_table(measured):
    values = {"barrier_us": 0.9, "l2_tbps": 6.25}
    measured({"NVIDIA H200": {"date": "2026-12-01", "commit": "0123abc", "values": values}})
    found = devices.named("NVIDIA H200", "sm_90", 132)
    assert (found.barrier_us, found.l2_tbps, found.memory_tbps) == (0.9, 6.25, 4.8)
    assert devices.source(found, "barrier_us") == "measured, 2026-12-01, 0123abc"
    assert devices.source(found, "memory_tbps") == "data sheet"
    other = devices.named("NVIDIA H100 80GB HBM3", "sm_90", 132)
    assert other.barrier_us == SM_90.barrier_us and devices.source(other, "barrier_us") == "assumed"


@pytest.mark.parametrize(
    "entry",
    [
        {"date": "d", "commit": "c", "values": {"num_sms": 3}},
        {"date": "d", "values": {}},
        {"date": "d", "commit": "c", "values": {"barrier_us": -1}},
        {"date": "d", "commit": "c", "values": {"barrier_us": "fast"}},
    ],
    ids=str,
)
def test_a_wrong_measurement_is_named(measured, entry):
    measured({"NVIDIA H200": entry})
    with pytest.raises(ValueError, match="measured.json, 'NVIDIA H200': expected"):
        devices.named("NVIDIA H200", "sm_90")


def test_a_device_that_the_table_lacks_is_a_cut_of_its_arch():
    half = devices.named("NVIDIA L40S", "sm_80", 54, smem_bytes=99 << 10)
    known = DEVICES["sm_80"]
    assert (half.name, half.num_sms, half.smem_bytes) == ("NVIDIA L40S", 54, 99 << 10)
    assert half.half_tflops == known.half_tflops / 2 and half.l2_tbps == known.l2_tbps / 2
