"""autograd.py and the module above it: outputs and every gradient, kernels against torch.nn.LSTM and float64.

Each case forces the tiles, so that the group, its weights and the form of its dot are what the test names.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import fusedlstm
from fusedlstm.engines import launch
from grids import grid
from support import DTYPES, assert_accurate, tiled


@pytest.fixture
def tiles(monkeypatch):
    """Make every launch use tiles of the test's choice."""

    def choose(**kwargs):
        def plan_for(cell, like, weight_hh, hx, pass_, layout, stack):
            D, B, H = hx.shape
            options = {"directions": D, "stack": stack, "precision": "ieee", **kwargs}
            return tiled(pass_, B, H, launch.DTYPES[like.dtype], **options)

        monkeypatch.setattr(launch, "plan_for", plan_for)

    return choose


def run(module, input, hx, cx, grads, transform):
    """Outputs and gradients of input, h_0, c_0 and all parameters, through output, h_n and c_n."""
    input, hx, cx = (x.detach().clone().requires_grad_() for x in (input, hx, cx))
    output, (h_n, c_n) = module(transform(input), (hx, cx))
    torch.autograd.backward([output, h_n, c_n], [g.to(output.device, output.dtype) for g in grads])
    results = {"output": output, "h_n": h_n, "c_n": c_n, "input.grad": input.grad, "h_0.grad": hx.grad}
    results["c_0.grad"] = cx.grad
    return results | {f"{name}.grad": p.grad for name, p in module.named_parameters()}


def check(device, dtype, T, B, I, H, transform=lambda x: x, **options):
    torch.manual_seed(1)
    stock = nn.LSTM(I, H, **options).to(dtype)
    ours = fusedlstm.LSTM(I, H, **options, backend="triton").to(dtype)
    ours.load_state_dict(stock.state_dict())
    exact = nn.LSTM(I, H, **options).double()
    exact.load_state_dict({k: v.double() for k, v in stock.state_dict().items()})
    directions = 2 if options.get("bidirectional") else 1
    rows, P = options.get("num_layers", 1) * directions, options.get("proj_size") or H
    lead = (B, T) if options.get("batch_first") else (T, B)
    input = torch.randn(*lead, I).to(dtype)
    hx, cx = torch.randn(rows, B, P).to(dtype), torch.randn(rows, B, H).to(dtype)
    grads = [torch.randn(*lead, directions * P), torch.randn(rows, B, P), torch.randn(rows, B, H)]
    grads = [g.to(dtype) for g in grads]
    result = run(ours.to(device), *(x.to(device) for x in (input, hx, cx)), grads, transform)
    result_torch = run(stock, input, hx, cx, grads, lambda x: x)
    result_exact = run(exact, input.double(), hx.double(), cx.double(), grads, lambda x: x)
    assert result.keys() == result_exact.keys()
    for name, value in result.items():
        assert_accurate(name, value.detach(), result_torch[name].detach(), result_exact[name].detach())


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("schedule", ["single", "resident", "streamed", "stepped"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_gradients(device, tiles, dtype, schedule, transposed):
    tiles(schedule=schedule, transposed=transposed)
    check(device, DTYPES[dtype], T=3, B=17, I=5, H=19)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "B", "H"), [(1, 1, 1), (1, 16, 33), (17, 3, 16), (2, 33, 7)])
def test_sizes(device, tiles, dtype, T, B, H):
    tiles(schedule="resident")
    check(device, DTYPES[dtype], T=T, B=B, I=3, H=H)


OPTIONS = {
    "no bias": {"bias": False},
    "two layers": {"num_layers": 2},
    "bidirectional": {"bidirectional": True},
    "two bidirectional layers, batch first": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "batch first, no bias": {"batch_first": True, "bias": False},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options(device, options):
    """With the plan's own tiles."""
    check(device, torch.float32, T=3, B=3, I=5, H=7, **options)


@pytest.mark.parametrize(("batch", "dtype"), [(1, torch.bfloat16), (17, torch.float32)], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_one_step(device, options, batch, dtype):
    """A single step takes its input product in the same launch."""
    check(device, dtype, T=1, B=batch, I=5, H=7, **options)


def test_one_step_projected(device):
    check(device, torch.float32, T=1, B=3, I=5, H=9, proj_size=7, num_layers=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}], ids=str)
def test_projection(device, dtype, options):
    """The recurrence runs over o tanh(c), with weight_hh weight_hr; h_0 enters by the first preactivation."""
    check(device, DTYPES[dtype], T=4, B=3, I=5, H=20, proj_size=7, **options)


