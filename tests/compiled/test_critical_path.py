"""The order and the size of a time step in the machine code, for all cells, schedules, protocols and layouts."""

import re

import pytest

from bench import kernels
from bench.shapes import BY_ID
from fusedlstm import cells
from fusedlstm.engines import offline
from fusedlstm.kernels.cells import STEPS
from fusedlstm.plan import LAYOUTS, plan
from fusedlstm.plan.devices import DEVICES
from grids import grid

# How a step can run: hidden units that lead to it, and the protocol.
KINDS = {"single": (64, None), "data": (256, "data"), "counter": (512, "counter"), "streamed": (4096, "counter")}
AXES = {
    "cell": [*STEPS],
    "kind": [*KINDS],
    "pass_": ["fwd", "bwd"],
    "layout": [*LAYOUTS],
    "dtype": ["bf16", "fp32"],
    "arch": ["sm_80", "sm_90"],
}


def planned(cell, kind, pass_, layout="dense", dtype="bf16", arch="sm_90"):
    hidden, protocol = KINDS[kind]
    limits = DEVICES[arch]
    p = plan(cell, 32, hidden, dtype, 1, limits, pass_, layout=layout, protocol=protocol)
    if p.norms_per_step and kind == "streamed":
        p = plan(cell, 32, 1024, dtype, 1, limits, pass_, layout=layout, protocol=protocol)
    return p


def positions(found, name):
    return [k for k, event in enumerate(found) if event == name]


@grid(AXES)
def test_the_order_of_a_step(cell, kind, pass_, layout, dtype, arch):
    """Fetch, wait, multiply, tell the group, save; and nothing that was fetched is looked at before the wait."""
    p = planned(cell, kind, pass_, layout, dtype, arch)
    compiled = offline.compile_plan(p)
    sass, found = compiled.asm["sass"], offline.loop_events(compiled.asm["sass"])
    assert found, "the loop over time"
    # No function is called, or every wgmma is waited for by itself; and a wait that does not end is a trap.
    assert not re.search(r"^\s*(@\S+\s+)?call", compiled.asm["ptx"], re.M)
    assert ("BPT.TRAP" in sass) == (not p.local)
    if p.local:
        assert not {"exchange", "poll", "arrive"} & {*found}
        return
    wait = "exchange" if p.protocol == "data" else "poll"
    first_wait, products, stores = min(positions(found, wait)), positions(found, "product"), positions(found, "store")
    assert not offline.read_before(sass, wait)
    fetches = positions(found, "fetch")
    assert len(fetches) >= cells.CELLS[cell].num_gates, "of a cell's own data"
    assert max(fetches) < first_wait < min(products)
    arrivals = positions(found, "arrive")
    assert len(arrivals) == (p.protocol == "counter")
    # Words of norms are stored and awaited between product and publication.
    told = [k for k in stores if k > max(products)]
    assert told
    if arrivals:
        assert min(told) < arrivals[0]
    # Every load of what others wrote goes past the first-level cache, or is a copy that bypasses it.
    strong = len(re.findall(r"LDG\.\S*STRONG\.GPU", sass)) + len(re.findall(r"LDGSTS\.\S*BYPASS", sass))
    exchanged = len(re.findall(r"ld\.global\.cg|cp\.async\.cg|ld\.global\.gpu\.acquire", compiled.asm["ptx"]))
    assert strong == exchanged > 0
    assert "volatile" not in compiled.asm["ptx"] and ".STRONG.SYS" not in sass


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("protocol", ["counter", "data"])
def test_backward_saves_nothing_that_is_not_exchanged(arch, protocol):
    """There is one exchange per step. All stores of the loop are gradients, after the product, before the arrival."""
    found = offline.loop_events(offline.compile_plan(planned("lstm", protocol, "bwd", arch=arch)).asm["sass"])
    # In the last iteration the gradients of the initial states leave, in a branch before the step's own.
    products, stores, arrivals = (positions(found, name) for name in ("product", "store", "arrive"))
    assert max(products) < min(stores) and all(max(stores) < k for k in arrivals)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_h_is_told_before_gates_and_c_are_saved(arch):
    """By counter: products, the store of h, arrival, and only then five stores or more."""
    found = offline.loop_events(offline.compile_plan(planned("lstm", "counter", "fwd", arch=arch)).asm["sass"])
    (arrive,) = positions(found, "arrive")
    stores = positions(found, "store")
    told, saved = [k for k in stores if k < arrive], [k for k in stores if k > arrive]
    assert min(stores) > max(positions(found, "product")) and len(saved) >= 5 * len(told) > 0, found


