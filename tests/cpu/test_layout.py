"""layout.py, torch_loop.py and the specification for packed batches, against torch.nn.LSTM and each other."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fusedlstm
from fusedlstm import autograd
from fusedlstm.cells import CELLS, Grads, State, Weights
from fusedlstm.engines import aten, reference, torch_loop
from fusedlstm.layout import DENSE, Layout, Pieces, spans
from fusedlstm.noise import Batch
from support import assert_accurate, recurrence

EXACT = {"rtol": 1e-11, "atol": 1e-12}
LENGTHS = [[3], [4, 4, 4], [5, 3, 3, 1], [6, 5, 4, 3, 2, 1]]
I, H, P = 4, 6, 3


def packed(lengths):
    batch_sizes = torch.tensor([sum(n > t for n in lengths) for t in range(lengths[0])])
    return Layout.of_packed(batch_sizes, len(lengths), torch.device("cpu")), batch_sizes


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_tables_describe_torchs_layout(lengths):
    """Rows that name their own step and sequence, packed by torch, tell where each must lie."""
    layout, batch_sizes = packed(lengths)
    padded = torch.tensor([[100 * t + b for b in range(len(lengths))] for t in range(lengths[0])])
    names = pack_padded_sequence(padded.unsqueeze(-1), torch.tensor(lengths)).data[:, 0]
    step, sequence = layout.positions(len(names))
    assert torch.equal(100 * step + sequence, names)
    assert layout.lengths.tolist() == lengths
    assert [n for _, n in spans(layout.first_row, names.shape)] == batch_sizes.tolist()
    row_of = {name: row for row, name in enumerate(names.tolist())}
    for direction, by in ((0, -1), (1, 1)):
        begins = layout.begin_rows(names.shape, direction, torch.device("cpu")).tolist()
        before = layout.states_before(names.unsqueeze(1), -1 - torch.arange(len(lengths)).unsqueeze(1), direction)
        for b, n in enumerate(lengths):
            first = 0 if direction == 0 else n - 1
            assert begins[b] == row_of[100 * first + b]
            for t in range(n):
                expected = -1 - b if t == first else 100 * (t + by) + b
                assert before[row_of[100 * t + b]].item() == expected


def random_layer(lengths, directions, hidden_out=H):
    generator = torch.Generator().manual_seed(5)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    B = len(lengths)
    parameters = [[randn(4 * H, I), randn(4 * H, hidden_out), randn(4 * H), randn(4 * H)] for _ in range(directions)]
    return randn(sum(lengths), I), randn(directions, B, hidden_out), randn(1, directions, B, H), parameters


@pytest.mark.parametrize("proj_size", [0, P])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_specification_equals_torch(lengths, directions, proj_size):
    layout, batch_sizes = packed(lengths)
    input, hx, cx, parameters = random_layer(lengths, directions, proj_size or H)
    weight_hr = [torch.randn(P, H, dtype=torch.float64) for _ in range(directions)] if proj_size else None
    stock = nn.LSTM(I, H, bidirectional=directions == 2, proj_size=proj_size).double()
    values = [[*p, weight_hr[d]] if proj_size else p for d, p in enumerate(parameters)]
    for own, value in zip(stock.parameters(), [x for p in values for x in p], strict=True):
        own.data.copy_(value)
    output, (h_n, c_n) = stock(PackedSequence(input, batch_sizes), (hx, cx[0]))
    ours = reference.layer(recurrence(), input, State(hx, cx), parameters, Batch(layout), weight_hr)[:3]
    for a, b in zip(ours, (output.data, h_n, c_n.unsqueeze(0)), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def some_resets(leading):
    return torch.rand(leading, generator=torch.Generator().manual_seed(7)) < 0.3


# The ragged lengths are in no order, and one sequence has no steps. Resets are in the padding and at the beginning too.
LAYOUTS = {
    "dense": (DENSE, (4, 3)),
    "resets": (Layout(resets=some_resets((4, 3))), (4, 3)),
    "ragged": (Layout(torch.tensor([2, 0, 4, 1], dtype=torch.int32)), (4, 4)),
    "ragged, none of T": (Layout(torch.tensor([2, 3, 1], dtype=torch.int32)), (5, 3)),
    "ragged, all empty": (Layout(torch.tensor([0, 0], dtype=torch.int32)), (3, 2)),
    "ragged, resets": (Layout(torch.tensor([2, 0, 4, 1], dtype=torch.int32), None, some_resets((4, 4))), (4, 4)),
    "all reset": (Layout(resets=torch.ones(4, 3, dtype=torch.bool)), (4, 3)),
    **{f"packed {n}": (packed(n)[0], (sum(n),)) for n in LENGTHS},
    "packed, resets": (packed([5, 3, 3, 1])[0]._replace(resets=some_resets((12,))), (12,)),
}


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loop_and_written_out_backward_equal_autograd(layout, directions, clip):
    """The specification's backward, and both passes of the loop, on every layout."""
    layout, leading = LAYOUTS[layout]
    B = leading[1] if len(leading) == 2 else len(layout.lengths)
    generator = torch.Generator().manual_seed(3)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    preact_x = randn(directions, *leading, 4 * H).requires_grad_()
    weight_hh = [randn(4 * H, H) for _ in range(directions)]
    hx, cx = randn(directions, B, H).requires_grad_(), randn(1, directions, B, H).requires_grad_()
    spec, given = recurrence(clip=clip), (Weights(weight_hh), State(hx, cx), Batch(layout))
    specified = reference.recurrence_fwd(spec, preact_x, *given)
    results = [getattr(specified, name) for name in Grads._fields]
    grads = Grads(*(randn(*x.shape) for x in results))
    by_autograd = torch.autograd.grad(results, [preact_x, hx, cx], grads)
    with torch.no_grad():
        looped = torch_loop.recurrence_fwd(spec, preact_x, *given)
        for name, b in zip(Grads._fields, results, strict=True):
            torch.testing.assert_close(getattr(looped, name), b, **EXACT)
        for engine, saved in ((reference, specified), (torch_loop, specified._replace(gates=looped.gates))):
            grad_preact, grad_hx, grad_cx = engine.recurrence_bwd(spec, grads, saved, *given)
            grad_preact = grad_preact.unflatten(-1, (directions, 4 * H)).movedim(-2, 0)
            for a, b in zip((grad_preact, grad_hx, grad_cx), by_autograd, strict=True):
                torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("layout", ["dense", "ragged, resets", "packed [3]", "packed, resets"])
