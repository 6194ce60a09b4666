"""kernels/norms.py: statistics across programs, in the cell that needs them. See test_cells.py for other cases."""

import pytest
import torch
import triton
import triton.language as tl

from fusedlstm import cells
from fusedlstm.engines import launch, reference
from fusedlstm.kernels import norms
from groups import is_caught
from support import DTYPES, assert_accurate, cast, recurrence_inputs, tiled, without_padding

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="needs the interpreter: run without a GPU")
FWD, BWD = ("output", "h_n", "c_n", "gates", "c_seq"), ("grad_preact", "grad_hx", "grad_cx")


def gradients(inputs):
    generator = torch.Generator().manual_seed(1)
    (D, B, H), leading, dtype = inputs["hx"].shape, inputs["preact_x"].shape[1:-1], inputs["hx"].dtype
    shapes = ((*leading, D * H), (1, *leading, D * H), (D, B, H), (1, D, B, H))
    return [torch.randn(s, generator=generator).to(inputs["hx"]).to(dtype) for s in shapes]


def run(inputs, clip=None, **tiles):
    """Every tensor of both passes by name."""
    (D, B, H), dtype = inputs["hx"].shape, launch.DTYPES[inputs["hx"].dtype]
    options = {"cell": "layernorm", "directions": D, "precision": "ieee", **tiles}
    fwd, bwd = (tiled(pass_, B, H, dtype, **options) for pass_ in ("fwd", "bwd"))
    results = launch.recurrence_fwd("layernorm", **inputs, save_gates=True, save_states=True, plan=fwd)
    output, _, _, gates, c_seq = results
    own = {k: v for k, v in inputs.items() if k != "preact_x"}
    saved = {"output": output, "gates": gates, "c_seq": c_seq}
    grads = launch.recurrence_bwd("layernorm", *gradients(inputs), **own, **saved, clip=clip, plan=bwd)
    return dict(zip(FWD + BWD, (*results, *grads), strict=True))


def specified(inputs, dtype, clip=None):
    grads, inputs = cast(gradients(inputs), dtype), cast(inputs, dtype)
    results = reference.recurrence_fwd("layernorm", **inputs)
    output, _, _, gates, c_seq = results
    own = {k: v for k, v in inputs.items() if k != "preact_x"}
    found = reference.recurrence_bwd("layernorm", *grads, **own, output=output, gates=gates, c_seq=c_seq, clip=clip)
    return dict(zip(FWD + BWD, (*results, *found), strict=True))


def check(inputs, clip=None, **tiles):
    ours = run(inputs, clip, **tiles)
    in_torch, exact = specified(inputs, inputs["hx"].dtype, clip), specified(inputs, torch.float64, clip)
    for name, x in ours.items():
        found = (x, in_torch[name], exact[name])
        if name == "gates":
            found = tuple(without_padding(y, inputs["layout"]) for y in found)
        assert_accurate(name, *found)
    return ours


def inputs_of(T, B, H, D=1, dtype="fp32", device="cpu", **options):
    return recurrence_inputs(T, B, H, D, DTYPES[dtype], device, cell="layernorm", **options)


# Tiles are 16 x 16: hidden sizes on both sides of a block, one batch tile and several, one program a group and three.
SIZES = [(1, 1, 1), (2, 3, 15), (3, 3, 16), (2, 17, 17), (2, 3, 33)]


@pytest.mark.parametrize(("T", "B", "H"), SIZES, ids=str)
@pytest.mark.parametrize("schedule", ["single", "resident", "streamed"])
def test_equals_specification(device, schedule, T, B, H):
    check(inputs_of(T, B, H, device=device), schedule=schedule)


def test_a_mean_far_from_zero(device):
    """Preactivations and a cell state near 1000 in all units. A difference of squares would be only noise."""
    inputs = inputs_of(2, 3, 33, device=device)
    inputs["weight_hh"] = [w * 1e-3 + 30 for w in inputs["weight_hh"]]
    inputs["hx"] = inputs["hx"] * 1e-2 + 1
    inputs["cx"] = inputs["cx"] + 1000
    inputs["preact_x"][..., 33:66] += 20  # a step forgets nothing
    check(inputs)


@interpreted
@pytest.mark.parametrize("protocol", ["counter", "data"])
@pytest.mark.parametrize("seed", range(2))
def test_under_seeded_schedules_to_the_last_bit(seed, protocol):
    """Whoever comes first: the baton moves at every load and store."""
    from fusedlstm.engines import interpreter

    inputs = inputs_of(3, 0, 20, lengths=[2, 3, 0, 1], resets=0.2)
    expected = run(inputs, protocol=protocol)
    with interpreter.side_by_side(seed, yield_on_memory=True):
        found = run(inputs, protocol=protocol)
    for name in expected:
        a, b = (without_padding(x[name], inputs["layout"]) if name == "gates" else x[name] for x in (found, expected))
        assert torch.equal(a, b), name


@triton.jit
def nothing_is_late(words, tag, GROUP: tl.constexpr):
    return 0


@triton.jit
def the_first_again(a, b, rows, k, EXCHANGE: tl.constexpr):
    return whole(a, b, rows, k * 0, EXCHANGE)


whole = norms._of_group
BROKEN = {
    "takes what is there": ("_late", nothing_is_late),
    "waits for the first exchange only": ("_of_group", the_first_again),
}


@interpreted
@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_exchange_is_caught(monkeypatch, fault):
    """Negative control: of four seeds with memory yields at least one shows wrong numbers or a deadlock."""
    monkeypatch.setattr(norms, *BROKEN[fault])
    inputs = inputs_of(2, 3, 20)
    assert is_caught(lambda: check(inputs, protocol="data"))


@interpreted
@pytest.mark.parametrize("protocol", ["counter", "data"])
def test_a_wait_without_end_is_an_error(monkeypatch, protocol):
    """A program whose words never come, before the scheduler loses its patience."""
    from fusedlstm import plan as planning
    from fusedlstm.engines import interpreter

    @triton.jit
    def untagged(x, tag):
        return tag.to(tl.int64) * 0

    monkeypatch.setattr(planning, "ATTEMPT_LIMIT", 8)
    monkeypatch.setattr(planning, "SPIN_LIMIT", 8)
    monkeypatch.setattr(norms, "_tagged", untagged)
    with pytest.raises(AssertionError, match="never arrived"), interpreter.side_by_side(patience=1000):
        check(inputs_of(2, 3, 20), protocol=protocol)


def test_other_cells_have_no_norms():
    assert [name for name, cell in cells.CELLS.items() if cell.norms] == ["layernorm"]