def test_by_data_h_is_stored_first():
    """In the intermediate code of the loop: h goes out as bits, the gates as numbers after it."""
    loop = offline.compile_plan(planned("lstm", "data", "fwd")).asm["ttgir"].partition("scf.for")[2]
    stores = re.findall(r"tt.store .*?: tensor<\S+?!tt.ptr<(\w+)>", loop)
    assert stores[0] == "i16" and stores[1:5] == ["bf16"] * 4 and stores[5] == "f32"


@pytest.mark.parametrize("pass_", ["fwd", "bwd"])
def test_by_data_nobody_counts(pass_):
    """No fence, no atomic: what is read again and again are the values themselves, in one round of loads."""
    compiled = offline.compile_plan(planned("lstm", "data", pass_))
    found = offline.loop_events(compiled.asm["sass"])
    assert "arrive" not in found and "poll" not in found and positions(found, "prefetch")
    assert "MEMBAR.ALL.GPU" not in compiled.asm["sass"]
    assert offline.loop(compiled.asm["sass"]).load_rounds == 1
    # Copies of less than 16 bytes go through the first-level cache, whatever the load says.
    assert "cp.async" not in compiled.asm["ptx"]


# The most that a step may need, as numbers of `offline.Loop`, by shape and pass. The comments have the numbers before,
# of 2026-11-28.
AT_MOST = {
    ("F1", "bf16", "fwd"): {"instructions": 700, "bar_sync": 16},  # 1280, 33
    ("F1", "bf16", "bwd"): {"instructions": 1050, "bar_sync": 24},  # 1251, 49
    ("F1", "fp32", "bwd"): {"load_rounds": 3},  # 12, and six waits for memory in a row before them
    ("M1", "bf16", "fwd"): {"wgmma_waits": 8},  # 32
    ("L1", "bf16", "fwd"): {"wgmma_waits": 24},  # 64
    ("L5", "bf16", "fwd"): {"wgmma_waits": 2},  # 4
}


@pytest.mark.parametrize("shape", AT_MOST, ids="-".join)
def test_a_step_is_short(shape):
    name, dtype, pass_ = shape
    s = BY_ID[name]
    p = plan("lstm", s.B, s.H, dtype, 1, DEVICES["sm_90"], pass_)
    compiled = offline.compile_plan(p)
    found = offline.loop(compiled.asm["sass"])._asdict()
    assert all(found[key] <= most for key, most in AT_MOST[shape].items()), found
    assert compiled.spill_bytes == 0
    assert not offline.read_before(compiled.asm["sass"], "exchange" if p.protocol == "data" else "poll")


@pytest.mark.parametrize(("pass_", "hidden", "batch"), [("fwd", 512, 64), ("fwd", 1024, 128), ("fwd", 2048, 128)])
def test_matrix_instructions_run_on(pass_, hidden, batch):
    """The transposed form and large tiles have wgmma, of which a chunk's are waited for once, and not one by one."""
    from fusedlstm.plan import candidates
    from fusedlstm.plan.problem import Problem

    found = candidates(Problem("lstm", batch, hidden, "bf16", 1, pass_, device_limits=DEVICES["sm_90"]))
    p = next(p for p in found if p.transposed or p.block_b == 64)
    compiled = offline.compile_plan(p)
    loop, operations = offline.loop(compiled.asm["sass"]), offline.loop_operations(compiled.asm["sass"])
    assert operations["HGMMA"] >= 4
    assert 0 < loop.wgmma_waits <= (p.chunks if p.resident else 2) < operations["HGMMA"]


def test_the_table_has_the_steps():
    """bench/results/kernels.csv: every row of NVIDIA's tells what a step consists of."""
    for key, row in kernels.rows_of(kernels.RESULTS).items():
        numbers = kernels.numbers_of(row)
        assert (numbers.instructions is None) == key[4].startswith("gfx"), key
        assert numbers.instructions is None or numbers.instructions > 0, key
