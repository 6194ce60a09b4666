"""torch_loop.py and aten.py: every cell equals the specification, forward and backward, in float64.

So does a cell without a loop of its own, by its equations. ATen's cells equal torch.nn's, whatever runs them.
"""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import bench.loops
import fusedlstm
from fusedlstm import autograd, cells, gradients, products
from fusedlstm.cells import Grads, Saved
from fusedlstm.cells.cell import LOOPS
from fusedlstm.engines import aten, reference, torch_loop
from fusedlstm.layout import DENSE, Layout
from support import assert_accurate, cast, recurrence, recurrence_inputs

EXACT = {"rtol": 1e-10, "atol": 1e-12}
T, B, H = 5, 3, 6
SERVED = [name for name, cell in cells.CELLS.items() if cell.equations.step_backward]
# Steps at which none, one and several sequences end; empty sequences; resets in the padding and at the beginning.
CASES = {
    "dense": {},
    "dense, two directions, heads": {"D": 2, "heads": 2},
    "dense, clip, no grad_output": {"clip": 0.05, "without": ["output"]},
    "one step": {"T": 1, "D": 2, "clip": 0.05},
    "resets, no grad_c_seq": {"resets": 0.3, "D": 2, "without": ["c_seq"]},
    "ragged, resets, heads": {"lengths": [2, 0, 5, 1, 0], "resets": 0.3, "heads": 3},
    "ragged, two directions, clip": {"lengths": [3, 0, 1], "D": 2, "clip": 0.05},
    "ragged, all empty": {"lengths": [0, 0], "D": 2},
    "packed": {"packed": [5, 3, 3, 1]},
    "packed, two directions, clip, heads": {"packed": [4, 4, 1], "D": 2, "clip": 0.05, "heads": 2},
    "packed, resets, no gradients of sequences": {
        "packed": [5, 3, 2],
        "resets": 0.3,
        "D": 2,
        "without": ["output", "c_seq"],
    },
}


