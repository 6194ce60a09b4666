"""What `fusedlstm.inspect` measures, against the layers' own outputs, Jacobians of autograd, and theory."""

import itertools

import pytest
import torch
from torch import nn

import fusedlstm
from fusedlstm import inspect, sequences
from fusedlstm.cells import CELLS

T, B, I, H = 6, 4, 3, 6
MEMBERS = {
    "lstm": fusedlstm.LSTM,
    "gru": fusedlstm.GRU,
    "rnn": fusedlstm.RNN,
    "relu": lambda *sizes, **options: fusedlstm.RNN(*sizes, nonlinearity="relu", **options),
    "peephole": fusedlstm.PeepholeLSTM,
    "coupled": fusedlstm.CoupledLSTM,
    "slstm": fusedlstm.SLSTM,
    "layernorm": fusedlstm.LayerNormLSTM,
    "reset before": fusedlstm.ResetBeforeGRU,
    "layernorm GRU": fusedlstm.LayerNormGRU,
}
GRUS = ("gru", "reset before", "layernorm GRU")
# Every option of a layer that a step depends on, for the members that have it.
OPTIONS = {
    "plain": ({}, MEMBERS),
    "zoneout": ({"zoneout": (0.1, 0.3), "candidate_dropout": 0.5, "dropout": 0.5}, MEMBERS.keys() - {"slstm"}),
    "heads": ({"num_heads": 2}, MEMBERS.keys() - {"layernorm", "layernorm GRU"}),
    "projection": ({"proj_size": 2}, ["lstm"]),
    "without biases": ({"bias": False}, MEMBERS),
}
CASES = [(member, name) for name, (_, members) in OPTIONS.items() for member in sorted(members)]
LENGTHS = torch.tensor([6, 3, 0, 5])


def make(member, num_layers=2, bidirectional=True, **options):
    torch.manual_seed(0)
    sizes = {"num_layers": num_layers, "bidirectional": bidirectional, "dtype": torch.float64}
    options = {k: v for k, v in options.items() if k != "dropout" or num_layers > 1}
    module = MEMBERS[member](I, H, **sizes, **options)
    for parameter in module.parameters():  # gains and vectors too
        nn.init.normal_(parameter, std=0.5)
    return module


def batch_of(module, rows=None):
    """Input, states and resets; the states of an SLSTM have a positive n."""
    x, resets = torch.randn(T, B, I, dtype=torch.float64), torch.rand(T, B) < 0.2
    rows = rows or module.num_layers * (2 if module.bidirectional else 1)
    states = [torch.rand(rows, B, H, dtype=torch.float64) for _ in CELLS[module.cell].states]
    states[0] = states[0][..., : module.proj_size or H]
    return x, states[0] if len(states) == 1 else tuple(states), resets


def all_states(module, *arguments, **options):
    """The states of every step by name, each [T, L * D, B, H], of the module in evaluation."""
    found = module.eval()(*arguments, return_states=True, **options)[2]
    return dict(zip(CELLS[module.cell].states, base_states(found), strict=True))


def base_states(states):
    return (states,) if isinstance(states, torch.Tensor) else states


def places(module):
    return itertools.product(range(module.num_layers), range(2 if module.bidirectional else 1))


@pytest.mark.parametrize(("member", "case"), CASES)
@pytest.mark.parametrize("side", ["right", "left"])
def test_states_are_those_of_the_layer(member, case, side):
    module = make(member, **OPTIONS[case][0])
    x, hx, resets = batch_of(module)
    options = {"lengths": LENGTHS, "resets": resets, "padding_side": side}
    expected = all_states(module, x, hx, **options)
    module.train()  # makes no difference
    steps = torch.arange(T).unsqueeze(1)
    valid = steps < LENGTHS if side == "right" else steps >= T - LENGTHS
    for layer, direction in places(module):
        trace = inspect.gates(module, x, hx, layer=layer, direction=direction, **options)
        assert [*trace.states] == [*expected] and [*trace.gates] == [*CELLS[module.cell].gates]
        assert torch.equal(trace.valid, valid)
        for name, value in trace.states.items():
            torch.testing.assert_close(value, expected[name][:, 2 * layer + direction], msg=name)
        for value in (*trace.gates.values(), trace.keep):
            assert value.shape == (T, B, H) and not value.requires_grad and (value[~valid] == 0).all()


