"""plan: a plan covers the problem, fits the device, and can never wait for a program that is not there."""

import itertools
import math
import operator
import random

import pytest

from fusedlstm import __main__ as command_line
from fusedlstm import cells
from fusedlstm.kernels.cells import STEPS
from fusedlstm.plan import LAYOUTS, Plan, PlanError, candidates, plan, step_plan, tiles
from fusedlstm.plan.devices import DEVICES
from fusedlstm.plan.problem import Problem
from grids import WHOLE

HIDDEN = (1, 7, 16, 32, 33, 64, 100, 128, 129, 160, 256, 400, 512, 768, 1000, 1024, 1150, 1536, 2048, 4096)
BATCH = (1, 3, 16, 17, 64, 65, 128, 512, 4096)
GRID = list(
    itertools.product(HIDDEN, BATCH, ("fp32", "fp16", "bf16"), (1, 2), ("fwd", "bwd"), ("tf32", "ieee"), LAYOUTS)
)
PROBLEMS = GRID if WHOLE else random.Random(0).sample(GRID, len(GRID) // 3)


def every_plan(arch):
    for hidden, batch, dtype, directions, pass_, precision, layout in PROBLEMS:
        if precision == "ieee" and dtype != "fp32":
            continue
        try:
            yield batch, plan("lstm", batch, hidden, dtype, directions, DEVICES[arch], pass_, precision, layout)
        except PlanError:
            assert hidden * directions >= 2048, "only the largest sizes may not fit"


@pytest.mark.parametrize("arch", DEVICES)
def test_whatever_runs_dense_runs_with_masks(arch):
    """Sizes whose rows are not aligned among them, up to the largest that fit."""
    found = 0
    for hidden, dtype, directions, precision in itertools.product(
        (1754, 2150, 3470, 5001, 6001, 8192), ("fp32", "bf16"), (1, 2), ("tf32", "ieee")
    ):
        for pass_ in ("fwd", "bwd"):
            arguments = ("lstm", 64, hidden, dtype, directions, DEVICES[arch], pass_, precision)
            if plan(*arguments).schedule == "stepped":
                continue
            found += 1
            for layout in LAYOUTS:
                plan(*arguments, layout)
    assert found > 20


def test_a_layer_of_a_wave_holds_both_weights():
    of = Problem("lstm", 64, 512, "bf16", 3, "fwd", stack=True, device_limits=DEVICES["sm_90"])
    held = [p for p in candidates(of) if p.schedule == "resident"]
    assert held
    for p in held:
        assert p.smem_bytes >= 2 * 2 * p.columns * p.padded_reduction


class Everything:
    def __contains__(self, code):
        return True


def test_what_is_known_to_spill_makes_room_for_the_next_variant(monkeypatch):
    """Of its tiling. If all spill, the first variant is as good as any."""
    of = Problem("lstm", 64, 512, "bf16", 1, "fwd", device_limits=DEVICES["sm_90"])
    monkeypatch.setattr(tiles, "known_spills", frozenset)
    first, *_ = before = candidates(of)
    monkeypatch.setattr(tiles, "known_spills", lambda: frozenset({first.code}))
    after = candidates(of)
    tiling = operator.attrgetter("schedule", "block_b", "block_h", "protocol")
    assert first.code not in {p.code for p in after} and {*map(tiling, before)} == {*map(tiling, after)}
    monkeypatch.setattr(tiles, "known_spills", Everything)
    assert candidates(of) == before


@pytest.mark.parametrize("arch", DEVICES)
def test_plans_fit_the_device(arch):
    limits = DEVICES[arch]
    count = 0
    for batch, p in every_plan(arch):
        count += 1
        assert p.smem_bytes <= limits.smem_bytes and p.regs <= 255
        assert p.group * p.block_h >= p.hidden > (p.group - 1) * p.block_h, "units covered once"
        assert p.tiles_b * p.block_b >= batch > (p.tiles_b - 1) * p.block_b, "rows covered once"
        assert p.grid[1] * p.walked >= p.tiles_b
        for block in (p.block_b, p.block_h, p.block_k, p.num_warps):
            assert block & (block - 1) == 0
        if p.schedule == "single":
            assert p.group == 1 and p.block_k == p.block_h >= p.hidden and p.barriers_per_step == 0
        elif p.schedule == "stepped":
            assert p.layout == "dense" and p.hidden * p.grid[2] >= 2048 and p.barriers_per_step == 0 and p.walked == 1
        else:
            assert math.prod(p.grid) <= limits.num_sms, "every program is on the device at once"
            assert p.barriers_per_step == 1
        if p.resident:  # the slice that a program is said to hold is no larger than where it is held
            slice_bytes = p.block_h * 4 * p.hidden * {"fp32": 4}.get(p.dtype, 2)
            registers = 4 * 256 * p.num_warps * limits.warp_size
            assert slice_bytes <= (registers if limits.weights_in_registers else limits.smem_bytes)
    assert count > len(PROBLEMS) / 2


def test_schedules_where_they_belong():
    def schedule(hidden, dtype="bf16", batch=16, pass_="fwd", precision="tf32") -> Plan:
        return plan("lstm", batch, hidden, dtype, 1, DEVICES["sm_90"], pass_, precision).schedule

    assert schedule(32) == schedule(64) == "single"
    assert schedule(512) == schedule(1024) == "resident"
    assert schedule(4096) == "streamed"
    assert schedule(16384) == schedule(16384, pass_="bwd") == "stepped"
    assert schedule(512, "fp32", precision="ieee") == "streamed"


def test_more_rows_than_fit_are_walked():
    p = plan("lstm", 4096, 1024, "bf16", 1, DEVICES["sm_90"], "fwd")
    assert p.walked > 1 and math.prod(p.grid) <= 132


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ((0, 1), "got 0 and 1"),
        ((1, 100_000), "hidden=100000 with 1 direction\\(s\\) in bf16, packed, does not fit NVIDIA H200"),
    ],
)
def test_errors_name_the_size_and_the_limit(sizes, text):
    with pytest.raises(PlanError, match=text):
        plan("lstm", *sizes, "bf16", 1, DEVICES["sm_90"], "fwd", layout="packed")