def test_gradients_twice(directions, layout):
    """gradcheck and gradgradcheck of a layer, with the preactivations that a projection adds to first steps."""
    layout, leading = LAYOUTS[layout]
    lengths = [1] * (leading[1] if len(leading) == 2 else len(layout.lengths))
    _, hx, cx, parameters = random_layer(lengths, directions)
    input = torch.randn(*leading, I, dtype=torch.float64, requires_grad=True)
    preact_0 = torch.randn(directions, len(lengths), 4 * H, dtype=torch.float64, requires_grad=True)
    flat = [p for direction in parameters for p in direction]

    def run(input, hx, cx, preact_0, *flat):
        per_direction = [flat[k : k + 4] for k in range(0, len(flat), 4)]
        output, (h, c), c_seq = autograd.layer(
            CELLS["lstm"], input, (hx, cx[0]), per_direction, "torch", layout, None, True, preact_0
        )
        return output, h, c, c_seq

    assert torch.autograd.gradcheck(run, (input, hx, cx, preact_0, *flat), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (input, hx, cx, preact_0, *flat), fast_mode=True)


@pytest.mark.parametrize("given", [0, 1, 2], ids=["output", "h_n", "c_n"])
def test_gradient_through_one_result(given):
    lengths = [4, 2, 1]
    layout, _ = packed(lengths)
    input, hx, cx, parameters = random_layer(lengths, 2)
    output, (h_n, c_n), _ = autograd.layer(CELLS["lstm"], input, (hx, cx[0]), parameters, "torch", layout)
    expected = reference.layer(recurrence(), input, State(hx, cx), parameters, Batch(layout))
    leaves = [input, hx, cx, *(p for direction in parameters for p in direction)]
    ours = torch.autograd.grad((output, h_n, c_n)[given].square().sum(), leaves)
    exact = torch.autograd.grad(expected[given].square().sum(), leaves)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("schedule", ["runs", "stretches", "loop"])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}], ids=str)
