"""`torch.compile(fullgraph=True)` on a GPU: one graph, custom ops and all, of everything that README says it takes."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fusedlstm
from fake_gpu import DEVICE

I, H, B, T = 10, 64, 4, 5
MEMBERS = {
    "LSTM": fusedlstm.LSTM,
    "GRU": fusedlstm.GRU,
    "RNN": fusedlstm.RNN,
    "PeepholeLSTM": fusedlstm.PeepholeLSTM,
    "CoupledLSTM": fusedlstm.CoupledLSTM,
    "LayerNormLSTM": fusedlstm.LayerNormLSTM,
    "SLSTM": fusedlstm.SLSTM,
}
CELLS = {
    "LSTMCell": fusedlstm.LSTMCell,
    "GRUCell": fusedlstm.GRUCell,
    "RNNCell": fusedlstm.RNNCell,
    "LayerNormLSTMCell": fusedlstm.LayerNormLSTMCell,
}
# Arguments of the constructor, tensors of the call, and steps.
VARIANTS = {
    "plain": ({}, (), T),
    "two layers": ({"num_layers": 2}, (), T),
    "bidirectional": ({"bidirectional": True}, (), T),
    "batch first": ({"batch_first": True}, (), T),
    "one step": ({"num_layers": 2}, (), 1),
    "states": ({"save": "states"}, (), 300),
    "grad_clip": ({"grad_clip": 1.0}, (), T),
    "lengths": ({"bidirectional": True}, ("lengths",), T),
    "resets": ({}, ("resets",), T),
    "lengths, resets": ({"num_layers": 2, "dropout": 0.5}, ("lengths", "resets"), T),
    "dropouts": ({"candidate_dropout": 0.1, "recurrent_dropout": 0.2, "weight_dropout": 0.3}, (), T),
}


@pytest.fixture(autouse=True)
def fake():
    torch.compiler.reset()
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def compiled(call, *args):
    """The graphs of a call, and what it returned."""
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    results = torch.compile(call, fullgraph=True, backend=keep)(*args)
    return graphs, results


def tensors(wanted: tuple, batch_first: bool, steps: int, training: bool, dtype) -> tuple:
    """Input, lengths and resets."""
    leading = (B, steps) if batch_first else (steps, B)
    x = torch.empty(*leading, I, device=DEVICE, dtype=dtype, requires_grad=training)
    lengths = torch.empty(B, device=DEVICE, dtype=torch.int64) if "lengths" in wanted else None
    resets = torch.empty(leading, device=DEVICE, dtype=torch.bool) if "resets" in wanted else None
    return x, lengths, resets


def check(module, training: bool, dtype, wanted: tuple = (), steps: int = T, autocast: bool = False) -> None:
    given = tensors(
        wanted, getattr(module, "batch_first", False), steps, training, torch.float32 if autocast else dtype
    )
    module.train(training)

    def call(x, lengths, resets):
        with torch.autocast("cuda", dtype=dtype, enabled=autocast), torch.set_grad_enabled(training):
            return module(x, lengths=lengths, resets=resets)

    graphs, (output, _) = compiled(call, *given)
    assert len(graphs) == 1
    assert "fusedlstm.recurrence_fwd" in _text(graphs[0]) or "fusedlstm.step_fwd" in _text(graphs[0])
    assert (output.device, output.dtype, output.requires_grad) == (DEVICE, dtype, training)


def _text(graph) -> str:
    return "\n".join(part.code for part in graph.modules() if isinstance(part, torch.fx.GraphModule))


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant, backend, training):
    given, wanted, steps = VARIANTS[variant]
    module = fusedlstm.LSTM(I, H, device=DEVICE, backend=backend, **given)
    check(module, training, torch.float32, wanted, steps)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("member", MEMBERS)
def test_members(member, backend, training):
    check(MEMBERS[member](I, H, device=DEVICE, backend=backend), training, torch.float32, ("lengths",))


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "of the weights"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, autocast, backend, training):
    module = fusedlstm.LSTM(I, H, device=DEVICE, backend=backend, dtype=None if autocast else dtype)
    check(module, training, dtype, autocast=autocast)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_projection_and_cell_states(backend, training):
    module = fusedlstm.LSTM(I, H, device=DEVICE, backend=backend, proj_size=16)
    x, *_ = tensors((), False, T, training, torch.float32)
    with torch.set_grad_enabled(training):
        graphs, (output, _, c_all) = compiled(lambda x: module(x, return_cell_states=True), x)
    assert len(graphs) == 1 and "fusedlstm.recurrence_fwd" in _text(graphs[0])
    assert (output.shape, c_all.shape) == ((T, B, 16), (T, B, H))


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("cell", CELLS)
def test_cell_classes(cell, backend, training):
    module = CELLS[cell](I, H, device=DEVICE, backend=backend)
    x = torch.empty(B, I, device=DEVICE, requires_grad=training)
    with torch.set_grad_enabled(training):
        graphs, _ = compiled(module, x)
    assert len(graphs) == 1
    assert "fusedlstm.recurrence_fwd" in _text(graphs[0]) or "fusedlstm.step_fwd" in _text(graphs[0])


def test_a_second_size_is_a_second_graph_and_no_break():
    """Any number of steps and sequences. The planner runs when the graph is made, and again for other sizes."""
    module = fusedlstm.LSTM(I, H, device=DEVICE)
    graphs = []
    call = torch.compile(module, fullgraph=True, backend=lambda graph, _: (graphs.append(graph), graph)[1])
    for steps in (3, 4, 7, 9):
        assert call(torch.empty(steps, B, I, device=DEVICE))[0].shape == (steps, B, H)
    assert len(graphs) == 2, "one for 3 steps, and one for any number"
