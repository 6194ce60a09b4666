"""tuning.py, the kernels run: what is measured overrides what is predicted, and gives the same numbers."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import fusedlstm
from fusedlstm import tuning
from fusedlstm.engines import launch
from fusedlstm.plan import tuned
from fusedlstm.plan.problem import Problem
from support import assert_accurate


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSEDLSTM_CACHE", str(tmp_path))
    monkeypatch.delenv("FUSEDLSTM_TUNING", raising=False)
    tuned.forget()
    yield tmp_path
    tuned.forget()


def favouring_the_second(calls, seconds):
    """A timer that runs everything once, and finds that fastest which was predicted to come second."""
    for call in calls.values():
        call()
    return {name: 1.0 if k == 1 else 2.0 + k for k, name in enumerate(calls)}


def results(module, input):
    input = input.detach().requires_grad_()
    output, (h_n, c_n) = module(input)
    wanted = [input, *module.parameters()]
    names = ["input.grad", *[f"{name}.grad" for name, _ in module.named_parameters()]]
    grads = torch.autograd.grad([output.sin().sum(), h_n.sum(), c_n.sum()], wanted)
    return {"output": output, "h_n": h_n, "c_n": c_n, **dict(zip(names, grads, strict=True))}


def test_a_measured_choice_overrides_the_prediction_and_gives_the_same_numbers(device, monkeypatch):
    torch.manual_seed(0)
    I, H = 3, 17
    stock, exact = nn.LSTM(I, H), nn.LSTM(I, H).double()
    module = fusedlstm.LSTM(I, H, backend="triton").to(device)
    module.load_state_dict(stock.state_dict())
    exact.load_state_dict({k: v.double() for k, v in stock.state_dict().items()})
    input = torch.randn(2, 3, I)
    ran = []
    inner = launch._launch
    monkeypatch.setattr(launch, "_launch", lambda p, **arguments: (ran.append(p), inner(p, **arguments)))
    results(module, input.to(device))
    predicted, state = list(ran), torch.random.get_rng_state()

    found = fusedlstm.tune(module, input.to(device), timer=favouring_the_second, seconds=0.01)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert module.backend == "triton" and all(p.grad is None for p in module.parameters())
    assert launch.trial is None
    plans = [m for m in found if isinstance(m.what, Problem)]
    assert [m.what.pass_ for m in plans] == ["fwd", "bwd"]
    assert all([m.predicted, m.chosen] == list(m.ms)[:2] for m in plans)
    assert [m.what.training for m in found if isinstance(m.what, tuned.Call)] == [True, False]

    ran.clear()
    ours = results(module, input.to(device))
    assert [tuning._name(p) for p in ran] == [m.chosen for m in plans]
    assert [tuning._name(p) for p in predicted] == [m.predicted for m in plans]
    same, truth = results(stock, input), results(exact, input.double())
    for name, value in ours.items():
        assert_accurate(name, value.detach(), same[name].detach(), truth[name].detach())

    ran.clear()
    monkeypatch.setenv("FUSEDLSTM_TUNING", "0")
    results(module, input.to(device))
    assert ran == predicted


@pytest.mark.parametrize("layout", ["packed", "ragged"])
def test_layouts_and_frozen_parameters(device, layout):
    """Nothing to train: the forward only. By the real clock."""
    module = fusedlstm.LSTM(3, 5, backend="auto").to(device).requires_grad_(False)
    x, lengths = torch.randn(3, 2, 3, device=device), torch.tensor([3, 1])
    if layout == "packed":
        found = fusedlstm.tune(module, pack_padded_sequence(x, lengths), seconds=0.01)
    else:
        found = fusedlstm.tune(module, x, lengths=lengths, seconds=0.01)
    problem = next(m.what for m in found if isinstance(m.what, Problem))
    assert (problem.pass_, problem.layout, problem.batch) == ("fwd", layout, 2)
    calls = [m.what for m in found if isinstance(m.what, tuned.Call)]
    assert [c.layout for c in calls] == (["packed"] if layout == "packed" else []), "of lengths there is no choice"
    assert all(min(m.ms.values()) > 0 for m in found)


@pytest.mark.parametrize(("layer", "engines"), [("GRU", 2), ("PeepholeLSTM", 0)])
def test_other_cells(device, layer, engines):
    """With a rival where ATen has the cell."""
    module = getattr(fusedlstm, layer)(3, 5).to(device)
    found = fusedlstm.tune(module, torch.randn(2, 2, 3, device=device), timer=favouring_the_second, seconds=0.01)
    plans = [m for m in found if isinstance(m.what, Problem)]
    assert [(m.what.cell, m.what.pass_) for m in plans] == [(module.cell, "fwd"), (module.cell, "bwd")]
    assert [m.chosen for m in plans] == [list(m.ms)[1] for m in plans]
    calls = [m.what for m in found if isinstance(m.what, tuned.Call)]
    assert [c.cell for c in calls] == [module.cell] * engines


def test_a_failure_leaves_nothing_behind(device, folder):
    module = fusedlstm.LSTM(3, 5).to(device)

    def timer(calls, seconds):
        raise OSError("the clock stopped")

    with pytest.raises(OSError, match="the clock stopped"):
        fusedlstm.tune(module, torch.randn(1, 1, 3, device=device), timer=timer)
    assert launch.trial is None and module.backend == "auto" and not list(folder.iterdir())
    with tuning._trial({}), pytest.raises(RuntimeError, match="under way"), tuning._trial({}):
        pass
