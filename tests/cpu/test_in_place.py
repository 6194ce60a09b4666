"""Results may be changed in place where those of torch.nn may, and the gradients are right afterwards."""

import pytest
import torch
from torch import nn

import fusedlstm
from fusedlstm.cells import CELLS

MEMBERS = {
    "LSTM": fusedlstm.LSTM,
    "GRU": fusedlstm.GRU,
    "RNN": fusedlstm.RNN,
    "PeepholeLSTM": fusedlstm.PeepholeLSTM,
    "CoupledLSTM": fusedlstm.CoupledLSTM,
    "LayerNormLSTM": fusedlstm.LayerNormLSTM,
    "SLSTM": fusedlstm.SLSTM,
    "ResetBeforeGRU": fusedlstm.ResetBeforeGRU,
    "LayerNormGRU": fusedlstm.LayerNormGRU,
}
CHANGES = {
    "relu": lambda x: x.relu_(),
    "mask": lambda x: x.mul_(0.5),
    "rows": lambda x: x[:, 0].zero_(),
}
CALLS = {
    "dense": {},
    "lengths": {"lengths": torch.tensor([3, 40])},
    "resets": {"resets": torch.arange(80).reshape(40, 2) % 7 == 0},
    "cell states": {"return_cell_states": True},
    "states": {"return_states": True},
}


def flat(results):
    for x in results:
        yield from flat(x) if isinstance(x, tuple) else [x]


def gradient(module, x, call, change):
    """Of the input, when `change` was made to all results, or to copies of them."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    results = [*flat(module(x, **CALLS[call]))]
    for result in results:
        change(result)
    sum(result.square().sum() for result in results).backward()
    return x.grad, *(p.grad for p in module.parameters())


def of_copies(module, x, call, name):
    """The same without a change in place of what the module returned."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    results = [result.clone() for result in flat(module(x, **CALLS[call]))]
    for result in results:
        CHANGES[name](result)
    sum(result.square().sum() for result in results).backward()
    return x.grad, *(p.grad for p in module.parameters())


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("name", "layers"), [("relu", 1), ("relu", 2), ("mask", 1), ("rows", 1)])
@pytest.mark.parametrize("member", MEMBERS)
def test_every_result_of_every_member(member, name, call, layers, backend):
    if call == "cell states" and not CELLS[MEMBERS[member](1, 1).cell].num_cell_states:
        call = "dense"
    module, x = MEMBERS[member](3, 4, layers, backend=backend), torch.randn(40, 2, 3)
    if backend == "torch" and member in ("LSTM", "CoupledLSTM") and call == "dense":
        # oneDNN keeps the output that it returns, and torch.nn.LSTM does not allow this either.
        for refuses in (module, nn.LSTM(3, 4, layers)):
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                gradient(refuses, x, call, CHANGES[name])
        return
    for ours, exact in zip(gradient(module, x, call, CHANGES[name]), of_copies(module, x, call, name), strict=True):
        torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize("member", ["LSTM", "GRU", "RNN"])
def test_states_of_atens_layers(member):
    """As every loop of reinforcement learning does it."""
    torch.manual_seed(0)
    module, stock = MEMBERS[member](3, 4), getattr(nn, member)(3, 4)
    stock.load_state_dict(module.state_dict())
    x = torch.randn(5, 2, 3)
    for m in (module, stock):
        states = m(x)[1]
        for state in states if isinstance(states, tuple) else (states,):
            state[:, 0] = 0
        sum(s.square().sum() for s in flat((states,))).backward()
    for ours, exact in zip(module.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, exact.grad)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("member", MEMBERS)
def test_what_is_given_stays(member, call):
    """The loop works in place, but neither on the states that it gets, nor on the gradients."""
    if call == "cell states" and not CELLS[MEMBERS[member](1, 1).cell].num_cell_states:
        call = "dense"
    module = MEMBERS[member](3, 4, bidirectional=True, backend="torch")
    states = tuple(torch.rand(2, 2, 4) for _ in CELLS[module.cell].states)
    given = [torch.randn(40, 2, 3), *states]
    for x in given:
        x.requires_grad_()
    results = [*flat(module(given[0], states if len(states) > 1 else states[0], **CALLS[call]))]
    given += [torch.randn_like(y) for y in results]
    before = [x.detach().clone() for x in given]
    torch.autograd.backward(results, given[-len(results) :])
    assert all(map(torch.equal, given, before))


@pytest.mark.parametrize("member", MEMBERS)
def test_every_gradient(member):
    """No two are one tensor, as those of both biases could be: whoever scales them would scale it twice."""
    module, x = MEMBERS[member](3, 4, bidirectional=True, backend="torch"), torch.randn(5, 2, 3)
    found = torch.autograd.grad(module(x, lengths=torch.tensor([5, 2]))[0].sum(), [*module.parameters()])
    expected = [grad + k for k, grad in enumerate(found)]
    for k, grad in enumerate(found):
        grad += k
    assert all(map(torch.equal, found, expected))
