"""Graphs of modules, compiled, exported and traced: few, for any T and B, with the numbers and gradients of a call."""

import io
import subprocess
import sys

import features
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fusedlstm
from fusedlstm import autograd, ops, transforms
from fusedlstm.cells import CELLS
from fusedlstm.engines import aten
from grids import grid

RESETS = torch.rand(30, 3, generator=torch.Generator().manual_seed(0)) < 0.2


class Recorded(TorchDispatchMode):
    """The arguments of all calls of an op."""

    def __init__(self, op):
        super().__init__()
        self.op, self.seen = op, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is self.op:
            self.seen.append(args)
        return func(*args, **(kwargs or {}))


SIZES = ((5, 2), (33, 4), (3, 20))
CALLS = {
    "plain": {},
    "bfloat16": {"dtype": torch.bfloat16, "input_grad": True},
    "autocast": {"autocast": True, "input_grad": True, "bidirectional": True},
}


@grid(
    {
        "name": features.OURS,
        "training": {"training": True, "inference": False},
        "call": CALLS,
        "dynamic": {"sizes marked": True, "sizes seen": None},
    }
)
def test_two_graphs(name, training, call, dynamic):
    torch.compiler.reset()
    torch.manual_seed(0)
    dtype, graphs = call.get("dtype", torch.float32), []

    def counting(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    module = getattr(fusedlstm, name)(3, 4, bidirectional=call.get("bidirectional", False)).to(dtype)
    compiled = torch.compile(module, fullgraph=True, backend=counting, dynamic=dynamic)
    # Half precision differs by what the engines round: ATen's layers in bfloat16, and our loop in float32.
    close = (
        {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 and "autocast" not in call else {"rtol": 0, "atol": 0.1}
    )
    for T, B in SIZES:
        x = torch.randn(T, B, 3, dtype=dtype).requires_grad_(call.get("input_grad", False))
        found = []
        for of in (compiled, module):
            with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16, enabled="autocast" in call):
                output = of(x)[0]
            found.append([output.detach()])
            if training:
                leaves = [*module.parameters(), *([x] if x.requires_grad else [])]
                found[-1] += torch.autograd.grad(output.float().square().mean(), leaves)
        torch.testing.assert_close(*found, **close)
    assert len(graphs) <= 2


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("given", ["input", "hx", "lengths"])
@pytest.mark.parametrize("name", features.OURS)
def test_exported_for_any_sizes(name, given, strict):
    """Saved and loaded too. The strict way traces a backward if gradients are on."""
    module = getattr(fusedlstm, name)(3, 4).eval()

    def call(T, B):
        x, h = torch.randn(T, B, 3), torch.rand(len(CELLS[module.cell].states), 1, B, 4)
        hx = h[0] if len(h) == 1 else tuple(h)
        return {"input": x, "hx": hx, "lengths": torch.arange(B) % (T + 1)}

    def chosen(of):
        return {name: value for name, value in of.items() if name in ("input", given)}

    T, B = torch.export.Dim("T", min=2, max=100), torch.export.Dim("B", min=2, max=64)
    states = tuple({1: B} for _ in CELLS[module.cell].states)
    shapes = {"input": {0: T, 1: B}, "hx": states[0] if len(states) == 1 else states, "lengths": {0: B}}
    with torch.no_grad():
        program = torch.export.export(module, (), chosen(call(7, 5)), dynamic_shapes=chosen(shapes), strict=strict)
        torch.export.save(program, file := io.BytesIO())
        file.seek(0)
        program = torch.export.load(file)
        for size in ((7, 5), (2, 9), (40, 2)):
            arguments = chosen(call(*size))
            torch.testing.assert_close(program.module()(**arguments), module(**arguments))


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_exported_with_one_number_of_steps_needs_no_package(name):
    """ATen's layers serve it, which every process has; the batch may vary."""
    module = getattr(fusedlstm, name)(3, 4).eval()
    shapes = {"input": {1: torch.export.Dim("B", min=2, max=64)}}
    program = torch.export.export(module, (torch.randn(7, 5, 3),), dynamic_shapes=shapes)
    assert not [node for node in program.graph.nodes if "fusedlstm" in str(node.target)]
    x = torch.randn(7, 30, 3)
    torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.parametrize("sizes", ["fixed", "dynamic"])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", features.OURS)
def test_an_exported_program_has_gradients(name, strict, sizes):
    """torch.nn's has them too, for one T. A program that lost those of the layers below would be a trap."""
    below, own = torch.nn.Linear(3, 3), getattr(fusedlstm, name)(3, 4, bidirectional=True, num_layers=2)
    model, T = torch.nn.Sequential(below, own), torch.export.Dim("T", min=3)
    shapes = ({0: T, 1: torch.export.Dim("B", min=2)},) if sizes == "dynamic" else None
    program = torch.export.export(model, (torch.randn(5, 2, 3),), dynamic_shapes=shapes, strict=strict).module()
    x = torch.randn(*((9, 6) if sizes == "dynamic" else (5, 2)), 3)
    found = []
    for of in (program, model):
        output, states = of(x)
        states = states if isinstance(states, tuple) else (states,)
        total = sum(y.square().sum() for y in (output, *states))
        found.append(
            dict(zip(dict(of.named_parameters()), torch.autograd.grad(total, [*of.parameters()]), strict=True))
        )
    torch.testing.assert_close(*found)


def test_an_exported_program_clips_gradients_and_takes_lengths():
    module, T = fusedlstm.PeepholeLSTM(3, 4, grad_clip=0.01), torch.export.Dim("T", min=3)
    arguments = {"input": torch.randn(5, 2, 3), "lengths": torch.tensor([5, 2])}
    shapes = {"input": {0: T}, "lengths": None}
    program = torch.export.export(module, (), arguments, dynamic_shapes=shapes).module()
    arguments = {"input": torch.randn(8, 2, 3), "lengths": torch.tensor([3, 8])}
    found = [torch.autograd.grad(of(**arguments)[0].sum(), [*of.parameters()]) for of in (program, module)]
    torch.testing.assert_close(*found)


def test_a_program_exported_without_gradients_says_so():
    """A warning and no gradients would be a trap."""
    module = fusedlstm.PeepholeLSTM(3, 4)
    with torch.no_grad():
        program = torch.export.export(module, (torch.randn(5, 2, 3),)).module()
    with pytest.raises(RuntimeError, match="fusedlstm::recurrence_fwd: expected .* no gradient"):
        program(torch.randn(5, 2, 3))[0].sum().backward()


def test_the_first_call_of_an_op_does_not_import_dynamo():
    """That takes as long as to import torch."""
    source = """
import sys, torch
from fusedlstm import ops
h = torch.zeros(1, 2, 4)
ops.onednn_fwd(torch.ones(3, 2, 5), h, h, [torch.ones(16, 5), torch.ones(16, 4)], False)
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", source], check=True)


def test_dynamo_does_not_look_into_an_op():
    """It looks at whatever a function calls that it does not trace. What it would trace of oneDNN's layer is wrong."""
    frames, h = [], torch.zeros(1, 2, 4)
    given = (torch.ones(3, 2, 5), h, h, [torch.ones(16, 5), torch.ones(16, 4)], False)

    def backend(graph, inputs):
        frames.append(graph)
        return graph

    def run(x):
        for _ in range(2):  # a break in a loop leaves the whole function without a graph
            ops.onednn_fwd(x, *given[1:])
            torch._dynamo.graph_break()

    torch.compiler.reset()
    torch.compile(run, backend=backend)(given[0])
    assert not any("mkldnn" in str(node.target) for graph in frames for node in graph.graph.nodes)


CALLS_OF_THE_OP = {
    "dense": ({"bidirectional": True}, {}),
    "batch first": ({"batch_first": True}, {}),
    "lengths and resets": ({"grad_clip": 0.01}, {"lengths": torch.tensor([30, 0, 7]), "resets": RESETS}),
    "packed": ({"bidirectional": True}, {}),
    "cell states": ({"save": "states"}, {"return_states": True}),
    "blocks of steps": ({"save": "states"}, {}),
    "dropout of states": ({"recurrent_dropout": 0.2, "bidirectional": True}, {"lengths": torch.tensor([30, 1, 7])}),
}


@pytest.mark.parametrize("call", CALLS_OF_THE_OP)
@pytest.mark.parametrize("name", ["PeepholeLSTM", "GRU", "LayerNormLSTM", "SLSTM", "ResetBeforeGRU", "LayerNormGRU"])
def test_the_op_of_a_layer_passes_opcheck(name, call, monkeypatch):
    """What it tells a compiler of its results is true, and its gradients in a graph are those without one."""
    options, arguments = CALLS_OF_THE_OP[call]
    module, seen, apply = getattr(fusedlstm, name)(3, 4, backend="torch", **options), [], transforms.apply
    x = torch.randn(30, 100 if call == "blocks of steps" else 3, 3)
    x = x.transpose(0, 1) if options.get("batch_first") else x
    if call == "packed":
        x = torch.nn.utils.rnn.pack_padded_sequence(x, [5, 30, 7], enforce_sorted=False)

    def record(function, loop, *given, name=""):
        if function is autograd.LoopFunction:
            seen.append(autograd._as_op(loop, *given))
        return apply(function, loop, *given, name=name)

    monkeypatch.setattr(aten, "SHORTEST_LOOP", 1)
    monkeypatch.setattr(transforms, "apply", record)
    module(x, **arguments)
    monkeypatch.undo()
    (given,) = seen
    given[3][0].requires_grad_()
    torch.library.opcheck(autograd.layer_fwd, given)
    with Recorded(autograd.layer_bwd) as backward:
        sum(y.square().sum() for y in autograd.layer_fwd(*given)[:3]).backward()
    torch.library.opcheck(autograd.layer_bwd, *backward.seen, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("strict", [False, True])
def test_exported_steps_of_the_specification(strict):
    """The steps of the specification are written out, so T is that of the export. The batch may vary."""
    module, B = (
        fusedlstm.GRU(3, 4, bidirectional=True, backend="reference").eval(),
        torch.export.Dim("B", min=2, max=64),
    )
    arguments = {"input": torch.randn(4, 5, 3), "lengths": torch.tensor([4, 0, 2, 3, 1])}
    options = {"dynamic_shapes": {"input": {1: B}, "lengths": {0: B}}, "strict": strict}
    with torch.no_grad():
        torch.export.save(torch.export.export(module, (), arguments, **options), file := io.BytesIO())
        file.seek(0)
        program = torch.export.load(file)
        for size in (2, 30):
            arguments = {"input": torch.randn(4, size, 3), "lengths": torch.arange(size) % 5}
            torch.testing.assert_close(program.module()(**arguments), module(**arguments))
        options["dynamic_shapes"]["input"][0] = torch.export.Dim("T", min=2, max=100)
        with pytest.raises(torch._dynamo.exc.UserError, match="Constraints violated"):
            torch.export.export(module, (), arguments, **options)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "SLSTM"])