PACKED = {
    "sorted": ([5, 3, 3, 1], True, {}),
    "one": ([3], True, {}),
    "equal": ([4, 4, 4], True, {"bidirectional": True}),
    "unsorted": ([2, 5, 1, 3], False, {}),
    "two bidirectional layers": ([2, 5, 1, 3], False, {"num_layers": 2, "bidirectional": True}),
    "projected": ([2, 5, 1, 3], False, {"bidirectional": True, "proj_size": 4}),
    "no bias, batch_first ignored": ([5, 3, 1], True, {"bias": False, "batch_first": True}),
}


@pytest.mark.parametrize("given", [True, False], ids=["hx given", "hx absent"])
@pytest.mark.parametrize(("lengths", "is_sorted", "options"), PACKED.values(), ids=PACKED.keys())
def test_packed(device, lengths, is_sorted, options, given):
    I, H = 5, 19
    modules = [nn.LSTM(I, H, **options), fusedlstm.LSTM(I, H, **options, backend="triton"), nn.LSTM(I, H, **options)]
    for module in modules[1:]:
        module.load_state_dict(modules[0].state_dict())
    rows, P = modules[0].num_layers * (2 if modules[0].bidirectional else 1), modules[0].proj_size or H
    x = torch.randn(max(lengths), len(lengths), I)
    states = torch.randn(rows, len(lengths), P), torch.randn(rows, len(lengths), H)
    grads = None
    found = []
    for module, place, dtype in zip(modules, ("cpu", device, "cpu"), (None, None, torch.float64), strict=True):
        module.to(place, dtype)
        input, *hx = (y.to(place, dtype).requires_grad_() for y in (x, *states))
        packed = pack_padded_sequence(input, torch.tensor(lengths), enforce_sorted=is_sorted)
        output, (h_n, c_n) = module(packed, tuple(hx) if given else None)
        for a, b in zip(output[1:], packed[1:], strict=True):
            assert a is b
        results = [output.data, h_n, c_n]
        grads = grads or [torch.randn_like(y) for y in results]
        torch.autograd.backward(results, [g.to(y) for g, y in zip(grads, results, strict=True)])
        leaves = {"input": input, **(dict(zip(("h_0", "c_0"), hx, strict=True)) if given else {})}
        leaves |= dict(module.named_parameters())
        named = dict(zip(("output", "h_n", "c_n"), results, strict=True))
        found.append(named | {f"{name}.grad": leaf.grad for name, leaf in leaves.items()})
        x, *states = (y.detach() for y in (x, *states))
    for name, in_torch in found[0].items():
        ours, exact = found[1][name], found[2][name]
        assert_accurate(name, ours.detach(), in_torch.detach(), exact.detach())


MASKED = {
    "one layer": {},
    "two bidirectional layers, batch first": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "projected": {"num_layers": 2, "bidirectional": True, "proj_size": 4},
    "clipped, no bias": {"bidirectional": True, "bias": False, "grad_clip": 0.3},
}


@grid({"options": MASKED, "dtype": list(DTYPES), "given": ["lengths", "resets", "both"]})
def test_lengths_and_resets(device, options, dtype, given):
    """Every result, all cell states and every gradient, against the specification in the same dtype and in float64."""
    T, B, I, H = 5, 6, 5, 19
    ours = fusedlstm.LSTM(I, H, **options, backend="triton").to(DTYPES[dtype])
    rows, P = ours.num_layers * (2 if ours.bidirectional else 1), ours.proj_size or H
    lead = (B, T) if ours.batch_first else (T, B)
    x, *hx = (torch.randn(s).to(DTYPES[dtype]) for s in ((*lead, I), (rows, B, P), (rows, B, H)))
    masks = {"lengths": torch.tensor([3, 0, 5, 1, 4, 2]), "resets": torch.rand(lead) < 0.3}
    masks = {k: v for k, v in masks.items() if given in (k, "both")}
    found, grads = [], None
    for backend, place, precision in (
        ("triton", device, DTYPES[dtype]),
        ("reference", "cpu", DTYPES[dtype]),
        ("reference", "cpu", torch.float64),
    ):
        module = copy.deepcopy(ours).to(place, precision)
        module.backend = backend
        input, *states = (y.clone().to(place, precision).requires_grad_() for y in (x, *hx))
        output, (h_n, c_n), c_seq = module(input, tuple(states), **masks, return_cell_states=True)
        results = [output, h_n, c_n, c_seq]
        grads = grads or [torch.randn(y.shape).to(DTYPES[dtype]) for y in results]
        torch.autograd.backward(results, [g.to(place, precision) for g in grads])
        found.append([*results, input.grad, *(y.grad for y in states), *(p.grad for p in module.parameters())])
    for k, (a, b, c) in enumerate(zip(*found, strict=True)):
        assert_accurate(f"tensor {k}", a.detach(), b.detach(), c.detach())


