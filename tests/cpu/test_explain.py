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
