"""kernels/recompute.py compiled offline: no spill, and memory read in whole lines."""

import pytest

from fusedlstm import launch, offline
from fusedlstm.kernels.cells import STEPS
from fusedlstm.kernels.recompute import recompute_kernel


@pytest.mark.parametrize("layout", [(), ("RAGGED", "RESETS"), ("PACKED", "RESETS")], ids=str)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_compiles(arch, layout):
    names = recompute_kernel.arg_names
    types = {name: "*bf16" if name.endswith("_ptr") else "i32" for name in names}
    types |= {
        "cx_ptr": "*fp32",
        "c_seq_ptr": "*fp32",
        "lengths_ptr": "*i32",
        "first_row_ptr": "*i64",
        "resets_ptr": "*i8",
    }
    flags = {name: name in layout for name in ("PACKED", "RAGGED", "RESETS")}
    constants = {"H": 1024, "G": 4, "S": 1, "STEP": STEPS["lstm"][0], "BLOCK_H": launch.RECOMPUTED_UNITS, **flags}
    compiled = offline.compile_kernel(recompute_kernel, types, constants, arch, num_warps=4, debug=True)
    assert compiled.spill_bytes == 0 and compiled.regs <= 64
