"""Exported layers run in ONNX Runtime with our numbers, and nodes of ONNX models become layers."""

import collections
import copy
import itertools
import sys
from typing import NamedTuple

import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils import _pytree

import fusedlstm
from fusedlstm.cells import CELLS
from support import assert_accurate

I, H = 5, 16
STANDARD = ("LSTM", "GRU", "RNN")
ANY = torch.export.Dim.DYNAMIC
# T, B and the lengths: of an export's own sizes none, and of one sequence none, one or all steps.
SIZES = {"one step": (1, 1, [1]), "four sequences": (6, 4, [0, 6, 3, 1]), "two sequences": (9, 2, [9, 0])}


class Case(NamedTuple):
    """A layer and how it is called."""

    layer: nn.Module
    lengths: bool = False
    hx: bool = False
    resets: bool = False
    options: dict = {}  # noqa: RUF012 it is not changed

    def call(self, x, lengths, states, resets):
        layer, dtype = self.layer, next(self.layer.parameters()).dtype
        rows = layer.num_layers * (2 if layer.bidirectional else 1)
        x, states = x.to(dtype), states.to(dtype)
        options = dict(self.options)
        if layer.batch_first:
            x, resets = x.transpose(0, 1), resets.transpose(0, 1)
        if self.lengths:
            options["lengths"] = lengths
        if self.resets:
            options["resets"] = resets
        hx = None
        if self.hx:
            widths = [layer.proj_size or H] + [H] * CELLS[layer.cell].num_cell_states
            hx = tuple(states[k, :rows, :, :width] for k, width in enumerate(widths))
        return _pytree.tree_leaves(layer(x, hx[0] if hx and len(hx) == 1 else hx, **options))


class Model(nn.Module):
    """All cases in one, since most of an export's time does not depend on what is exported."""

    def __init__(self, cases: dict[str, Case]) -> None:
        super().__init__()
        self.cases = cases
        self.layers = nn.ModuleDict({name: case.layer for name, case in cases.items()})

    def forward(self, x, lengths, states, resets):
        return {name: case.call(x, lengths, states, resets) for name, case in self.cases.items()}

    def double(self):
        return Model({name: c._replace(layer=copy.deepcopy(c.layer).double()) for name, c in self.cases.items()})


def inputs(T: int, B: int, lengths: list[int]):
    states = torch.randn(4, 4, B, H)
    states[2] = states[2].abs() + 0.5  # n of an SLSTM is positive
    return torch.randn(T, B, I), torch.tensor(lengths), states, torch.rand(T, B) < 0.3


def exported(model: nn.Module, args: tuple, shapes: tuple) -> onnx.ModelProto:
    program = torch.onnx.export(model.eval(), args, dynamo=True, dynamic_shapes=shapes, verbose=False)
    onnx.checker.check_model(program.model_proto, full_check=True)
    return program.model_proto


def run(proto: onnx.ModelProto, *args) -> list[torch.Tensor]:
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    found = session.run(None, {name: x.numpy() for name, x in zip(names, args, strict=True)})
    return [torch.from_numpy(y) for y in found]


def operators(proto: onnx.ModelProto) -> collections.Counter:
    """How many nodes there are of each operator that is or can be a loop."""
    assert not proto.functions
    kinds = (*STANDARD, "Scan", "Loop", "If")
    return collections.Counter(node.op_type for node in proto.graph.node if node.op_type in kinds)


def standard_cases() -> dict[str, Case]:
    """Every member has six options with both values, and together they have every pair of two options' values."""
    makers = {
        "lstm": fusedlstm.LSTM,
        "gru": fusedlstm.GRU,
        "rnn": fusedlstm.RNN,
        "relu": lambda *a, **k: fusedlstm.RNN(*a, nonlinearity="relu", **k),
        "peephole": fusedlstm.PeepholeLSTM,
        "coupled": fusedlstm.CoupledLSTM,
        "before": fusedlstm.ResetBeforeGRU,
    }
    cases, settings = {}, []
    for k, (name, make) in enumerate(makers.items()):
        a, b, c = k % 2, k // 2 % 2, k // 4
        for flip in (0, 1):
            settings.append([value ^ flip for value in (a, b, c, a ^ b, b ^ c, a ^ b ^ c)])
            bidirectional, two_layers, bias, batch_first, hx, lengths = map(bool, settings[-1])
            options = {"bias": bias, "batch_first": batch_first, "bidirectional": bidirectional}
            cases[f"{name}_{flip}"] = Case(make(I, H, num_layers=1 + two_layers, **options), lengths, hx)
    for pair in itertools.combinations(range(6), 2):
        assert len({tuple(setting[k] for k in pair) for setting in settings}) == 4, pair
    left = {"padding_side": "left"}
    cases["left"] = Case(fusedlstm.LSTM(I, H), lengths=True, options=left)
    cases["wide"] = Case(fusedlstm.GRU(I, 100))  # torch's exporter does not fold so many weights
    cases["float16"] = Case(fusedlstm.GRU(I, H, bidirectional=True).half(), lengths=True)
    return cases


