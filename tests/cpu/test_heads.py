"""Heads on the engines without kernels, against dense layers with block-diagonal weights, torch's if it has them."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fusedlstm
from fusedlstm import functional, inspect
from support import assert_accurate
from twins import block_diagonal, blocks, case_id, dense_twin, outcome, pairwise, with_heads

EXACT = {"rtol": 1e-10, "atol": 1e-12}
CASES = pairwise(engine=("torch", "traced", "reference"), dtype=(torch.float32, torch.float16, torch.bfloat16))


@pytest.fixture
def module(monkeypatch):
    """The module of a case in float64, with the case's engine. "traced" is the way of a compiled graph."""

    def make(case):
        lstm = with_heads(case)
        lstm.backend = "reference" if case["engine"] == "reference" else "torch"
        if case["engine"] == "traced":
            monkeypatch.setattr(functional, "_traced", lambda input: True)
        return lstm

    return make


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_equals_a_dense_layer(module, case):
    lstm = module(case)
    other = "torch" if lstm.backend == "reference" else "reference"
    found, expected = outcome(lstm, case), outcome(dense_twin(lstm, case, other), case)
    assert list(found) == list(expected)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], **EXACT, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_accuracy(module, case):
    lstm = module(case).to(case["dtype"])
    found = outcome(lstm, case)
    same_dtype = outcome(dense_twin(lstm, case, lstm.backend), case)
    exact = outcome(dense_twin(copy.deepcopy(lstm).double(), case), case)
    assert list(found) == list(exact)
    for name, value in found.items():
        assert value.dtype == same_dtype[name].dtype
        assert_accurate(name, value, same_dtype[name], exact[name])


@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("bias", [True, False])
def test_cell(bias, backend, dtype, batched):
    cell = fusedlstm.LSTMCell(5, 21, bias, backend=backend, num_heads=3).to(dtype)
    shapes = [(4, 5), (4, 21), (4, 21)] if batched else [(5,), (21,), (21,)]
    given = [torch.randn(s).to(dtype) for s in shapes]
    grads = [torch.randn(shapes[1]).to(dtype) for _ in range(2)]
    found = []
    for module in (cell, nn.LSTMCell(5, 21, bias).to(dtype), nn.LSTMCell(5, 21, bias).double()):
        if module is not cell:
            weights = cell.state_dict() | {"weight_hh": block_diagonal(cell.weight_hh)}
            module.load_state_dict(weights)
        x, h, c = (y.to(module.weight_ih.dtype).requires_grad_() for y in (y.clone() for y in given))
        results = module(x, (h, c))
        torch.autograd.backward(results, [g.to(y) for g, y in zip(grads, results, strict=True)])
        grad = module.weight_hh.grad
        grad = grad if module is cell else blocks(grad, 3)
        others = [p.grad for name, p in module.named_parameters() if name != "weight_hh"]
        found.append([*results, x.grad, h.grad, c.grad, grad, *others])
    for k, (a, b, exact) in enumerate(zip(*found, strict=True)):
        assert a.dtype == dtype
        assert_accurate(f"tensor {k}", a.detach(), b.detach(), exact.detach())


def test_heads_do_not_see_each_other():
    """What is changed in h of one head changes that head, and not a bit of another."""
    lstm = fusedlstm.LSTM(5, 21, num_heads=3)
    x, h, c = torch.randn(4, 2, 5), torch.randn(1, 2, 21), torch.randn(1, 2, 21)
    output = lstm(x, (h, c))[0].unflatten(-1, (3, 7))
    h[..., 7:14] += 1
    changed = (lstm(x, (h, c))[0].unflatten(-1, (3, 7)) != output).any(-1)
    assert changed[..., 1].all() and not changed[..., 0].any() and not changed[..., 2].any()


