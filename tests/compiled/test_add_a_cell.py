"""docs/add_a_cell.md, followed literally: its kernels compile for a GPU, and none spills."""

import pytest

from bench import kernels
from fusedlstm.engines import offline
from fusedlstm.plan import plan, step_plan
from fusedlstm.plan.devices import DEVICES

LIMITS = DEVICES["sm_90"]


def assert_sound(p, c):
    found = kernels.faults(p, kernels.Numbers(*c[:4]))
    assert not found and not c.spill_bytes and c.smem_bytes <= p.smem_bytes, (c[:4], found)


@pytest.mark.parametrize("pass_", ["fwd", "bwd"])
@pytest.mark.parametrize(
    ("dtype", "layout", "protocol", "hidden"),
    [
        ("bf16", "dense", "data", 512),
        ("bf16", "dense", "counter", 512),
        ("bf16", "packed", "data", 512),
        ("bf16", "ragged", "data", 512),
        ("fp32", "dense", "data", 512),
        ("fp32", "packed", "data", 512),
        ("fp32", "ragged", "data", 512),
    ],
)
def test_no_kernel_spills(ugrnn, dtype, layout, protocol, hidden, pass_):
    p = plan(ugrnn.cell.name, 64, hidden, dtype, 1, LIMITS, pass_, layout=layout, protocol=protocol)
    assert p.schedule == "resident" and p.protocol == protocol and p.group > 1
    assert_sound(*offline.compile_clean(p, LIMITS))


def test_zoneout_and_dropout_do_not_spill(ugrnn):
    noise = dict.fromkeys(("HOLDS", "DROPS_CANDIDATE", "DROPS_H", "TRAINING"), True)
    for pass_ in ("fwd", "bwd"):
        p = plan(ugrnn.cell.name, 64, 512, "bf16", 1, LIMITS, pass_)
        assert_sound(p, offline.compile_plan(p, **noise))


@pytest.mark.parametrize(("pass_", "input_size"), [("fwd", 256), ("bwd", 0)])
def test_a_single_step(ugrnn, pass_, input_size):
    p = step_plan(ugrnn.cell.name, 16, 256, "bf16", 1, LIMITS, pass_, input_size=input_size)
    assert_sound(p, offline.compile_step(p, input_size))
