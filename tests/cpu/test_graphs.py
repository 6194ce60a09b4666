"""Graphs of modules, compiled, exported and traced: few, for any T and B, with the numbers and gradients of a call."""

import io

import pytest
import torch

import fusedlstm
from fusedlstm.cells import CELLS
from grids import grid

SIZES = ((5, 2), (6, 3), (33, 4), (40, 9), (3, 20))
CALLS = {
    "plain": {},
    "input has a gradient": {"input_grad": True},
    "bfloat16": {"dtype": torch.bfloat16},
    "autocast": {"autocast": True},
}


@grid(
    {
        "name": ["LSTM", "GRU", "RNN", "PeepholeLSTM", "CoupledLSTM", "LayerNormLSTM", "SLSTM", "LayerNormGRU"],
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

    module = getattr(fusedlstm, name)(3, 4).to(dtype)
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
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", "PeepholeLSTM", "LayerNormLSTM", "SLSTM", "LayerNormGRU"])
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


@pytest.mark.parametrize("strict", [False, True])
def test_exported_steps_of_the_specification(strict):
    """The steps that autograd differentiates are written out, so T is that of the export. The batch may vary."""
    module, B = fusedlstm.ResetBeforeGRU(3, 4, bidirectional=True).eval(), torch.export.Dim("B", min=2, max=64)
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
