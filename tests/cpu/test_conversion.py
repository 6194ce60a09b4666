"""conversion.py: the class changes and nothing else, in models that are built and in code that builds them."""

import copy
import functools
import inspect
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.nn import LSTM, LSTMCell
from torch.nn.modules.rnn import LSTM as RnnLSTM
from torch.nn.utils import parametrizations, parametrize, prune

import fusedlstm
from fusedlstm import conversion
from fusedlstm.conversion import PatchedLSTM, PatchedLSTMCell, Report, convert, patch_torch, restore


class Tagger(nn.Module):
    """Third-party style: the names are imported, the layers are built inside."""

    def __init__(self):
        super().__init__()
        self.lstm = LSTM(3, 4, num_layers=2, bidirectional=True, dropout=0.5)
        self.cell = LSTMCell(8, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        output, (h_n, c_n) = self.lstm(x)
        h, c = self.cell(output[-1])
        return self.head(h), c, h_n, c_n


class MyLSTM(nn.LSTM):
    def forward(self, input, hx=None):
        output, state = super().forward(input, hx)
        return 2 * output, state


class OurSubclass(fusedlstm.LSTM):
    pass


def seeded(make):
    torch.manual_seed(7)
    return make()


def report_of(change, model, **options):
    found, report = change(model, return_report=True, **options)
    assert found is model
    return report


def results(model, x):
    """Every output, and the gradient of every parameter and of the input."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(11)  # dropout
    outputs = [y for y in torch.utils._pytree.tree_leaves(model(x)) if isinstance(y, torch.Tensor)]
    sum(y.square().sum() for y in outputs).backward()
    return [*outputs, x.grad, *(p.grad for p in model.parameters())]


def assert_same_bits(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def assert_close(found, expected):
    """Of a graph, which trains by our loop and not by ATen's layers."""
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def attributes(model):
    """The `__dict__` of every module; containers are copied, what is in them is not."""
    return [{k: copy.copy(v) if isinstance(v, dict | list) else v for k, v in vars(m).items()} for m in model.modules()]


def assert_same_attributes(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert list(a) == list(b)
        for k in a:
            if isinstance(a[k], list):
                assert len(a[k]) == len(b[k]) and all(x is y for x, y in zip(a[k], b[k], strict=True))
            elif isinstance(a[k], dict):
                assert list(a[k]) == list(b[k]) and all(a[k][n] is b[k][n] for n in a[k])
            else:
                assert a[k] is b[k]


X = torch.linspace(-1, 1, 30).reshape(5, 2, 3)

LAYERS = {
    "plain": lambda: nn.LSTM(3, 4),
    "stack": lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True, dropout=0.5),
    "no bias, batch first": lambda: nn.LSTM(3, 4, bias=False, batch_first=True),
    "projection": lambda: nn.LSTM(3, 4, proj_size=2),
    "double": lambda: nn.LSTM(3, 4).double(),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
def test_the_same_bits(make):
    stock, model = seeded(make), seeded(make)
    x = X.to(stock.weight_ih_l0.dtype)
    before = results(model, x)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    assert report_of(convert, model) == Report({"": "torch.nn.LSTM -> fusedlstm.LSTM"}, {})
    assert type(model) is fusedlstm.LSTM
    assert list(model.state_dict()) == list(state)
    assert_same_bits(model.state_dict().values(), state.values())
    after = results(model, x)
    assert_same_bits(after, before)
    assert_same_bits(after, results(stock, x))


@pytest.mark.parametrize("model", [nn.Sequential(nn.LSTM(3, 4)), nn.LSTM(3, 4)], ids=["model", "layer"])
def test_what_is_returned(model):
    """The model itself, so that `model = convert(model)` reads as it does elsewhere."""
    for change in (convert, restore):
        assert change(model) is model
    assert type(next(m for m in model.modules() if not list(m.children()))) is nn.LSTM


def test_a_model():
    stock, model = seeded(Tagger), seeded(Tagger)
    parameters, objects = list(model.parameters()), list(model.modules())
    report = report_of(convert, model)
    assert report.replaced == {
        "lstm": "torch.nn.LSTM -> fusedlstm.LSTM",
        "cell": "torch.nn.LSTMCell -> fusedlstm.LSTMCell",
    }
    assert report.kept == {}
    assert all(a is b for a, b in zip(model.modules(), objects, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert type(model.lstm) is fusedlstm.LSTM and type(model.cell) is fusedlstm.LSTMCell
    assert repr(model) == repr(stock)
    assert_same_bits(results(model, X), results(stock, X))
    stock.load_state_dict(model.state_dict())
    packed = nn.utils.rnn.pack_padded_sequence(X, [5, 3])
    torch.testing.assert_close(model.lstm.eval()(packed)[0].data, stock.lstm.eval()(packed)[0].data)


FAMILY = {
    "GRU": lambda: nn.GRU(3, 4, num_layers=2, bidirectional=True, dropout=0.5, batch_first=True),
    "RNN": lambda: nn.RNN(3, 4, 2, "relu", False),
    "GRUCell": lambda: nn.GRUCell(3, 4),
    "RNNCell": lambda: nn.RNNCell(3, 4, nonlinearity="relu"),
    "normed GRU": lambda: parametrizations.weight_norm(nn.GRU(3, 4), "weight_hh_l0"),
}


@pytest.mark.parametrize("make", FAMILY.values(), ids=FAMILY)
def test_the_family(make):
    """Converted, patched and restored: the numbers of torch's, and after the way back its object."""
    x = X if "Cell" not in type(make()).__name__ else X[0]
    stock, model = seeded(make), seeded(make)
    before = attributes(model)
    with patch_torch(backend="reference"):
        patched = seeded(make)
    name = type(stock).__name__.removeprefix("Parametrized")
    assert isinstance(patched, getattr(nn, name)) and isinstance(patched, getattr(fusedlstm, name))
    expected = results(stock, x)
    for ours in (model, patched):
        stands_for = parametrize.type_before_parametrizations(ours).__name__
        change = "torch.nn." if ours is model else "fusedlstm.conversion."
        assert report_of(convert, ours).replaced == {"": f"{change}{stands_for} -> fusedlstm.{name}"}
        for backend in ("auto", "reference"):
            ours.backend = backend
            for a, b in zip(results(ours, x), expected, strict=True):
                torch.testing.assert_close(a, b)
        assert report_of(restore, ours).replaced == {"": f"fusedlstm.{name} -> torch.nn.{name}"}
        assert_same_bits(results(ours, x), expected)
    if not parametrize.is_parametrized(model):  # else the weights are computed, and others each time
        assert_same_attributes(attributes(model), before)


def test_what_torch_has_not_is_not_restored():
    model = nn.Sequential(fusedlstm.LSTM(3, 4, grad_clip=1.0), fusedlstm.LSTM(3, 4))
    report = report_of(restore, model)
    assert report.kept == {"0": "torch.nn has no grad_clip"} and list(report.replaced) == ["1"]
    assert type(model[0]) is fusedlstm.LSTM and not hasattr(model[1], "grad_clip")


def test_the_backend_is_set_and_used():
    model = Tagger()
    expected = model.eval()(X)
    convert(model, backend="reference")
    assert model.lstm.backend == model.cell.backend == "reference"
    for a, b in zip(model(X), expected, strict=True):
        torch.testing.assert_close(a, b)
    model = nn.LSTM(3, 4)
    convert(model, backend="triton")
    with pytest.raises(RuntimeError, match="backend='triton' cannot serve this call"):
        model(X)


@pytest.mark.parametrize("train", [True, False])
def test_the_training_flag_stays(train):
    model = Tagger().train(train)
    convert(model)
    assert model.lstm.training is model.cell.training is train
    assert torch.equal(model(X)[0], model(X)[0]) is not train  # dropout


def test_an_optimizer_goes_on():
    """Momentum that was gathered before stays, and the steps are those of a model that was not converted."""
    pair = [seeded(Tagger), seeded(Tagger)]
    optimizers = [torch.optim.Adam(model.parameters(), lr=0.1) for model in pair]
    for step in range(4):
        for model, optimizer in zip(pair, optimizers, strict=True):
            results(model, X)
            optimizer.step()
        if step == 1:
            convert(pair[1])
    assert optimizers[1].param_groups[0]["params"][0] is pair[1].lstm.weight_ih_l0
    assert_same_bits(pair[1].parameters(), pair[0].parameters())


def test_hooks_fire():
    model = Tagger()
    fired = []
    model.lstm.register_forward_pre_hook(lambda module, args: fired.append("before"))
    model.lstm.register_forward_hook(lambda module, args, output: fired.append("after"))
    model.cell.register_full_backward_hook(lambda module, *grads: fired.append("backward"))
    model.lstm.weight_hh_l0.register_hook(lambda grad: fired.append("grad"))
    convert(model)
    results(model, X)
    assert fired == ["before", "after", "backward", "grad"]


def test_buffers_dtype_and_moves():
    model = nn.LSTM(3, 4)
    model.register_buffer("seen", torch.ones(2))
    model.note = "mine"
    convert(model)
    model.double()
    assert model.seen.dtype == torch.double and model.note == "mine"
    assert model(X.double())[0].dtype == torch.double
    assert model._flat_weights[0] is model.weight_ih_l0


def test_shared_modules_and_tied_weights():
    lstm = nn.LSTM(3, 3)
    other = nn.LSTM(3, 3)
    other.weight_hh_l0 = lstm.weight_hh_l0
    model = nn.ModuleDict({"first": lstm, "second": lstm, "tied": other})
    assert list(report_of(convert, model).replaced) == ["first", "tied"]
    assert model["first"] is model["second"] is lstm
    assert type(lstm) is type(other) is fusedlstm.LSTM
    assert other.weight_hh_l0 is lstm.weight_hh_l0
    (lstm(X)[0].sum() + other(X)[0].sum()).backward()
    assert len(list(model.parameters())) == 7


def pruned(lstm):
    prune.l1_unstructured(lstm, "weight_hh_l0", amount=0.5)
    return lstm


REWRITTEN = {
    "pruned": pruned,
    "old weight norm": lambda lstm: nn.utils.weight_norm(lstm, "weight_hh_l0"),
    "old spectral norm": lambda lstm: nn.utils.spectral_norm(lstm, "weight_hh_l0"),
    "weight norm": lambda lstm: parametrizations.weight_norm(lstm, "weight_hh_l0"),
    "spectral norm": lambda lstm: parametrizations.spectral_norm(lstm, "weight_ih_l0"),
    "two parametrizations": lambda lstm: parametrizations.weight_norm(
        parametrizations.orthogonal(lstm, "weight_ih_l0"), "weight_hh_l0"
    ),
}


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"])
def test_instances_of_both(name):
    """For libraries that ask for the class of torch.nn."""
    pair = [seeded(lambda: nn.Sequential(getattr(nn, name)(3, 4))) for _ in range(2)]
    report = report_of(functools.partial(convert, keep_isinstance=True), pair[1])
    assert report.replaced == {"0": f"torch.nn.{name} -> fusedlstm.conversion.Patched{name}"}
    assert isinstance(pair[1][0], getattr(nn, name)) and isinstance(pair[1][0], getattr(fusedlstm, name))
    x = torch.randn(5, 3)
    assert_same_bits(results(pair[1], x), results(pair[0], x))
    assert report_of(functools.partial(convert, keep_isinstance=True), pair[1]).kept == {"0": "already fusedlstm"}
    assert report_of(convert, pair[1]).replaced == {"0": f"fusedlstm.conversion.Patched{name} -> fusedlstm.{name}"}
    assert type(pair[1][0]) is getattr(fusedlstm, name)
    convert(pair[1], keep_isinstance=True)
    assert report_of(restore, pair[1]).replaced == {"0": f"fusedlstm.conversion.Patched{name} -> torch.nn.{name}"}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("rewrite", REWRITTEN.values(), ids=REWRITTEN.keys())
def test_weights_that_are_computed(rewrite):
    """Two steps of training, so that what the weights are computed from is seen to change; then the way back."""
    pair = [seeded(lambda: nn.Sequential(rewrite(nn.LSTM(3, 4)))) for _ in range(2)]
    assert report_of(convert, pair[1]).replaced == {"0": "torch.nn.LSTM -> fusedlstm.LSTM"}
    assert isinstance(pair[1][0], fusedlstm.LSTM) and not isinstance(pair[1][0], nn.LSTM)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in pair]
    for _ in range(2):
        assert_same_bits(results(pair[1], X), results(pair[0], X))
        for optimizer in optimizers:
            optimizer.step()
    assert_same_bits(pair[1].state_dict().values(), pair[0].state_dict().values())
    assert report_of(restore, pair[1]).replaced == {"0": "fusedlstm.LSTM -> torch.nn.LSTM"}
    assert not isinstance(pair[1][0], fusedlstm.LSTM)
    assert_same_bits(results(pair[1], X), results(pair[0], X))


def test_pruning_ends():
    lstm = pruned(nn.LSTM(3, 4))
    mask = lstm.weight_hh_l0_mask
    convert(lstm)
    prune.remove(lstm, "weight_hh_l0")
    assert isinstance(lstm.weight_hh_l0, nn.Parameter) and (lstm.weight_hh_l0[mask == 0] == 0).all()
    assert len(results(lstm, X)) == 8


@pytest.mark.parametrize("patched", [False, True], ids=["stock", "patched"])
def test_parametrizations_are_removed_and_added(patched):
    def make():
        return parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0")

    stock = seeded(make)
    if patched:
        with patch_torch():
            model = seeded(make)
        assert parametrize.type_before_parametrizations(model) is PatchedLSTM
    else:
        model = seeded(make)
    neighbour = copy.deepcopy(model)  # shares the class that parametrize made
    convert(model)
    assert type(model).__name__ == "ParametrizedLSTM"
    assert parametrize.type_before_parametrizations(model) is fusedlstm.LSTM
    with pytest.raises(RuntimeError, match="Serialization of parametrized modules"):
        pickle.dumps(model)
    assert_same_bits(copy.deepcopy(model)(X)[0], stock(X)[0])
    for module in (stock, model):
        parametrizations.weight_norm(module, "weight_ih_l0")
    assert_same_bits(results(model, X), results(stock, X))
    for name in ("weight_hh_l0", "weight_ih_l0"):
        for module in (stock, model):
            parametrize.remove_parametrizations(module, name)
    assert type(model) is fusedlstm.LSTM and not hasattr(model, "parametrizations")
    assert_same_bits(results(model, X), results(stock, X))
    neighbour(X)
    parametrize.remove_parametrizations(neighbour, "weight_hh_l0")
    assert type(neighbour) is (PatchedLSTM if patched else nn.LSTM)


def test_restored_parametrizations_are_removed():
    model = parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0")
    expected = model(X)[0]
    convert(model)
    restore(model)
    assert parametrize.type_before_parametrizations(model) is nn.LSTM
    parametrize.remove_parametrizations(model, "weight_hh_l0")
    assert type(model) is nn.LSTM
    assert torch.equal(model(X)[0], expected)


def test_copies_and_files(tmp_path):
    stock, model = seeded(Tagger).eval(), seeded(Tagger).eval()
    convert(model, backend="torch")
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert type(other.lstm) is fusedlstm.LSTM and type(other.cell) is fusedlstm.LSTMCell
        assert other.lstm.backend == "torch"
        assert_same_bits(results(other, X), results(stock, X))


def test_round_trip():
    model = pruned(nn.LSTM(3, 4, bidirectional=True))
    model = nn.ModuleDict({"layer": model, "inner": Tagger(), "gru": nn.GRU(3, 4)})
    before = attributes(model)
    assert len(report_of(convert, model).replaced) == 4
    report = report_of(restore, model)
    assert report.replaced == {
        "gru": "fusedlstm.GRU -> torch.nn.GRU",
        "layer": "fusedlstm.LSTM -> torch.nn.LSTM",
        "inner.lstm": "fusedlstm.LSTM -> torch.nn.LSTM",
        "inner.cell": "fusedlstm.LSTMCell -> torch.nn.LSTMCell",
    }
    assert report.kept == {}
    assert type(model["layer"]) is type(model["inner"].lstm) is nn.LSTM and type(model["inner"].cell) is nn.LSTMCell
    assert_same_attributes(attributes(model), before)
    assert str(report_of(restore, model)) == "nothing to replace"


def test_restored_modules_are_scripted():
    """TorchScript wants torch.nn.LSTM itself; built with ours or converted is the same."""
    model = nn.Sequential(fusedlstm.LSTM(3, 4))
    expected = model(X)[0]
    restore(model)
    assert torch.equal(torch.jit.script(model)(X)[0], expected)


def test_what_is_kept():
    model = nn.ModuleDict(
        {
            "mine": MyLSTM(3, 4),
            "base": nn.RNNBase("GRU", 3, 4),
            "normed_mine": parametrizations.weight_norm(MyLSTM(3, 4), "weight_hh_l0"),
            "ours": fusedlstm.LSTM(3, 4),
            "our_variant": fusedlstm.PeepholeLSTM(3, 4),
            "our_subclass": OurSubclass(3, 4),
            "scripted": torch.jit.script(nn.Sequential(nn.LSTM(3, 4))),
            "quantized": torch.ao.nn.quantized.dynamic.LSTM(3, 4),
            "quantizable": torch.ao.nn.quantizable.LSTMCell(3, 4),
            "linear": nn.Linear(3, 4),
        }
    )
    types = [type(m) for m in model.modules()]
    expected = model["mine"](X)[0]
    report = report_of(convert, model)
    assert report.replaced == {}
    assert report.kept == {
        "mine": "a subclass, MyLSTM, with code of its own",
        "base": "torch.nn.RNNBase has no counterpart here",
        "normed_mine": "a subclass, MyLSTM, with code of its own",
        "ours": "already fusedlstm",
        "our_variant": "already fusedlstm",
        "our_subclass": "already fusedlstm",
        "scripted.0": "a ScriptModule: convert before scripting",
        "quantized": "torch.ao.nn.quantized.dynamic.LSTM: quantized, or prepared for it",
        "quantizable": "torch.ao.nn.quantizable.LSTMCell: quantized, or prepared for it",
    }
    assert [type(m) for m in model.modules()] == types
    assert torch.equal(model["mine"](X)[0], expected)
    assert report_of(restore, model) == Report(
        {"ours": "fusedlstm.LSTM -> torch.nn.LSTM"},
        {
            "our_variant": "torch.nn has no PeepholeLSTM",
            "our_subclass": "a subclass, OurSubclass, with code of its own",
        },
    )


def test_a_forward_that_was_replaced_is_kept():
    """The old forward is bound to the old class: the new class would never be reached, or be wrong."""
    ours, stock = fusedlstm.LSTM(3, 4), nn.LSTM(3, 4)
    for module in (ours, stock):
        forward = module.forward
        module.forward = lambda *args, forward=forward: forward(*args)
    why = {"": "its forward was replaced on the object"}
    assert report_of(convert, stock).kept == report_of(restore, ours).kept == why
    assert type(stock) is nn.LSTM and type(ours) is fusedlstm.LSTM
    stock(X)
    ours(X)


def test_the_text_of_a_report():
    model = nn.Sequential(nn.LSTM(3, 4), MyLSTM(3, 4), nn.Linear(3, 4))
    report = report_of(convert, model)
    assert str(report) == "0: torch.nn.LSTM -> fusedlstm.LSTM\n1: kept, a subclass, MyLSTM, with code of its own"
    assert str(report_of(convert, nn.LSTM(3, 4))) == "(model): torch.nn.LSTM -> fusedlstm.LSTM"
    assert str(report_of(convert, fusedlstm.LSTM(3, 4))) == "(model): kept, already fusedlstm"
    assert str(report_of(convert, nn.Linear(3, 4))) == "nothing to replace"
    with pytest.raises(AttributeError):
        report.replaced = {}


def test_wrong_arguments():
    model = nn.LSTM(3, 4)
    for function in (convert, restore):
        with pytest.raises(TypeError, match=r"^model: expected a torch.nn.Module, got list$"):
            function([model])
    with pytest.raises(ValueError, match="backend: expected one of auto, triton, torch, reference, got 'cudnn'"):
        convert(model, backend="cudnn")
    with pytest.raises(ValueError, match="backend: expected one of .*, got 'cudnn'"), patch_torch(backend="cudnn"):
        pass
    assert type(model) is type(nn.LSTM(3, 4)) is nn.LSTM


def test_wrappers_are_walked_into():
    model = nn.DataParallel(Tagger())
    assert list(report_of(convert, model).replaced) == ["module.lstm", "module.cell"]


# torch.compile


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


@pytest.fixture
def graphs():
    """A list that gets the targets of every graph which `compiled` hands over."""
    torch.compiler.reset()
    yield []
    torch.compiler.reset()


def recording(graphs):
    def backend(graph, example_inputs):
        graphs.append([node.target for node in graph.graph.nodes])
        return graph

    return backend


def has_head(targets):
    return torch._C._nn.linear in targets


def test_a_converted_model_compiles_without_a_graph_break(graphs):
    model = seeded(Small)
    expected = results(model, X)
    convert(model)
    assert_close(results(torch.compile(model, backend="eager", fullgraph=True), X), expected)
    torch.compiler.reset()
    assert_close(results(torch.compile(model, backend=recording(graphs), fullgraph=True), X), expected)
    assert len(graphs) == 1 and has_head(graphs[0])


@pytest.mark.parametrize("how", ["wrapper", "in place"])
def test_a_model_that_ran_compiled(graphs, how):
    """Dynamo guards on the class, so the results are ours. It compiles the frame of nn.LSTM again only after reset."""
    model = seeded(Small)
    if how == "wrapper":
        compiled = torch.compile(model, backend=recording(graphs))
    else:
        model.compile(backend=recording(graphs))
        compiled = model
    expected = results(compiled, X)
    assert not any(has_head(g) for g in graphs)
    name = "_orig_mod.lstm" if how == "wrapper" else "lstm"
    assert report_of(convert, compiled) == Report(
        {
            name: "torch.nn.LSTM -> fusedlstm.LSTM; "
            "if it ran compiled before, torch.compiler.reset() lets Dynamo look again"
        },
        {},
    )
    for reset in (False, True):
        if reset:
            torch.compiler.reset()
        graphs.clear()
        assert_close(results(compiled, X), expected)
        assert len(graphs) == 1 and has_head(graphs[0]) is reset
    model.lstm.backend = "reference"
    graphs.clear()
    assert_close(results(compiled, X), expected)
    assert len(graphs) == 1
    restore(compiled)
    graphs.clear()
    assert_same_bits(results(compiled, X), expected)
    assert not any(has_head(g) for g in graphs)


def test_a_wrapper_that_has_not_run(graphs):
    compiled = torch.compile(seeded(Small), backend=recording(graphs), fullgraph=True)
    convert(compiled)
    compiled(X)
    assert len(graphs) == 1 and has_head(graphs[0])


def test_a_neighbour_of_a_compiled_layer_needs_no_reset():
    """Though its name begins with that of the compiled one."""
    model = nn.ModuleDict({"layer": nn.LSTM(3, 4), "layer2": nn.LSTM(3, 4)})
    model["layer"].compile()
    replaced = report_of(convert, model).replaced
    assert "torch.compiler.reset()" in replaced["layer"] and "torch.compiler.reset()" not in replaced["layer2"]


def test_patched_models_compile_after_convert(graphs):
    """What patch_torch builds is a torch.nn.LSTM, at which Dynamo stops."""
    with patch_torch():
        model = seeded(Small)
    expected = model(X)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="LSTM"):
        torch.compile(model, backend="eager", fullgraph=True)(X)
    assert report_of(convert, model).replaced == {"lstm": "fusedlstm.conversion.PatchedLSTM -> fusedlstm.LSTM"}
    torch.compiler.reset()
    assert_close([torch.compile(model, backend="eager", fullgraph=True)(X)], [expected])


# patch_torch


def torch_classes():
    return [{k: v for k, v in vars(cls).items() if k != "__annotations__"} for cls in conversion.CLASSES]  # lazy


@pytest.fixture(autouse=True)
def torch_is_left_as_it_was():
    before = torch_classes()
    yield
    assert torch_classes() == before
    assert type(nn.LSTM(3, 4, 2)) is nn.LSTM and type(nn.LSTMCell(3, bias=False, hidden_size=4)) is nn.LSTMCell
    assert conversion._entered == {}


FORMS = {
    "nn.": lambda: nn.LSTM,
    "torch.nn.": lambda: torch.nn.LSTM,
    "from torch.nn": lambda: LSTM,
    "from torch.nn.modules.rnn": lambda: RnnLSTM,
    "torch.nn.modules.": lambda: torch.nn.modules.LSTM,
    "getattr": lambda: getattr(torch.nn, "LST" + "M"),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_patch_reaches_every_import(form):
    stock = seeded(lambda: form()(3, 4, num_layers=2, bidirectional=True))
    with patch_torch():
        model = seeded(lambda: form()(3, 4, num_layers=2, bidirectional=True))
    assert type(model) is PatchedLSTM
    assert isinstance(model, nn.LSTM) and isinstance(model, fusedlstm.LSTM)
    assert_same_bits(model.parameters(), stock.parameters())
    assert_same_bits(results(model, X), results(stock, X))


def test_patch_reaches_a_third_party_model():
    stock = seeded(Tagger)
    with patch_torch():
        model = seeded(Tagger)
    assert type(model.lstm) is PatchedLSTM and type(model.cell) is PatchedLSTMCell
    assert isinstance(model.cell, nn.LSTMCell) and isinstance(model.cell, fusedlstm.LSTMCell)
    assert_same_bits(results(model, X), results(stock, X))
    assert type(model.cell)(3, 4).backend == type(model.lstm)(3, 4).backend == "auto"
    assert report_of(convert, model, backend="torch").replaced == {
        "lstm": "fusedlstm.conversion.PatchedLSTM -> fusedlstm.LSTM",
        "cell": "fusedlstm.conversion.PatchedLSTMCell -> fusedlstm.LSTMCell",
    }
    assert type(model.lstm) is fusedlstm.LSTM and model.lstm.backend == "torch"
    assert_same_bits(results(model, X), results(stock, X))


def test_patched_models_are_restored():
    expected = attributes(seeded(Tagger))
    with patch_torch(backend="reference"):
        model = seeded(Tagger)
    assert report_of(restore, model).replaced == {
        "lstm": "fusedlstm.conversion.PatchedLSTM -> torch.nn.LSTM",
        "cell": "fusedlstm.conversion.PatchedLSTMCell -> torch.nn.LSTMCell",
    }
    assert type(model.lstm) is nn.LSTM
    assert [sorted(a) for a in attributes(model)] == [sorted(a) for a in expected]


def test_patch_leaves_subclasses_alone():
    with patch_torch():
        module = seeded(lambda: MyLSTM(3, 4))
    assert type(module) is MyLSTM and "backend" not in vars(module)
    assert torch.equal(module(X)[0], seeded(lambda: MyLSTM(3, 4))(X)[0])


def test_patch_and_the_backend():
    with patch_torch(backend="reference"):
        outer = Tagger()
        with patch_torch(backend="torch"):
            inner = Tagger()
        outer_again = Tagger()
    assert outer.lstm.backend == outer.cell.backend == outer_again.lstm.backend == "reference"
    assert inner.lstm.backend == inner.cell.backend == "torch"


def test_patch_nests_with_the_same_backend():
    with patch_torch():
        with patch_torch():
            pass
        assert type(nn.LSTM(3, 4)) is PatchedLSTM
    assert type(nn.LSTM(3, 4)) is nn.LSTM


def test_patches_leave_in_any_order():
    first, second = patch_torch(backend="torch"), patch_torch(backend="reference")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert nn.LSTM(3, 4).backend == "reference"
    second.__exit__(None, None, None)
    assert type(nn.LSTM(3, 4)) is nn.LSTM


def test_patch_is_for_every_thread():
    built = []
    with patch_torch(backend="reference"):
        thread = threading.Thread(target=lambda: built.append(nn.LSTM(3, 4)))
        thread.start()
        thread.join()
    assert type(built[0]) is PatchedLSTM and built[0].backend == "reference"


def test_an_exception_leaves_the_patch():
    with pytest.raises(ZeroDivisionError), patch_torch():
        raise ZeroDivisionError
    assert type(nn.LSTM(3, 4)) is nn.LSTM
    with patch_torch(), pytest.raises(ValueError, match="hidden_size must be greater than zero"):
        nn.LSTM(3, 0)


def test_patch_is_a_decorator():
    @patch_torch(backend="reference")
    def build():
        return nn.LSTM(3, 4)

    for _ in range(2):
        assert build().backend == "reference"
        assert type(nn.LSTM(3, 4)) is nn.LSTM


def test_copies_and_files_under_a_patch(tmp_path):
    """They stay what they are, inside and after."""
    stock = seeded(Tagger).eval()
    torch.save(stock, tmp_path / "stock.pt")
    with patch_torch(backend="torch"):
        patched = seeded(Tagger).eval()
        torch.save(patched, tmp_path / "patched.pt")
        models = [copy.deepcopy(stock), torch.load(tmp_path / "stock.pt", weights_only=False)]
        copies = [copy.deepcopy(patched), torch.load(tmp_path / "patched.pt", weights_only=False)]
    copies += [pickle.loads(pickle.dumps(patched)), torch.load(tmp_path / "patched.pt", weights_only=False)]
    assert all(type(m.lstm) is nn.LSTM and type(m.cell) is nn.LSTMCell for m in models)
    assert all(type(m.lstm) is PatchedLSTM and m.cell.backend == "torch" for m in copies)
    for model in models + copies:
        assert_same_bits(results(model, X), results(stock, X))


def test_signatures_stay_under_a_patch():
    before = [inspect.signature(cls) for cls in conversion.CLASSES]
    with patch_torch():
        assert [inspect.signature(cls) for cls in conversion.CLASSES] == before
        cell = nn.utils.skip_init(nn.LSTMCell, 3, 4)  # reads the signature
    assert type(cell) is PatchedLSTMCell
