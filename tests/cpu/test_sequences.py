"""Lengths, resets, cell states and clipped gradients of stacks, against a loop over LSTMCell and torch on packs."""

import math

import features
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fusedlstm
from fusedlstm import cells, engines, functional
from support import assert_accurate

EXACT = {"rtol": 1e-10, "atol": 1e-12}
T, I, H = 9, 4, 6
OPTIONS = {
    "one layer": {},
    "bidirectional, no bias": {"bidirectional": True, "bias": False},
    "two bidirectional layers": {"num_layers": 2, "bidirectional": True},
    "batch first": {"num_layers": 2, "batch_first": True},
    "projected": {"num_layers": 2, "bidirectional": True, "proj_size": 3},
}


def by_hand(lstm, x, hx, lengths, resets, clip=None):
    """Sequence by sequence and step by step with LSTMCell: output, h_n, c_n, c of every step of the last layer.

    x [T, B, I]. Nothing is shared with the package: what a reset cuts is a new loop from zeros.
    """
    directions = 2 if lstm.bidirectional else 1
    h_n, c_n = torch.zeros_like(hx[0]), torch.zeros_like(hx[1])
    for layer in range(lstm.num_layers):
        P = lstm.proj_size or lstm.hidden_size
        output = x.new_zeros(*x.shape[:2], directions * P)
        cells = x.new_zeros(*x.shape[:2], directions * lstm.hidden_size)
        for d in range(directions):
            row, suffix = layer * directions + d, f"_l{layer}" + "_reverse" * d
            p = {name[: -len(suffix)]: w for name, w in lstm.named_parameters() if name.endswith(suffix)}
            p = {name: w for name, w in p.items() if f"{name}{suffix}" in dict(lstm.named_parameters())}
            for b in range(x.size(1)):
                h, c = hx[0][row, b], hx[1][row, b]
                steps = range(lengths[b]) if d == 0 else range(lengths[b] - 1, -1, -1)
                for t in steps:
                    later = t + d  # the cut before `later` is between this step and the one visited before it
                    if later < lengths[b] and resets[later, b]:
                        h, c = torch.zeros_like(h), torch.zeros_like(c)
                    if clip:
                        h, c = clipped(h, clip), clipped(c, clip)
                    h, c = cell(p, x[t, b], h, c)
                    output = output.index_put((torch.tensor(t), torch.tensor(b), torch.arange(d * P, d * P + P)), h)
                    units = torch.arange(d * lstm.hidden_size, (d + 1) * lstm.hidden_size)
                    cells = cells.index_put((torch.tensor(t), torch.tensor(b), units), c)
                h_n = h_n.index_put((torch.tensor(row), torch.tensor(b)), h)
                c_n = c_n.index_put((torch.tensor(row), torch.tensor(b)), c)
        x = output
    return x, h_n, c_n, cells


def cell(p, x, h, c):
    """One step of one sequence by torch's LSTMCell, which knows no projection: that by its equations."""
    weights = (p["weight_ih"], p["weight_hh"], p.get("bias_ih"), p.get("bias_hh"))
    if "weight_hr" not in p:
        h, c = torch._VF.lstm_cell(x.unsqueeze(0), (h.unsqueeze(0), c.unsqueeze(0)), *weights)
        return h.squeeze(0), c.squeeze(0)
    i, f, g, o = (p["weight_ih"] @ x + p["bias_ih"] + p["weight_hh"] @ h + p["bias_hh"]).chunk(4)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return p["weight_hr"] @ (o.sigmoid() * c.tanh()), c


def clipped(x, limit):
    x = x.clone() if x.requires_grad else x.clone().requires_grad_()
    x.register_hook(lambda grad: grad.clamp(-limit, limit))
    return x