def test_lengths_elsewhere(device):
    """On the CPU, as a list, of another integer type, with strides: the same."""
    ours = fusedlstm.LSTM(5, 7, bidirectional=True, backend="triton").to(device)
    x, lengths = torch.randn(4, 3, 5, device=device), torch.tensor([2, 0, 4])
    expected = ours(x, lengths=lengths.to(device))[0]
    column = torch.stack([lengths, lengths + 1], 1).to(device, torch.int32)[:, 0]
    for other in (lengths, lengths.tolist(), lengths.to(device, torch.uint8), column):
        assert torch.equal(ours(x, lengths=other)[0], expected)
    all_of_two = ours(x, lengths=torch.full((3,), 2, device=device))[0]
    assert torch.equal(ours(x, lengths=torch.tensor(2, device=device).expand(3))[0], all_of_two)
    resets = (torch.rand(3, 4, device=device) < 0.5).t()
    assert torch.equal(ours(x, resets=resets)[0], ours(x, resets=resets.contiguous())[0])


def test_a_nan_passes_the_clip(device):
    ours = fusedlstm.LSTM(5, 7, backend="triton", grad_clip=0.1).to(device)
    x = torch.randn(4, 3, 5, device=device, requires_grad=True)
    grad = torch.zeros(4, 3, 7, device=device)
    grad[3, 1, 2] = float("nan")
    ours(x)[0].backward(grad)
    assert x.grad[:, 1].isnan().all() and x.grad[:, [0, 2]].isfinite().all()


def test_all_cell_states_without_gradients(device):
    """Of the last layer, where nothing else is saved; and with no mask at all."""
    ours = fusedlstm.LSTM(5, 7, num_layers=2, backend="triton").to(device)
    x = torch.randn(4, 3, 5, device=device)
    with torch.no_grad():
        output, (_, c_n), c_seq = ours(x, return_cell_states=True)
        prefix = ours(x[:2])
    assert c_seq.shape == output.shape
    torch.testing.assert_close(c_seq[-1], c_n[1])
    torch.testing.assert_close(c_seq[1], prefix[1][1][1])


def test_strided_input(device):
    """An input with gaps of NaN between its rows, and one whose axes lie the other way round."""

    def gaps(x):
        wide = torch.cat([x, x.detach() * float("nan")], -1)
        return wide[..., : x.size(-1)]

    check(device, torch.float32, T=3, B=3, I=5, H=7, transform=gaps)
    check(device, torch.float32, 3, 3, 5, 7, transform=lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0))


@pytest.mark.parametrize("kept", [0, 1, 2], ids=["output", "h_n", "c_n"])
def test_gradient_through_one_result(device, kept):
    """The other two have no gradient at all, and nothing is made up for them."""
    stock, ours = nn.LSTM(5, 7), fusedlstm.LSTM(5, 7, backend="triton")
    ours.load_state_dict(stock.state_dict())
    input = torch.randn(3, 2, 5)
    found = []
    for module, place in ((stock, "cpu"), (ours.to(device), device)):
        x = input.to(place).requires_grad_()
        output, (h_n, c_n) = module(x)
        (output, h_n, c_n)[kept].square().sum().backward()
        found.append([x.grad.cpu(), *(p.grad.cpu() for p in module.parameters())])
        input = input.detach()
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_gradients_only_where_wanted(device):
    ours = fusedlstm.LSTM(5, 7, backend="triton").to(device)
    ours.weight_ih_l0.requires_grad_(False)
    ours.bias_hh_l0.requires_grad_(False)
    x = torch.randn(3, 2, 5, device=device)
    ours(x)[0].sum().backward()
    assert x.grad is None and ours.weight_ih_l0.grad is None and ours.bias_hh_l0.grad is None
    assert ours.weight_hh_l0.grad.abs().sum() > 0 and ours.bias_ih_l0.grad.abs().sum() > 0
    assert ours.weight_hh_l0.grad.isfinite().all()