def test_symbolic_trace_takes_our_modules_whole(name):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.cell = getattr(fusedlstm, name)(3, 3), getattr(fusedlstm, f"{name}Cell")(3, 4)

        def forward(self, x, lengths):
            output, state = self.layer(x, lengths=lengths)
            again, _ = self.layer(output, state)
            return again, self.cell(again[-1])

    model, x, lengths = Model(), torch.randn(5, 2, 3), torch.tensor([5, 2])
    traced = torch.fx.symbolic_trace(model)
    calls = [(node.target, node.kwargs) for node in traced.graph.nodes if node.op == "call_module"]
    assert [target for target, _ in calls] == ["layer", "layer", "cell"] and [*calls[0][1]] == ["lengths"]
    torch.testing.assert_close(traced(x, lengths), model(x, lengths))


@grid(
    {
        "num_layers": [1, 2],
        "bidirectional": [False, True],
        "bias": [False, True],
        "batch_first": [False, True],
        "given_hx": [False, True],
        "uses": {"all": (0, 1, 2), "output": (0,), "c_n": (2,)},
        "copied": [False, True],
    }
)
def test_lstm_trains_by_onednn(num_layers, bidirectional, bias, batch_first, given_hx, uses, copied):
    """A compiled LSTM takes oneDNN's layer, as an eager one does.

    What oneDNN keeps for the backward is hidden in the storage of an empty tensor. A copy of that has nothing, and the
    backward computes it again.
    """
    options = {"bias": bias, "batch_first": batch_first, "bidirectional": bidirectional}
    trains_by_onednn(fusedlstm.LSTM(3, 5, num_layers, **options), given_hx, uses, copied, "aot_eager")