def problem(options, batch, seed, dtype=torch.float64):
    """A module, its input [T, B, I], states, lengths with zeros among them, resets, and gradients of the results."""
    generator = torch.Generator().manual_seed(seed)
    lstm = fusedlstm.LSTM(I, H, **options, dtype=dtype)
    rows, P = lstm.num_layers * (2 if lstm.bidirectional else 1), lstm.proj_size or H

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    lengths = torch.randint(0, T + 1, (batch,), generator=generator)
    lengths[0] = 0
    resets = torch.rand(T, batch, generator=generator) < 0.25
    directions = rows // lstm.num_layers
    grads = [
        randn(T, batch, directions * P),
        randn(rows, batch, P),
        randn(rows, batch, H),
        randn(T, batch, directions * H),
    ]
    return lstm, randn(T, batch, I), (randn(rows, batch, P), randn(rows, batch, H)), lengths, resets, grads


def turned(x, lstm):
    return x.transpose(0, 1) if lstm.batch_first else x


def run(call, lstm, x, hx, grads):
    """All results of `call(x, hx)` and all gradients."""
    lstm.zero_grad()
    x, *hx = (y.detach().clone().requires_grad_() for y in (x, *hx))
    results = call(x, tuple(hx))
    torch.autograd.backward(results, [g.to(results[0].dtype) for g in grads])
    return [*results, x.grad, *(y.grad for y in hx), *(p.grad for p in lstm.parameters())]


def call_of(lstm, lengths=None, resets=None, **options):
    """The module as a function of x [T, B, I] and hx, with the results of `by_hand`."""

    def call(x, hx):
        own_resets = None if resets is None else turned(resets, lstm)
        output, (h_n, c_n), c_seq = lstm(
            turned(x, lstm), hx, lengths=lengths, resets=own_resets, return_cell_states=True, **options
        )
        return turned(output, lstm), h_n, c_n, turned(c_seq, lstm)

    return call


