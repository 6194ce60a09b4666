"""inits.py: which biases and weights change, to what, and that a constructor does what the functions do."""

import copy
import functools
import pickle
import re

import pytest
import torch
from torch import nn

import fusedlstm
from fusedlstm import inits

OPTIONS = {"num_layers": 2, "bidirectional": True}
KEEPING = {  # a layer or cell, the gate that forgets, in which direction, and the gate that takes in
    "LSTM": (lambda **o: fusedlstm.LSTM(5, 8, **OPTIONS, **o), 1, 1, 0),
    "peephole": (lambda **o: fusedlstm.PeepholeLSTM(5, 8, **OPTIONS, **o), 1, 1, 0),
    "sLSTM": (lambda **o: fusedlstm.SLSTM(5, 8, **OPTIONS, **o), 1, 1, 0),
    "coupled": (lambda **o: fusedlstm.CoupledLSTM(5, 8, **OPTIONS, **o), 0, -1, 0),
    "GRU": (lambda **o: fusedlstm.GRU(5, 8, **OPTIONS, **o), 1, 1, None),
    "reset before": (lambda **o: fusedlstm.ResetBeforeGRU(5, 8, **OPTIONS, **o), 1, 1, None),
    "layernorm GRU": (lambda **o: fusedlstm.LayerNormGRU(5, 8, **OPTIONS, **o), 1, 1, None),
    "GRUCell": (lambda **o: fusedlstm.GRUCell(5, 8, **o), 1, 1, None),
    "LSTMCell": (lambda **o: fusedlstm.LSTMCell(5, 8, **o), 1, 1, 0),
}
every_keeping = pytest.mark.parametrize(("make", "gate", "sign", "takes"), KEEPING.values(), ids=KEEPING)


def biases(module):
    """bias_ih and bias_hh of every layer and direction, [G, H] each."""
    named = dict(module.named_parameters())
    pairs = [(b, named[n.replace("_ih", "_hh")]) for n, b in named.items() if n.startswith("bias_ih")]
    return [tuple(b.detach().unflatten(0, (-1, 8)) for b in pair) for pair in pairs]


def changed(before, after):
    """The names of parameters that differ."""
    return {n for (n, a), b in zip(before.items(), after.values(), strict=True) if not torch.equal(a, b)}


@pytest.mark.parametrize("cls", [fusedlstm.LSTM, fusedlstm.GRUCell])
def test_what_a_pickle_cannot_hold(cls, tmp_path):
    """The parameters are all there, copies draw anew as before, and what was loaded says what it lacks."""
    module = cls(3, 4, init=[lambda m: nn.init.ones_(next(m.parameters())), inits.orthogonal_])
    torch.save(module, tmp_path / "module.pt")
    loaded = [pickle.loads(pickle.dumps(module)), torch.load(tmp_path / "module.pt", weights_only=False)]
    loaded.append(pickle.loads(pickle.dumps(loaded[0])))
    for other in loaded:
        assert all(torch.equal(a, b) for a, b in zip(other.parameters(), module.parameters(), strict=True))
        assert repr(other) == repr(module)
        with pytest.raises(RuntimeError, match="init: expected functions that a pickle can hold, got <lambda>, which"):
            other.reset_parameters()
        other.init = inits.orthogonal_
        other.reset_parameters()
    for copied in (copy.copy(module), copy.deepcopy(module), copy.deepcopy(copy.copy(module))):
        nn.init.zeros_(next(copied.parameters()))
        copied.reset_parameters()
        assert (next(copied.parameters()) == 1).all()
    assert copy.deepcopy(module).init == module.init


def seeded(make, **options):
    torch.manual_seed(5)
    return make(**options)


@every_keeping
def test_forget_bias(make, gate, sign, takes):
    plain, module = seeded(make), seeded(make, init=inits.forget_bias_)
    for (b, b_hh), (before, before_hh) in zip(biases(module), biases(plain), strict=True):
        assert (b[gate] == sign).all() and (b_hh[gate] == 0).all()
        others = [k for k in range(len(b)) if k != gate]
        assert torch.equal(b[others], before[others]) and torch.equal(b_hh[others], before_hh[others])
    assert all("bias" in n for n in changed(plain.state_dict(), module.state_dict()))
    inits.forget_bias_(plain, 2.5)
    assert all((b[gate] == 2.5 * sign).all() for b, _ in biases(plain))


@pytest.mark.parametrize("cls", [fusedlstm.LSTM, fusedlstm.PeepholeLSTM, fusedlstm.CoupledLSTM, fusedlstm.GRU])
def test_a_forget_bias_keeps_the_state(cls):
    """What it is for: with a large one a step changes c, or h of a GRU, little; with the other sign it is gone."""
    for value, kept in ((20.0, True), (-20.0, False)):
        module = cls(5, 8)
        with torch.no_grad():
            for p in module.parameters():
                p.zero_()
        inits.forget_bias_(module, value)
        state = torch.rand(1, 1, 8) + 1
        hx = state if cls is fusedlstm.GRU else (torch.zeros_like(state), state)
        _, after = module(torch.zeros(1, 1, 5), hx)
        after = after if cls is fusedlstm.GRU else after[1]
        torch.testing.assert_close(after, state if kept else torch.zeros_like(state))


