"""Plans compiled for every target without a GPU.

`make kernels` compiles all shapes of the field, which takes 20 minutes, and commits the table. Here the table is held
against the plans, and kernels of the LSTM are compiled again. Of each kind (target, layout, pass, dtype, schedule) that
is the one that has the most registers in the table: the next to spill if kernels change. Its numbers must be those of
the table, or the table is of other kernels. The kinds are some in which every two of these five meet (`grids`).
"""

import re

import pytest
import triton

import grids
from bench import kernels
from bench.shapes import BY_ID
from fusedlstm.cells.cell import EQUATIONS
from fusedlstm.engines import offline
from fusedlstm.kernels.cells import STEPS
from fusedlstm.plan import allowed_bytes, plan
from fusedlstm.plan.devices import DEVICES

ROWS = kernels.rows_of(kernels.RESULTS)


def hardest():
    """Plans of the LSTM and the rows of the table that have their numbers."""
    chosen = {}
    for shape, dtype, p in kernels.plans():
        row = ROWS.get(kernels.row_key(shape, dtype, p))
        if row is None or p.cell != "lstm" or dtype == "fp16":  # which has the machine code of bf16
            continue
        kind = (p.arch, kernels.layout(p), p.pass_, dtype, p.schedule)
        if kind not in chosen or int(chosen[kind][1]["regs"]) < int(row["regs"]):
            chosen[kind] = p, row
    few = {kind: chosen[kind] for kind in grids.covering([*chosen])}
    return {"-".join(map(str, (*kind, *kernels.choice(p)[1:]))): (p, row) for kind, (p, row) in few.items()}


HARDEST = hardest()


@pytest.mark.parametrize("name", HARDEST)
def test_compiles_as_the_table_says(name):
    p, row = HARDEST[name]
    numbers = kernels.compile_numbers(p)
    found = kernels.faults(p, numbers)
    assert not found, f"{numbers}: {found}"
    assert numbers[2] <= p.smem_bytes, f"plan expected at most {p.smem_bytes} bytes of shared memory, got {numbers[2]}"
    if triton.__version__ == kernels.TRITON:
        assert numbers == kernels.numbers_of(row), "the table is of other kernels: `make kernels` writes it anew"


@pytest.mark.parametrize("pass_", ["fwd", "bwd"])
@pytest.mark.parametrize("cell", [name for name in STEPS if name != "lstm"])
def test_the_family_compiles(cell, pass_):
    """Each cell at H 512 with masks, zoneout and dropouts, which may cost registers but not correctness."""
    p = plan(cell, 64, 512, "bf16", 1, DEVICES["sm_90"], pass_, layout="packed")
    noises = {"DROPS_CANDIDATE": True, "DROPS_H": True, "TRAINING": True}
    noises |= {"HOLDS": True} if EQUATIONS[cell].update else {}
    found = offline.compile_plan(p, **noises)
    assert found.spill_bytes <= allowed_bytes("sm_120") and found.smem_bytes <= p.smem_bytes


def test_the_committed_table_is_of_these_plans():
    """bench/results/kernels.csv has a row for every case, with the plan of today and no fault.

    The cases are every cell, shape, dtype, pass, target and layout.
    """
    expected = {kernels.row_key(shape, dtype, p): p for shape, dtype, p in kernels.plans()}
    assert ROWS.keys() == expected.keys()
    for key, p in expected.items():
        row = ROWS[key]
        assert tuple(row[name] for name in kernels.CHOICE) == kernels.choice(p), key
        found = kernels.faults(p, kernels.numbers_of(row))
        assert not found, (key, found)
        assert (row["predicted_us"], row["bound_us"]) == kernels.times(BY_ID[key[1]], p), key
        assert float(row["predicted_us"]) >= float(row["bound_us"]) >= 0


def sm_90(pass_, protocol="counter"):
    return plan("lstm", 64, 512, "bf16", 1, DEVICES["sm_90"], pass_, protocol=protocol)


@pytest.fixture(scope="module", params=["fwd", "bwd"])
def resident(request):
    return offline.compile_plan(sm_90(request.param))


def test_resident_weights_are_loaded_outside_the_loop(resident):
    """In the intermediate code the weights are put into shared memory before the first loop."""
    before, _, inside = resident.asm["ttgir"].partition("scf.for")
    assert before.count("ttg.local_alloc") >= 2
    assert "ttng.warp_group_dot" in inside or "tt.dot" in inside


def test_barrier_instructions(resident):
    """One release a step after a CTA barrier with no store between, an acquiring poll, every exchanged load past L1."""
    ptx = resident.asm["ptx"]
    (release,) = re.finditer(r"\b(atom|red)\.global\.gpu\.release\.add", ptx)  # `red` drops what was there before
    before = ptx[: release.start()]
    assert "st.global" not in before[before.rindex("bar.sync") :]
    assert ptx.count("ld.global.gpu.acquire") == 1
    assert ptx.count("ld.global.cg.v4") >= 4  # what the group exchanges, 16 bytes at a time
    assert "volatile" not in ptx
    assert re.search(r"\btrap;", ptx), "the wait is bounded"


def test_matrix_instruction_in_the_loop():
    forward = offline.compile_plan(sm_90("fwd"))
    assert offline.loop_operations(forward.asm["sass"])["HGMMA"] >= 4


def test_inference_compiles():
    assert offline.compile_plan(sm_90("fwd", None), SAVE_GATES=False, SAVE_STATES=False).spill_bytes == 0


def test_a_clipped_gradient_that_is_nan_stays_nan():
    ptx = offline.compile_plan(sm_90("bwd"), CLIP=True).asm["ptx"]
    # From Triton 3.9 on both are one instruction, of the absolute value, which puts the sign back.
    assert ("min.NaN.f32" in ptx and "max.NaN.f32" in ptx) or "min.NaN.xorsign.abs.f32" in ptx


def test_nothing_is_specialised_on_length_or_batch():
    """T and B are run-time arguments that Triton may not specialise on: a new length compiles nothing."""
    from fusedlstm.engines.launch import KERNELS

    for kernel in KERNELS.values():
        for name in ("T", "B"):
            parameter = kernel.params[kernel.arg_names.index(name)]
            assert parameter.do_not_specialize and not parameter.is_constexpr