def test_a_forward_keeps_what_a_backward_needs(monkeypatch):
    computed, onednn = [], ops._onednn
    monkeypatch.setattr(ops, "_onednn", lambda *arguments: computed.append(arguments) or onednn(*arguments))
    trains_by_onednn(fusedlstm.LSTM(3, 5), False, (0, 1, 2), False, "aot_eager_decomp_partition")
    assert len(computed) == 2, "once for every call"


def trains_by_onednn(module, given_hx, uses, copied, backend):
    torch.compiler.reset()
    torch.manual_seed(0)
    rows, graphs = module.num_layers * (2 if module.bidirectional else 1), []

    def counting(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    compiled = torch.compile(module, fullgraph=True, backend=counting)
    for T, B in ((7, 4), (4, 2)):
        x = torch.randn((B, T, 3) if module.batch_first else (T, B, 3), requires_grad=True)
        hx = tuple(torch.randn(rows, B, 5, requires_grad=True) for _ in range(2)) if given_hx else None
        found = []
        for of in (compiled, module):
            with torch.autograd.graph.saved_tensors_hooks(_copy if copied else _same, _same):
                output, states = of(x, hx)
                results = [(output, *states)[k] for k in uses]
                loss = sum(y.sin().sum() for y in results)
            leaves = [x, *(hx or ()), *module.parameters()]
            found.append([*results, *torch.autograd.grad(loss, leaves, allow_unused=True)])
        torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)
    for graph in graphs:
        assert any("onednn_fwd" in str(m.graph) for m in graph.modules() if isinstance(m, torch.fx.GraphModule))


