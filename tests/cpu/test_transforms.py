"""Every transform of torch with every call that needs no kernel: the right numbers, or an error that says why."""

import itertools

import features
import pytest
import torch
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

import fusedlstm
import transforms
from fusedlstm import cells, ops

ATEN = {
    "lstm": {"cell": "lstm"},
    "gru": {"cell": "gru"},
    "packed": {"cell": "rnn_tanh", "batch_sizes": torch.tensor([2, 2, 1])},
    "projected": {"cell": "lstm", "proj_size": 3},
    "one step": {"cell": "lstm", "steps": 1},
}
EXACT = {"rtol": 1e-9, "atol": 1e-12}
NAMES = features.OURS


@pytest.mark.parametrize(("path", "case"), transforms.pairs(transforms.CASES))
def test_ours(path, case):
    found = transforms.found(path, case, "torch", torch.float64)
    torch.testing.assert_close(found, transforms.plain(path, case, torch.float64), **EXACT)


@pytest.mark.parametrize(("path", "case"), transforms.pairs(ATEN))
def test_aten(path, case):
    """Where ATen has no rule, ours serves."""
    found = transforms.found(path, case, "auto", torch.float64)
    torch.testing.assert_close(found, transforms.plain(path, case, torch.float64), **EXACT)


@pytest.mark.parametrize("name", NAMES)
def test_samples_along_any_axis(name):
    module = getattr(fusedlstm, name)(3, 4, bidirectional=True, backend="torch", dtype=torch.float64)
    x = torch.randn(5, 4, 2, 3, dtype=torch.float64)  # four samples [5, 2, 3]
    found = torch.func.vmap(lambda own: module(own)[0], in_dims=1, out_dims=1)(x)
    torch.testing.assert_close(found, torch.stack([module(own)[0] for own in x.unbind(1)], 1), **EXACT)


WEIGHTS = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0")
# What has samples, and what becomes of them: how many calls of the loop three samples need.
SAMPLES = {
    "input": (("input",), 1),
    "hx": (("hx",), 1),
    "lengths": (("lengths",), 1),
    "input and resets": (("input", "resets"), 1),
    "one bias": (("bias_hh_l0",), 1),
    "weights and resets": (("input", "hx", "resets", *WEIGHTS), 3),
    "weights": (WEIGHTS, 1),
    "weights and input": (("input", *WEIGHTS), 1),
    "weights and lengths": (("lengths", *WEIGHTS), 3),
}


@pytest.mark.parametrize("samples", SAMPLES)
@pytest.mark.parametrize("save", ["gates", "states"])
@pytest.mark.parametrize("name", NAMES)
def test_samples_share_calls(name, save, samples, monkeypatch):
    """As sequences or heads, with the numbers and gradients of a call each."""
    torch.manual_seed(0)
    module = getattr(fusedlstm, name)(3, 4, backend="torch", save=save, dtype=torch.float64)
    size, (batched, calls) = 3, SAMPLES[samples]
    if name.startswith("LayerNorm") and "weight_hh_l0" in batched:  # its norms are over all units
        calls = size
    if name == "LayerNormGRU" and "bias_hh_l0" in batched:  # which is among the vectors of the step
        calls = size
    own = {k: v.detach() for k, v in module.named_parameters()}
    own |= {
        "input": torch.randn(6, 2, 3).double(),
        "hx": torch.rand(len(cells.CELLS[module.cell].states), 1, 2, 4).double(),
    }
    own |= {"lengths": torch.tensor([6, 3]), "resets": torch.zeros(6, 2, dtype=torch.bool)}
    differing = {k: torch.stack([v + 0.1 * n for n in range(size)]) for k, v in own.items() if v.is_floating_point()}
    differing |= {"lengths": torch.tensor([[6, 3], [0, 6], [2, 5]]), "resets": torch.rand(size, 6, 2) < 0.3}
    given = {k: differing[k] if k in batched else v for k, v in own.items()}

    def call(of):
        options = {"lengths": of["lengths"], "resets": of["resets"] if "resets" in batched else None}
        hx = of["hx"].unbind(0) if len(of["hx"]) > 1 else of["hx"][0]
        parameters = {k: v for k, v in of.items() if "_l0" in k}
        output, state = torch.func.functional_call(module, parameters, (of["input"], hx), options)
        return torch.cat([y.flatten() for y in (output, *(state if isinstance(state, tuple) else (state,)))])

    leaves = {k: v.clone().requires_grad_() if v.is_floating_point() else v for k, v in given.items()}
    expected = torch.stack([call({k: v[n] if k in batched else v for k, v in leaves.items()}) for n in range(size)])
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    of_results = torch.randn_like(expected)
    expected = [expected, *torch.autograd.grad(expected, wanted, of_results)]
    counted, loop = [], ops.loop_fwd

    def counting(engine, spec, preact_x, weights, *more):
        counted.extend(weights.weight_hh[:1])  # what is recomputed has none
        return loop(engine, spec, preact_x, weights, *more)

    monkeypatch.setattr(ops, "loop_fwd", counting)
    found = torch.vmap(call, ({k: 0 if k in batched else None for k in given},))(leaves)
    torch.testing.assert_close([found, *torch.autograd.grad(found, wanted, of_results)], expected, **EXACT)
    assert len(counted) == calls