def scan_cases() -> dict[str, Case]:
    cells, every = {"return_cell_states": True}, {"return_states": True}
    layernorm = fusedlstm.LayerNormLSTM(I, H, num_layers=2)
    layernorm_gru = fusedlstm.LayerNormGRU(I, H, bidirectional=True)
    for parameter in (*layernorm.parameters(), *layernorm_gru.parameters()):
        nn.init.normal_(parameter)
    return {
        "layernorm": Case(layernorm, hx=True, options=every),
        "before": Case(fusedlstm.ResetBeforeGRU(I, H, bidirectional=True, num_heads=2), True, True, True),
        "layernorm_gru": Case(layernorm_gru, lengths=True, hx=True),
        "slstm": Case(fusedlstm.SLSTM(I, H, bidirectional=True), lengths=True, hx=True),
        "projection": Case(fusedlstm.LSTM(I, H, proj_size=2, bidirectional=True), lengths=True, hx=True),
        "heads": Case(fusedlstm.PeepholeLSTM(I, H, num_heads=2, batch_first=True), options=cells),
        "resets": Case(fusedlstm.GRU(I, H, bidirectional=True), True, True, True, every),
        "zoneout": Case(fusedlstm.GRU(I, H, zoneout=0.2, recurrent_dropout=0.5)),
        "float64": Case(fusedlstm.LSTM(I, H, dtype=torch.float64), hx=True),
    }


class Export(NamedTuple):
    model: Model
    exact: Model
    proto: onnx.ModelProto


def export_of(cases: dict[str, Case]) -> Export:
    model = Model(cases)
    model.eval()
    shapes = ({0: ANY, 1: ANY}, {0: ANY}, {2: ANY}, {0: ANY, 1: ANY})
    proto = exported(model, inputs(5, 3, [5, 0, 2]), shapes)
    return Export(model, model.double().eval(), proto)


def check(export: Export, size: str) -> None:
    args = inputs(*SIZES[size])
    with torch.no_grad():
        same, exact = export.model(*args), export.exact(*args)
    found = iter(run(export.proto, *args))
    for name in same:
        for k, (ours, expected) in enumerate(zip(same[name], exact[name], strict=True)):
            assert_accurate(f"{name} {k}", next(found), ours, expected)
    assert not [*found]


# One test for each export, because tests that share one may run in several processes.


def test_standard_operators_compute_the_layer():
    export = export_of(standard_cases())
    expected = collections.Counter()
    for name, case in export.model.cases.items():
        kind = {"gru": "GRU", "before": "GRU", "wide": "GRU", "float16": "GRU", "rnn": "RNN", "relu": "RNN"}.get(
            name.partition("_")[0]
        )
        expected[kind or "LSTM"] += case.layer.num_layers
    assert operators(export.proto) == expected
    for size in SIZES:
        check(export, size)
    check_loaded(export)


def check_loaded(export: Export) -> None:
    """Every node is loaded as a layer of the same class, with the same parameters to the last bit."""
    layers = iter(fusedlstm.onnx.load(export.proto).values())
    computed = {output for node in export.proto.graph.node for output in node.output}
    weights = [t for node in export.proto.graph.node if node.op_type in STANDARD for t in node.input[1:3]]
    assert computed & {*weights}, "no weight is left to compute, so the test shows less than it should"
    for case in export.model.cases.values():
        own = case.layer.state_dict()
        for k in range(case.layer.num_layers):
            found = next(layers)
            assert type(found) is type(case.layer) and found.cell == case.layer.cell
            assert (found.bidirectional, found.bias) == (case.layer.bidirectional, case.layer.bias)
            parameters = {name.replace("_l0", f"_l{k}"): value for name, value in found.state_dict().items()}
            assert parameters.keys() == {name for name in own if f"_l{k}" in name}
            for name, value in parameters.items():
                assert torch.equal(value, own[name]), name
    assert not [*layers]


def test_a_scan_computes_the_layer():
    export = export_of(scan_cases())
    assert operators(export.proto) == {"Scan": sum(case.layer.num_layers for case in export.model.cases.values())}
    for size in SIZES:
        check(export, size)