@pytest.mark.parametrize("lengths", [[9, 9, 4], [6, 5, 4, 3, 2, 1], [20, 1]], ids=str)
def test_every_way_of_a_cpu_equals_stock(monkeypatch, lengths, options, schedule):
    """Runs and stretches of steps through ATen, and the loop, whatever the lengths would have chosen."""
    monkeypatch.setattr(aten, "schedule", lambda *call: schedule)
    stock, ours = nn.LSTM(I, H, **options), fusedlstm.LSTM(I, H, **options, backend="torch")
    ours.load_state_dict(stock.state_dict())
    rows = stock.num_layers * (2 if stock.bidirectional else 1)
    x = pack_padded_sequence(torch.randn(max(lengths), len(lengths), I), torch.tensor(lengths))
    states = [torch.randn(rows, len(lengths), H) for _ in range(2)]
    found = []
    for module, dtype in ((ours, torch.float32), (stock, torch.float32), (copy.deepcopy(stock), torch.float64)):
        data, *hx = (y.to(dtype).requires_grad_() for y in (x.data.clone(), *states))
        output, (h_n, c_n) = module.to(dtype)(x._replace(data=data), tuple(hx))
        (output.data.square().sum() + h_n.sum() + c_n.square().sum()).backward()
        found.append([output.data, h_n, c_n, data.grad, *(y.grad for y in hx), *(p.grad for p in module.parameters())])
        states = [y.detach() for y in states]
    for k, (a, b, c) in enumerate(zip(*found, strict=True)):
        assert_accurate(f"tensor {k}", a.detach(), b.detach(), c.detach())


def test_which_way_a_cpu_goes():
    def way(lengths, dtype=torch.float32, hidden=256, proj_size=0):
        sizes = packed(lengths)[1]
        return aten.schedule(
            CELLS["lstm"], torch.zeros(sum(lengths), I, dtype=dtype), dtype, sizes, False, hidden, proj_size
        )

    assert way([40, 20]) == "runs" and way([40, 20], torch.float64) == "loop"
    assert way([5, 4, 3]) == "stretches" and way([5, 4, 3], hidden=257) == "loop"
    assert way([5, 4, 3], proj_size=2) == "stack" and way([5, 4, 3], torch.float16) == "stretches"
    assert aten.schedule(CELLS["lstm"], torch.zeros(70_000, 1, I), torch.float32, None, False, H, 0) == "stack"
    assert aten.schedule(CELLS["lstm"], torch.zeros(1, 9, I), torch.float32, None, False, H, 0) == "step"
    with torch.no_grad():
        assert way([5, 4, 3], hidden=257) == "stretches"
        assert aten.schedule(CELLS["lstm"], torch.zeros(1, 8, I), torch.float32, None, False, H, 0) == "step"
        assert aten.schedule(CELLS["lstm"], torch.zeros(1, 9, I), torch.float32, None, False, H, 0) == "stack"


@pytest.mark.parametrize("schedule", ["runs", "stretches", "step", "loop"])
def test_whatever_way_a_cpu_goes_evaluation_has_no_dropout(monkeypatch, schedule):
    monkeypatch.setattr(aten, "schedule", lambda *call: schedule)
    stock, ours = nn.LSTM(I, H, 2, dropout=1.0).eval(), fusedlstm.LSTM(I, H, 2, dropout=1.0, backend="torch").eval()
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(1, 3, I) if schedule == "step" else pack_padded_sequence(torch.randn(6, 3, I), [6, 4, 1])
    (found, *states), (expected, *exact) = ours(x), stock(x)
    found, expected = (y if schedule == "step" else y.data for y in (found, expected))
    torch.testing.assert_close([found, *states[0]], [expected, *exact[0]])


