"""modules.py and functional.py: what torch.nn.LSTM does, ours does, on the engines that need no kernel."""

import copy
import functools
import itertools
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

import fusedlstm
from fusedlstm import cells, functional
from support import assert_accurate

OPTIONS = [
    {"num_layers": layers, "bias": bias, "batch_first": batch_first, "bidirectional": bidirectional}
    for layers, bias, batch_first, bidirectional in itertools.product((1, 2), *[(True, False)] * 3)
]


def name(options):
    return "-".join(k if v is True else f"{k}{v}" for k, v in options.items() if v)


def pair(*args, **kwargs):
    """Stock and ours, from the same seed."""
    backend = kwargs.pop("backend", "auto")
    torch.manual_seed(7)
    stock = nn.LSTM(*args, **kwargs)
    torch.manual_seed(7)
    return stock, fusedlstm.LSTM(*args, **kwargs, backend=backend)


@pytest.mark.parametrize("given", [False, True], ids=["hx absent", "hx given"])
@pytest.mark.parametrize("batched", [False, True], ids=["unbatched", "batched"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_equals_stock(options, backend, batched, given):
    stock, ours = pair(5, 7, **options, dtype=torch.float64, backend=backend)
    rows = options["num_layers"] * (2 if options["bidirectional"] else 1)
    input = torch.randn(*((3, 4) if batched else (4,)), 5, dtype=torch.float64)
    batch = input.size(0 if options["batch_first"] else 1)
    state = [torch.randn(rows, *([batch] if batched else []), 7, dtype=torch.float64) for _ in range(2)]
    found = []
    for module in (stock, ours):
        tensors = [x.clone().requires_grad_() for x in (input, *state)]
        output, (h_n, c_n) = module(tensors[0], tuple(tensors[1:]) if given else None)
        torch.manual_seed(9)
        sum((y * torch.randn_like(y)).sum() for y in (output, h_n, c_n)).backward()
        grads = [x.grad for x in tensors[: 3 if given else 1]] + [p.grad for p in module.parameters()]
        found.append([output, h_n, c_n, *grads])
    for a, b in zip(*found, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_same_parameters_under_a_seed(options):
    stock, ours = pair(5, 7, **options)
    assert list(stock.state_dict()) == list(ours.state_dict())
    for a, b in zip(stock.state_dict().values(), ours.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    ours.load_state_dict(stock.state_dict())
    assert repr(ours) == repr(stock)
    assert ours.all_weights[0][0] is ours.weight_ih_l0


def test_dropout_between_layers():
    """At 1 the second layer sees zeros, at 0 and in evaluation nothing changes; between, the mean stays."""
    x = torch.randn(4, 3, 5)
    for backend in ("auto", "reference"):
        stock, ours = pair(5, 7, 2, dropout=1.0, backend=backend)
        torch.testing.assert_close(ours(x)[0], stock(x)[0])
        torch.testing.assert_close(ours.eval()(x)[0], stock.eval()(x)[0])
        assert not torch.allclose(ours.train()(x)[0], ours.eval()(x)[0])
    ours = fusedlstm.LSTM(5, 7, 2, dropout=0.4, backend="reference")
    first = fusedlstm.LSTM(5, 7, backend="reference")
    first.load_state_dict({k: v for k, v in ours.state_dict().items() if k.endswith("l0")})
    kept = []
    ours.weight_ih_l1.data.fill_(0)
    ours.weight_ih_l1.data[14:21] = torch.eye(7)  # g of layer 1 sees the units of layer 0, the other gates are constant
    for b in (ours.bias_ih_l1, ours.bias_hh_l1, ours.weight_hh_l1):
        b.data.fill_(0)
    h = first(x[:1])[0][0]
    for _ in range(200):
        g = torch.atanh((2 * torch.atanh(2 * ours(x[:1])[0][0])).clamp(-0.999, 0.999))
        kept.append((g / h).mean())
        values = (g / h).flatten()
        assert ((values.abs() < 1e-3) | ((values - 1 / 0.6).abs() < 1e-2)).all()  # zero, or scaled by 1 / (1 - p)
    assert abs(torch.stack(kept).mean().item() - 1) < 0.06


def test_seeded_dropout_repeats():
    ours = fusedlstm.LSTM(5, 7, 2, dropout=0.5)
    x = torch.randn(4, 3, 5)
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(ours(x)[0])
    assert torch.equal(*results)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("bias", [True, False])
def test_cell(backend, bias):
    torch.manual_seed(7)
    stock = nn.LSTMCell(5, 7, bias)
    torch.manual_seed(7)
    ours = fusedlstm.LSTMCell(5, 7, bias, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(stock.parameters(), ours.parameters(), strict=True))
    x, h, c = torch.randn(3, 5), torch.randn(3, 7), torch.randn(3, 7)
    for arguments in ((x,), (x, (h, c)), (x[0],), (x[0], (h[0], c[0]))):
        for a, b in zip(stock(*arguments), ours(*arguments), strict=True):
            torch.testing.assert_close(b, a)
    shown = "" if backend == "auto" else f", backend={backend}"
    assert repr(ours) == repr(stock)[:-1] + shown + ")"


def test_repr_shows_what_is_no_default():
    options = {"backend": "torch", "grad_clip": 1.0, "save": "states", "init": fusedlstm.inits.orthogonal_}
    module = fusedlstm.LSTM(5, 8, 2, num_heads=2, zoneout=0.1, **options)
    assert repr(module) == (
        "LSTM(5, 8, num_layers=2, num_heads=2, backend=torch, grad_clip=1.0, save=states, init=orthogonal_, "
        "zoneout_h=0.1, zoneout_c=0.1)"
    )
    assert repr(fusedlstm.GRUCell(5, 8, num_heads=4)) == "GRUCell(5, 8, num_heads=4)"
    init = functools.partial(fusedlstm.inits.forget_bias_, value=2.0)
    assert repr(fusedlstm.GRU(5, 8, init=init)) == "GRU(5, 8, init=forget_bias_)"


@pytest.mark.parametrize(("name", "value"), [("backend", "cuda"), ("grad_clip", -1), ("save", 1), ("init", "zeros")])
def test_attributes_are_checked_like_arguments(name, value):
    module = fusedlstm.LSTM(5, 7)
    before = getattr(module, name)
    with pytest.raises((ValueError, TypeError)) as of_attribute:
        setattr(module, name, value)
    with pytest.raises(of_attribute.type) as of_argument:
        fusedlstm.LSTM(5, 7, **{name: value})
    assert str(of_attribute.value) == str(of_argument.value) and getattr(module, name) == before
    module.grad_clip = 2
    assert module.grad_clip == 2.0 and copy.deepcopy(module).grad_clip == 2.0


def test_what_a_module_is_built_with_stays():
    """Of ours, of a copy, and of a converted one, which has the defaults."""
    built = fusedlstm.GRU(5, 8, num_heads=2, zoneout=0.1)
    for module, heads in ((built, 2), (copy.deepcopy(built), 2), (fusedlstm.convert(nn.GRU(5, 8)), 1)):
        rates = module.rates
        with pytest.raises(AttributeError, match=f"^num_heads: expected {heads}, as the module was built, got 4$"):
            module.num_heads = 4
        with pytest.raises(AttributeError, match=r"^rates: expected Rates\(.*\), as the module was built, got \(0\.5,"):
            module.rates = (0.5, 0, 0, 0, 0)
        module.num_heads, module.rates = heads, rates  # what is there already
        assert (module.num_heads, module.rates) == (heads, rates)
    with pytest.raises(AttributeError, match=r"^num_heads: expected 1, as the module was built, got 4$"):
        fusedlstm.LSTMCell(5, 8).num_heads = 4


def test_cell_loop_equals_layer():
    ours = fusedlstm.LSTM(5, 7)
    cell = fusedlstm.LSTMCell(5, 7)
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in ours.state_dict().items()})
    x = torch.randn(4, 3, 5)
    state = None
    for t, expected in enumerate(ours(x)[0]):
        state = cell(x[t], state)
        torch.testing.assert_close(state[0], expected)


def test_copies_and_files(tmp_path):
    stock, ours = pair(5, 7, 2, bidirectional=True)
    x = torch.randn(4, 3, 5)
    torch.save(ours, tmp_path / "lstm.pt")
    loaded = torch.load(tmp_path / "lstm.pt", weights_only=False)
    for module in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), loaded):
        assert module.backend == "auto"
        torch.testing.assert_close(module(x)[0], stock(x)[0])
    torch.testing.assert_close(ours.double()(x.double())[0], stock.double()(x.double())[0])


