"""The list of kernels that are known to spill: data that `make kernels` writes, not a rule.

A thread has 255 registers. A kernel that needs more moves values to memory and back at every step; that is a spill.
Whether a kernel spills is known only after it is compiled. So `make kernels` compiles the plans for the benchmark shapes
(`bench/shapes.py`) with both versions of Triton that CI tests, and `spills.json` names the kernels that spilled. The
planner then takes the next variant of the same tiles. For all other sizes the launch on a GPU checks the compiled kernel,
and takes the next variant if it spills (`fusedlstm.engines.launch`).
"""

import functools
import json
from pathlib import Path

from fusedlstm.plan.problem import Plan

TUNED_FOR = ("sm_80", "sm_90")
FILE = Path(__file__).parent / "spills.json"


@functools.cache
def known() -> frozenset[str]:
    """`Plan.code` of every kernel that was found to spill."""
    return frozenset(json.loads(FILE.read_text()))


def spills(p: Plan) -> bool:
    return p.code in known()


def allowed_bytes(arch: str) -> int:
    """What a thread may spill: nothing where plans are tuned, a little elsewhere."""
    return 0 if arch in TUNED_FOR else 64
