"""The litmus tests of the exchange (`bench/litmus.py`) compile, and have the operations whose order they test."""

import dataclasses
import re

import pytest

from bench import litmus
from bench.ceilings import exchange_of
from fusedlstm.engines import offline

SIZES = {"ROWS": litmus.ROWS, "UNITS": litmus.UNITS}


def compiled(protocol, dtype, group, waits):
    exchange = dataclasses.replace(exchange_of(group), PROTOCOL="data" if dtype is None else protocol)
    types = {"arrived_ptr": "*i32", "wrong_ptr": "*i32", "STEPS": "i32", "launch_number": "i32"}
    if dtype is None:
        kernel, types, constants = litmus.sums_kernel, types | {"sums_ptr": "*i64"}, {}
    else:
        name = {"bfloat16": "*bf16", "float32": "*fp32"}[dtype]
        kernel, types = litmus.tiles_kernel, types | {"tiles_ptr": name, "ones_ptr": name}
        constants = {"DOT": litmus.dot_of(group), "WAITS": waits}
    return offline.compile_kernel(
        kernel, types, SIZES | constants | {"EXCHANGE": exchange}, "sm_90", num_warps=4, num_stages=1
    )


@pytest.mark.parametrize("case", [*litmus.patterns(litmus.GROUPS[-1:])], ids=str)
def test_a_pattern_compiles(case):
    protocol, dtype, _, waits = case
    found = compiled(*case)
    ptx, sass = found.asm["ptx"], found.asm["sass"]
    by_counter = protocol == "counter" and waits
    assert found.spill_bytes == 0
    assert bool(re.search(r"atom\.\S*\.release\.|red\.\S*release", ptx)) == by_counter
    assert ("acquire" in ptx) == by_counter
    assert ("BPT.TRAP" in sass) == waits
    strong = re.findall(r"LDG\.E(?:\.(?:64|128))?\.STRONG\.GPU", sass)
    assert strong, "loads past the first-level cache"
    if dtype is None:
        assert all(load.split(".")[2] in ("64", "128") for load in strong), "a word with its tag"