def test_functional_call_and_replaced_weights():
    stock, ours = pair(5, 7)
    x = torch.randn(4, 3, 5)
    other = {k: torch.randn_like(v) for k, v in ours.state_dict().items()}
    results = [torch.func.functional_call(m, other, (x,))[0] for m in (stock, ours)]
    torch.testing.assert_close(results[1], results[0])
    for m in (stock, ours):
        m.weight_hh_l0 = nn.Parameter(other["weight_hh_l0"])
    torch.testing.assert_close(ours(x)[0], stock(x)[0])


def test_compiles_without_a_graph_break():
    """Dynamo stops at torch.nn.LSTM; ours goes into the graph."""
    _, ours = pair(5, 7, 2, bidirectional=True)
    x = torch.randn(4, 3, 5)
    with torch.no_grad():
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x)[0], ours(x)[0])


def test_packed_compiles_without_a_graph_break():
    """The layout of a pack is data to the graph."""
    from fusedlstm.layout import Layout

    ours = fusedlstm.LSTM(5, 7, bidirectional=True)
    weights = [[*direction] for direction in ours.all_weights]

    def run(data, *layout):
        from fusedlstm import autograd
        from fusedlstm.cells import CELLS

        zeros = data.new_zeros(2, len(layout[0]), 7)
        return autograd.layer(CELLS["lstm"], data, (zeros, zeros), weights, "torch", Layout(*layout))[0]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in ([4, 2, 1], [6, 6, 3], [5, 4, 4, 1]):
        packed = pack_padded_sequence(torch.randn(lengths[0], len(lengths), 5), torch.tensor(lengths))
        tables = Layout.of_packed(packed.batch_sizes, len(lengths), torch.device("cpu"))
        found = []
        for f in (run, compiled):
            ours.zero_grad()
            data = packed.data.clone().requires_grad_()
            output = f(data, *tables)
            output.square().sum().backward()
            found.append([output, data.grad, *(p.grad for p in ours.parameters())])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)