def test_parameters():
    """Shapes, names and order; drawn in that order from the range of torch's; one head is torch's LSTM."""
    options = {"num_layers": 2, "bidirectional": True}
    torch.manual_seed(3)
    lstm = fusedlstm.LSTM(5, 12, **options, num_heads=4)
    torch.manual_seed(3)
    for name, weight in lstm.named_parameters():
        assert torch.equal(weight, torch.empty_like(weight).uniform_(-(12**-0.5), 12**-0.5)), name
    stock = nn.LSTM(5, 12, **options)
    shapes = {k: (48, 3) if "weight_hh" in k else tuple(v.shape) for k, v in stock.state_dict().items()}
    assert {k: tuple(v.shape) for k, v in lstm.state_dict().items()} == shapes
    assert list(lstm.state_dict()) == list(stock.state_dict())
    assert lstm.all_weights[3][1] is lstm.weight_hh_l1_reverse is lstm._flat_weights[13]
    for cls, name in ((nn.LSTM, "LSTM"), (nn.LSTMCell, "LSTMCell")):
        torch.manual_seed(3)
        expected = cls(5, 12)
        torch.manual_seed(3)
        one = getattr(fusedlstm, name)(5, 12, num_heads=1)
        assert repr(one) == repr(expected)
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), expected.parameters(), strict=True))
        assert repr(getattr(fusedlstm, name)(5, 12, num_heads=4)) == repr(expected)[:-1] + ", num_heads=4)"


def test_devices_and_dtypes_of_parameters():
    for make in (fusedlstm.LSTM, fusedlstm.LSTMCell):
        lstm = make(5, 12, num_heads=4, device="meta", dtype=torch.bfloat16)
        assert {(p.device.type, p.dtype) for p in lstm.parameters()} == {("meta", torch.bfloat16)}
        with torch.device("meta"):
            assert {p.device.type for p in make(5, 12, num_heads=4).parameters()} == {"meta"}
        empty = nn.utils.skip_init(make, 5, 12, num_heads=4)
        assert {(p.device.type, p.is_leaf, p.requires_grad) for p in empty.parameters()} == {("cpu", True, True)}


def test_copies_and_old_modules():
    lstm = fusedlstm.LSTM(5, 12, num_heads=4)
    x = torch.randn(4, 3, 5)
    for other in (copy.deepcopy(lstm), pickle.loads(pickle.dumps(lstm))):
        assert other.num_heads == 4
        assert torch.equal(other(x)[0], lstm(x)[0])
    for old in (fusedlstm.LSTM(5, 12), fusedlstm.LSTMCell(5, 12)):
        del old.__dict__["num_heads"]  # of a file from before there were heads
        assert pickle.loads(pickle.dumps(old)).num_heads == 1
        assert "num_heads" not in repr(old)
    with pytest.raises(RuntimeError, match="size mismatch for weight_hh_l0"):
        lstm.load_state_dict(nn.LSTM(5, 12).state_dict())


def test_conversion():
    model = nn.ModuleDict({"lstm": fusedlstm.LSTM(5, 12, num_heads=4), "cell": fusedlstm.LSTMCell(5, 12, num_heads=4)})
    _, report = fusedlstm.restore(model, return_report=True)
    assert not report.replaced and set(report.kept) == {"lstm", "cell"}
    assert all("no heads (fusedlstm.dense_weight" in why for why in report.kept.values())
    assert type(model["lstm"]) is fusedlstm.LSTM and model["lstm"].num_heads == 4
    one = nn.Sequential(fusedlstm.LSTM(5, 12, num_heads=1))
    fusedlstm.restore(one)
    assert type(one[0]) is nn.LSTM and "num_heads" not in vars(one[0])
    fusedlstm.convert(one)
    assert one[0].num_heads == 1
    with fusedlstm.patch_torch():
        assert nn.LSTM(5, 12, num_heads=4).weight_hh_l0.shape == (48, 3)