@grid(
    {
        "name": ["GRU", "RNN"],
        "num_layers": [1, 2],
        "bidirectional": [False, True],
        "bias": [False, True],
        "batch_first": [False, True],
        "dtype": [torch.float32, torch.float64],
        "dropout": [0.0, 0.5],
    }
)
def test_inference_by_aten(name, num_layers, bidirectional, bias, batch_first, dtype, dropout):
    """Without gradients ATen's loop is as fast as ours or faster, and a graph has it as one op."""
    torch.compiler.reset()
    dropout *= num_layers > 1
    options = {"bias": bias, "batch_first": batch_first, "bidirectional": bidirectional, "dropout": dropout}
    module = getattr(fusedlstm, name)(3, 5, num_layers, **options).to(dtype)
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(module, fullgraph=True, backend=counting, dynamic=True)
    for training in (False, True):
        module.train(training)
        for T, B in ((7, 4), (5, 3)):
            x = torch.randn((B, T, 3) if batch_first else (T, B, 3), dtype=dtype)
            found = []
            for of in (compiled, module):
                torch.manual_seed(T)
                with torch.no_grad():
                    found.append(of(x))
            if not (dropout and training):  # whose masks another engine draws in another order
                torch.testing.assert_close(*found)
    by_aten = ["aten_fwd" in str(graph.graph) for graph in graphs]
    assert by_aten == [True] * (len(graphs) - bool(dropout)) + [False] * bool(dropout)


