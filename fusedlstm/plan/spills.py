"""Which kernels the compiler is known to spill: data, written by `make kernels`, and no rule.

A kernel that keeps more than a thread's 255 registers hold moves some to memory and back at every step. Whether it does is known only
once it is compiled. So `make kernels` compiles the plans of the field's shapes, with every version of Triton that is
supported, and `spills.json` names those that spilled; for them a plan takes the next variant of its tiles. For other sizes
the launch on a GPU looks, and takes the next one too (`fusedlstm.launch`).
"""

import functools
import json
from pathlib import Path

from fusedlstm.plan.one_launch import Plan

FILE = Path(__file__).parent / "spills.json"


@functools.cache
def known() -> frozenset[str]:
    """`Plan.code` of every kernel that was found to spill."""
    return frozenset(json.loads(FILE.read_text()))


def spills(p: Plan) -> bool:
    return p.code in known()