def test_second_backward_and_bias_gradients_apart(device):
    """retain_graph gives the same gradients again; the two biases do not share memory."""
    ours = fusedlstm.LSTM(5, 7, backend="triton").to(device)
    output, _ = ours(torch.randn(3, 2, 5, device=device))
    output.sum().backward(retain_graph=True)
    once = [p.grad.clone() for p in ours.parameters()]
    output.sum().backward()
    for p, g in zip(ours.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, 2 * g, rtol=0, atol=0)
    ours.bias_ih_l0.grad.zero_()
    assert ours.bias_hh_l0.grad.abs().sum() > 0


def test_state_passing(device):
    """A run in two chunks equals one run, gradients across the cut included."""
    ours = fusedlstm.LSTM(5, 7, backend="triton").to(device)
    x = torch.randn(5, 2, 5, device=device)
    whole, (h, c) = ours(x)
    (whole.sum() + h.square().sum() + c.sum()).backward()
    grads = [p.grad.clone() for p in ours.parameters()]
    ours.zero_grad()
    first, state = ours(x[:2])
    second, (h2, c2) = ours(x[2:], state)
    (first.sum() + second.sum() + h2.square().sum() + c2.sum()).backward()
    torch.testing.assert_close(torch.cat([first, second]), whole, rtol=1e-6, atol=1e-7)
    for p, g in zip(ours.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-5, atol=1e-6)


def test_permuting_the_batch_permutes_the_result(device):
    ours = fusedlstm.LSTM(5, 20, backend="triton").to(device)
    x = torch.randn(3, 19, 5, device=device)
    order = torch.randperm(19, device=device)
    # The input product may sum a row in another order where it lies elsewhere.
    torch.testing.assert_close(ours(x[:, order])[0], ours(x)[0][:, order], rtol=1e-5, atol=1e-6)


def test_empty_batch(device):
    ours = fusedlstm.LSTM(5, 7, backend="triton").to(device)
    output, (h_n, c_n) = ours(torch.zeros(3, 0, 5, device=device))
    assert output.shape == (3, 0, 7) and h_n.shape == c_n.shape == (1, 0, 7)
    output.sum().backward()
    assert all(p.grad.abs().sum() == 0 for p in ours.parameters())


def test_double_backward(device):
    """create_graph differentiates the gradients through the specification."""
    stock, ours = nn.LSTM(3, 4), fusedlstm.LSTM(3, 4, backend="triton")
    ours.load_state_dict(stock.state_dict())
    found = []
    input = torch.randn(3, 2, 3)
    for module, place in ((stock, "cpu"), (ours.to(device), device)):
        x = input.clone().to(place).requires_grad_()
        (grad,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
        grad.square().sum().backward()
        found.append([x.grad.cpu(), *(p.grad.cpu() for p in module.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_cell(device):
    stock, ours = nn.LSTMCell(5, 7), fusedlstm.LSTMCell(5, 7, backend="triton")
    ours.load_state_dict(stock.state_dict())
    input, hx, cx = torch.randn(3, 5), torch.randn(3, 7), torch.randn(3, 7)
    found = []
    for module, place in ((stock, "cpu"), (ours.to(device), device)):
        x = input.to(place).detach().requires_grad_()
        h, c = module(x, (hx.to(place), cx.to(place)))
        (h.square().sum() + c.sum()).backward()
        found.append([h.cpu(), c.cpu(), x.grad.cpu(), *(p.grad.cpu() for p in module.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_autocast(device):
    """bfloat16 autocast runs the kernels in bfloat16 and returns bfloat16; gradients stay float32."""
    ours = fusedlstm.LSTM(5, 7, backend="triton").to(device)
    with torch.autocast(device, torch.bfloat16):
        output, (h_n, c_n) = ours(torch.randn(3, 2, 5, device=device))
    assert output.dtype == h_n.dtype == c_n.dtype == torch.bfloat16
    output.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in ours.parameters())


def test_states_of_every_layer_and_padding_on_the_left(device):
    found = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        torch.manual_seed(0)
        module = fusedlstm.LSTM(5, 7, 2, backend=backend).to(device, dtype)
        x = torch.randn(4, 3, 5).to(device, dtype).requires_grad_()
        lengths = torch.tensor([4, 0, 2], device=device)
        output, final, states = module(x, lengths=lengths, padding_side="left", return_states=True)
        results = [output, *final, *states]
        (grad,) = torch.autograd.grad(sum((k + 1) * y.square().sum() for k, y in enumerate(results)), x)
        found.append([*results, grad])
    for k, results in enumerate(zip(*found, strict=True)):
        assert_accurate(f"result {k}", *results)