GIVEN = {"lengths": (True, False), "resets": (False, True), "both": (True, True), "neither": (False, False)}


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("engine", ["torch", "traced", "reference"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_equals_a_loop_over_cells(monkeypatch, options, engine, given):
    """Every result and every gradient. "traced" is the way of a compiled graph, where lengths are not known."""
    has_lengths, has_resets = GIVEN[given]
    lstm, x, hx, lengths, resets, grads = problem(options, 7, seed=sum(map(ord, given)))
    lstm.backend = "torch" if engine == "traced" else engine
    if engine == "traced":
        monkeypatch.setattr(functional, "_traced", lambda input: True)
    ours = run(call_of(lstm, lengths if has_lengths else None, resets if has_resets else None), lstm, x, hx, grads)
    lengths = lengths if has_lengths else torch.full_like(lengths, T)
    resets = resets if has_resets else torch.zeros_like(resets)
    exact = run(lambda x, hx: by_hand(lstm, x, hx, lengths.tolist(), resets), lstm, x, hx, grads)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("engine", ["torch", "reference"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_clipped_gradients(options, engine):
    lstm, x, hx, lengths, resets, grads = problem(options, 5, seed=2)
    lstm.backend = engine
    ours = run(call_of(lstm, lengths, resets, grad_clip=0.05), lstm, x, hx, grads)
    exact = run(lambda x, hx: by_hand(lstm, x, hx, lengths.tolist(), resets, clip=0.05), lstm, x, hx, grads)
    free = run(call_of(lstm, lengths, resets), lstm, x, hx, grads)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    for a, b in zip(ours[:4], free[:4], strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    assert not torch.allclose(ours[4], free[4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_accuracy(dtype):
    """Stretches of oneDNN, in float32 and for half precision, under the one rule."""
    lstm, x, hx, lengths, resets, grads = problem({"num_layers": 2, "bidirectional": True}, 7, seed=4, dtype=dtype)
    ours = run(call_of(lstm, lengths, resets), lstm, x, hx, grads)
    state = {name: p.detach().double() for name, p in lstm.named_parameters()}
    same = run(lambda x, hx: by_hand(lstm, x, hx, lengths.tolist(), resets), lstm, x, hx, grads)
    double = fusedlstm.LSTM(I, H, 2, bidirectional=True, dtype=torch.float64)
    double.load_state_dict(state)
    args = (x.double(), [y.double() for y in hx])
    exact = run(lambda x, hx: by_hand(double, x, hx, lengths.tolist(), resets), double, *args, grads)
    for k, (a, b, c) in enumerate(zip(ours, same, exact, strict=True)):
        assert_accurate(f"tensor {k}", a.detach(), b.detach(), c.detach())


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_equals_torch_on_the_packed_form(options):
    """The same batch, packed for torch.nn.LSTM: outputs, states, every gradient."""
    lstm, x, hx, lengths, _, grads = problem(options, 6, seed=9)
    lengths = lengths.clamp_min(1)
    lengths[3] = T
    stock = nn.LSTM(I, H, **options).double()
    stock.load_state_dict(lstm.state_dict())

    def packed(x, hx):
        pack = pack_padded_sequence(turned(x, stock), lengths, stock.batch_first, enforce_sorted=False)
        output, (h_n, c_n) = stock(pack, hx)
        return turned(pad_packed_sequence(output, stock.batch_first)[0], stock), h_n, c_n

    def ours(x, hx):
        return call_of(lstm, lengths)(x, hx)[:3]

    found = run(ours, lstm, x, hx, grads[:3]), run(packed, stock, x, hx, grads[:3])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("engine", ["torch", "reference"])
@pytest.mark.parametrize("is_sorted", [True, False])
def test_packed_input(engine, is_sorted):
    """Resets of a pack are a pack; its cell states are one too."""
    lstm, x, hx, _, resets, _ = problem({"num_layers": 2, "bidirectional": True}, 5, seed=11)
    lstm.backend = engine
    lengths = torch.tensor([9, 7, 7, 4, 1])[slice(None) if is_sorted else torch.tensor([3, 0, 4, 1, 2])]
    x, resets = (pack_padded_sequence(y, lengths, enforce_sorted=is_sorted) for y in (x, resets))
    output, (h_n, c_n), c_seq = lstm(x, hx, resets=resets, return_cell_states=True)
    padded_x, padded_resets = pad_packed_sequence(x)[0], pad_packed_sequence(resets)[0]
    exact = by_hand(lstm, padded_x, hx, lengths.tolist(), padded_resets)
    found = pad_packed_sequence(output)[0], h_n, c_n, pad_packed_sequence(c_seq)[0]
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_resets_of_a_pack_of_equal_lengths():
    lstm, x, hx, _, resets, _ = problem({"bidirectional": True}, 3, seed=12)
    pack = pack_padded_sequence(x, torch.full((3,), T))
    of_pack = lstm(pack, hx, resets=pack._replace(data=resets.flatten()))
    dense = lstm(x, hx, resets=resets)
    torch.testing.assert_close(of_pack[0].data.view(T, 3, -1), dense[0])
    torch.testing.assert_close(of_pack[1], dense[1])


def test_unbatched():
    lstm, x, hx, _, resets, _ = problem({"bidirectional": True, "batch_first": True}, 1, seed=13)
    for length in (torch.tensor(5), torch.tensor([5]), 5):
        found = lstm(x[:, 0], (hx[0][:, 0], hx[1][:, 0]), lengths=length, resets=resets[:, 0], return_cell_states=True)
        exact = by_hand(lstm, x, hx, [5], resets)
        for a, b in zip((found[0], *found[1], found[2]), exact, strict=True):
            torch.testing.assert_close(a, b.squeeze(1), **EXACT)


def test_default_states_and_integer_types():
    lstm, x, hx, lengths, resets, _ = problem({}, 4, seed=14)
    zeros = tuple(torch.zeros_like(s) for s in hx)
    expected = lstm(x, zeros, lengths=lengths, resets=resets)[0]
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert torch.equal(lstm(x, lengths=lengths.to(dtype), resets=resets)[0], expected)
    assert torch.equal(lstm(x, lengths=lengths.tolist(), resets=resets)[0], expected)


def test_no_sequence_has_a_step():
    lstm, x, hx, _, _, grads = problem({"num_layers": 2, "bidirectional": True}, 3, seed=15)
    for layer in (call_of(lstm, torch.zeros(3, dtype=torch.int64)),):
        output, h_n, c_n, c_seq, grad_x, grad_h, grad_c, *_ = run(layer, lstm, x, hx, grads)
        assert not output.any() and not c_seq.any() and not grad_x.any()
        assert torch.equal(h_n, hx[0]) and torch.equal(c_n, hx[1])
        assert torch.equal(grad_h, grads[1]) and torch.equal(grad_c, grads[2])
    for none in (torch.zeros(0, dtype=torch.int64), []):
        assert lstm(x[:, :0], lengths=none)[0].shape == (T, 0, 2 * H)


def test_what_padding_holds_is_not_looked_at():
    lstm, x, hx, lengths, resets, grads = problem({"bidirectional": True}, 6, seed=16)
    clean = run(call_of(lstm, lengths, resets), lstm, x, hx, grads)
    padding = torch.arange(T).unsqueeze(1) >= lengths
    x = x.masked_fill(padding.unsqueeze(-1), math.nan)
    grads = [g.masked_fill(padding.unsqueeze(-1), math.nan) if g.size(0) == T else g for g in grads]
    dirty = run(call_of(lstm, lengths, resets | padding), lstm, x, hx, grads)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "options", [{"return_cell_states": True}, {"return_states": True, "padding_side": "left"}], ids=["right", "left"]
)
def test_compiles_for_any_lengths(training, options):
    """One graph, whatever lengths and resets hold; the same numbers, and gradients when training."""
    torch.compiler.reset()  # what other tests compiled has told Dynamo which sizes vary
    lstm, x, hx, *_ = problem({"num_layers": 2, "bidirectional": True}, 4, seed=17, dtype=torch.float32)
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(lstm, fullgraph=True, backend=counting)
    for seed in range(4):
        lengths, resets = problem({}, 4, seed=20 + seed)[3:5]
        found = []
        for module in (lstm, compiled):
            with torch.set_grad_enabled(training):
                lstm.zero_grad()
                output, (h_n, c_n), states = module(x, hx, lengths=lengths, resets=resets, **options)
            c_seq = states[1] if "return_states" in options else states
            found.append([output, h_n, c_n, c_seq])
            if training:
                (output.square().sum() + c_seq.sum() + h_n.sum()).backward()
                found[-1] += [p.grad for p in lstm.parameters()]
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)
    assert len(graphs) == 1


def test_dropout_zeroes_what_the_second_layer_sees():
    """With all of it dropped, the second layer sees zeros, in every sequence's own steps."""
    lstm, x, hx, lengths, resets, _ = problem({"num_layers": 2, "dropout": 1.0}, 4, seed=18)
    second = fusedlstm.LSTM(H, H, dtype=torch.float64)
    second.load_state_dict({n[:-1] + "0": p for n, p in lstm.named_parameters() if n.endswith("1")})
    expected = second(x.new_zeros(T, 4, H), (hx[0][1:], hx[1][1:]), lengths=lengths, resets=resets)
    torch.testing.assert_close(lstm(x, hx, lengths=lengths, resets=resets)[0], expected[0])


def test_grad_clip_of_a_module():
    """A constructor argument, an attribute, and overridden by a call."""
    lstm, x, hx, *_ = problem({"grad_clip": 0.01}, 3, seed=19)
    free = fusedlstm.LSTM(I, H, dtype=torch.float64)
    free.load_state_dict(lstm.state_dict())
    assert lstm.grad_clip == 0.01 and free.grad_clip is None

    def grad(module, **options):
        h = hx[0].clone().requires_grad_()
        module(x, (h, hx[1]), **options)[0].sum().backward()
        return h.grad

    assert grad(lstm).abs().max() <= 0.01 < grad(free).abs().max()
    assert torch.equal(grad(free, grad_clip=0.01), grad(lstm))
    free.grad_clip = np.float32(0.01)
    torch.testing.assert_close(grad(free), grad(lstm))
    with pytest.raises(ValueError, match="grad_clip: expected a number above 0, got -1.0"):
        free.grad_clip = -1.0
    with pytest.raises(ValueError, match="grad_clip: expected a number above 0, got -1.0"):
        free(x, grad_clip=-1.0)


BAD = {
    "lengths 2D": (
        {"lengths": torch.ones(3, 1, dtype=torch.int64)},
        ValueError,
        r"lengths: expected shape \[3\], got \[3, 1\]",
    ),
    "lengths of another batch": (
        {"lengths": torch.ones(4, dtype=torch.int64)},
        ValueError,
        r"lengths: expected shape \[3\], got \[4\]",
    ),
    "lengths of floats": ({"lengths": torch.ones(3)}, ValueError, "lengths: expected integers, got torch.float32"),
    "no lengths": ({"lengths": "three"}, TypeError, "lengths: expected a Tensor of integers, got str"),
    "lengths beyond T": ({"lengths": torch.tensor([1, 10, 2])}, ValueError, "lengths: expected 0 to 9, got 10"),
    "negative lengths": ({"lengths": torch.tensor([1, -2, 2])}, ValueError, "lengths: expected 0 to 9, got -2"),
    "complex resets": (
        {"resets": torch.zeros(9, 3, dtype=torch.complex64)},
        ValueError,
        "resets: expected torch.bool, or numbers of which 0 is false, got torch.complex64",
    ),
    "resets batch first": (
        {"resets": torch.zeros(3, 9, dtype=torch.bool)},
        ValueError,
        r"resets: expected shape \[9, 3\], got \[3, 9\]",
    ),
    "no resets": ({"resets": [True]}, TypeError, "resets: expected a Tensor, got list"),
    "grad_clip of zero": ({"grad_clip": 0.0}, ValueError, "grad_clip: expected a number above 0, got 0.0"),
    "grad_clip a tensor": ({"grad_clip": torch.ones(1)}, TypeError, "grad_clip: expected a number or None, got Tensor"),
}


@pytest.mark.parametrize(("arguments", "error", "text"), BAD.values(), ids=BAD.keys())
def test_errors(arguments, error, text):
    with pytest.raises(error, match=text):
        fusedlstm.LSTM(I, H)(torch.zeros(9, 3, I), **arguments)


def test_errors_of_packs():
    lstm = fusedlstm.LSTM(I, H)
    pack = pack_padded_sequence(torch.zeros(4, 3, I), torch.tensor([4, 2, 1]))
    with pytest.raises(ValueError, match="lengths: expected None with a PackedSequence"):
        lstm(pack, lengths=torch.tensor([4, 2, 1]))
    with pytest.raises(TypeError, match="resets: expected a PackedSequence like input, got Tensor"):
        lstm(pack, resets=torch.zeros(4, 3, dtype=torch.bool))
    other = pack_padded_sequence(torch.zeros(4, 3, dtype=torch.bool), torch.tensor([4, 3, 1]))
    with pytest.raises(ValueError, match="resets: expected the lengths and the order of input"):
        lstm(pack, resets=other)
    turned = pack_padded_sequence(torch.zeros(4, 3, dtype=torch.bool), torch.tensor([1, 2, 4]), enforce_sorted=False)
    with pytest.raises(ValueError, match="resets: expected the lengths and the order of input"):
        lstm(pack, resets=turned)
    also_turned = pack_padded_sequence(torch.zeros(4, 3, I), torch.tensor([2, 4, 1]), enforce_sorted=False)
    with pytest.raises(ValueError, match="resets: expected the lengths and the order of input"):
        lstm(also_turned, resets=turned)
    assert isinstance(
        lstm(pack, resets=PackedSequence(torch.zeros(7, dtype=torch.bool), pack.batch_sizes))[0], PackedSequence
    )


def test_triton_says_why_it_does_not_clip_projections(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    lstm = fusedlstm.LSTM(I, H, proj_size=2, backend="triton", grad_clip=1.0)
    assert engines.why_not_triton(torch.device("cpu"), torch.float32) is None
    with pytest.raises(RuntimeError, match="do not clip the gradient of a projected h"):
        lstm(torch.zeros(2, 3, I))


MEMBERS = features.OURS
every_member = pytest.mark.parametrize("name", MEMBERS)
both_engines = pytest.mark.parametrize("backend", ["torch", "reference"])


def member(name, backend, **options):
    torch.manual_seed(0)
    return getattr(fusedlstm, name)(I, H, 2, backend=backend, dtype=torch.float64, **options)


def as_tuple(states):
    return (states,) if isinstance(states, torch.Tensor) else states


@both_engines
@every_member
@pytest.mark.parametrize("form", ["dense", "batch first", "lengths", "unbatched", "packed"])
def test_states_of_every_layer(form, name, backend):
    """The t-th is what a call of t steps ends with, in numbers and gradients. So a stack can go on from it."""
    check_states(form, name, backend)


@both_engines
def test_projected_states_of_every_layer(backend):
    check_states("dense", "LSTM", backend, proj_size=3)


def check_states(form, name, backend, **options):
    module = member(name, backend, batch_first=form == "batch first", **options)
    x = torch.randn(5, 3, I, dtype=torch.float64) if form != "unbatched" else torch.randn(5, I, dtype=torch.float64)
    lengths = torch.tensor([5, 2, 4]) if form in ("lengths", "packed") else torch.full((3,), 5)
    given = x.clone().requires_grad_()
    if form == "packed":
        packed = pack_padded_sequence(given, lengths, enforce_sorted=False)
        output, _, states = module(packed, return_states=True)
        output = pad_packed_sequence(output)[0]
        states = tuple(pad_packed_sequence(s)[0].transpose(1, 2) for s in flat_packed(states))
    else:
        own = {"lengths": lengths} if form == "lengths" else {}
        input = given.transpose(0, 1) if form == "batch first" else given
        output, _, states = module(input, **own, return_states=True)
        output, states = output.transpose(0, 1) if form == "batch first" else output, as_tuple(states)
    torch.testing.assert_close(states[0].select(1, 1), output, **EXACT)
    weights = [torch.randn_like(s) for s in states]
    found = torch.autograd.grad(sum((s * w).sum() for s, w in zip(states, weights, strict=True)), given)[0]
    again, total = x.clone().requires_grad_(), 0
    for t in range(5):
        part = again[: t + 1].transpose(0, 1) if form == "batch first" else again[: t + 1]
        own = as_tuple(module(part)[1])
        lives = (t < lengths).view(-1, 1) if x.dim() == 3 else True
        for s, w, end in zip(states, weights, own, strict=True):
            torch.testing.assert_close(s[t], end * lives, **EXACT)
            total = total + (end * lives * w[t]).sum()
    torch.testing.assert_close(found, torch.autograd.grad(total, again)[0], **EXACT)
    if form == "dense":
        entered = tuple(s[2] for s in states)
        rest = module(x[3:], entered if len(entered) > 1 else entered[0])[0]
        torch.testing.assert_close(rest, output[3:], **EXACT)


def flat_packed(states):
    return [states] if isinstance(states, PackedSequence) else list(states)


def test_states_are_wanted_once():
    with pytest.raises(ValueError, match="return_cell_states: expected False with return_states, which has"):
        fusedlstm.LSTM(3, 4)(torch.zeros(2, 1, 3), return_cell_states=True, return_states=True)


@both_engines
@every_member
@pytest.mark.parametrize("batch_first", [False, True])
def test_padded_left(batch_first, name, backend):
    """As with the padding on the right, moved by hand: results and gradients, with resets and the states asked for."""
    module = member(name, backend, bidirectional=True, batch_first=batch_first)
    lengths = [4, 0, 6, 1]
    right = torch.randn(6, 4, I, dtype=torch.float64)
    resets = torch.rand(6, 4) < 0.3

    def to_left(x):
        return torch.stack([torch.cat([x[n:, b], x[:n, b]]) for b, n in enumerate(lengths)], 1)

    def run(x, resets, side):
        x = x.clone().requires_grad_()
        given = (x.transpose(0, 1), resets.t()) if batch_first else (x, resets)
        output, final, states = module(
            given[0], lengths=torch.tensor(lengths), resets=given[1], padding_side=side, return_states=True
        )
        results = [output.transpose(0, 1) if batch_first else output, *as_tuple(final), *as_tuple(states)]
        torch.manual_seed(1)
        weights = [torch.randn_like(y) for y in results]
        n = 1 + len(as_tuple(final))
        if side == "left":
            weights[0] = to_left(weights[0])
            weights[n:] = [to_left(w.transpose(1, 2)).transpose(1, 2) for w in weights[n:]]
        total = sum((y * w).sum() for y, w in zip(results, weights, strict=True))
        return results, n, torch.autograd.grad(total, (x, *module.parameters()))

    expected, n, grads = run(right, resets, "right")
    found, _, grads_left = run(to_left(right), to_left(resets.unsqueeze(-1)).squeeze(-1), "left")
    expected[0] = to_left(expected[0])
    expected[n:] = [to_left(s.transpose(1, 2)).transpose(1, 2) for s in expected[n:]]
    torch.testing.assert_close(found, expected, **EXACT)
    torch.testing.assert_close(grads_left, (to_left(grads[0]), *grads[1:]), **EXACT)


def test_padding_side_is_checked():
    lstm, x = fusedlstm.LSTM(3, 4), torch.zeros(2, 1, 3)
    with pytest.raises(ValueError, match="padding_side: expected right or left, got 'top'"):
        lstm(x, lengths=torch.tensor([1]), padding_side="top")
    with pytest.raises(ValueError, match="padding_side: expected right without lengths"):
        lstm(x, padding_side="left")


@both_engines
@every_member
@pytest.mark.parametrize("batch_first", [False, True])
def test_jagged_input(batch_first, name, backend):
    """As a padded batch with lengths, an empty sequence among them; the output can be added to the input."""
    module = getattr(fusedlstm, name)(H, H, backend=backend, batch_first=batch_first, dtype=torch.float64)
    parts = [torch.randn(n, H, dtype=torch.float64, requires_grad=True) for n in (3, 0, 5, 1)]
    jagged = torch.nested.as_nested_tensor(parts, layout=torch.jagged)
    output, states, *kept = module(jagged, return_cell_states=len(cells.CELLS[module.cell].states) > 1)
    grads = torch.autograd.grad((output + jagged).values().square().sum(), parts)
    padded, lengths = fusedlstm.sequences.padded_from_jagged(jagged, batch_first=batch_first)
    options = {"lengths": lengths, "return_cell_states": bool(kept)}
    expected, final, *cell_states = module(padded, **options)
    torch.testing.assert_close(states, final, **EXACT)
    for a, b in zip([output, *map_states(kept)], [expected, *map_states(cell_states)], strict=True):
        torch.testing.assert_close(fusedlstm.sequences.padded_from_jagged(a, batch_first=batch_first)[0], b, **EXACT)
    valid = padded + expected
    torch.testing.assert_close(grads, torch.autograd.grad(valid.square().sum(), parts), **EXACT)


def map_states(kept):
    return [c for of in kept for c in as_tuple(of)]


def test_what_a_jagged_input_has_itself():
    jagged = torch.nested.nested_tensor([torch.zeros(2, 3)], layout=torch.jagged)
    for options in ({"lengths": torch.tensor([2])}, {"resets": torch.zeros(2, 1)}, {"return_states": True}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}: expected .* with a nested tensor as input, got"):
            fusedlstm.LSTM(3, 4)(jagged, **options)
    with pytest.raises(ValueError, match="input: expected a dense tensor, or a nested one"):
        fusedlstm.LSTM(3, 4)(torch.nested.nested_tensor([torch.zeros(2, 3)]))