@pytest.mark.parametrize(("hidden", "n"), [(21, 3), (6, 6), (8, 2), (5, 1)])
def test_dense_weight(hidden, n):
    weight_hh = torch.randn(4 * hidden, hidden // n)
    assert torch.equal(fusedlstm.dense_weight(weight_hh, hidden), block_diagonal(weight_hh))


ERRORS = {
    "no divisor": ({"num_heads": 5}, ValueError, r"num_heads: .*divisor of hidden_size \(12\), got 5"),
    "zero": ({"num_heads": 0}, ValueError, "num_heads: .*got 0"),
    "negative": ({"num_heads": -3}, ValueError, "num_heads: .*got -3"),
    "float": ({"num_heads": 2.0}, TypeError, "num_heads: expected an integer, got float"),
    "bool": ({"num_heads": True}, TypeError, "num_heads: expected an integer, got bool"),
    "projected": ({"num_heads": 2, "proj_size": 4}, ValueError, "num_heads: expected 1 with proj_size=4.*got 2"),
}


@pytest.mark.parametrize(("options", "error", "text"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(options, error, text):
    with pytest.raises(error, match=text):
        fusedlstm.LSTM(5, 12, **options)
    if "proj_size" not in options:
        with pytest.raises(error, match=text):
            fusedlstm.LSTMCell(5, 12, **options)


def test_autocast():
    """The dtype that was asked for, float32 gradients, and the numbers of a dense layer in that dtype."""
    for dtype in (torch.bfloat16, torch.float16):
        lstm, x = fusedlstm.LSTM(5, 12, num_heads=4), torch.randn(4, 3, 5)
        with torch.autocast("cpu", dtype):
            output, (h_n, c_n) = lstm(x)
        assert output.dtype == h_n.dtype == c_n.dtype == dtype
        rounded = dense_twin(copy.deepcopy(lstm).to(dtype))
        exact = copy.deepcopy(rounded).double()
        same_dtype, exact = rounded(x.to(dtype))[0], exact(x.to(dtype).double())[0]
        assert_accurate("output", output.detach(), same_dtype.detach(), exact.detach())
        output.float().sum().backward()
        assert all(p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in lstm.parameters())


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_double_backward(backend):
    lstm = fusedlstm.LSTM(3, 6, num_heads=2, dtype=torch.float64, backend=backend)
    x, found = torch.randn(3, 2, 3, dtype=torch.float64), []
    for module in (lstm, dense_twin(lstm)):
        x = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
        grad.square().sum().backward()
        grads = {name: p.grad for name, p in module.named_parameters()}
        if module is not lstm:
            grads["weight_hh_l0"] = blocks(grads["weight_hh_l0"], 2)
        found.append([x.grad, *grads.values()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_compiles_without_a_graph_break():
    """Training, with lengths."""
    lstm = fusedlstm.LSTM(5, 12, num_heads=4, bidirectional=True, dtype=torch.float64)
    compiled = torch.compile(lstm, fullgraph=True, backend="aot_eager")
    x, lengths, found = torch.randn(4, 3, 5, dtype=torch.float64), torch.tensor([2, 4, 0]), []
    for f in (lstm, compiled):
        lstm.zero_grad()
        x = x.detach().requires_grad_()
        output, (h_n, c_n) = f(x, lengths=lengths)
        (output.square().sum() + h_n.sum() + c_n.sum()).backward()
        found.append([output, h_n, c_n, x.grad, *(p.grad for p in lstm.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_empty_batch():
    lstm = fusedlstm.LSTM(5, 12, num_heads=4)
    output, (h_n, c_n) = lstm(torch.zeros(3, 0, 5))
    assert output.shape == (3, 0, 12) and h_n.shape == c_n.shape == (1, 0, 12)
    output.sum().backward()
    assert all(p.grad.abs().sum() == 0 for p in lstm.parameters())


def test_strided_weights():
    """A weight that is a view with gaps, as functional_call may bring it."""
    lstm, x = fusedlstm.LSTM(5, 12, num_heads=4), torch.randn(4, 3, 5)
    wide = torch.randn(48, 8)
    wide[:, 1::2] = float("nan")
    views = {"weight_hh_l0": wide[:, :6:2]}
    assert views["weight_hh_l0"].shape == (48, 3)
    found = torch.func.functional_call(lstm, views, (x,))[0]
    expected = torch.func.functional_call(lstm, {"weight_hh_l0": views["weight_hh_l0"].contiguous()}, (x,))[0]
    torch.testing.assert_close(found, expected)


def test_gates_with_heads():
    lstm = fusedlstm.LSTM(5, 12, num_layers=2, num_heads=4)
    x = torch.randn(4, 3, 5)
    torch.testing.assert_close(inspect.gates(lstm, x, layer=1).h, lstm(x)[0])