@pytest.mark.parametrize("arch", DEVICES)
def test_plans_of_a_step_fit_the_device(arch):
    limits = DEVICES[arch]
    hidden, batch, input_size = (1, 7, 64, 257, 1024, 1150, 9001, 100_000), (1, 2, 16, 17, 64, 4096), (0, 1, 1024)
    kinds = (("bf16", "tf32", "fwd"), ("fp32", "tf32", "bwd"), ("fp32", "ieee", "fwd"))
    for H, B, I, D, kind in itertools.product(hidden, batch, input_size, (1, 2), kinds):
        dtype, precision, pass_ = kind
        if I and pass_ == "bwd":
            continue
        p = step_plan("lstm", B, H, dtype, D, limits, pass_, precision, input_size=I)
        assert p.schedule == "stepped" and p.smem_bytes <= limits.smem_bytes and p.regs <= 255
        assert p.group * p.block_h >= H > (p.group - 1) * p.block_h, "units covered once"
        assert p.tiles_b * p.block_b >= B > (p.tiles_b - 1) * p.block_b, "rows covered once"
        assert p.grid == (p.group, p.tiles_b, D)
        assert (p.block_b == 1) == (B == 1), "a single row needs no matrix unit"
        for block in (p.block_b, p.block_h, p.block_k, p.num_warps):
            assert block & (block - 1) == 0


def test_a_step_of_one_row_keeps_every_multiprocessor_busy():
    for hidden in (256, 1024, 4096):
        assert step_plan("lstm", 1, hidden, "bf16", 1, DEVICES["sm_90"], "fwd", input_size=hidden).grid[0] >= 256


def test_a_launch_a_step_comes_last_where_others_fit():
    """So that a measurement may choose it, and no prediction does."""
    problem = Problem("lstm", 64, 512, "bf16", 1, "fwd", device_limits=DEVICES["sm_90"])
    schedules = [p.schedule for p in candidates(problem)]
    assert schedules.count("stepped") == 1 and schedules[-1] == "stepped"
    for layout in ("packed", "ragged"):
        assert all(p.schedule != "stepped" for p in candidates(problem._replace(layout=layout)))
    assert {p.schedule for p in candidates(problem._replace(hidden=16384))} == {"stepped"}


@pytest.mark.parametrize("units", [64, 37, 5])
def test_a_step_covers_every_head(units):
    p = step_plan("lstm", 16, 12 * units, "bf16", 1, DEVICES["sm_90"], "fwd", heads=12, input_size=768)
    assert p.grid[0] == 12 * p.group and p.group * p.block_h >= units > (p.group - 1) * p.block_h


@pytest.mark.parametrize(("batch", "hidden", "input_size"), [(0, 1, 1), (1, 0, 1), (1, 1, -1)])
def test_errors_of_a_step_name_the_sizes(batch, hidden, input_size):
    with pytest.raises(PlanError, match=f"got {batch}, {hidden} and {input_size}"):
        step_plan("lstm", batch, hidden, "bf16", 1, DEVICES["sm_90"], "fwd", input_size=input_size)


def test_command_line_prints_the_plan(capsys):
    command_line.main(["plan", "--hidden", "1024", "--batch", "64", "--dtype", "bf16", "--arch", "sm_90"])
    printed = capsys.readouterr().out
    p = plan("lstm", 64, 1024, "bf16", 1, DEVICES["sm_90"], "fwd")
    assert f"forward: {p.schedule}" in printed and f"{p.block_b} batch rows x {p.block_h} hidden units" in printed
    assert "backward:" in printed and "programs a group" in printed
    assert "lstm layer: " in printed and "auto, training: " in printed


def test_command_line_knows_every_cell(capsys):
    for cell in cells.CELLS:
        if cell not in STEPS:
            with pytest.raises(SystemExit):
                command_line.main(["plan", "--cell", cell, "--hidden", "512"])
            assert f"--cell: the kernels have no cell '{cell}'" in capsys.readouterr().err
            continue
        command_line.main(["plan", "--cell", cell, "--hidden", "512"])
        printed = capsys.readouterr().out
        p = plan(cell, 32, 512, "fp32", 1, DEVICES["sm_90"], "bwd")
        assert f"{cell} layer: " in printed and f"backward: {p.schedule}" in printed
        assert ("auto, training: " in printed) == (cells.CELLS[cell].aten is not None), (
            "ATen is a rival where it has the cell"
        )