def test_results_of_a_graph_may_change_in_place():
    """Those that torch.nn.LSTM lets change: the backward needs the output, and c for itself."""
    torch.compiler.reset()
    module, x = fusedlstm.LSTM(3, 4), torch.randn(5, 2, 3)
    found = []
    for of in (torch.compile(module, backend="aot_eager", fullgraph=True), module):
        output, (h, c) = of(x)
        loss = output.sin().sum() + h.mul_(2).sum() + c.mul_(3).sin().sum()
        found.append(torch.autograd.grad(loss, [*module.parameters()]))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
def test_dropout_between_layers(training, gradients):
    """Of all units, so that it does not matter in which order the masks are drawn."""
    torch.compiler.reset()
    module, x = fusedlstm.LSTM(3, 4, 2, dropout=1.0, bidirectional=True).train(training), torch.randn(5, 2, 3)
    with torch.set_grad_enabled(gradients):
        found = torch.compile(module, backend="aot_eager", fullgraph=True)(x)
        torch.testing.assert_close(found, module(x))
        assert torch.equal(found[0], module(torch.zeros_like(x))[0]) == training


@pytest.mark.parametrize("name", ["GRU", "RNN", "LSTM"])
def test_dropout_between_layers_of_complex_numbers(name):
    torch.compiler.reset()
    module, x = getattr(fusedlstm, name)(3, 4, 2, dropout=1.0, dtype=torch.complex64), torch.randn(5, 2, 3) + 0j
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(module, backend="aot_eager", fullgraph=True)(x), module(x))


@pytest.mark.parametrize("name", ["LSTM", "GRU", "PeepholeLSTM"])
@pytest.mark.parametrize("gradients", [True, False])
def test_an_empty_batch(name, gradients):
    """oneDNN's layer would end the process."""
    torch.compiler.reset()
    module, x = getattr(fusedlstm, name)(3, 4, bidirectional=True), torch.randn(5, 0, 3)
    with torch.set_grad_enabled(gradients):
        torch.testing.assert_close(torch.compile(module, backend="aot_eager", fullgraph=True)(x), module(x))


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_exported_dropout_between_layers(name):
    """torch's own rule for layers, which takes them apart, forgets it."""
    module, x = getattr(fusedlstm, name)(3, 4, 2, dropout=1.0).train(), torch.randn(5, 2, 3)
    with torch.no_grad():
        program = torch.export.export(module, (x,)).run_decompositions()
        torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.parametrize(("name", "row"), [("LSTM", "of a function with"), ("GRU", "(fullgraph=True)` of functions")])
def test_transforms_inside_of_a_graph(name, row):
    """torch loses the rules of ops and functions there: with ours, `jacrev` was wrong without an error."""
    (feature,) = (own for own in features.FEATURES if row in own)
    assert features.outcome(feature, features.COLUMNS[name]) == "yes"


def test_a_graph_stores_nothing_in_the_module():
    """What a transform makes of a parameter has no meaning after it."""
    module, x = fusedlstm.LSTM(3, 4), torch.randn(5, 2, 3)
    before = list(module._flat_weights)
    own = {name: p.detach() for name, p in module.named_parameters()}
    with torch.no_grad():
        torch.compile(lambda own: torch.func.functional_call(module, own, (x,)), backend="eager", fullgraph=True)(own)
    assert all(ours is same for ours, same in zip(module._flat_weights, before, strict=True))


def _copy(x):
    """With the strides that a graph was compiled for."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x)


def _same(x):
    return x


def test_a_constant_function_is_marked_as_torch_marks_it():
    def ours() -> None: ...

    def theirs() -> None: ...

    assert vars(transforms.constant(ours)) == vars(torch.compiler.assume_constant_result(theirs)) != {}