@pytest.mark.parametrize("what", ["inputs", "models"])
def test_samples_have_the_noise_of_a_call(what):
    """All of them the same, or each its own, as `randomness` says."""
    module = fusedlstm.LSTM(3, 4, zoneout=0.4, candidate_dropout=0.3, recurrent_dropout=0.3, dtype=torch.float64)
    of_models = {name: torch.stack([p.detach()] * 3) for name, p in module.named_parameters()}
    x = torch.randn(6, 2, 3).double()
    arguments, dims = (of_models, x), (0, None)
    if what == "inputs":
        arguments, dims = (dict(module.named_parameters()), x.expand(3, 6, 2, 3)), (None, 0)

    def call(own, x):
        return torch.func.functional_call(module, own, (x,))[0]

    torch.manual_seed(1)
    expected = module(x)[0]
    torch.manual_seed(1)
    for found in torch.vmap(call, dims, randomness="same")(*arguments):
        torch.testing.assert_close(found, expected, **EXACT)
    a, b, c = torch.vmap(call, dims, randomness="different")(*arguments)
    assert not (torch.equal(a, b) or torch.equal(b, c) or torch.equal(a, c))


def clipped_gradient(case: dict, backend: str, hx: torch.Tensor, x: torch.Tensor, limit: float | None):
    """The gradients of hx and x, of a sum that they get multiplied by numbers; as one vector, with a graph."""
    torch.manual_seed(1)
    module = getattr(fusedlstm, case["name"])(3, 4, len(hx), backend=backend, grad_clip=limit, dtype=torch.float64)
    states = (hx, *(torch.rand_like(hx).detach() for _ in cells.CELLS[module.cell].states[1:]))
    output, finals = module(x, states if len(states) > 1 else hx, lengths=case.get("lengths"))
    first = finals[0] if isinstance(finals, tuple) else finals
    loss = 3 * (output * torch.randn_like(output)).sum() + 3 * (first * torch.randn_like(first)).sum()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, (hx, x), create_graph=True)])


every_way = pytest.mark.parametrize(
    ("name", "lengths", "backend"),
    [*itertools.product(NAMES, (None, torch.tensor([2, 4])), ("torch", "reference"))],
    ids=lambda value: value if isinstance(value, str) else "dense" if value is None else "ragged",
)


@every_way
def test_derivative_of_a_clipped_gradient(name, lengths, backend):
    """By finite differences. The direction is small, so that no layer clips what the layer above sends back."""
    case = {"name": name, "lengths": lengths}
    torch.manual_seed(0)
    hx, x = (torch.randn(*shape, dtype=torch.float64).requires_grad_() for shape in ((2, 2, 4), (4, 2, 3)))
    found = clipped_gradient(case, backend, hx, x, 0.2)
    assert not torch.allclose(found, clipped_gradient(case, backend, hx, x, None)), "the limit is never reached"
    v, d_hx, d_x = (1e-4 * torch.randn_like(y) for y in (found, hx, x))
    of_hx, of_x = torch.autograd.grad(found, (hx, x), v)
    derivative = (of_hx * d_hx).sum() + (of_x * d_x).sum()
    beside = [clipped_gradient(case, backend, hx + s * d_hx, x + s * d_x, 0.2) for s in (1e-2, -1e-2)]
    torch.testing.assert_close(derivative, ((beside[0] - beside[1]) * v).sum() / 2e-2, rtol=1e-5, atol=1e-16)


