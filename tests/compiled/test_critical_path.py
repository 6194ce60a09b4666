"""The order of a time step in the machine code: what nobody needs yet is fetched before the wait, and saved after the group was told."""

import re

import pytest

from fusedlstm import offline
from fusedlstm.devices import DEVICES
from fusedlstm.plan import plan

TARGETS = ("sm_80", "sm_90")


def events(pass_, protocol, arch):
    p = plan("lstm", 100, 64, 512, "bf16", 1, DEVICES[arch], pass_, protocol=protocol)
    assert p.schedule == "resident"
    compiled = offline.compile_plan(p)
    return compiled, offline.loop_events(compiled.asm["sass"])


def positions(found, name):
    return [k for k, event in enumerate(found) if event == name]


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("pass_", ["fwd", "bwd"])
@pytest.mark.parametrize("protocol", ["counter", "data"])
def test_the_next_operands_are_fetched_before_the_wait(pass_, protocol, arch):
    """Forward four preactivations; backward four gates, the gradient of h and c of the step before."""
    _, found = events(pass_, protocol, arch)
    fetches = positions(found, "fetch")
    assert len(fetches) >= (4 if pass_ == "fwd" else 6)
    waits = positions(found, "poll" if protocol == "counter" else "exchange")
    assert max(fetches) < min(waits), found
    assert max(fetches) < min(positions(found, "product"))


@pytest.mark.parametrize("arch", TARGETS)
def test_h_is_told_before_gates_and_c_are_saved(arch):
    """By counter: products, the store of h, arrival, and only then five stores or more."""
    _, found = events("fwd", "counter", arch)
    (arrive,) = positions(found, "arrive")
    after_products = max(positions(found, "product"))
    stores = positions(found, "store")
    told = [k for k in stores if after_products < k < arrive]
    saved = [k for k in stores if k > arrive]
    assert min(stores) > after_products and len(saved) >= 5 * len(told) > 0, found


def test_by_data_h_is_stored_first():
    """In the intermediate code of the loop: h goes out as bits, the gates as numbers after it."""
    compiled, _ = events("fwd", "data", "sm_90")
    loop = compiled.asm["ttgir"].partition("scf.for")[2]
    stores = re.findall(r"tt.store .*?: tensor<\S+?!tt.ptr<(\w+)>", loop)
    assert stores[0] == "i16" and stores[1:5] == ["bf16"] * 4 and stores[5] == "f32"


@pytest.mark.parametrize("arch", TARGETS)
def test_backward_saves_nothing_that_is_not_exchanged(arch):
    """One exchange a step: every store of the loop is one of the four gradients, before the arrival."""
    _, found = events("bwd", "counter", arch)
    (arrive,) = positions(found, "arrive")
    assert len(positions(found, "poll")) == 1
    # In the last iteration the gradients of the initial states leave, in a branch before the step's own.
    products, stores = positions(found, "product"), positions(found, "store")
    assert max(products) < min(stores) and max(stores) < arrive


@pytest.mark.parametrize("pass_", ["fwd", "bwd"])
def test_by_data_nobody_counts(pass_):
    """No fence, no atomic: what is read again and again are the values themselves."""
    compiled, found = events(pass_, "data", "sm_90")
    assert "arrive" not in found and "poll" not in found
    assert "MEMBAR.ALL.GPU" not in compiled.asm["sass"]
    assert positions(found, "exchange")
    # Copies of less than 16 bytes go through the first-level cache, whatever the load says.
    assert "cp.async" not in compiled.asm["ptx"]
    assert "__assertfail" in compiled.asm["ptx"], "the attempts are bounded"