@every_keeping
def test_chrono(make, gate, sign, takes):
    """b_f = log u with u in [1, longest - 1], of every unit its own; b_i = -b_f."""
    module = seeded(make, init=functools.partial(inits.chrono_, longest=50))
    drawn = []
    for b, b_hh in biases(module):
        u = (sign * b[gate]).exp()
        assert (u >= 1 - 1e-5).all() and (u <= 49 + 1e-3).all() and (b_hh[gate] == 0).all()
        if takes is not None:
            torch.testing.assert_close(b[takes], -sign * b[gate] if takes != gate else b[gate])
            assert (b_hh[takes] == 0).all()
        drawn.append(u)
    assert len(torch.cat(drawn).unique()) == torch.cat(drawn).numel()
    wide = fusedlstm.GRU(1, 2000, init=functools.partial(inits.chrono_, longest=50))
    u = wide.bias_ih_l0.detach()[2000:4000].exp()
    assert abs(u.mean() - 25) < 1.5 and u.min() < 2 and u.max() > 48


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("heads", [1, 2])
def test_orthogonal(heads, dtype):
    module = fusedlstm.GRU(5, 8, **OPTIONS, num_heads=heads, dtype=dtype, init=inits.orthogonal_)
    DH = 8 // heads
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    for name, weight in module.named_parameters():
        if name.startswith("weight_hh"):
            for block in weight.detach().double().split(DH):
                assert (block @ block.t() - torch.eye(DH)).abs().max() < tolerance
            assert not torch.equal(*weight.detach().split(DH)[:2])
    projected = fusedlstm.LSTM(5, 8, proj_size=3, init=functools.partial(inits.orthogonal_, gain=2.0))
    for gate in projected.weight_hh_l0.detach().chunk(4):
        torch.testing.assert_close(gate.t() @ gate, 4 * torch.eye(3))
    plain = seeded(lambda **o: fusedlstm.LSTM(5, 8, **o))
    before = copy.deepcopy(plain.state_dict())
    inits.orthogonal_(plain)
    assert changed(before, plain.state_dict()) == {"weight_hh_l0"}


def test_uniform_is_torchs():
    module, stock = fusedlstm.GRU(5, 8, 2), nn.GRU(5, 8, 2)
    for reset in (lambda: inits.uniform_(module), module.reset_parameters):
        torch.manual_seed(4)
        reset()
        torch.manual_seed(4)
        stock.reset_parameters()
        assert not changed(stock.state_dict(), module.state_dict())


def test_the_argument_is_the_functions():
    """The functions run in order, at construction and at every reset, also in copies, but not on the meta device."""
    several = [inits.orthogonal_, functools.partial(inits.forget_bias_, value=2.0)]
    module = seeded(lambda: fusedlstm.LSTM(5, 8, init=several))
    by_hand = seeded(lambda: fusedlstm.LSTM(5, 8))
    for change in several:
        change(by_hand)
    assert not changed(by_hand.state_dict(), module.state_dict())
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.manual_seed(5)
        other.reset_parameters()
        assert not changed(by_hand.state_dict(), other.state_dict())
    empty = fusedlstm.LSTM(5, 8, init=several, device="meta").to_empty(device="cpu")
    torch.manual_seed(5)
    empty.reset_parameters()
    assert not changed(by_hand.state_dict(), empty.state_dict())
    fusedlstm.restore(module)
    assert type(module) is nn.LSTM and "init" not in vars(module)


ERRORS = {
    "no gate keeps": (lambda: inits.forget_bias_(fusedlstm.RNN(3, 4)), ValueError, "got rnn_tanh, which has none"),
    "no bias": (lambda: inits.chrono_(fusedlstm.GRU(3, 4, bias=False), 9), ValueError, "expected one with biases"),
    "too short": (
        lambda: inits.chrono_(fusedlstm.GRU(3, 4), 1),
        ValueError,
        "longest: expected at least 2 steps, got 1",
    ),
    "no number": (lambda: inits.chrono_(fusedlstm.GRU(3, 4), "9"), TypeError, "longest: expected a number of steps"),
    "not ours": (lambda: inits.orthogonal_(nn.GRU(3, 4)), TypeError, "a layer or a cell of fusedlstm, got GRU"),
}


@pytest.mark.parametrize(("make", "kind", "text"), ERRORS.values(), ids=ERRORS)
def test_errors(make, kind, text):
    with pytest.raises(kind, match=re.escape(text)):
        make()
