"""explain and the logger: they name the engine that a call then takes."""

import logging
import subprocess
import sys

import pytest
import torch
from torch import nn

import fusedlstm
from fusedlstm import functional
from fusedlstm.engines import aten

X = torch.randn(4, 3, 5)
PACKED = nn.utils.rnn.pack_padded_sequence(X, [4, 2, 1])
CASES = {
    "dense": (fusedlstm.LSTM(5, 6), X, {}, "take the stack whole"),
    "one step": (fusedlstm.LSTM(5, 6), X[:1], {}, "take the only step"),
    "packed": (fusedlstm.LSTM(5, 6), PACKED, {}, "stretches of steps"),
    "lengths": (fusedlstm.LSTM(5, 6), X, {"lengths": torch.tensor([4, 2, 1])}, "stretches of steps"),
    "equal lengths": (fusedlstm.LSTM(5, 6), X, {"lengths": torch.tensor([3, 3, 3])}, "take the stack whole"),
    "cell states": (fusedlstm.LSTM(5, 6), X, {"return_cell_states": True}, "a loop of torch operations"),
    "clipped": (fusedlstm.LSTM(5, 6, grad_clip=1.0), X, {}, "a loop of torch operations"),
    "projected": (fusedlstm.LSTM(5, 6, proj_size=2), X, {}, "take the stack whole"),
    "an LSTM with other weights": (fusedlstm.CoupledLSTM(5, 6), X, {}, "take the stack whole"),
    "a cell that ATen has not": (fusedlstm.PeepholeLSTM(5, 6), X, {}, "a loop of torch operations"),
}


@pytest.mark.parametrize("case", CASES)
def test_says_what_a_call_does(monkeypatch, case):
    module, input, options, how = CASES[case]
    said = fusedlstm.explain(module, input, **options)
    assert said.engine == "torch" and said.why == "auto takes the kernels on a GPU only" and how in said.how
    assert str(said) == f"engine torch: {said.why}; {said.how}"
    ran, by_aten, by_layers = [], functional._by_aten, functional._by_layers
    monkeypatch.setattr(functional, "_by_aten", lambda call, schedule: ran.append(schedule) or by_aten(call, schedule))
    monkeypatch.setattr(functional, "_by_layers", lambda *arguments: ran.append("loop") or by_layers(*arguments))
    monkeypatch.setattr(fusedlstm.Recurrent, "_is_plain", lambda *_: False)  # that has a test of its own below
    module(input, **options)
    assert [said.how] == [aten.IN_WORDS[way] for way in ran]


def test_an_engine_asked_for_by_name():
    said = fusedlstm.explain(fusedlstm.GRU(5, 6, backend="reference"), X)
    assert said == ("reference", "asked for by name", "the specification in plain torch, step by step")


@pytest.mark.parametrize("options", [{}, {"proj_size": 2}, {"num_heads": 2, "bidirectional": True}])
def test_the_kernels_tell_their_plan(monkeypatch, options):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    said = fusedlstm.explain(fusedlstm.LSTM(5, 6, backend="triton", **options), X)
    assert said.engine == "triton" and said.why == "asked for by name" and said.how.startswith("forward single, ")


def test_errors():
    with pytest.raises(TypeError, match="module: expected a Recurrent, got LSTM"):
        fusedlstm.explain(nn.LSTM(5, 6), X)
    with pytest.raises(RuntimeError, match="input.size\\(-1\\) must be equal to input_size"):
        fusedlstm.explain(fusedlstm.LSTM(7, 6), X)


def test_the_logger(caplog):
    module = fusedlstm.LSTM(5, 6)
    module(X)
    assert not caplog.records
    with caplog.at_level(logging.DEBUG, "fusedlstm"):
        module(PACKED)
    assert caplog.messages == ["lstm, packed: engine torch: auto takes the kernels on a GPU only"]


def test_the_environment_variable(tmp_path):
    code = "import fusedlstm, torch; fusedlstm.GRU(2, 3)(torch.zeros(2, 1, 2))"
    for value, lines in (("1", 1), ("0", 0)):
        ran = subprocess.run(
            [sys.executable, "-c", code], env={"FUSEDLSTM_LOG": value}, capture_output=True, text=True, check=True
        )
        assert ran.stderr.count("gru, dense: engine torch: auto takes the kernels on a GPU only") == lines


