"""failures.py: if kernels ran the forward and cannot be launched for the backward, the loop gives the gradients."""

import copy

import pytest
import torch

import fusedlstm
from fusedlstm import engines
from fusedlstm.engines import bound, failures, launch
from support import DTYPES, assert_accurate

CASES = {
    "lstm": (fusedlstm.LSTM, "fp32", {}, ("lengths", "resets"), 1),
    "half": (fusedlstm.LSTM, "bf16", {"bidirectional": True}, ("lengths",), 1),
    "states": (fusedlstm.LSTM, "fp16", {"save": "states"}, (), 1),
    "wave": (fusedlstm.LSTM, "fp16", {"grad_clip": 0.1}, ("resets",), 2),
    "gru": (fusedlstm.GRU, "fp32", {}, (), 2),
    "layernorm": (fusedlstm.LayerNormLSTM, "fp32", {}, ("lengths",), 1),
    "slstm": (fusedlstm.SLSTM, "bf16", {"num_heads": 2}, (), 1),
}


@pytest.fixture(autouse=True)
def tried(monkeypatch):
    """The kernels that were launched, or were to be: those of a backward fail."""
    names, inner = [], bound.Bound.launcher

    def launcher(self, arguments, varying=None):
        names.append(getattr(self.kernel, "__name__", None) or self.kernel.fn.__name__)
        if "bwd" in names[-1]:
            raise failures.LaunchError("no room.")
        return inner(self, arguments, varying)

    monkeypatch.setattr(bound.Bound, "launcher", launcher)
    monkeypatch.setattr(
        engines, "choice", lambda *args, **kwargs: ("triton" if args[0] == "auto" else args[0], "for this test")
    )
    monkeypatch.setattr(engines, "fastest", lambda *args: ("triton", "for this test"))
    failures.forget()
    yield names
    failures.forget()


@pytest.mark.parametrize("name", CASES)
def test_a_backward_by_the_loop_follows_a_forward_by_the_kernels(device, monkeypatch, tried, name):
    kind, dtype, options, masks, layers = CASES[name]
    monkeypatch.setattr(launch, "layers_together", lambda cell, like, hx, layers, *_: layers)
    given = {}
    if "lengths" in masks:
        given["lengths"] = torch.tensor([4, 0, 2])
    if "resets" in masks:
        given["resets"] = torch.tensor([[False, False, True]] * 4)

    def results(module, x):
        x = x.detach().clone().requires_grad_()
        own = {mask: value.to(x.device) for mask, value in given.items()}
        output, _ = module(x, **own)
        output.sin().sum().backward()
        return [output.detach(), x.grad, *(p.grad for p in module.parameters())]

    found = []
    for seed in range(4):  # together, for a norm makes much of a rounding in some of them
        torch.manual_seed(seed)
        failures.forget()
        module, same = (kind(3, 6, layers, **options, dtype=DTYPES[dtype], backend=b) for b in ("auto", "reference"))
        same.load_state_dict(module.state_dict())
        exact, input = copy.deepcopy(same).double(), torch.randn(4, 3, 3).to(DTYPES[dtype])
        with pytest.warns(RuntimeWarning, match="backend='auto': no room"):
            ours = results(module.to(device), input.to(device))
        found.append([ours, results(same, input), results(exact, input.double())])
    assert any("fwd" in kernel for kernel in tried) and any("bwd" in kernel for kernel in tried)
    for a, *expected in (
        [torch.stack([own[k] for own in of]) for of in zip(*found, strict=True)] for k in range(len(found[0][0]))
    ):
        assert_accurate("result", a, *expected)
