"""save="states" gives the same numbers in blocks of steps, and needs as much memory as memory.py says."""

import copy
import itertools
import pickle
import weakref

import features
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fusedlstm
from bench import memory
from bench.shapes import SHAPES
from fusedlstm import autograd, checks, ops
from fusedlstm.cells import CELLS, State
from fusedlstm.engines import reference
from fusedlstm.layout import DENSE, Layout
from fusedlstm.noise import Batch
from support import assert_accurate, recurrence

EXACT = {"rtol": 1e-11, "atol": 1e-12}
I, H = 4, 6


@pytest.fixture
def short_blocks(monkeypatch):
    """Blocks of a step or two, so that a short batch has borders."""
    monkeypatch.setattr(autograd, "FEWEST_STEPS", 1)
    monkeypatch.setattr(autograd, "FEWEST_ROWS", 1)
    monkeypatch.setattr(autograd, "MOST_BLOCKS", 4)


def lengths(*values):
    return torch.tensor(values, dtype=torch.int32)


def resets(*leading, also=()):
    """At random rows, and at the rows `also`."""
    found = torch.rand(leading, generator=torch.Generator().manual_seed(7)) < 0.3
    for row in also:
        found[row] = True
    return found


def packed(*values):
    sizes = torch.tensor([sum(n > t for n in values) for t in range(values[0])])
    return Layout.of_packed(sizes, len(values), torch.device("cpu"))


# Resets are at a border, in the first row of padding, at the beginning and in the last row. Sequences end before, at
# and after a border, and one has no steps.
LAYOUTS = {
    "dense": (DENSE, (7, 3)),
    "one step": (DENSE, (1, 3)),
    "no sequence": (DENSE, (5, 0)),
    "resets": (Layout(resets=resets(7, 3)), (7, 3)),
    "all reset": (Layout(resets=torch.ones(7, 2, dtype=torch.bool)), (7, 2)),
    "ragged": (Layout(lengths(2, 0, 7, 1, 5)), (7, 5)),
    "ragged, resets": (Layout(lengths(2, 0, 7, 3), None, resets(7, 4, also=[(2, 0), (3, 3)])), (7, 4)),
    "packed, resets": (packed(5, 3, 3, 1)._replace(resets=resets(12, also=[11])), (12,)),
}


