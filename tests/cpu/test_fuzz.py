"""Calls drawn at random, the same ones every time. `make fuzz` draws others for as long as you like."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from torch import nn

from fuzz import bad, cases, equations, found
from support import error

OF_TORCH = ("LSTM", "GRU", "RNN tanh", "RNN relu")


@pytest.mark.parametrize("member", cases.MEMBERS)
def test_right_calls(member):
    @settings(cases.SETTINGS, max_examples=250)
    @given(cases.of_engines("cpu", (member,)))
    def check(case):
        cases.check(case)

    check()


@pytest.mark.parametrize("case", found.RIGHT, ids=repr)
def test_right_calls_that_were_found(case):
    cases.check(case)


def test_wrong_calls():
    told = bad.run("0", ("auto", "torch", "reference"), 3000)
    assert not told.faults, "\n".join(f"{call}: {why}" for call, why in told.faults)
    assert told.made.total() == 3000


@pytest.mark.parametrize("call", found.WRONG, ids=repr)
def test_wrong_calls_that_were_found(call):
    assert bad.outcome(call) is None


# The fuzzer itself.


@pytest.mark.parametrize("member", OF_TORCH)
def test_the_equations_are_torchs(member):
    """In float64, with a second layer and direction."""
    name, _, nonlinearity = member.partition(" ")
    options = {"nonlinearity": nonlinearity} if nonlinearity else {}
    stock = getattr(nn, name)(3, 4, 2, bidirectional=True, dtype=torch.float64, **options)
    case = cases.Case(member, T=5, B=2, I=3, H=4, layers=2, bidirectional=True, hx="given", seed=1)
    values = cases.tensors(case)
    for key, p in values.parameters.items():
        stock.get_parameter(key).data = p
    states = values.states if len(values.states) > 1 else values.states[0]
    output, finals = stock(values.input, states if isinstance(states, torch.Tensor) else tuple(states))
    exact = cases.expected(case, values, torch.float64)
    finals = (finals,) if isinstance(finals, torch.Tensor) else finals
    for key, x in {"output": output, **{f"state {k}": s for k, s in enumerate(finals)}}.items():
        assert error(x.detach(), exact[key].detach()) < 1e-12, key


@pytest.mark.parametrize("member", cases.MEMBERS)
def test_a_wrong_result_is_found(member, monkeypatch):
    """In every result and gradient: other equations than ours."""
    case = cases.Case(member, T=4, B=2, I=3, H=4, hx="given", cell_states=equations.STATES[member] > 1)
    cases.check(case)
    original = equations._STEPS[member]
    monkeypatch.setitem(
        equations._STEPS, member, lambda p, z, a, u, state: [1.001 * s for s in original(p, z, a, u, state)]
    )
    with pytest.raises(AssertionError) as told:
        cases.check(case)
    wanted = {"output", "state 0", "grad input", "grad weight_ih_l0", "grad weight_hh_l0", "grad hx 0"}
    assert all(name in str(told.value) for name in wanted)


def test_a_process_that_dies_is_found(tmp_path, monkeypatch):
    text = "import os; from fuzz.processes import calling\nwith calling('a call', 'auto', 'LSTM'): os.abort()\n"
    (tmp_path / "dying.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    told = bad.Told()
    told.follow("dying", (), interpret=False)
    assert told.made == {"auto, LSTM": 1} and told.faults == [("a call", "the process ends: SIGABRT")]


def test_a_call_says_what_differs_from_the_simplest():
    assert repr(cases.Case()) == "Case()"
    case = cases.Case("GRU", T=3, lengths=(1, 2), clip=0.1)
    assert eval(repr(case), {"Case": cases.Case}) == case == dataclasses.replace(case)