def test_the_custom_ops_compile():
    """The path of the ops under Dynamo: the ops are opaque, the products around them are traced."""
    from fusedlstm import autograd
    from fusedlstm.cells import CELLS

    ours = fusedlstm.LSTM(5, 7, bidirectional=True)
    weights = [[*direction] for direction in ours.all_weights]

    def run(x, h, c):
        return autograd.layer(CELLS["lstm"], x, (h, c), weights, engine="torch")[0]

    x = torch.randn(4, 3, 5, requires_grad=True)
    h, c = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    found = []
    for f in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        x.grad = None
        ours.zero_grad()
        output = f(x, h, c)
        output.square().sum().backward()
        found.append([output, x.grad, *(p.grad for p in ours.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_autocast_on_a_cpu(backend, dtype, packed):
    """The dtype that was asked for, float32 gradients, and the numbers of a module in that dtype."""
    stock, ours = pair(5, 7, backend=backend)
    x = torch.randn(4, 3, 5)
    x = pack_padded_sequence(x, torch.tensor([4, 2, 1])) if packed else x
    with torch.autocast("cpu", dtype):
        output, (h_n, c_n) = ours(x)
    output = output.data if packed else output
    assert output.dtype == h_n.dtype == c_n.dtype == dtype
    stock, x = stock.to(dtype), x.to(dtype)
    same_dtype, exact = stock(x), stock.double()(x.double())
    for name, a, b, c in (
        ("output", output, same_dtype[0], exact[0]),
        ("h_n", h_n, same_dtype[1][0], exact[1][0]),
        ("c_n", c_n, same_dtype[1][1], exact[1][1]),
    ):
        b, c = (y.data if name == "output" and packed else y for y in (b, c))
        assert_accurate(name, a.detach(), b.detach(), c.detach())
    output.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters())


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_autocast_of_a_cell(backend, dtype):
    cell = fusedlstm.LSTMCell(5, 7, backend=backend)
    with torch.autocast("cpu", dtype):
        h, c = cell(torch.randn(3, 5), (torch.randn(3, 7), torch.randn(3, 7)))
    assert h.dtype == c.dtype == dtype
    h.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in cell.parameters())


# Of the input, and what comes back without autocast, with autocast to bfloat16 and with autocast to float16.
AUTOCAST = {
    "float32": ("float32", "bfloat16", "float16"),
    "bfloat16": ("bfloat16", "bfloat16", "float16"),
    "float16": ("float16", "bfloat16", "float16"),
    "float64": ("float64", "float64", "float64"),
}


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize(
    "name",
    ["LSTM", "GRU", "RNN", "PeepholeLSTM", "CoupledLSTM", "LayerNormLSTM", "SLSTM", "ResetBeforeGRU", "LayerNormGRU"],
)
@pytest.mark.parametrize("given", AUTOCAST)
def test_dtypes_under_autocast(given, name, backend):
    """Of layers, dense, with lengths, packed and in one step, and of cells: the table of docs/support.md."""
    for k, dtype in enumerate((None, torch.bfloat16, torch.float16)):
        expected, x = getattr(torch, AUTOCAST[given][k]), torch.randn(5, 2, 3, dtype=getattr(torch, given))
        parameters = x.dtype if dtype is None or given == "float64" else torch.float32
        layer = getattr(fusedlstm, name)(3, 4, backend=backend, dtype=parameters)
        one = getattr(fusedlstm, f"{name}Cell")(3, 4, backend=backend, dtype=parameters)
        packed = nn.utils.rnn.pack_padded_sequence(x, [5, 3])
        x.requires_grad_()
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            calls = [layer(x), layer(x, lengths=torch.tensor([5, 3])), layer(packed), layer(x[:1]), one(x[0])]
        results = [y for y in torch.utils._pytree.tree_leaves(calls) if isinstance(y, torch.Tensor)]
        results += [
            y.data for y in torch.utils._pytree.tree_leaves(calls) if isinstance(y, nn.utils.rnn.PackedSequence)
        ]
        assert {y.dtype for y in results if y.is_floating_point()} == {expected}
        results = [y for y in results if y.is_floating_point()]
        sum(y.sum() for y in results).backward()
        assert x.grad.dtype == x.dtype and one.weight_ih.grad.dtype == parameters


def test_the_table_of_autocast_is_in_the_docs():
    docs = (Path(__file__).resolve().parents[2] / "docs" / "support.md").read_text()
    for given, results in AUTOCAST.items():
        assert f"| {' | '.join((given, *results))} |\n" in docs


def test_autocast_leaves_float64_alone():
    ours = fusedlstm.LSTM(5, 7).double()
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(torch.randn(4, 3, 5, dtype=torch.float64))[0].dtype == torch.float64


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_on_a_cpu(dtype, packed):
    """Outputs and every gradient in the dtype of the module, no less exact than stock's."""
    stock, ours = pair(5, 19, 2, bidirectional=True)
    lengths = torch.tensor([6, 3, 1])
    x, grads = torch.randn(6, 3, 5), None
    found = []
    for module, to in (
        (ours.to(dtype), dtype),
        (stock.to(dtype), dtype),
        (copy.deepcopy(stock).double(), torch.float64),
    ):
        input = x.to(dtype).to(to).requires_grad_()
        output, (h_n, c_n) = module(pack_padded_sequence(input, lengths) if packed else input)
        results = [output.data if packed else output, h_n, c_n]
        assert all(y.dtype == to for y in results)
        grads = grads or [torch.randn_like(y) for y in results]
        torch.autograd.backward(results, [g.to(to) for g in grads])
        found.append([*results, input.grad, *(p.grad for p in module.parameters())])
    for k, (a, b, c) in enumerate(zip(*found, strict=True)):
        assert a.dtype == dtype
        assert_accurate(f"tensor {k}", a.detach(), b.detach(), c.detach())


def test_float16_on_a_cpu_computes_in_float32(monkeypatch):
    """ATen has only slow code for it."""
    seen = []
    stack = torch._VF.lstm
    monkeypatch.setattr(
        torch._VF, "lstm", lambda input, *rest: seen.append(input.dtype) or stack(input, *rest), raising=False
    )
    fusedlstm.LSTM(5, 7).half()(torch.randn(4, 3, 5).half())
    assert seen == [torch.float32]


def test_functional_is_the_module():
    _, ours = pair(5, 7, 2, bidirectional=True)
    x, zeros = torch.randn(4, 3, 5), torch.zeros(4, 3, 7)
    spec = functional.Spec(cells.CELLS["lstm"], num_layers=2, bidirectional=True)
    output, (h_n, c_n), _ = functional.run(spec, x, (zeros, zeros), ours._flat_weights)
    expected, (h, c) = ours(x)
    assert torch.equal(output, expected) and torch.equal(h_n, h) and torch.equal(c_n, c)


def twice(module, x):
    """The same module on its own output, from a state that is made of its input."""
    output, state = module(x, x.mean(0, keepdim=True))
    return module(output, state)[0]


@pytest.mark.parametrize("T", [3, 40])  # ATen's loop, and ours
@pytest.mark.parametrize("batched", [False, True])
def test_differentiable_gradients_count_each_path_once(T, batched):
    """Inputs that are made of one another, and hooks of parameters, which are called once."""
    ours, stock = fusedlstm.GRU(3, 3).double(), nn.GRU(3, 3).double()
    stock.load_state_dict(ours.state_dict())
    x, found, calls = torch.randn(T, 2, 3, dtype=torch.float64, requires_grad=True), [], []
    for module in (ours, stock):
        count = []
        module.weight_hh_l0.register_hook(lambda grad, count=count: count.append(1))
        y, inputs = twice(module, x).sin().sum(), [x, *module.parameters()]
        if batched and module is ours:
            firsts = torch.autograd.grad(y, inputs, torch.ones(1, dtype=torch.float64), is_grads_batched=True)
            found.append([g[0] for g in firsts])
            continue
        firsts = torch.autograd.grad(y, inputs, create_graph=True)
        calls.append(len(count))
        found.append([*firsts, *(() if batched else torch.autograd.grad(sum(g.sin().sum() for g in firsts), inputs))])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)
    assert len(set(calls)) == 1