def random_layer(leading, batch, directions, bias=True, dtype=torch.float64, heads=1):
    generator = torch.Generator().manual_seed(5)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()

    shapes = [(4 * H, I), (4 * H, H // heads), *([(4 * H,)] * 2 if bias else [])]
    parameters = [[randn(*s) for s in shapes] for _ in range(directions)]
    return randn(*leading, I), randn(directions, batch, H), randn(1, directions, batch, H), parameters


@pytest.mark.parametrize(("clip", "heads"), [(None, 1), (0.1, 1), (None, 3)])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_the_specification(short_blocks, name, directions, clip, heads):
    layout, leading = LAYOUTS[name]
    batch = leading[1] if len(leading) == 2 else len(layout.lengths)
    input, hx, cx, parameters = random_layer(leading, batch, directions, heads=heads)
    leaves = [input, hx, cx, *(p for direction in parameters for p in direction)]
    output, (h_n, c_n), c_seq = autograd.layer(
        CELLS["lstm"], input, (hx, cx[0]), parameters, "torch", layout, clip, wants_c_seq=True, save="states"
    )
    specified = reference.layer(recurrence(clip=clip), input, State(hx, cx), parameters, Batch(layout))
    exact = (*specified[:3], specified.c_seq)
    results = (output, h_n, c_n.unsqueeze(0), c_seq)
    for a, b in zip(results, exact, strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    grads = [torch.randn_like(x) for x in exact]
    found = torch.autograd.grad(results, leaves, grads)
    for a, b in zip(found, torch.autograd.grad(exact, leaves, grads), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("name", ["dense", "ragged, resets"])
def test_gradients_twice(short_blocks, name):
    """gradcheck and gradgradcheck, with the preactivations that a projection adds to first steps."""
    layout, leading = LAYOUTS[name]
    layout, leading = layout.of_steps(0, 3), (3, leading[1])
    input, hx, cx, parameters = random_layer(leading, leading[1], 1)
    preact_0 = torch.randn(1, leading[1], 4 * H, dtype=torch.float64, requires_grad=True)

    def run(input, hx, cx, preact_0, *flat):
        output, states, c_seq = autograd.layer(
            CELLS["lstm"], input, (hx, cx[0]), [flat], "torch", layout, None, True, preact_0, "states"
        )
        return output, *states, c_seq

    tensors = (input, hx, cx, preact_0, *parameters[0])
    assert torch.autograd.gradcheck(run, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, tensors, fast_mode=True)


@pytest.mark.parametrize("given", range(4), ids=["output", "h_n", "c_n", "c_seq"])
@pytest.mark.parametrize("wanted", [[0], [1, 2], [3], [4], [0, 1, 2, 3, 4]], ids=str)
def test_some_gradients(short_blocks, given, wanted):
    """Through one result, of some of the tensors; batch first, without bias."""
    input, hx, cx, parameters = random_layer((3, 7), 3, 1, bias=False)
    leaves = [input, hx, cx, *parameters[0]]
    for k, leaf in enumerate(leaves):
        leaf.requires_grad_(k in wanted)
    x = input.transpose(0, 1)
    output, (h_n, c_n), c_seq = autograd.layer(
        CELLS["lstm"], x, (hx, cx[0]), parameters, "torch", wants_c_seq=True, save="states"
    )
    specified = reference.layer(recurrence(), x, State(hx, cx), parameters)
    exact = (*specified[:3], specified.c_seq)
    leaves = [leaves[k] for k in wanted]
    found = torch.autograd.grad((output, h_n, c_n, c_seq)[given].square().sum(), leaves)
    for a, b in zip(found, torch.autograd.grad(exact[given].square().sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("T", [1, 7])
def test_compiles(short_blocks, monkeypatch, T):
    monkeypatch.setattr(autograd, "MOST_BLOCKS", 2)
    input, hx, cx, parameters = random_layer((T, 3), 3, 1)
    cuts = resets(T, 3)

    def run(x, cuts):
        layout = Layout(resets=cuts)
        return autograd.layer(
            CELLS["lstm"], x, (hx.detach(), cx[0].detach()), parameters, "torch", layout, save="states"
        )[0]

    found = []
    for f in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        output = f(input, cuts)
        found.append([output, *torch.autograd.grad(output.square().sum(), [input, *parameters[0]])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_the_op_passes_opcheck():
    preact, hx, cx = torch.randn(2, 3, 4, 4 * H), torch.randn(2, 4, H), torch.randn(1, 2, 4, H)
    for layout in (DENSE, Layout(lengths(2, 0, 3, 1), None, resets(3, 4))):
        arguments = ("lstm", "torch", preact, None, hx, cx, [*layout, None], [], [0, 0])
        torch.library.opcheck(ops.recompute, arguments, test_utils=("test_schema", "test_faketensor"))


def test_blocks():
    for T, B in itertools.product((1, 2, 7, 50, 99, 1024, 100_000), (0, 1, 3, 128)):
        begins = autograd.begins_of_blocks(T, B)
        assert begins[0] == 0 and begins[-1] == T and len(begins) <= autograd.MOST_BLOCKS + 1
        sizes = [end - begin for begin, end in itertools.pairwise(begins)]
        assert max(sizes) - min(sizes) <= 1
        assert len(sizes) == 1 or (min(sizes) >= autograd.FEWEST_STEPS and max(sizes) * B >= autograd.FEWEST_ROWS)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations return: those now, and the maximum. `before` do not count."""

    def __init__(self, before):
        super().__init__()
        self.known, self.now, self.peak = set(), 0, 0
        for x in before:
            self._follow(x.untyped_storage(), 0)

    def _follow(self, storage, size):
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            weakref.finalize(storage, self._forget, storage._cdata, size)
            self.now += size
            self.peak = max(self.peak, self.now)

    def _forget(self, key, size):
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        results = f(*args, **(kwargs or {}))
        for x in tree_leaves(results):
            if isinstance(x, torch.Tensor):
                self._follow(x.untyped_storage(), x.untyped_storage().nbytes())
        return results


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("save", ["gates", "states"])
@pytest.mark.parametrize(("T", "B"), [(50, 64), (103, 20), (7, 3)])
def test_peak_is_as_memory_says(T, B, save, directions):
    input, hx, cx, parameters = random_layer((T, B), B, directions, dtype=torch.float32)
    grad = torch.randn(T, B, directions * H)
    before = [input, hx, cx, grad, *(p for direction in parameters for p in direction)]
    with LiveBytes(before) as live:
        output = autograd.layer(CELLS["lstm"], input, (hx.detach(), cx[0].detach()), parameters, "torch", save=save)[0]
        # The formulas are those of the kernels. The loop keeps an output of its own with the gates.
        of_loop = output.nbytes if save == "gates" else 0
        assert live.now == memory.kept(T, B, H, 4, save, directions) + of_loop
        output.backward(grad)
    own = memory.own_peak(T, B, H, 4, save, directions)
    bound = own + memory.gradients(T, B, I, H, 4, directions) - grad.nbytes + of_loop
    assert live.peak <= bound
    assert max(own, 0.8 * bound) <= 1.05 * live.peak or len(autograd.begins_of_blocks(T, B)) == 2


@pytest.mark.parametrize("shape", ["L1", "F1"])
def test_half_of_cudnn(shape):
    """In bfloat16, of what is the layer's own: reserve space and output there. The gradients both hold beside it."""
    shape = next(s for s in SHAPES if s.id == shape)
    T, B, H = shape.T, shape.B, shape.H
    cudnn = memory.cudnn_reserve(T, B, H, 2) + T * B * H * 2
    assert memory.own_peak(T, B, H, 2, "states") <= cudnn / 2
    assert memory.own_peak(T, B, H, 2, "gates") > cudnn  # so the comparison can fail
    assert memory.kept(T, B, H, 2, "states") <= cudnn / 4


def test_the_published_reserve():
    """pytorch issue 2895: 4 layers of H 320, float32, T * B = 25000; and the outputs between the layers."""
    assert 4 * memory.cudnn_reserve(1000, 25, 320, 4) + 3 * 1000 * 25 * 320 * 4 == 736_000_000


def test_module_keyword(monkeypatch):
    lstm = fusedlstm.LSTM(3, 4, 2, batch_first=True, proj_size=2, save="states", backend="torch").double()
    asked = []
    layer = autograd.layer

    def spy(*arguments, **options):
        asked.append(options["save"])
        return layer(*arguments, **options)

    monkeypatch.setattr(autograd, "layer", spy)
    lstm(torch.randn(2, 5, 3).double(), return_cell_states=True)
    assert asked == ["states"] * 2
    for module in (copy.deepcopy(lstm), pickle.loads(pickle.dumps(lstm))):
        assert module.save == "states"
    assert fusedlstm.LSTM(3, 4).save == "gates"
    model = torch.nn.LSTM(3, 4)
    fusedlstm.convert(model)
    assert model.save == "gates"
    with fusedlstm.patch_torch():
        patched = torch.nn.LSTM(3, 4)
    patched.save = "states"
    fusedlstm.convert(patched)
    assert type(patched) is fusedlstm.LSTM and patched.save == "states"
    fusedlstm.restore(patched)
    assert "save" not in vars(patched)
    with pytest.raises(ValueError, match="save: expected gates or states, got 'gate'"):
        fusedlstm.LSTM(3, 4, save="gate")
    with pytest.raises(TypeError):
        fusedlstm.LSTM(3, 4, 1, True, False, 0.0, False, 0, None, None, "auto", None, "states")
    assert checks.save("states") == "states"


def test_blocks_add_up_as_exactly_as_one_product():
    """The last block comes first, with the large gradient of h_n. Row after row would be rounded beside it."""
    module, same = fusedlstm.GRU(5, 8, save="states", backend="torch"), torch.nn.GRU(5, 8)
    same.load_state_dict(module.state_dict())
    x = torch.randn(2000, 2, 5)
    found = []
    for layer in (module, same, copy.deepcopy(same).double()):
        output, h_n = layer(x.to(layer.weight_ih_l0.dtype))
        (output.square().mean() + h_n.mean()).backward()
        found.append([p.grad for p in layer.parameters()])
    for name, *values in zip(dict(module.named_parameters()), *found, strict=True):
        assert_accurate(name, *values)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("name", features.OURS)
def test_blocks_of_every_member(name, heads, dropout):
    """Two blocks of steps have the gradients of one."""
    assert len(autograd.begins_of_blocks(60, 10)) == 3
    x, found = torch.randn(60, 10, 3, dtype=torch.float64), []
    lengths = torch.tensor([60, 1, 0, 30, 29, 31, 60, 59, 2, 45])
    for save in ("gates", "states"):
        torch.manual_seed(0)
        options = {} if name.startswith("LayerNorm") else {"num_heads": heads}  # norms are over all units
        options |= {"backend": "torch", "dtype": torch.float64, "save": save, "recurrent_dropout": dropout}
        module = getattr(fusedlstm, name)(3, 4, **options)
        output, _ = module(x, lengths=lengths)
        found.append([output, *torch.autograd.grad(output.sin().sum(), [*module.parameters()])])
    torch.testing.assert_close(*found, **EXACT)
