"""A wave: stacks of layers in one launch, through fusedlstm.LSTM, against the layers one after another."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fusedlstm
from fusedlstm import autograd
from fusedlstm.cells import CELLS
from fusedlstm.engines import launch
from support import DTYPES, assert_accurate
from twins import SEQUENCES, case_id, dense_twin, outcome, pairwise, with_heads

CASES = pairwise(
    sizes=((6, 1), (17, 1)),  # one program a layer, and three
    dtype=tuple(DTYPES.values()),
    sequence=tuple(name for name in SEQUENCES if name != "unbatched"),
    num_layers=(2, 3),
    bidirectional=(False,),
    dropout=(0.0,),
)


@pytest.fixture
def launches(monkeypatch):
    """How many layers each launch of a wave takes; whatever the plan predicts, it takes all."""
    counts = []
    monkeypatch.setattr(launch, "layers_together", lambda cell, like, hx, layers, *_: layers)
    wave_fwd = autograd.wave_fwd

    def counted(cell, preact_x, weight_ih, bias, weight_hh, *arguments):
        counts.append(len(weight_hh))
        return wave_fwd(cell, preact_x, weight_ih, bias, weight_hh, *arguments)

    monkeypatch.setattr(autograd, "wave_fwd", counted)
    return counts


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_equals_one_layer_after_another(device, case, launches):
    lstm = with_heads(case).to(case["dtype"])
    lstm.backend = "triton"
    same_dtype = outcome(dense_twin(lstm, case, "reference"), case)
    exact = outcome(dense_twin(copy.deepcopy(lstm).double(), case, "reference"), case)
    found = outcome(lstm.to(device), case)
    assert launches == [case["num_layers"]]
    assert list(found) == list(exact)
    for name, value in found.items():
        assert value.dtype == same_dtype[name].dtype
        assert_accurate(name, value, same_dtype[name], exact[name])


MEMBERS = {
    "GRU": fusedlstm.GRU,
    "RNN": fusedlstm.RNN,
    "PeepholeLSTM": fusedlstm.PeepholeLSTM,
    "CoupledLSTM": fusedlstm.CoupledLSTM,
    "SLSTM": fusedlstm.SLSTM,
}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("lengths", [None, [2, 0, 1]], ids=["dense", "lengths"])
@pytest.mark.parametrize("member", MEMBERS)
def test_every_member(device, launches, member, lengths, bias):
    """Three layers, each with vectors and states of its own: all results and all gradients."""
    module = MEMBERS[member](4, 5, 3, bias=bias, backend="triton")
    generator = torch.Generator().manual_seed(3)
    count = len(CELLS[module.cell].states)
    states = [torch.randn(3, 3, 5, generator=generator) for _ in range(count)]
    if member == "SLSTM":
        states[2].abs_().add_(0.5)  # a normaliser
    leaves = [torch.randn(3, 3, 4, generator=generator), *states]
    lengths = None if lengths is None else torch.tensor(lengths)

    def results(module, dtype, device="cpu"):
        input, *hx = (x.detach().to(device, dtype, copy=True).requires_grad_() for x in leaves)
        module = copy.deepcopy(module).to(device, dtype)
        output, final = module(input, tuple(hx) if count > 1 else hx[0], lengths=lengths)
        found = [output, *(final if count > 1 else (final,))]
        torch.autograd.backward(found, [torch.linspace(0, 1, x.numel()).view_as(x).to(x) for x in found])
        return [*found, input.grad, *(x.grad for x in hx), *(p.grad for p in module.parameters())]

    ours = results(module, torch.float32, device)
    assert launches == [3]
    module.backend = "reference"
    for k, (a, b, c) in enumerate(
        zip(ours, results(module, torch.float32), results(module, torch.float64), strict=True)
    ):
        assert_accurate(f"tensor {k}", a.detach(), b.detach(), c.detach())


def test_a_device_without_room_takes_them_in_parts(device, launches, monkeypatch):
    """Five layers, two and two in a launch and the last by itself; inference, which saves nothing."""
    stock = torch.nn.LSTM(5, 20, 5)
    ours = fusedlstm.LSTM(5, 20, 5, backend="triton").to(device)
    ours.load_state_dict(stock.state_dict())
    monkeypatch.setattr(autograd, "layers_together", lambda *arguments: 2)
    x = torch.randn(4, 3, 5)
    with torch.no_grad():
        expected, (h_n, c_n) = stock.double()(x.double())
        output, state = ours(x.to(device))
    assert launches == [2, 2]
    for ours, exact in zip((output, *state), (expected, h_n, c_n), strict=True):
        assert_accurate("result", ours, exact.float(), exact)


def test_double_backward(device):
    lstm = fusedlstm.LSTM(3, 6, 2, backend="triton").to(device)
    twin = fusedlstm.LSTM(3, 6, 2, backend="reference")
    twin.load_state_dict(lstm.state_dict())
    leaves = [torch.randn(3, 2, 3), *(torch.randn(2, 2, 6) for _ in range(2))]
    results = []
    for module, like in (
        (lstm, leaves[0].to(device)),
        (twin, leaves[0]),
        (copy.deepcopy(twin).double(), leaves[0].double()),
    ):
        input, *hx = (x.to(like, copy=True).requires_grad_() for x in leaves)
        grads = torch.autograd.grad(module(input, tuple(hx))[0].square().sum(), (input, *hx), create_graph=True)
        sum(grad.square().sum() for grad in grads).backward()
        results.append([*(grad.detach() for grad in grads), *(x.grad for x in (input, *hx, *module.parameters()))])
    for ours, same_dtype, exact in zip(*results, strict=True):
        assert_accurate("gradient", ours, same_dtype, exact)


def test_what_a_wave_does_not_serve(device, launches):
    """Two directions, dropout in training, a projection, heads, all states: one layer after another, and no error."""
    x = torch.randn(3, 2, 4, device=device)
    for options in ({"bidirectional": True}, {"dropout": 0.5}, {"proj_size": 3}, {"num_heads": 2}):
        fusedlstm.LSTM(4, 6, 2, backend="triton", **options).to(device)(x)
    fusedlstm.LSTM(4, 6, 2, backend="triton").to(device)(x, return_states=True)
    assert launches == []


def test_compiles_into_one_graph_for_any_batch(device):
    """One layer after another, since the choice depends on the batch."""
    lstm = fusedlstm.LSTM(3, 6, 2, backend="triton").to(device)
    compiled = torch.compile(lambda x: lstm(x)[0], backend="aot_eager", fullgraph=True)
    for batch in (2, 5, 7):
        x = torch.randn(3, batch, 3, device=device)
        output = compiled(x)
        torch.testing.assert_close(output, lstm(x)[0])
        output.sum().backward()
    assert all(p.grad is not None for p in lstm.parameters())


def test_operations_are_counted(device, monkeypatch):
    """Of a wave and of a single step, by torch's counter: two for each weight and row."""
    monkeypatch.setattr(launch, "layers_together", lambda cell, like, hx, layers, *_: layers)
    module, x = fusedlstm.LSTM(5, 6, 3, backend="triton").to(device), torch.randn(4, 2, 5, device=device)
    weights = sum(p.numel() for name, p in module.named_parameters() if name.startswith("weight"))
    for input in (x, x[:1]):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(input)
        assert counter.get_total_flops() == 2 * len(input) * 2 * weights
    output = module(x.requires_grad_())[0]
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    assert 2 * 4 * 2 * weights < counter.get_total_flops() <= 2 * (2 * 4 * 2 * weights)