@pytest.mark.parametrize("has_instructions", [False, True])
def test_half_precision_is_computed_in_float32_where_aten_is_slow(monkeypatch, has_instructions):
    monkeypatch.setattr(aten, "_onednn_has_bfloat16", lambda: has_instructions)

    def computed(cell, dtype, schedule="stack", dense=True):
        return aten.compute_dtype(CELLS[cell], torch.device("cpu"), dtype, schedule, dense)

    assert computed("lstm", torch.bfloat16) == (torch.bfloat16 if has_instructions else torch.float32)
    assert computed("lstm", torch.bfloat16, dense=False) == computed("lstm", torch.bfloat16, "loop") == torch.float32
    assert computed("gru", torch.bfloat16) == computed("lstm", torch.float16) == torch.float32
    assert computed("lstm", torch.float64) == torch.float64


def test_held_sequences_keep_their_state():
    """However large the other preactivations are, c_n is what there was after the sequence's own last step."""
    lengths = [6, 5, 5, 5, 4, 4]  # one stretch
    ours = fusedlstm.LSTM(I, H)
    with torch.no_grad():
        for p in ours.parameters():
            p.mul_(300.0)
        x = torch.randn(6, 6, I) * 100
        _, (h_n, c_n) = ours(pack_padded_sequence(x, torch.tensor(lengths)))
        for b, n in enumerate(lengths):
            _, (h, c) = ours(x[:n])
            torch.testing.assert_close(c_n[:, b], c[:, b])
            torch.testing.assert_close(h_n[:, b], h[:, b])


@pytest.mark.parametrize("resets", [False, True])
def test_lengths_beyond_the_steps_count_as_the_nearest(resets):
    """On a device nobody has looked at them: they may be no address."""
    T, lengths = 4, torch.tensor([-3, 9, 2, 0, 4])
    B = len(lengths)
    cuts = torch.rand(T, B) < 0.5 if resets else None
    given, clamped = (Layout(n, None, cuts) for n in (lengths, lengths.clamp(0, T)))
    seq, initial = torch.randn(T, B, H), torch.randn(B, H)
    has_step = (torch.arange(T).unsqueeze(1) < lengths).flatten()
    for direction in (0, 1):
        found, expected = (x.begin_rows((T, B), direction, seq.device) for x in (given, clamped))
        assert torch.equal(found, expected)
        found, expected = (x.states_before(seq, initial, direction)[has_step] for x in (given, clamped))
        assert torch.equal(found, expected)
    found, expected = (Pieces.of(x, (T, B), seq.device) for x in (given, clamped))
    assert torch.equal(found.batch_sizes, expected.batch_sizes) and torch.equal(found.rows, expected.rows)
    for k in (0, 1):
        assert torch.equal(found.enters[k], expected.enters[k]) and torch.equal(found.leaves[k], expected.leaves[k])


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("proj_size", [0, 3])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_layers_take_lengths_beyond_the_steps_as_the_nearest(backend, proj_size, padding_side):
    """Inside of a compiled graph nobody looks at lengths of the host either."""
    torch.compiler.reset()
    layer = fusedlstm.LSTM(I, H, bidirectional=True, proj_size=proj_size, backend=backend)
    x, lengths = torch.randn(4, 5, I), torch.tensor([-3, 9, 2, 0, 4])
    call = torch.compile(layer, fullgraph=True, backend="eager")
    with torch.no_grad():
        output, states = call(x, lengths=lengths, padding_side=padding_side)
        expected, final = layer(x, lengths=lengths.clamp(0, 4), padding_side=padding_side)
    for a, b in zip((output, *states), (expected, *final), strict=True):
        torch.testing.assert_close(a, b)
