"""The kernels of a cell with norms, compiled for sm_80 and sm_90 without a GPU, with the tiles of their plans."""

import re

import pytest

from bench import kernels
from bench.shapes import BY_ID
from fusedlstm.cells import CELLS
from fusedlstm.engines import launch, offline
from fusedlstm.kernels.cells import STEPS
from fusedlstm.kernels.norms import row_statistics_kernel
from fusedlstm.plan import plan
from fusedlstm.plan.devices import DEVICES

CELLS_WITH_NORMS = [name for name in STEPS if CELLS[name].norms]


@pytest.mark.parametrize("pass_", ["fwd", "bwd"])
@pytest.mark.parametrize(
    ("arch", "dtype", "shape", "layout"),
    [
        ("sm_80", "bf16", "L1", "dense"),
        ("sm_90", "bf16", "S2", "ragged"),
        ("sm_90", "fp32", "F1", "dense"),
    ],
)
@pytest.mark.parametrize("cell", CELLS_WITH_NORMS)
def test_compiles_within_the_limits(cell, arch, dtype, shape, layout, pass_):
    s = BY_ID[shape]
    p = plan(cell, s.B, s.H, dtype, 1, DEVICES[arch], pass_, layout=layout)
    numbers = kernels.compile_numbers(p)
    assert not kernels.faults(p, numbers), kernels.faults(p, numbers)
    assert numbers.smem_bytes <= p.smem_bytes


@pytest.mark.parametrize("protocol", ["counter", "data"])
@pytest.mark.parametrize("pass_", ["fwd", "bwd"])
@pytest.mark.parametrize("cell", CELLS_WITH_NORMS)
def test_exchanges_of_a_step(cell, pass_, protocol):
    """Of every norm one, by words of 64 bits that are stored and polled, and h by its protocol: nobody else counts."""
    p = plan(cell, 64, 512, "bf16", 1, DEVICES["sm_90"], pass_, protocol=protocol)
    ptx = offline.compile_plan(p).asm["ptx"]
    assert p.barriers_per_step == 1 + CELLS[cell].norms
    for instruction in ("atom.global.gpu.release.add", "ld.global.gpu.acquire"):
        assert ptx.count(instruction) == (protocol == "counter")
    assert re.search(r"ld\.global\.cg\.(v2\.)?b64", ptx) and re.search(r"st\.global\.(v2\.)?b64", ptx)


@pytest.mark.parametrize("hidden", [7, 1024, 8192])
@pytest.mark.parametrize("cell", CELLS_WITH_NORMS)
def test_row_statistics(cell, hidden):
    constants = launch.row_statistics_constants(CELLS[cell], hidden)
    options = {"num_warps": constants.pop("num_warps")}
    types = {"gates_ptr": "*bf16", "c_seq_ptr": "*fp32", "statistics_ptr": "*fp32", "D": "i32"}
    assert offline.compile_kernel(row_statistics_kernel, types, constants, "sm_90", **options).spill_bytes == 0


@pytest.mark.parametrize("pass_", ["fwd", "bwd"])
def test_on_amd_the_words_are_awaited_by_a_counter(pass_):
    """A load there sees only the L2 of its own die until an acquire: three of them a step, and as many releases."""
    p = plan("layernorm", 64, 256, "bf16", 1, DEVICES["gfx942"], pass_)
    assert p.group > 1
    found = offline.compile_plan(p).asm["amdgcn"]
    assert len(re.findall(r"buffer_inv sc1", found)) >= 3 and len(re.findall(r"buffer_wbl2 sc1", found)) >= 3
