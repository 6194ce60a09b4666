"""Every layer of the family against a loop by hand, in all combinations of options, and torch.nn's conventions."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn.functional import layer_norm
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fusedlstm
from fusedlstm import cells, engines, functional
from support import assert_accurate
from twins import SEQUENCES, case_id, pairwise

EXACT = {"rtol": 1e-10, "atol": 1e-12}
T, B, I = 5, 4, 3
MEMBERS = {
    "LSTM": (fusedlstm.LSTM, fusedlstm.LSTMCell, {}),
    "GRU": (fusedlstm.GRU, fusedlstm.GRUCell, {}),
    "RNN": (fusedlstm.RNN, fusedlstm.RNNCell, {}),
    "RNN relu": (fusedlstm.RNN, fusedlstm.RNNCell, {"nonlinearity": "relu"}),
    "peephole": (fusedlstm.PeepholeLSTM, fusedlstm.PeepholeLSTMCell, {}),
    "coupled": (fusedlstm.CoupledLSTM, fusedlstm.CoupledLSTMCell, {}),
    "layernorm": (fusedlstm.LayerNormLSTM, fusedlstm.LayerNormLSTMCell, {}),
    "sLSTM": (fusedlstm.SLSTM, fusedlstm.SLSTMCell, {}),
    "reset before": (fusedlstm.ResetBeforeGRU, fusedlstm.ResetBeforeGRUCell, {}),
    "layernorm GRU": (fusedlstm.LayerNormGRU, fusedlstm.LayerNormGRUCell, {}),
}
VECTORS = {  # numbers a unit
    "peephole": {"weight_ci": 1, "weight_cf": 1, "weight_co": 1},
    "layernorm": {"gain_ih": 4, "gain_hh": 4, "gain_c": 1, "bias_c": 1},
    "layernorm GRU": {"gain_ih": 3, "gain_hh": 3},
}
every_member = pytest.mark.parametrize("member", MEMBERS)


def make(member, *args, **options):
    cls, _, more = MEMBERS[member]
    return cls(*args, **more, **options)


def make_cell(member, *args, **options):
    _, cls, more = MEMBERS[member]
    return cls(*args, **more, **options)


def heads_of(member, heads):
    return 1 if member.startswith("layernorm") else heads  # its norms mix the units of all heads


def states_of(hx):
    return (hx,) if isinstance(hx, torch.Tensor) else tuple(hx)


def tree(states):
    return states[0] if len(states) == 1 else tuple(states)


# The equations as the docstrings have them, for one sequence; where torch has the cell, torch's.


def step(member, p, x, states):
    zero = torch.zeros((), dtype=x.dtype)
    weights = [p["weight_ih"], p["weight_hh"], p.get("bias_ih"), p.get("bias_hh")]
    of_torch = {"GRU": torch._VF.gru_cell, "RNN": torch._VF.rnn_tanh_cell, "RNN relu": torch._VF.rnn_relu_cell}
    if member in of_torch:
        return (of_torch[member](x[None], states[0][None], *weights)[0],)
    if member == "LSTM":
        return tuple(s[0] for s in torch._VF.lstm_cell(x[None], [s[None] for s in states], *weights))
    if member == "layernorm":
        preact = p["weight_ih"] @ x
        preact = layer_norm(preact, preact.shape, p["gain_ih"], p.get("bias_ih"))
        preact = preact + layer_norm(p["weight_hh"] @ states[0], preact.shape, p["gain_hh"], p.get("bias_hh"))
        i, f, g, o = preact.chunk(4)
        c = f.sigmoid() * states[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * layer_norm(c, c.shape, p["gain_c"], p["bias_c"]).tanh(), c
    if member == "layernorm GRU":
        a, u = (
            layer_norm(y, y.shape, p[f"gain_{k}"], p.get(f"bias_{k}"))
            for k, y in (("ih", p["weight_ih"] @ x), ("hh", p["weight_hh"] @ states[0]))
        )
        (a_r, a_z, a_n), (u_r, u_z, u_n) = a.chunk(3), u.chunk(3)
        z = (a_z + u_z).sigmoid()
        return ((1 - z) * (a_n + (a_r + u_r).sigmoid() * u_n).tanh() + z * states[0],)
    if member == "reset before":
        a_r, a_z, a_n = (p["weight_ih"] @ x + p.get("bias_ih", zero) + p.get("bias_hh", zero)).chunk(3)
        u_r, u_z, u_n = p["weight_hh"].chunk(3)
        r, z = (a_r + u_r @ states[0]).sigmoid(), (a_z + u_z @ states[0]).sigmoid()
        return ((1 - z) * (a_n + u_n @ (r * states[0])).tanh() + z * states[0],)
    preact = p["weight_ih"] @ x + p.get("bias_ih", zero) + p["weight_hh"] @ states[0] + p.get("bias_hh", zero)
    if member == "peephole":
        i, f, g, o = preact.chunk(4)
        c = states[1]
        i, f = (i + p["weight_ci"] * c).sigmoid(), (f + p["weight_cf"] * c).sigmoid()
        c = f * c + i * g.tanh()
        return (o + p["weight_co"] * c).sigmoid() * c.tanh(), c
    if member == "coupled":
        i, g, o = preact.chunk(3)
        c = (1 - i.sigmoid()) * states[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c
    i, f, g, o = preact.chunk(4)
    _, c, n, m = states
    m = torch.where(n > 0, m, -math.inf)
    log_f = -torch.log1p(torch.exp(-f))
    m_new = torch.maximum(log_f + m, i)
    i, f = torch.exp(i - m_new), torch.exp(log_f + m - m_new)
    c, n = f * c + i * g.tanh(), f * n + i
    return o.sigmoid() * c / n, c, n, m_new


def by_hand(member, module, x, hx, lengths, resets, clip):
    """Output, final states and states beside h of the last layer, of x [T, B, I]; what a reset cuts begins anew."""
    directions, H = 2 if module.bidirectional else 1, module.hidden_size
    finals = [[[None] * x.size(1) for _ in hx[0]] for _ in hx]  # [state][row][sequence]
    for layer in range(module.num_layers):
        rows = [[[torch.zeros(H, dtype=x.dtype)] * directions for _ in range(x.size(1))] for _ in range(T)]
        seen = [
            [[[torch.zeros(H, dtype=x.dtype)] * directions for _ in range(x.size(1))] for _ in range(T)] for _ in hx
        ]
        for d in range(directions):
            suffix = f"_l{layer}" + "_reverse" * d
            p = {
                n.removesuffix(suffix): w for n, w in module.named_parameters() if n.endswith(f"_l{layer}{suffix[3:]}")
            }
            p["weight_hh"] = dense(p["weight_hh"], H)
            for b in range(x.size(1)):
                states = [s[layer * directions + d, b] for s in hx]
                for t in range(lengths[b])[:: -1 if d else 1]:
                    later = t + d
                    if later < lengths[b] and resets[later, b]:
                        states = [torch.zeros_like(s) for s in states]
                    if clip:
                        states = [clipped(s, clip) for s in states]
                    states = step(member, p, x[t, b], states)
                    rows[t][b][d] = states[0]
                    for k, s in enumerate(states):
                        seen[k][t][b][d] = s
                for k, s in enumerate(states):
                    finals[k][layer * directions + d][b] = s
        x = torch.stack([torch.stack([torch.cat(of) for of in row]) for row in rows])
    seen = [torch.stack([torch.stack([torch.cat(of) for of in row]) for row in of_state]) for of_state in seen[1:]]
    return x, [torch.stack([torch.stack(row) for row in of_state]) for of_state in finals], seen


def dense(weight_hh, H):
    """[G*H, DH] -> [G*H, H], differentiable."""
    gates = len(weight_hh) // H
    DH = weight_hh.size(1)
    return torch.cat([torch.block_diag(*gate.split(DH)) for gate in weight_hh.chunk(gates)])


def clipped(x, limit):
    x = x.clone() if x.requires_grad else x.clone().requires_grad_()
    x.register_hook(lambda grad: grad.clamp(-limit, limit))
    return x


FACTORS = {
    "member": tuple(MEMBERS),
    "engine": ("torch", "traced", "reference"),
    "num_layers": (1, 2),
    "bidirectional": (False, True),
    "bias": (True, False),
    "batch_first": (False, True),
    "heads": (1, 2),
    "grad_clip": (None, 0.05),
    "sequence": tuple(SEQUENCES),
    "hx": (True, False),
    "cell_states": (False, True),
    "save": ("gates", "states"),
}
CASES = pairwise(FACTORS)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_equals_a_loop_by_hand(monkeypatch, case):
    """Every result and every gradient, in float64."""
    H, generator = 6, torch.Generator().manual_seed(1)
    names = ("num_layers", "bidirectional", "bias", "batch_first", "grad_clip", "save")
    heads = heads_of(case["member"], case["heads"])
    module = make(case["member"], I, H, **{k: case[k] for k in names}, num_heads=heads, dtype=torch.float64)
    if case["member"].startswith("layernorm"):
        for name, p in module.named_parameters():
            if not name.startswith("weight"):  # else 1 and 0
                nn.init.normal_(p, 0.5)
    module.backend = "reference" if case["engine"] == "reference" else "torch"
    if case["engine"] == "traced":
        monkeypatch.setattr(functional, "_traced", lambda input: True)
    of, packed = cells.CELLS[module.cell], case["sequence"].startswith("packed")
    batch = 1 if case["sequence"] == "unbatched" else B
    rows = case["num_layers"] * (2 if case["bidirectional"] else 1)
    given = SEQUENCES[case["sequence"]]
    lengths = [2, 5, 1, 3] if packed else [2, 5, 0, 3] if "lengths" in given else [T] * batch
    resets = torch.rand(T, batch, generator=generator) < 0.3 if "resets" in given else torch.zeros(T, batch).bool()
    wants_states = case["cell_states"] and len(of.states) > 1

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def as_given(y):
        if case["sequence"] == "unbatched":
            return y.squeeze(1)
        y = y.transpose(0, 1) if case["batch_first"] else y
        return pack_padded_sequence(y, lengths, case["batch_first"], enforce_sorted=False) if packed else y

    def as_found(y):
        if packed:
            return pad_packed_sequence(y, total_length=T)[0]
        return y.unsqueeze(1) if y.dim() == 2 else y.transpose(0, 1) if case["batch_first"] else y

    x, hx = randn(T, batch, I), [randn(rows, batch, H) for _ in of.states]
    if of.name == "slstm":
        hx[2] = hx[2].abs() + 0.5
    if not case["hx"]:
        hx = [torch.zeros_like(s) for s in hx]
    widths = T, batch, H * rows // case["num_layers"]
    grads = [randn(*widths), *[randn(rows, batch, H) for _ in hx], *[randn(*widths) for _ in hx[1:]]]
    found = []
    for by in (module, by_hand):
        module.zero_grad()
        leaves = [y.clone().requires_grad_() for y in (x, *hx)]
        if by is by_hand:
            output, finals, seen = by_hand(
                case["member"], module, leaves[0], leaves[1:], lengths, resets, case["grad_clip"]
            )
        else:
            states = [s.squeeze(1) if case["sequence"] == "unbatched" else s for s in leaves[1:]]
            options = {"lengths": torch.tensor(lengths)} if "lengths" in given else {}
            options |= {"resets": as_given(resets)} if "resets" in given else {}
            output, finals, *seen = module(
                as_given(leaves[0]),
                tree(states) if case["hx"] else None,
                return_cell_states=wants_states,
                **options,
            )
            assert isinstance(output, PackedSequence) is packed
            finals = [s.unsqueeze(1) if s.dim() == 2 else s for s in states_of(finals)]
            output, seen = as_found(output), [as_found(c) for c in (states_of_seen(seen[0]) if seen else ())]
        results = [output, *finals, *(seen if wants_states else ())]
        torch.autograd.backward(results, grads[: len(results)])
        wanted = leaves if case["hx"] else leaves[:1]
        found.append([*results, *(y.grad for y in wanted), *(p.grad for p in module.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def states_of_seen(seen):
    return (seen,) if isinstance(seen, torch.Tensor | PackedSequence) else seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_member
def test_accuracy(member, dtype):
    """The torch engine beside the specification in the same dtype."""
    module = make(member, I, 19, 2, bidirectional=True, dtype=dtype)
    same, exact = (copy.deepcopy(module) for _ in range(2))
    same.backend = exact.backend = "reference"
    exact.double()
    x, lengths = torch.randn(T, B, I).to(dtype), torch.tensor([3, 5, 0, 2])
    found, grads = [], None
    for m in (module, same, exact):
        input = x.detach().clone().to(m.weight_ih_l0.dtype).requires_grad_()
        output, states = m(input, lengths=lengths)
        results = [output, *states_of(states)]
        grads = grads or [torch.randn_like(y) for y in results]
        torch.autograd.backward(results, [g.to(y) for g, y in zip(grads, results, strict=True)])
        found.append([*results, input.grad, *(p.grad for p in m.parameters())])
    for k, (a, b, c) in enumerate(zip(*found, strict=True)):
        assert a.dtype == dtype
        assert_accurate(f"tensor {k}", a.detach(), b.detach(), c.detach())


@every_member
def test_parameters(member):
    """Names and shapes in torch's order, values from torch's range under a seed, and their number."""
    options = {"num_layers": 2, "bidirectional": True}
    torch.manual_seed(3)
    heads = heads_of(member, 4)
    module = make(member, 5, 12, **options, num_heads=heads)
    G = cells.CELLS[module.cell].num_gates
    shapes = {}
    for layer, suffix in ((0, ""), (0, "_reverse"), (1, ""), (1, "_reverse")):
        end = f"_l{layer}{suffix}"
        shapes |= {f"weight_ih{end}": (G * 12, 24 if layer else 5), f"weight_hh{end}": (G * 12, 12 // heads)}
        shapes |= {f"bias_ih{end}": (G * 12,), f"bias_hh{end}": (G * 12,)}
        shapes |= {f"{v}{end}": (n * 12,) for v, n in VECTORS.get(member, {}).items()}
    assert [(k, tuple(v.shape)) for k, v in module.state_dict().items()] == list(shapes.items())
    assert [id(w) for w in module._flat_weights] == [id(w) for w in module.parameters()]
    assert [w for of in module.all_weights for w in of][-1] is [*module.parameters()][-1]
    torch.manual_seed(3)
    for name, weight in module.named_parameters():
        expected = torch.empty_like(weight).uniform_(-(12**-0.5), 12**-0.5)
        if member.startswith("layernorm") and not name.startswith("weight"):
            expected = torch.full_like(weight, name.startswith("gain"))
        assert torch.equal(weight, expected), name
    for other in (module, make(member, 5, 12, bias=False), make_cell(member, 5, 12), make_cell(member, 5, 12, False)):
        assert other.num_parameters() == sum(p.numel() for p in other.parameters())
    assert fusedlstm.LSTM(5, 12, 2, proj_size=3).num_parameters() == sum(
        p.numel() for p in nn.LSTM(5, 12, 2, proj_size=3).parameters()
    )
    for kwargs in ({"device": "meta", "dtype": torch.bfloat16}, {"dtype": torch.float64}):
        for built in (make(member, 5, 12, **kwargs), make_cell(member, 5, 12, **kwargs)):
            assert {p.dtype for p in built.parameters()} == {kwargs["dtype"]}
            assert {p.device.type for p in built.parameters()} == {kwargs.get("device", "cpu")}


@every_member
def test_copies_moves_and_weights_that_are_replaced(member):
    module = make(member, I, 6, 2, bidirectional=True)
    x = torch.randn(T, B, I)
    expected = module(x)[0]
    file = pickle.dumps(module)
    for other in (copy.deepcopy(module), pickle.loads(file), make(member, I, 6, 2, bidirectional=True)):
        other.load_state_dict(module.state_dict())
        assert torch.equal(other(x)[0], expected)
    state = {k: torch.randn_like(v) for k, v in module.state_dict().items()}
    called = torch.func.functional_call(module, state, (x,))[0]
    assert torch.equal(module(x)[0], expected)
    module.double()
    assert module(x.double())[0].dtype == torch.float64
    module.float()
    for name, value in state.items():
        setattr(module, name, nn.Parameter(value))
    torch.testing.assert_close(module(x)[0], called)
    with torch.device("meta"):
        empty = make(member, I, 6, 2, bidirectional=True)
    assert empty(x.to("meta"))[0].shape == expected.shape
    empty.to_empty(device="cpu").load_state_dict(module.state_dict())
    torch.testing.assert_close(empty(x)[0], called)
    normed = parametrizations.weight_norm(module, "weight_hh_l0")
    torch.testing.assert_close(normed(x)[0], called)
    if heads_of(member, 2) == 2:
        assert repr(make(member, 3, 4, num_layers=2, num_heads=2)).endswith("(3, 4, num_layers=2, num_heads=2)")


@pytest.mark.parametrize("options", [{"num_layers": 2}, {"bidirectional": True}], ids=str)
@pytest.mark.parametrize("engine", [*engines.BACKENDS])
@every_member
def test_shapes_on_meta(member, engine, options):
    """Of results and gradients, whatever engine is named: nothing runs there."""

    def outcome(module, x):
        output, states = module(x, lengths=torch.tensor([T, 1, 2], device=x.device))
        found = [output, *(states if isinstance(states, tuple) else (states,))]
        return [*found, *torch.autograd.grad(output.sum(), [*module.parameters()], allow_unused=True)]

    if engine == "triton" and MEMBERS[member][0] is fusedlstm.ResetBeforeGRU:
        with pytest.raises(RuntimeError, match="cannot serve this call: the kernels have no cell"):
            make(member, I, 6, device="meta", backend=engine)(torch.empty(T, 3, I, device="meta"))
        return
    expected = outcome(make(member, I, 6, **options), torch.randn(T, 3, I))
    on_meta = outcome(make(member, I, 6, device="meta", backend=engine, **options), torch.empty(T, 3, I, device="meta"))
    for a, b in zip(on_meta, expected, strict=True):
        assert (a is None) == (b is None) and (a is None or (a.is_meta and a.shape == b.shape))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("heads", [1, 2])
@every_member
def test_cell_loop_equals_layer(member, heads, backend):
    heads = heads_of(member, heads)
    layer = make(member, I, 6, num_heads=heads, backend=backend)
    cell = make_cell(member, I, 6, num_heads=heads, backend=backend)
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})
    x, state, single = torch.randn(T, B, I), None, None
    output, finals = layer(x)
    for t in range(T):
        state, single = cell(x[t], state), cell(x[t, 0], single)
        torch.testing.assert_close(states_of(state)[0], output[t])
    for final, s, one in zip(states_of(finals), states_of(state), states_of(single), strict=True):
        torch.testing.assert_close(s, final[0])
        torch.testing.assert_close(one, final[0, 0])


@pytest.mark.parametrize(
    ("member", "training"),
    [
        *((member, False) for member in MEMBERS),
        *((member, True) for member in ("GRU", "peephole", "sLSTM", "reset before", "layernorm GRU")),
    ],
)
def test_cells_compile_without_a_graph_break(member, training):
    """The layers are compiled in test_graphs.py."""
    torch.compiler.reset()
    cell, x = make_cell(member, I, 6), torch.randn(B, I)
    found = []
    for f in (cell, torch.compile(cell, fullgraph=True, backend="aot_eager")):
        with torch.set_grad_enabled(training):
            cell.zero_grad()
            results = torch.utils._pytree.tree_leaves(f(x))
        if training:
            sum(y.square().sum() for y in results).backward()
            results += [p.grad for p in cell.parameters()]
        found.append(results)
    torch.testing.assert_close(*found)


@every_member
def test_double_backward(member):
    """Through our loop, as through the specification."""
    module = make(member, I, 4, dtype=torch.float64, backend="torch")
    x, lengths = torch.randn(T, B, I, dtype=torch.float64), torch.tensor([3, 5, 0, 2])
    found = []
    for backend in ("torch", "reference"):
        module.backend = backend
        module.zero_grad()
        input = x.clone().requires_grad_()
        output, _ = module(input, lengths=lengths)
        (grad,) = torch.autograd.grad(output.square().sum(), input, create_graph=True)
        grad.square().sum().backward()
        found.append([input.grad, *(p.grad for p in module.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@every_member
def test_autocast(member):
    module, cell = make(member, I, 6, 2), make_cell(member, I, 6)
    with torch.autocast("cpu", torch.bfloat16):
        output, states = module(torch.randn(T, B, I))
        stepped = cell(torch.randn(B, I))
    assert {y.dtype for y in (output, *states_of(states), *states_of(stepped))} == {torch.bfloat16}
    (output.float().sum() + states_of(stepped)[0].float().sum()).backward()
    assert all(p.grad.dtype == torch.float32 for m in (module, cell) for p in m.parameters())


@every_member
def test_streams(member):
    """Chunks equal one run, and some sequences begin anew."""
    module = make(member, I, 6, 2, dtype=torch.float64)
    x, which = torch.randn(T, B, I, dtype=torch.float64), torch.tensor([True, False, False, True])
    stream = fusedlstm.Stream(module)
    torch.testing.assert_close(torch.cat([stream(c) for c in x.split([1, 3, 1])]), module(x)[0], **EXACT)
    stream.reset()
    first = stream(x[:3])
    stream.reset(which)
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[3] = which
    torch.testing.assert_close(torch.cat([first, stream(x[3:])]), module(x, resets=resets)[0], **EXACT)


def test_dropout_between_layers():
    """At 1 the second layer sees zeros; in evaluation nothing changes."""
    x = torch.randn(T, B, I)
    for member in ("GRU", "peephole"):
        for backend in ("torch", "reference"):
            module = make(member, I, 6, 2, dropout=1.0, backend=backend)
            second = make(member, 6, 6)
            second.load_state_dict({n[:-1] + "0": p for n, p in module.named_parameters() if n.endswith("1")})
            torch.testing.assert_close(module(x)[0], second(torch.zeros(T, B, 6))[0])
            plain = make(member, I, 6, 2)
            plain.load_state_dict(module.state_dict())
            torch.testing.assert_close(module.eval()(x)[0], plain(x)[0])


class MGU(fusedlstm.Recurrent):
    cell = "mgu"


class MGUCell(fusedlstm.RecurrentCell):
    cell = "mgu"


class MGUEquations:
    """h' = (1 - f) h + f tanh(x + f h): a cell of a user's own, with one gate beside the candidate."""

    @staticmethod
    def step(preact_x, preact_h, state, vectors, drop):
        f = torch.sigmoid(preact_x[0] + preact_h[0])
        gates = (torch.tanh(preact_x[1] + preact_h[1]), f)
        return gates[::-1], MGUEquations.update(gates[::-1], state, drop)

    @staticmethod
    def update(gates, state_prev, drop):
        f, n = gates
        return ((1 - f) * state_prev[0] + f * (n * drop),)

    @staticmethod
    def step_backward(gates, state_prev, state, dstate, vectors, drop):
        f, n = gates
        (dh,) = dstate
        dpreact_f = dh * (n * drop - state_prev[0]) * f * (1 - f)
        return (dpreact_f, dh * f * drop * (1 - n * n)), (dh * (1 - f),)


def test_a_cell_of_a_users_own(monkeypatch):
    """Named, with two gates and equations: that is all."""
    monkeypatch.setitem(cells.CELLS, "mgu", cells.Cell("mgu", gates=("f", "n"), states=("h",)))
    monkeypatch.setitem(
        cells.cell.EQUATIONS, "mgu", cells.Equations(MGUEquations.step, MGUEquations.step_backward, MGUEquations.update)
    )
    module = MGU(I, 6, 2, bidirectional=True, dtype=torch.float64, num_heads=2)
    assert module.weight_ih_l0.shape == (12, I) and repr(module).startswith("MGU(3, 6")
    lengths, resets = torch.tensor([3, 5, 0, 2]), torch.rand(T, B) < 0.3
    x, found = torch.randn(T, B, I, dtype=torch.float64), []
    for backend in ("auto", "reference"):
        module.backend = backend
        module.zero_grad()
        output, h_n = module(x, lengths=lengths, resets=resets)
        (output.square().sum() + h_n.sum()).backward()
        found.append([output, h_n, *(p.grad for p in module.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    cell, layer = MGUCell(I, 6), MGU(I, 6)
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})
    torch.testing.assert_close(cell(x[0].float()), layer(x[:1].float())[1][0])
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    module.backend = "triton"
    with pytest.raises(RuntimeError, match="cannot serve this call: the kernels have no cell 'mgu', they have lstm, "):
        module.float()(x.float())