def assert_all_close(names, ours, exact):
    for name, a, b in zip(names, ours, exact, strict=True):
        torch.testing.assert_close(a, b, **EXACT, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("by_equations", [False, True], ids=["own file", "by equations"])
@pytest.mark.parametrize("block", [2, 100], ids=["blocks", "one block"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("cell", SERVED)
def test_equals_the_specification(monkeypatch, cell, case, block, by_equations):
    monkeypatch.setattr(torch_loop, "_steps_of_block", lambda batch, H: block)
    if by_equations:
        monkeypatch.delitem(LOOPS, cell)
    else:
        assert cell in LOOPS
    options = {"T": T, "D": 1, "heads": 1, "clip": None, "without": [], **CASES[case]}
    clip, without, steps, D = (options.pop(name) for name in ("clip", "without", "T", "D"))
    if cells.CELLS[cell].norms:  # which mix the units of all heads
        options["heads"] = 1
    inputs = recurrence_inputs(steps, B, H, D, torch.float64, cell=cell, seed=4, **options)
    spec, layout = recurrence(cell, clip=clip), inputs.batch.layout
    saved, ours = (engine.recurrence_fwd(spec, *inputs) for engine in (reference, torch_loop))
    lives = torch.ones_like(saved.gates[..., :1], dtype=torch.bool)
    if layout.name == "ragged" and layout.lengths is not None:
        lives = (torch.arange(steps).unsqueeze(1) < layout.lengths).unsqueeze(-1)
    assert_all_close(Saved._fields, *(x._replace(gates=x.gates * lives) for x in (ours, saved)))

    generator = torch.Generator().manual_seed(1)
    grads = Grads(*(torch.randn(getattr(saved, k).shape, generator=generator).double() for k in Grads._fields))
    grads = grads._replace(**{name: None for name in ("output", "c_seq") if name in without})
    found = (engine.recurrence_bwd(spec, grads, saved, *inputs[1:]) for engine in (torch_loop, reference))
    assert_all_close(("grad_preact", "grad_hx", "grad_cx"), *found)


def test_a_block_has_work_for_every_thread(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch_loop._steps_of_block(32, 128) == 3 * 8
    assert torch_loop._steps_of_block(1000, 1000) == 1
    assert torch_loop._steps_of_block(0, 128) == 3 * (1 << 15)


@pytest.mark.parametrize("cell", SERVED)
def test_no_steps(cell):
    """Which the specification does not take: states and their gradients pass."""
    inputs = recurrence_inputs(0, B, H, 2, torch.float64, cell=cell)
    saved = torch_loop.recurrence_fwd(recurrence(cell), *inputs)
    assert saved.output.shape == (0, B, 2 * H)
    assert torch.equal(saved.h_n, inputs.state.hx) and torch.equal(saved.c_n, inputs.state.cx)
    grads = Grads(None, None, saved.h_n, saved.c_n)
    grad_preact, grad_hx, grad_cx = torch_loop.recurrence_bwd(recurrence(cell), grads, saved, *inputs[1:])
    assert grad_preact.shape == (0, B, 2 * cells.CELLS[cell].num_kept * H)
    assert torch.equal(grad_hx, saved.h_n) and torch.equal(grad_cx, saved.c_n)


@pytest.mark.parametrize("layer", [fusedlstm.PeepholeLSTM, fusedlstm.LayerNormLSTM])
def test_passes_in_blocks_of_rows(monkeypatch, layer):
    """Fourteen rows in blocks of four: every gradient is that of the specification."""
    monkeypatch.setattr(gradients, "ROWS_OF_BLOCK", 4)
    assert [s.stop for s in gradients._row_blocks(14, torch.device("cpu"))] == [4, 8, 12, 16]
    assert gradients._row_blocks(14, torch.device("cuda")) == [slice(None)]
    module, x = layer(3, 5, bidirectional=True).double(), torch.randn(7, 2, 3, dtype=torch.float64)
    found = []
    for module.backend in ("torch", "reference"):
        output, _ = module(x)
        found.append(torch.autograd.grad(output.sin().sum(), [*module.parameters()]))
    torch.testing.assert_close(*found, **EXACT)


@pytest.mark.parametrize("cell", [name for name, cell in cells.CELLS.items() if cell.adds])
def test_recomputed_from_the_preactivations(cell):
    """Without weights the preactivations are whole, and gates and states those of the loop."""
    inputs = recurrence_inputs(T, B, H, 2, torch.float64, cell=cell, resets=0.3)
    saved = torch_loop.recurrence_fwd(recurrence(cell), *inputs)
    whole, weights = inputs.preact_x.clone(), inputs.weights
    for d, (y, weight) in enumerate(zip(saved.output.chunk(2, -1), weights.weight_hh, strict=True)):
        before = inputs.batch.layout.states_before(y, inputs.state.hx[d], d)
        products.add_recurrent_product(whole[d].view(-1, whole.size(-1)), before, weight)
    found = torch_loop.recurrence_fwd(recurrence(cell), whole, weights._replace(weight_hh=[]), *inputs[2:])
    torch.testing.assert_close(found.gates, saved.gates, **EXACT)
    torch.testing.assert_close(found.c_seq, saved.c_seq, **EXACT)


def test_shut_output_gates_have_gradients():
    """o of zero, small and one, with |c| from small to large: the gradient of c is found from h = o tanh(c)."""
    o = torch.tensor([-200.0, -95.0, -60.0, 0.0, 5.0, 200.0])
    for size in (1e-3, 1.0, 30.0):
        inputs = recurrence_inputs(T, B, H, 1, torch.float32, resets=0.2)
        inputs.preact_x[..., 3 * H :] = o
        inputs.state.cx.mul_(size)
        inputs.preact_x[..., H : 2 * H] += 5.0  # c stays about as large
        exact = cast(inputs, torch.float64)
        found = []
        for engine, given in ((torch_loop, inputs), (reference, inputs), (reference, exact)):
            saved = engine.recurrence_fwd(recurrence(), *given)
            grads = Grads(*(torch.ones_like(getattr(saved, name)) for name in Grads._fields))
            found.append(engine.recurrence_bwd(recurrence(), grads, saved, *given[1:]))
        for name, ours, same, truth in zip(("grad_preact", "grad_hx", "grad_cx"), *found, strict=True):
            assert_accurate(f"{name}, c {size}", ours, same, truth)


@pytest.mark.parametrize("cell", ["gru", "rnn_tanh", "rnn_relu"])
@pytest.mark.parametrize("lengths", [None, [6, 5, 5, 2]], ids=["dense", "packed"])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}], ids=str)
def test_atens_stacks_and_the_loop(cell, lengths, options):
    """aten.py hands stacks and single steps on as torch.nn does, runs of steps too; the loop computes the same."""
    stock = _stock(cell, 4, H, **options).double()
    x = torch.randn(6, 4, 4, dtype=torch.float64)
    layers, D = stock.num_layers, 2 if stock.bidirectional else 1
    hx = torch.randn(layers * D, 4, H, dtype=torch.float64)
    packed = None if lengths is None else pack_padded_sequence(x, torch.tensor(lengths))
    rows, sizes = (x, None) if packed is None else (packed.data, packed.batch_sizes)
    expected, h_n = stock(x if packed is None else packed, hx)
    expected = expected if packed is None else expected.data
    arguments = (stock._flat_weights, stock.bias, layers, 0.0, True, stock.bidirectional, False)
    schedules = ["stack"] if sizes is None else ["stack", "runs"]
    for schedule in schedules:
        output, (h,) = aten.stack(cells.CELLS[cell], schedule, rows, sizes, (hx,), *arguments)
        torch.testing.assert_close(output, expected, **EXACT)
        torch.testing.assert_close(h, h_n, **EXACT)
    step, (h,) = aten.stack(cells.CELLS[cell], "step", x[:1], None, (hx,), *arguments)
    torch.testing.assert_close(step, stock(x[:1], hx)[0], **EXACT)
    if layers == 1:
        (h,) = aten.cell(cells.CELLS[cell], x[0], (hx[0],), *stock._flat_weights)
        torch.testing.assert_close(h, step[0], **EXACT)

    layout = DENSE if sizes is None else Layout.of_packed(sizes, 4, torch.device("cpu"))
    count = len(stock._flat_weights) // (layers * D)
    parameters = [stock._flat_weights[k : k + count] for k in range(0, layers * D * count, count)]
    found = rows
    for layer in range(layers):
        own = slice(layer * D, (layer + 1) * D)
        found, _, _ = autograd.layer(cells.CELLS[cell], found, (hx[own],), parameters[own], "torch", layout)
    torch.testing.assert_close(found, expected, **EXACT)
    grad = torch.randn_like(expected)
    for ours, exact in zip(
        torch.autograd.grad(found, stock._flat_weights, grad),
        torch.autograd.grad(expected, stock._flat_weights, grad),
        strict=True,
    ):
        torch.testing.assert_close(ours, exact, **EXACT)


def _stock(cell, *sizes, **options):
    if cell == "gru":
        return nn.GRU(*sizes, **options)
    return nn.RNN(*sizes, nonlinearity=cell[len("rnn_") :], **options)


@pytest.mark.parametrize("cell", bench.loops.CASES)
def test_rivals_of_the_benchmark_compute_the_same(cell):
    calls = bench.loops.calls_of(cell, 5, 3, 8)
    found = calls.pop("ours")()
    assert calls
    for rival in calls.values():
        torch.testing.assert_close(found, rival(), rtol=1e-4, atol=1e-5)


def test_views_of_steps_have_no_history(monkeypatch):
    """With one, a compiled call takes half as long again. What is returned is a tensor like any other."""
    loop, asked = LOOPS["gru"], []

    def asking(function):
        def of_direction(at):
            asked.append(torch.is_inference_mode_enabled())
            step = function(at)
            return lambda t, state: (asked.append(torch.is_inference_mode_enabled()), step(t, state))[1]

        return of_direction

    monkeypatch.setitem(LOOPS, "gru", loop._replace(forward=asking(loop.forward), backward=asking(loop.backward)))
    gru = fusedlstm.GRU(3, 4)
    output, h_n = gru(torch.randn(40, 2, 3))
    found = [output, h_n, *torch.autograd.grad(output.sum(), [*gru.parameters()])]
    assert asked == [True] * 2 * 41 and not any(x.is_inference() for x in found)


def test_who_serves_on_a_cpu():
    def way(cell, steps, dtype=torch.float32, sizes=None, batch_first=False):
        x = torch.zeros((2, steps, 4) if batch_first else (steps, 2, 4))
        return aten.schedule(
            cells.CELLS[cell], x.flatten(0, 1) if sizes is not None else x, dtype, sizes, batch_first, H
        )

    for cell in ("gru", "rnn_tanh", "rnn_relu"):
        assert cells.CELLS[cell].aten
        assert way(cell, 32) == way(cell, 32, batch_first=True) == way(cell, 32, torch.float64) == "loop"
        assert way(cell, 32, sizes=torch.tensor([2] * 31 + [1])) == "loop"
        assert way(cell, 31) == way(cell, 1) == way(cell, 31, sizes=torch.tensor([2] * 30 + [1])) == "stack"
        with torch.no_grad():
            assert way(cell, 32) == "stack"
        for dtype in (torch.float16, torch.bfloat16):
            assert aten.compute_dtype(cells.CELLS[cell], torch.device("cpu"), dtype, "stack", True) == torch.float32
    assert cells.CELLS["peephole"].aten is None and way("peephole", 1) == "loop"