HX = tuple(torch.randn(1, 3, 6) for _ in "hc")
PLAIN = {
    "dense": (fusedlstm.LSTM(5, 6), X, {}),
    "with states": (fusedlstm.LSTM(5, 6), X, {"hx": HX}),
    "batch first": (fusedlstm.LSTM(5, 6, batch_first=True), X, {}),
    "float64": (fusedlstm.LSTM(5, 6).double(), X.double(), {}),
    "by name": (fusedlstm.LSTM(5, 6, backend="torch"), X, {}),
    "without biases": (fusedlstm.LSTM(5, 6, 2, bias=False, bidirectional=True), X, {}),
    "projected": (fusedlstm.LSTM(5, 6, 3, proj_size=2), X, {}),
    "evaluated": (fusedlstm.LSTM(5, 6, 2, dropout=0.5).eval(), X, {}),
    "dropout": (fusedlstm.LSTM(5, 6, 2, dropout=0.5), X, {}),
}
WITHOUT_GRADIENTS = {
    "GRU": (fusedlstm.GRU(5, 6), X, {}),
    "RNN": (fusedlstm.RNN(5, 6, 2), X, {"hx": torch.ones(2, 3, 6)}),
}
NOT_PLAIN = {name: case[:3] for name, case in CASES.items() if name not in ("dense", "projected")} | {
    "without a batch": (fusedlstm.LSTM(5, 6), X[:, 0], {}),
    "two-step limit": (fusedlstm.LSTM(5, 6, batch_first=True), X[:, :1], {}),
    "limited for this call": (fusedlstm.LSTM(5, 6), X, {"grad_clip": 0.5}),
    "all states": (fusedlstm.LSTM(5, 6), X, {"return_states": True}),
    "resets": (fusedlstm.LSTM(5, 6), X, {"resets": torch.ones(4, 3)}),
    "heads": (fusedlstm.LSTM(5, 6, num_heads=2), X, {}),
    "weight dropout": (fusedlstm.LSTM(5, 6, weight_dropout=0.5), X, {}),
    "bfloat16": (fusedlstm.LSTM(5, 6).bfloat16(), X.bfloat16(), {}),
    "another engine": (fusedlstm.LSTM(5, 6, backend="reference"), X, {}),
    "a GRU that trains": (fusedlstm.GRU(5, 6), X, {}),
}


def _ran(module, input, options, plain: bool) -> list:
    """Results and gradients of a call, by the short way if there is one, or not."""
    with pytest.MonkeyPatch.context() as patch:
        if not plain:
            patch.setattr(fusedlstm.Recurrent, "_is_plain", lambda *_: False)
        torch.manual_seed(0)
        results = torch.utils._pytree.tree_leaves(module(input, **options))
    results = [x for x in results if torch.is_tensor(x) and x.is_floating_point()]
    if not results[0].requires_grad:
        return results
    return [*results, *torch.autograd.grad(results, [*module.parameters()], [torch.ones_like(x) for x in results])]


@pytest.mark.parametrize("case", [*PLAIN, *WITHOUT_GRADIENTS])
def test_the_short_way_of_a_plain_call(case):
    module, input, options = (PLAIN | WITHOUT_GRADIENTS)[case]
    with torch.set_grad_enabled(case in PLAIN):
        assert module._is_plain(input, options.get("hx"))
        assert "take the stack whole" in fusedlstm.explain(module, input, **options).how
        for short, long in zip(*(_ran(module, input, options, plain) for plain in (True, False)), strict=True):
            assert torch.equal(short, long)


@pytest.mark.parametrize("case", NOT_PLAIN)
def test_who_asks_more_goes_the_long_way(case):
    module, input, options = NOT_PLAIN[case]
    for short, long in zip(*(_ran(module, input, options, plain) for plain in (True, False)), strict=True):
        assert torch.equal(short, long)


def test_what_is_around_a_call_makes_it_not_plain(monkeypatch, caplog):
    module = fusedlstm.LSTM(5, 6)
    found = {}
    with torch.autocast("cpu"):
        found["autocast"] = module._is_plain(X, None)
    torch.func.vmap(lambda x: found.update(vmap=module._is_plain(x, None)) or x)(X.expand(2, -1, -1, -1))
    with torch.autograd.forward_ad.dual_level():
        found["tangents"] = module._is_plain(X, None)
    with caplog.at_level(logging.DEBUG, "fusedlstm"):
        found["logger"] = module._is_plain(X, None)
    with monkeypatch.context() as patch:
        patch.setenv("FUSEDLSTM_BACKEND", "reference")
        found["environment"] = module._is_plain(X, None)
    assert found == dict.fromkeys(found, False) and len(found) == 5 and module._is_plain(X, None)


def test_a_parametrization_is_computed_once(monkeypatch):
    """It may draw random numbers, so the short way may not ask for a weight that it does not use."""
    times = []

    class Counted(nn.Module):
        def forward(self, weight):
            times.append(1)
            return weight

    found, module = {}, fusedlstm.LSTM(5, 6)
    nn.utils.parametrize.register_parametrization(module, "weight_hh_l0", Counted())
    for name in ("plain", "tangents", "without the short way"):
        times.clear()
        if name == "without the short way":
            monkeypatch.setattr(fusedlstm.Recurrent, "_is_plain", lambda *_: False)
        with torch.autograd.forward_ad.dual_level() if name == "tangents" else torch.no_grad():
            module(X)
        found[name] = len(times)
    assert len({*found.values()}) == 1, found


def test_a_dropout_that_does_not_act_may_be_anything():
    module = fusedlstm.LSTM(5, 6, 2).eval()
    expected, module.dropout = module(X)[0], None
    assert torch.equal(module(X)[0], expected)