@every_way
def test_a_layer_does_not_clip_its_own_second_derivative(name, lengths, backend):
    """It is linear in the gradient that comes, however large that is."""
    torch.manual_seed(0)
    hx, x = (torch.randn(*shape, dtype=torch.float64).requires_grad_() for shape in ((1, 2, 4), (4, 2, 3)))
    found = clipped_gradient({"name": name, "lengths": lengths}, backend, hx, x, 0.2)
    v = torch.randn_like(found)
    small, large = (torch.autograd.grad(found, (hx, x), s * v, retain_graph=True) for s in (1e-4, 1e4))
    torch.testing.assert_close([1e8 * y for y in small], [*large], **EXACT)


@pytest.mark.parametrize("cell", ["lstm", "peephole", "gru"])
def test_what_would_drop_tangents_raises(cell):
    f = transforms.Call({"cell": cell, **transforms.OURS}, "torch", torch.float32)
    transforms.check_tangents_behind_samples(f)
    transforms.check_tangents_in_graphs(f)


def test_call_for_per_sample_grads_with_a_frozen_parameter():
    """torch then wraps the others only."""
    module, x = fusedlstm.LSTM(3, 4, batch_first=True), torch.randn(2, 5, 3)
    module.weight_ih_l0.requires_grad_(False)
    call_for_per_sample_grads(module)(x)[0].sum().backward()
    expected = [torch.autograd.grad(module(one.unsqueeze(0))[0].sum(), module.weight_hh_l0)[0] for one in x]
    torch.testing.assert_close(module.weight_hh_l0.grad_sample, torch.stack(expected))
    assert module.weight_ih_l0.grad is None


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("form", ["dense", "batch first", "packed"])
def test_call_for_per_sample_grads(form, name):
    """As the gradients of one sample after another. Stock's LSTM fails where oneDNN serves it."""
    torch.manual_seed(0)
    module = getattr(fusedlstm, name)(3, 4, 2, bidirectional=True, batch_first=form == "batch first").double()
    x, lengths = torch.randn(5, 3, 3, dtype=torch.float64), [5, 4, 2]
    w = torch.randn(5, 3, 8, dtype=torch.float64)
    input = x.transpose(0, 1) if form == "batch first" else x
    if form == "packed":
        input, w = (torch.nn.utils.rnn.pack_padded_sequence(y, lengths) for y in (x, w))
        w = w.data
    called = call_for_per_sample_grads(module, batch_size=3, loss_reduction="sum", batch_first=form == "batch first")
    output = called(input)[0]
    (output.data if form == "packed" else output).mul(
        w.transpose(0, 1) if form == "batch first" else w
    ).sum().backward()
    w = torch.nn.utils.rnn.pad_packed_sequence(input._replace(data=w))[0] if form == "packed" else w
    for p, (key, _) in zip(module.parameters(), module.named_parameters(), strict=True):
        for b in range(3):
            T = lengths[b] if form == "packed" else 5
            one = x[:T, b : b + 1].transpose(0, 1) if form == "batch first" else x[:T, b : b + 1]
            y = module(one)[0]
            y = y.transpose(0, 1) if form == "batch first" else y
            (expected,) = torch.autograd.grad((y * w[:T, b : b + 1]).sum(), p)
            torch.testing.assert_close(p.grad_sample[b], expected, msg=lambda text, key=key: f"{key}: {text}", **EXACT)


@pytest.mark.parametrize(
    "options", [{"lengths": torch.tensor([2, 1])}, {"return_states": True}, {"grad_clip": 1.0}], ids=str
)
def test_what_has_no_per_sample_grads(options):
    called = call_for_per_sample_grads(fusedlstm.LSTM(3, 4), batch_size=2, loss_reduction="sum", batch_first=False)
    with pytest.raises(RuntimeError, match="call_for_per_sample_grads: expected a layer and a call that torch.nn has"):
        called(torch.zeros(2, 2, 3), **options)
    called = call_for_per_sample_grads(fusedlstm.PeepholeLSTM(3, 4), batch_size=2, batch_first=False)
    with pytest.raises(RuntimeError, match="got the cell peephole"):
        called(torch.zeros(2, 2, 3))
