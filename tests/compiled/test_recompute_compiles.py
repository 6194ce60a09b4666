"""kernels/recompute.py compiled offline: no spill, and memory read in whole lines."""

import pytest

from fusedlstm.engines import launch, offline
from fusedlstm.kernels.cells import STEPS
from fusedlstm.kernels.recompute import recompute_kernel

MASKS = [(), ("RAGGED", "RESETS"), ("PACKED", "RESETS"), ("HOLDS", "DROPS_CANDIDATE", "TRAINING")]


@pytest.mark.parametrize("on", MASKS, ids=str)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_compiles(arch, on):
    names = recompute_kernel.arg_names
    types = {name: "*bf16" if name.endswith("_ptr") else "i32" for name in names}
    types |= {
        "cx_ptr": "*fp32",
        "c_seq_ptr": "*fp32",
        "lengths_ptr": "*i32",
        "first_row_ptr": "*i64",
        "resets_ptr": "*i8",
        "seed_ptr": "*i64",
        "first_row_of_all": "i64",
        **dict.fromkeys(("rate_h", "rate_c", "scale_candidate"), "fp32"),
    }
    flags = dict.fromkeys(on, True)
    constants = {"H": 1024, "G": 4, "V": 0, "S": 1, "STEP": STEPS["lstm"][0], "BLOCK_H": launch.RECOMPUTED_UNITS}
    constants |= {"LAYOUT": launch.row_layout(flags), "NOISE": launch.noise_kinds(flags)}
    compiled = offline.compile_kernel(recompute_kernel, types, constants, arch, num_warps=4, debug=True)
    assert compiled.spill_bytes == 0 and compiled.regs <= 64