def test_a_whole_model():
    """Embedding, LSTM with lengths, a cell, and a head; from another example's sizes than it is called with."""

    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.lstm = nn.Embedding(10, I), fusedlstm.LSTM(I, H, bidirectional=True, batch_first=True)
            self.cell, self.head = fusedlstm.LSTMCell(2 * H, H), nn.Linear(H, 5)

        def forward(self, words, lengths):
            output, _ = self.lstm(self.embedding(words), lengths=lengths)
            h, _ = self.cell(output.sum(1))
            return self.head(h)

    model = Tagger()
    shapes = ({0: ANY, 1: ANY}, {0: ANY})
    proto = exported(model, (torch.randint(10, (3, 5)), torch.tensor([5, 2, 0])), shapes)
    assert operators(proto) == {"LSTM": 1}, "and the cell is plain operators"
    for T, B, lengths in SIZES.values():
        args = torch.randint(10, (B, T)), torch.tensor(lengths)
        with torch.no_grad():
            same, exact = model(*args), copy.deepcopy(model).double()(*args)
        assert_accurate("head", run(proto, *args)[0], same, exact)


class Packs(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = fusedlstm.LSTM(I, H)

    def forward(self, data, batch_sizes):
        return self.lstm(torch.nn.utils.rnn.PackedSequence(data, batch_sizes))[0].data


@pytest.mark.parametrize(
    ("model", "args", "text"),
    [
        (Packs(), pack_padded_sequence(torch.randn(5, 2, I), [5, 3])[:2], "got a PackedSequence"),
        (
            fusedlstm.GRU(I, H, weight_dropout=0.5, zoneout=0.1),
            (torch.randn(5, 2, I),),
            "expected eval() before torch.onnx.export, got training",
        ),
    ],
    ids=["packed", "noise of training"],
)
def test_what_cannot_be_exported_says_so(model, args, text):
    with pytest.raises(torch.onnx.errors.OnnxExporterError) as found:
        torch.onnx.export(model, args, dynamo=True, verbose=False)
    assert text in str(found.value.__cause__)


# Nodes of other makers.

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def node_model(
    operator: str, D: int = 1, without: tuple = (), peepholes: bool = False, **attributes
) -> onnx.ModelProto:
    """A model of one node with random weights. Its inputs are x, lengths and the initial states."""
    G, direction = GATES[operator], {"direction": "bidirectional"} if D == 2 else {}
    sizes = {"W": (D, G * H, I), "R": (D, G * H, H), "B": (D, 2 * G * H)} | ({"P": (D, 3 * H)} if peepholes else {})
    weights = {k: torch.randn(size) for k, size in sizes.items() if k not in without}
    states = ("initial_h", "initial_c") if operator == "LSTM" else ("initial_h",)
    names = ["X", "W", "R", "B" if "B" in weights else "", "sequence_lens", *states, *(["P"] if peepholes else [])]
    outputs = ["Y", "Y_h", "Y_c"][: len(states) + 1]
    node = helper.make_node(operator, names, outputs, "a node", hidden_size=H, **direction, **attributes)
    float_input = [helper.make_tensor_value_info(k, TensorProto.FLOAT, ["a", "b", "c"]) for k in ("X", *states)]
    lengths = helper.make_tensor_value_info("sequence_lens", TensorProto.INT32, ["B"])
    graph = helper.make_graph(
        [node],
        "graph",
        [float_input[0], lengths, *float_input[1:]],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, ["a", "b", "c", "d"])]
        + [helper.make_tensor_value_info(k, TensorProto.FLOAT, ["a", "b", "c"]) for k in outputs[1:]],
        [numpy_helper.from_array(x.numpy(), k) for k, x in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)


NODES = {
    "LSTM": ("LSTM", {}, fusedlstm.LSTM),
    "peepholes": ("LSTM", {"peepholes": True}, fusedlstm.PeepholeLSTM),
    "input_forget": ("LSTM", {"input_forget": 1}, fusedlstm.CoupledLSTM),
    "without bias": ("LSTM", {"without": ("B",)}, fusedlstm.LSTM),
    "GRU": ("GRU", {"linear_before_reset": 1}, fusedlstm.GRU),
    "GRU, reset before": ("GRU", {}, fusedlstm.ResetBeforeGRU),
    "tanh": ("RNN", {}, fusedlstm.RNN),
    "relu": ("RNN", {"activations": ["Relu"]}, fusedlstm.RNN),
}


