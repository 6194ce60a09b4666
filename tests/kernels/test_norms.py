"""kernels/norms.py: statistics across programs, in the cell that needs them. See test_cells.py for other cases."""

import copy

import pytest
import torch
import triton
import triton.language as tl

import fusedlstm
from fusedlstm import cells
from fusedlstm.cells import Grads, Saved, State
from fusedlstm.engines import launch, reference
from fusedlstm.kernels import norms
from fusedlstm.kernels.cells import STEPS
from groups import is_caught
from support import DTYPES, Inputs, assert_accurate, cast, recurrence, recurrence_inputs, tiled, without_padding

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="needs the interpreter: run without a GPU")
CELLS_WITH_NORMS = [name for name in STEPS if cells.CELLS[name].norms]
NAMES = (*Saved._fields, "grad_preact", "grad_hx", "grad_cx")


def gradients(inputs):
    generator = torch.Generator().manual_seed(1)
    (hx, cx), leading = inputs.state, inputs.preact_x.shape[1:-1]
    D, B, H = hx.shape
    shapes = ((*leading, D * H), (len(cx), *leading, D * H), (D, B, H), (len(cx), D, B, H))
    return Grads(*(torch.randn(s, generator=generator).to(hx) for s in shapes))


def cell_of(inputs) -> str:
    """The one with as many states."""
    return "layernorm" if len(inputs.state.cx) else "layernorm_gru"


def run(inputs, clip=None, **tiles):
    """Every tensor of both passes by name."""
    hx, spec = inputs.state.hx, recurrence(cell_of(inputs), clip=clip)
    D, B, H = hx.shape
    options = {"cell": cell_of(inputs), "directions": D, "precision": "ieee", **tiles}
    fwd, bwd = (tiled(pass_, B, H, launch.DTYPES[hx.dtype], **options) for pass_ in ("fwd", "bwd"))
    saved = launch.recurrence_fwd(spec, *inputs, plan=fwd)
    grads = launch.recurrence_bwd(spec, gradients(inputs), saved, *inputs[1:], plan=bwd)
    return dict(zip(NAMES, (*saved, *grads), strict=True))


def specified(inputs, dtype, clip=None):
    grads, inputs, spec = cast(gradients(inputs), dtype), cast(inputs, dtype), recurrence(cell_of(inputs), clip=clip)
    saved = reference.recurrence_fwd(spec, *inputs)
    found = reference.recurrence_bwd(spec, grads, saved, *inputs[1:])
    return dict(zip(NAMES, (*saved, *found), strict=True))


def check(inputs, clip=None, **tiles):
    ours = run(inputs, clip, **tiles)
    in_torch, exact = specified(inputs, inputs.state.hx.dtype, clip), specified(inputs, torch.float64, clip)
    for name, x in ours.items():
        found = (x, in_torch[name], exact[name])
        if name == "gates":
            found = tuple(without_padding(y, inputs.batch.layout) for y in found)
        assert_accurate(name, *found)
    return ours


def inputs_of(T, B, H, D=1, dtype="fp32", device="cpu", cell="layernorm", **options):
    return recurrence_inputs(T, B, H, D, DTYPES[dtype], device, cell=cell, **options)


# Tiles are 16 x 16: hidden sizes on both sides of a block, one batch tile and several, one program a group and three.
SIZES = [(1, 1, 1), (2, 3, 15), (3, 3, 16), (2, 17, 17), (2, 3, 33)]


@pytest.mark.parametrize(("T", "B", "H"), SIZES, ids=str)
@pytest.mark.parametrize("schedule", ["single", "resident", "streamed"])
@pytest.mark.parametrize("cell", CELLS_WITH_NORMS)
def test_equals_specification(device, cell, schedule, T, B, H):
    check(inputs_of(T, B, H, device=device, cell=cell), schedule=schedule)


def test_a_mean_far_from_zero_of_a_gru(device):
    """Recurrent products near 1000 in all units."""
    preact_x, weights, (hx, cx), batch = inputs_of(2, 3, 33, device=device, cell="layernorm_gru")
    weights = weights._replace(weight_hh=[w * 1e-3 + 30 for w in weights.weight_hh])
    check(Inputs(preact_x, weights, State(hx * 1e-2 + 1, cx), batch))


def test_a_mean_far_from_zero(device):
    """Preactivations and a cell state near 1000 in all units. A difference of squares would be only noise."""
    preact_x, weights, (hx, cx), batch = inputs_of(2, 3, 33, device=device)
    preact_x[..., 33:66] += 20  # a step forgets nothing
    weights = weights._replace(weight_hh=[w * 1e-3 + 30 for w in weights.weight_hh])
    check(Inputs(preact_x, weights, State(hx * 1e-2 + 1, cx + 1000), batch))


@interpreted
@pytest.mark.parametrize("protocol", ["counter", "data"])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("cell", CELLS_WITH_NORMS)
def test_under_seeded_schedules_to_the_last_bit(cell, seed, protocol):
    """Whoever comes first: the baton moves at every load and store."""
    from fusedlstm.engines import interpreter

    inputs = inputs_of(3, 0, 20, lengths=[2, 3, 0, 1], resets=0.2, cell=cell)
    expected = run(inputs, protocol=protocol)
    with interpreter.side_by_side(seed, yield_on_memory=True):
        found = run(inputs, protocol=protocol)
    for name in expected:
        a, b = (
            without_padding(x[name], inputs.batch.layout) if name == "gates" else x[name] for x in (found, expected)
        )
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
@pytest.mark.parametrize("cell", CELLS_WITH_NORMS)
def test_a_broken_exchange_is_caught(monkeypatch, cell, fault):
    """Negative control: of four seeds with memory yields at least one shows wrong numbers or a deadlock."""
    monkeypatch.setattr(norms, *BROKEN[fault])
    inputs = inputs_of(2, 3, 20, cell=cell)
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


@pytest.mark.parametrize("cls", [fusedlstm.LayerNormLSTM, fusedlstm.LayerNormGRU])
def test_padding_has_no_part_in_the_gradients(device, cls):
    """All gradients of a layer, where no sequence has the last step: nothing writes the gates of that."""
    lengths, x = torch.tensor([3, 0, 1, 2, 3]), torch.randn(4, 5, 7)
    same_dtype = cls(7, 20, 2, backend="reference")
    results = []
    for module in (copy.deepcopy(same_dtype).to(device), same_dtype, copy.deepcopy(same_dtype).double()):
        module.backend = "reference" if results else "triton"
        output, _ = module(x.to(module.weight_ih_l0), lengths=lengths)
        output.backward(torch.linspace(0, 1, output.numel()).view_as(output).to(output))
        results.append([output.detach(), *(p.grad for p in module.parameters())])
    for k, tensors in enumerate(zip(*results, strict=True)):
        assert_accurate(f"tensor {k}", *tensors)