EQUATIONS = {
    "lstm": lambda s, h, c: {"c": s.f * c + s.i * s.g},
    **dict.fromkeys(GRUS, lambda s, h, c: {"h": (1 - s.z) * s.n + s.z * h}),
    "rnn": lambda s, h, c: {"h": s.gates["h"]},
    "relu": lambda s, h, c: {"h": s.gates["h"]},
    "peephole": lambda s, h, c: {"c": s.f * c + s.i * s.g, "h": s.o * s.c.tanh()},
    "coupled": lambda s, h, c: {"c": (1 - s.i) * c + s.i * s.g, "h": s.o * s.c.tanh()},
    "slstm": lambda s, h, c: {"c": s.keep * c + s.i * s.g, "h": s.o * s.c / s.n},
    "layernorm": lambda s, h, c: {"c": s.f * c + s.i * s.g},
}
KEEPS = {
    "lstm": lambda s: s.f,
    **dict.fromkeys(GRUS, lambda s: s.z),
    "rnn": lambda s: torch.zeros_like(s.h),
    "relu": lambda s: torch.zeros_like(s.h),
    "peephole": lambda s: s.f,
    "coupled": lambda s: 1 - s.i,
    "layernorm": lambda s: s.f,
}


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("direction", [0, 1])
def test_gates_have_the_names_of_the_equations(member, direction):
    """The equations in the docstrings of the classes hold for what has their names."""
    module = make(member, num_layers=1)
    x, hx, _ = batch_of(module)
    trace = inspect.gates(module, x, hx, direction=direction)
    initial = dict(zip(trace.states, (s[direction] for s in base_states(hx)), strict=True))

    def before(name):
        seq = trace.states[name].flip(0) if direction == 1 else trace.states[name]
        seq = torch.cat([initial[name].unsqueeze(0), seq[:-1]])
        return seq.flip(0) if direction == 1 else seq

    h_prev, c_prev = before("h"), before("c") if "c" in trace.states else None
    for name, value in EQUATIONS[member](trace, h_prev, c_prev).items():
        torch.testing.assert_close(trace.states[name], value)
    if member in KEEPS:
        torch.testing.assert_close(trace.keep, KEEPS[member](trace))
    else:  # of an SLSTM, from log f and m
        torch.testing.assert_close(trace.keep, trace.f * torch.exp(before("m") - trace.m))
    # One sigmoid by itself, because gates could be swapped together with their weights.
    gate = {"gru": "z", "reset before": "z", "coupled": "i"} | dict.fromkeys(("rnn", "relu"), "")
    gate = "" if member.startswith("layernorm") else gate.get(member, "f")
    if gate:
        row, suffix = CELLS[module.cell].gates.index(gate), "_l0_reverse" if direction else "_l0"
        w, u, b, d = (
            getattr(module, f"{name}{suffix}")[row * H : (row + 1) * H]
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        preact = x @ w.t() + h_prev @ u.t() + b + d
        if member == "peephole":
            preact = preact + getattr(module, f"weight_cf{suffix}") * c_prev
        torch.testing.assert_close(trace.gates[gate], torch.sigmoid(preact).detach())


@pytest.mark.parametrize("member", ["lstm", "gru", "slstm"])
def test_every_form_of_a_batch_is_time_major(member):
    module = make(member)
    x, hx, resets = batch_of(module)
    lengths = torch.tensor([4, 6, 1, 3])
    place = {"layer": 1, "direction": 1}
    expected = inspect.gates(module, x, hx, lengths=lengths, resets=resets, **place)
    packed, packed_resets = (sequences.packed_from_padded(s, lengths) for s in (x, resets.unsqueeze(-1)))
    packed_resets = packed_resets._replace(data=packed_resets.data.squeeze(-1))
    found = {"packed": inspect.gates(module, packed, hx, resets=packed_resets, **place)}
    module.batch_first = True
    first = x.transpose(0, 1)
    found["batch_first"] = inspect.gates(module, first, hx, lengths=lengths, resets=resets.t(), **place)
    for form, trace in found.items():
        for name, value in (expected.states | expected.gates | {"keep": expected.keep}).items():
            torch.testing.assert_close(getattr(trace, name), value, msg=f"{form}: {name}")
    jagged = sequences.jagged_from_padded(first, lengths, batch_first=True)
    without = inspect.gates(module, first, hx, lengths=lengths, **place)
    torch.testing.assert_close(inspect.gates(module, jagged, hx, **place).h, without.h)
    one = [s[:, 1] for s in base_states(hx)]
    alone = inspect.gates(module, first[1], one[0] if len(one) == 1 else tuple(one), resets=resets[:, 1], **place)
    torch.testing.assert_close(alone.h, expected.h[:, 1:2])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_layers_of_torch(kind):
    torch.manual_seed(0)
    module, x = kind(I, H, 2, bidirectional=True, dtype=torch.float64), torch.randn(T, B, I, dtype=torch.float64)
    trace = inspect.gates(module, x, layer=1, direction=1)
    assert type(module) is kind
    torch.testing.assert_close(trace.h, module(x)[0][..., H:].detach())


def test_an_empty_batch():
    module, x = make("lstm"), torch.randn(T, 0, I, dtype=torch.float64)
    trace, flow = inspect.gates(module, x), inspect.gradient_flow(module, x)
    assert trace.c.shape == (T, 0, H) and flow.norms["c"].shape == (T, 0)
    assert flow.by_distance("c").isnan().all()


def test_half_precision_is_traced_in_float32():
    module = fusedlstm.LSTM(I, H, dtype=torch.bfloat16)
    x = torch.randn(T, B, I).bfloat16()
    trace, flow = inspect.gates(module, x), inspect.gradient_flow(module, x)
    assert trace.c.dtype == torch.float32 and flow.norms["c"].dtype == torch.float64
    torch.testing.assert_close(trace.h, inspect.gates(module.float(), x.float()).h)


def test_errors():
    module, x = fusedlstm.LSTM(I, H), torch.randn(T, B, I)
    for function in (inspect.gates, inspect.gradient_flow):
        with pytest.raises(TypeError, match=r"module: expected a layer of fusedlstm, or an LSTM, GRU or RNN of torch"):
            function(nn.Linear(I, H), x)
        with pytest.raises(ValueError, match="layer: expected 0 to 0, got 1"):
            function(module, x, layer=1)
        with pytest.raises(ValueError, match="direction: expected 0 to 0, got 1"):
            function(module, x, direction=1)
        with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size"):
            function(module, x[..., :2])
        with pytest.raises(ValueError, match="lengths: expected 0 to 6, got 7"):
            function(module, x, lengths=torch.tensor([7, 1, 1, 1]))
    with pytest.raises(ValueError, match="probes: expected at least 1, got 0"):
        inspect.gradient_flow(module, x, probes=0)
    with pytest.raises(AttributeError, match="q: expected one of i, f, g, o, h, c"):
        _ = inspect.gates(module, x).q
    with pytest.raises(ValueError, match="loader: expected at least one step, got none"):
        inspect.saturation(module, [])


# Gradients through time.


@pytest.mark.parametrize(("member", "case"), CASES)
@pytest.mark.parametrize("direction", [0, 1])
def test_norms_are_those_of_jacobians(member, case, direction):
    """By `torch.autograd.functional.jacobian`, from what the layer itself does with the rest of each sequence."""
    module = make(member, **OPTIONS[case][0]).eval()
    x, hx, resets = batch_of(module)
    options = {"lengths": LENGTHS, "resets": resets}
    flow = inspect.gradient_flow(module, x, hx, layer=1, direction=direction, **options)
    # The upper layer by itself, in one direction, reads the states of the lower one.
    lower, own = (
        all_states(module, x, hx, **options),
        make(member, num_layers=1, bidirectional=True, **OPTIONS[case][0]),
    )
    lower_h = torch.cat([lower["h"][:, 0], lower["h"][:, 1]], -1)
    seqs = [states[:, 2 + direction] for states in lower.values()]
    weights = {name.replace("_l1", "_l0"): p for name, p in module.named_parameters() if "_l1" in name}
    own.input_size = lower_h.size(-1)
    for name, value in weights.items():
        setattr(own, name, nn.Parameter(value))
    own._init_flat_weights()
    own.eval()
    for b, t in itertools.product(range(B), range(T)):
        length = int(LENGTHS[b])
        rest = slice(t + 1, length) if direction == 0 else slice(0, t)
        steps = length - 1 - t if direction == 0 else t
        if t >= length:
            assert flow.distance[t, b] == -1 and all(norm[t, b] == 0 for norm in flow.norms.values())
            continue
        assert flow.distance[t, b] == steps
        for k, name in enumerate(flow.norms):

            def last(state, k=k, b=b, t=t, rest=rest):
                given = [seq[t : t + 1, b : b + 1].expand(2, 1, -1).clone() for seq in seqs]
                given[k] = state.expand(2, 1, -1)
                given = given[0] if len(given) == 1 else tuple(given)
                _, finals = own(lower_h[rest, b : b + 1], given, resets=resets[rest, b : b + 1])
                return base_states(finals)[k][direction, 0]

            at = seqs[k][t, b]
            if steps == 0:
                expected = 1.0
            elif direction == 1 and resets[t, b]:
                expected = 0.0
            else:
                jacobian = torch.autograd.functional.jacobian(last, at)
                expected = float(jacobian.norm()) / len(at) ** 0.5
            torch.testing.assert_close(float(flow.norms[name][t, b]), expected, rtol=1e-6, atol=1e-12)


def test_padding_on_the_left_moves_the_norms():
    module = make("lstm")
    x, hx, resets = batch_of(module)
    flow = inspect.gradient_flow(module, x, hx, lengths=LENGTHS, resets=resets, layer=1)
    moved = [torch.stack([s[:, b].roll(T - int(n), 0) for b, n in enumerate(LENGTHS)], 1) for s in (x, resets)]
    options = {"lengths": LENGTHS, "resets": moved[1], "padding_side": "left"}
    left = inspect.gradient_flow(module, moved[0], hx, layer=1, **options)
    for name in (*flow.norms, "kept"):
        torch.testing.assert_close(left.by_distance(name), flow.by_distance(name), equal_nan=True)
        norm = left.kept if name == "kept" else left.norms[name]
        assert (norm[-1, LENGTHS > 0] == 1).all() and norm[0, 1] == 0


def test_probes_estimate_the_norms():
    module = make("lstm", num_layers=1, bidirectional=False)
    x, hx, _ = batch_of(module)
    state = torch.get_rng_state()
    exact, estimate = inspect.gradient_flow(module, x, hx), inspect.gradient_flow(module, x, hx, probes=4000)
    assert torch.equal(torch.get_rng_state(), state)
    for name, norm in exact.norms.items():
        # The standard deviation of a square is below sqrt(2 / 4000) = 2 % of it, that of a norm below 1.2 %.
        assert ((estimate.norms[name] - norm).abs() <= 0.06 * norm).all()
    assert torch.equal(exact.kept, estimate.kept)


def test_an_lstm_without_recurrent_weights_hands_on_what_its_forget_gates_keep():
    """Then d c_T / d c_t is diagonal: the product of f. At 200 steps it is below what float32 can hold."""
    torch.manual_seed(0)
    lstm, x = fusedlstm.LSTM(I, H), torch.randn(200, 2, I)
    with torch.no_grad():
        lstm.weight_hh_l0.zero_()
    flow, f = inspect.gradient_flow(lstm, x), inspect.gates(lstm, x).f.double()
    ahead = torch.cat([f[1:], torch.ones_like(f[:1])])
    product = ahead.flip(0).cumprod(0).flip(0)  # [T, B, H]
    expected = product.square().mean(-1).sqrt()
    assert 0 < float(expected[0].max()) < torch.finfo(torch.float32).tiny
    torch.testing.assert_close(flow.norms["c"], expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(flow.kept, expected, rtol=1e-4, atol=0)
    assert (flow.norms["h"][:-1] == 0).all() and (flow.norms["h"][-1] == 1).all()


@pytest.mark.parametrize("member", ["lstm", *GRUS, "rnn", "coupled", "layernorm", "slstm"])
def test_without_recurrent_weights_the_memory_hands_on_what_is_kept(member):
    """With zoneout, lengths and resets, in both directions."""
    module = make(member, num_layers=1, **({} if member == "slstm" else {"zoneout": (0.2, 0.3)}))
    with torch.no_grad():
        module.weight_hh_l0.zero_()
        module.weight_hh_l0_reverse.zero_()
    x, hx, resets = batch_of(module)
    for direction in (0, 1):
        flow = inspect.gradient_flow(module, x, hx, direction=direction, lengths=LENGTHS, resets=resets)
        torch.testing.assert_close(flow.norms["c" if "c" in flow.norms else "h"], flow.kept)
        assert 0 < flow.by_distance("kept")[1] < 1


@pytest.mark.parametrize("radius", [0.9, 1.0, 1.1])
def test_an_orthogonal_rnn_decays_by_its_radius(radius):
    """Around zero, where tanh is the identity, the Jacobian is the recurrent weight to the power of the distance."""
    torch.manual_seed(0)
    rnn = fusedlstm.RNN(I, H, bias=False, init=lambda module: fusedlstm.inits.orthogonal_(module, radius))
    flow = inspect.gradient_flow(rnn, torch.zeros(200, 1, I))
    expected = torch.tensor([radius**k for k in range(200)], dtype=torch.float64)
    torch.testing.assert_close(flow.by_distance("h"), expected, rtol=1e-3, atol=0)
    assert flow.per_step("h") == pytest.approx(radius, rel=1e-5)
    assert (flow.by_distance("kept")[1:] == 0).all()


def test_untrained_layers_forget_as_is_known():
    """Of 200 steps with random input, an RNN keeps less than an LSTM, whose c decays about as its forget gates say."""
    torch.manual_seed(0)
    x = torch.randn(200, 2, 8)
    rnn, lstm = (inspect.gradient_flow(kind(8, 16), x, probes=8) for kind in (fusedlstm.RNN, fusedlstm.LSTM))
    open_lstm = inspect.gradient_flow(fusedlstm.LSTM(8, 16, init=fusedlstm.inits.forget_bias_), x, probes=8)
    assert rnn.per_step("h") < 0.65 < open_lstm.per_step("c") < 1
    assert lstm.per_step("c") < open_lstm.per_step("c") - 0.1
    for flow in (lstm, open_lstm):
        assert abs(flow.per_step("c") - flow.per_step("kept")) < 0.12


def test_by_distance_is_the_mean_of_the_sequences_that_are_long_enough():
    module, x = make("gru", num_layers=1), torch.randn(T, 3, I, dtype=torch.float64)
    flow = inspect.gradient_flow(module, x, lengths=torch.tensor([4, 2, 0]), direction=0)
    norm = flow.norms["h"]
    expected = [(norm[3, 0] + norm[1, 1]) / 2, (norm[2, 0] + norm[0, 1]) / 2, norm[1, 0], norm[0, 0]]
    torch.testing.assert_close(flow.by_distance("h")[:4], torch.stack(expected))
    assert flow.by_distance("h")[4:].isnan().all()


# Units.


def constant(module, **biases):
    """The gates by name have a preactivation each, per unit; all weights are zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        for name, values in biases.items():
            row = CELLS[module.cell].gates.index(name)
            module.bias_ih_l0[row * H : (row + 1) * H] = torch.tensor(values)
    return module


def test_idle_units_of_an_lstm():
    f, i = [9.0, 9, -9, -9, 0, 0], [9.0, -9, 9, -9, 0, -9]
    lstm = constant(fusedlstm.LSTM(I, H), f=f, i=i)
    found = inspect.saturation(lstm, [torch.randn(T, B, I), (torch.randn(2, B, I), "label")])
    units = found.units[0, 0]
    assert units.shut["f"].tolist() == [0, 0, 1, 1, 0, 0] and units.open["f"].tolist() == [1, 1, 0, 0, 0, 0]
    assert units.idle["always keep"].tolist() == [True, True, False, False, False, False]
    assert units.idle["always forget"].tolist() == [False, False, True, True, False, False]
    assert units.idle["never write"].tolist() == [False, True, False, True, False, True]
    text = str(found)
    assert "0      f     33.3%      33.3%" in text and "0      2 of 6       2 of 6         3 of 6" in text


def test_idle_units_of_the_others():
    z = [9.0, -9, 0, 9, -9, 0]
    x = [torch.randn(T, B, I)]
    units = inspect.saturation(constant(fusedlstm.GRU(I, H), z=z), x).units[0, 0]
    assert units.idle["always keep"].tolist() == units.idle["never write"].tolist() == [v > 0 for v in z]
    assert units.idle["always forget"].tolist() == [v < 0 for v in z]
    units = inspect.saturation(constant(fusedlstm.CoupledLSTM(I, H), i=z), x).units[0, 0]
    assert units.idle["always keep"].tolist() == units.idle["never write"].tolist() == [v < 0 for v in z]
    units = inspect.saturation(constant(fusedlstm.RNN(I, H), h=z), x).units[0, 0]
    assert units.idle["always saturated"].tolist() == [v != 0 for v in z]
    assert units.idle["always zero"].tolist() == [v == 0 for v in z]
    assert units.open["|h|"].tolist() == [float(v != 0) for v in z]
    relu = constant(fusedlstm.RNN(I, H, nonlinearity="relu"), h=z)
    assert inspect.saturation(relu, x).units[0, 0].idle["always zero"].tolist() == [v <= 0 for v in z]


def test_a_unit_is_idle_if_it_is_so_in_every_batch():
    lstm = constant(fusedlstm.LSTM(I, H), f=[9.0, -9, 9, -9, 9, -9])
    with torch.no_grad():
        lstm.weight_ih_l0[H : H + 2] = 9.0  # the forget gates of the first two units follow the input
    ones = torch.ones(T, B, I)
    for loader in ([ones, -ones], [-ones, ones]):
        idle = inspect.saturation(lstm, loader).units[0, 0].idle
        assert idle["always keep"].tolist() == [False, False, True, False, True, False]
        assert idle["always forget"].tolist() == [False, False, False, True, False, True]


def test_shares_are_those_of_the_steps():
    """Over several batches, with every layer and direction, and without padding."""
    module = make("layernorm")
    padded, lengths = torch.randn(T, B, I, dtype=torch.float64), torch.tensor([6, 2, 1, 5])
    dense = torch.randn(3, 2, I, dtype=torch.float64)
    found = inspect.saturation(module, [sequences.packed_from_padded(padded, lengths), [dense, 7]])
    assert [*found.units] == [*places(module)]
    for (layer, direction), units in found.units.items():
        place = {"layer": layer, "direction": direction}
        first = inspect.gates(module, padded, lengths=lengths, **place)
        rows = torch.cat([first.i[first.valid], inspect.gates(module, dense, **place).i.flatten(0, 1)])
        torch.testing.assert_close(units.shut["i"], (rows < 0.1).double().mean(0))
        torch.testing.assert_close(units.open["i"], (rows > 0.9).double().mean(0))
        assert torch.equal(units.idle["never write"], (rows < 0.1).all(0))
    assert "1 reverse" in str(found)


# Pictures. They are looked at by eye; these tests look at what they draw.


def test_gates_are_drawn_as_they_are():
    trace = inspect.gates(fusedlstm.LSTM(I, H, dtype=torch.float64), torch.randn(T, B, I, dtype=torch.float64))
    figure = inspect.plot_gates(trace, sample=1, period=2)
    panels = {axes.get_title()[-2]: axes for axes in figure.axes if axes.get_title()}
    assert sorted(panels) == sorted("ifgohc")
    drawn = {name: torch.from_numpy(axes.images[0].get_array().data.copy()) for name, axes in panels.items()}  # [H, T]
    for name, values in drawn.items():
        expected = getattr(trace, name)[:, 1].t().float()
        torch.testing.assert_close(values.sort(0).values, expected.sort(0).values)
    # Units whose cell state moves early are on top.
    moves = drawn["c"].double().diff(dim=1, prepend=torch.zeros(H, 1, dtype=torch.float64)).abs()
    mean_step = (moves * torch.arange(T)).sum(1) / moves.sum(1)
    assert (mean_step.diff() >= 0).all()
    # Every unit is in the same row of all panels.
    o, c, h = (drawn[name].double() for name in "och")
    torch.testing.assert_close(o * torch.tanh(c), h, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("member", "names"), [("gru", "rznh"), ("rnn", "h"), ("slstm", "ifgocnmh"), ("coupled", "igoch")]
)
def test_gates_of_the_others_are_drawn_once(member, names):
    trace = inspect.gates(make(member), torch.randn(T, B, I, dtype=torch.float64), lengths=torch.tensor([6, 2, 0, 1]))
    figure = inspect.plot_gates(trace, sample=1)
    assert [axes.get_title()[-2] for axes in figure.axes if axes.get_title()] == [*names]
    assert all(axes.images[0].get_array().shape == (H, 2) for axes in figure.axes if axes.get_title())


def test_a_projected_h_has_units_of_its_own():
    figure = inspect.plot_gates(inspect.gates(make("lstm", proj_size=2), torch.randn(T, B, I, dtype=torch.float64)))
    shown = {axes.get_title(): axes.get_ylim() for axes in figure.axes if axes.get_title()}
    assert sum("projected" in title for title in shown) == 1
    assert all(limits == ((2, 0) if "projected" in title else (H, 0)) for title, limits in shown.items())


def test_gradient_flow_is_drawn_as_it_is():
    module, x = make("lstm"), torch.randn(T, B, I, dtype=torch.float64)
    flows = {f"layer {k}": inspect.gradient_flow(module, x, layer=k) for k in range(2)}
    figure = inspect.plot_gradient_flow(flows)
    for panel, (title, flow) in zip(figure.axes, flows.items(), strict=True):
        assert panel.get_title() == title and panel.get_yscale() == "log"
        drawn = [torch.as_tensor(line.get_ydata()) for line in panel.lines[1:]]  # the first is at 1
        for values, name in zip(drawn, ("h", "c", "kept"), strict=True):
            torch.testing.assert_close(values, flow.by_distance(name))
    alone = inspect.plot_gradient_flow(inspect.gradient_flow(make("rnn"), x))
    assert len(alone.axes) == 1 and len(alone.axes[0].lines) == 2  # no product of gates that are none


def test_saturation_is_drawn_as_it_is():
    found = inspect.saturation(make("gru"), [torch.randn(T, B, I, dtype=torch.float64)])
    figure = inspect.plot_saturation(found)
    assert len(figure.axes) == 4 * 2
    panel, units = figure.axes[1], found.units[0, 0]  # z of the first layer
    shut, between, opened = (torch.as_tensor(patch.get_data().values) for patch in panel.patches)
    torch.testing.assert_close(shut.sort().values, units.shut["z"].sort().values)
    torch.testing.assert_close((opened - between).sort().values, units.open["z"].sort().values)
    torch.testing.assert_close(opened, torch.ones_like(opened))