@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("name", NODES)
def test_a_node_becomes_the_layer_that_computes_it(name, D, tmp_path):
    operator, options, cls = NODES[name]
    options = options | ({"activations": options["activations"] * D} if "activations" in options else {})
    proto = node_model(operator, D, **options)
    path = tmp_path / "model.onnx"
    onnx.save(proto, path)
    ((key, module),) = fusedlstm.onnx.load(path).items()
    assert key == "a node" and type(module) is cls
    x, lengths, states = torch.randn(6, 3, I), torch.tensor([6, 1, 4]), torch.randn(2, D, 3, H)
    states = states[: 2 if operator == "LSTM" else 1]
    with torch.no_grad():
        exact_module = copy.deepcopy(module).double()
        results = []
        for of, dtype in ((module, torch.float32), (exact_module, torch.float64)):
            hx = tuple(states.to(dtype))
            results.append(_pytree.tree_leaves(of(x.to(dtype), hx if len(hx) > 1 else hx[0], lengths=lengths)))
    Y, *finals = run(proto, x, lengths.int(), *states)
    for k, found in enumerate([Y.transpose(1, 2).flatten(2), *finals]):
        # ONNX Runtime is the one that is no part of this package, so its error is what is allowed twice.
        assert_accurate(f"result {k}", results[0][k], found, results[1][k])
        assert_accurate(f"result {k} of the node", found, results[0][k], results[1][k])


def test_layout_is_batch_first():
    proto = node_model("LSTM", layout=1)
    module = fusedlstm.onnx.load(proto.SerializeToString())["a node"]
    assert module.batch_first and not fusedlstm.onnx.load(node_model("LSTM", layout=0))["a node"].batch_first


def test_a_node_without_a_name_and_peepholes_that_are_zero():
    proto = node_model("LSTM", peepholes=True)
    proto.graph.node[0].name = ""
    (weights,) = [t for t in proto.graph.initializer if t.name == "P"]
    weights.CopyFrom(numpy_helper.from_array(torch.zeros(1, 3 * H).numpy(), "P"))
    ((key, module),) = fusedlstm.onnx.load(proto).items()
    assert key == "Y" and type(module) is fusedlstm.LSTM


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_keep_their_dtype(dtype):
    proto = node_model("RNN")
    weights = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in proto.graph.initializer}
    kind = {torch.float16: TensorProto.FLOAT16, torch.bfloat16: TensorProto.BFLOAT16}.get(dtype, TensorProto.DOUBLE)
    for tensor in proto.graph.initializer:
        array = numpy_helper.to_array(tensor)
        tensor.CopyFrom(helper.make_tensor(tensor.name, kind, array.shape, array.flatten().tolist()))
    (module,) = fusedlstm.onnx.load(proto).values()
    assert torch.equal(module.weight_hh_l0, weights["R"][0].to(dtype))


@pytest.mark.parametrize(
    ("operator", "options", "text"),
    [
        ("LSTM", {"direction": "reverse"}, "direction of LSTM to be forward or bidirectional, got reverse"),
        ("GRU", {"clip": 3.0, "linear_before_reset": 1}, "clip of GRU to be absent, got 3"),
        ("LSTM", {"activations": ["Sigmoid", "Tanh", "Relu"]}, r"to be ['Sigmoid', 'Tanh', 'Tanh'] in every direction"),
        ("RNN", {"D": 2, "activations": ["Tanh", "Relu"]}, "activations of RNN to be"),
        ("RNN", {"activations": ["Affine"]}, "got ['Affine']"),
        ("LSTM", {"input_forget": 1, "peepholes": True}, "input_forget of LSTM to be 0 with peepholes"),
        ("RNN", {"without": ("R",)}, "weights that follow from constants, got the model's input 'R'"),
    ],
)
def test_a_node_that_no_layer_computes_is_an_error(operator, options, text):
    with pytest.raises(ValueError) as found:
        fusedlstm.onnx.load(node_model(operator, **options))
    assert text in str(found.value) and str(found.value).startswith("a node: expected")


def test_wrong_models(monkeypatch):
    with pytest.raises(TypeError, match="model: expected a path, bytes or an onnx.ModelProto, got int"):
        fusedlstm.onnx.load(3)
    proto = node_model("RNN")
    proto.graph.node[0].op_type = "Identity"
    with pytest.raises(ValueError, match="model: expected a node LSTM, GRU or RNN in its graph, got none"):
        fusedlstm.onnx.load(proto)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ModuleNotFoundError, match="onnx is not installed: pip install"):
        fusedlstm.onnx.load("model.onnx")