@pytest.mark.parametrize("save", ["gates", "states"])
@pytest.mark.parametrize("layer", [fusedlstm.GRU, fusedlstm.LayerNormLSTM, fusedlstm.LayerNormGRU])
def test_checkpoints_of_our_loops(layer, save):
    module, x = layer(3, 4, save=save), torch.randn(40, 2, 3, requires_grad=True)
    output = torch.utils.checkpoint.checkpoint(lambda x: module(x)[0], x, use_reentrant=False)
    found = torch.autograd.grad(output.sin().sum(), [x, *module.parameters()])
    expected = torch.autograd.grad(module(x)[0].sin().sum(), [x, *module.parameters()])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("name", "G"), [("LSTM", 4), ("GRU", 3), ("RNN", 1), ("PeepholeLSTM", 4)])
@pytest.mark.parametrize("heads", [1, 3])
def test_operations_are_counted(name, G, heads):
    """By torch's counter; in the backward but for one sum of products in place, which torch itself does not count."""
    T, B, I, H = 40, 3, 5, 6
    module = getattr(fusedlstm, name)(I, H, backend="torch", num_heads=heads)
    with FlopCounterMode(display=False) as forward:
        output, _ = module(torch.randn(T, B, I, requires_grad=True))
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    own, recurrent = 2 * T * B * G * H * I, 2 * T * B * G * H * (H // heads)
    assert forward.get_total_flops() == own + recurrent
    assert 2 * own + recurrent < backward.get_total_flops() <= 2 * (own + recurrent)


@pytest.mark.parametrize(("name", "cell"), [("LSTM", "lstm"), ("GRU", "gru"), ("RNN", "rnn_tanh"), ("SLSTM", "slstm")])
def test_a_profile_names_cell_and_pass(name, cell):
    module = getattr(fusedlstm, name)(3, 4, num_layers=2, grad_clip=1.0, backend="torch")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        module(torch.randn(5, 2, 3))[0].sum().backward()
    found = {event.key: event.count for event in profile.key_averages() if event.key.startswith("fusedlstm::")}
    ops = {"fusedlstm::recurrence_fwd": 2, "fusedlstm::recurrence_bwd": 2}
    assert found == {f"fusedlstm::{cell}_layer": 2, f"fusedlstm::{cell}_layerBackward": 2} | ops
