"""products.py, and the cell whose preactivations and states are normalised: what the family's grid does not reach."""

import copy

import pytest
import torch
from torch import nn

import fusedlstm
from fusedlstm import cells, products
from fusedlstm.plan import PlanError, candidates, plan
from fusedlstm.plan.devices import DEVICES
from fusedlstm.plan.problem import Problem

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_backwards_are_autograd_s():
    """Of rows of which one is zero, and one far from it."""
    torch.manual_seed(0)
    x, gain, bias, grad = randn(4, 12), randn(12), randn(12), randn(4, 12)
    x[1], x[2] = 0, x[2] + 1000
    leaves = [y.requires_grad_() for y in (x, gain)]
    y = products.normed_input(x.unsqueeze(-2), [gain], [bias]).squeeze(-2)
    torch.testing.assert_close(y, nn.functional.layer_norm(x, (12,), gain, bias), **EXACT)
    expected = torch.autograd.grad(y, leaves, grad)
    torch.testing.assert_close(products.normed_input_backward(grad, x.detach(), gain.detach()), expected, **EXACT)
    (expected,) = torch.autograd.grad(products.normalised(x), x, grad)
    torch.testing.assert_close(products.normalised_backward(grad, x.detach()), expected, **EXACT)


@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "batch_first": True}], ids=str)
@pytest.mark.parametrize("noise", [{}, {"zoneout": 0.3, "candidate_dropout": 0.3, "recurrent_dropout": 0.3}], ids=str)
def test_recomputed_and_regularised(options, noise):
    """Our loop that keeps gates, the one that recomputes them in blocks of steps, and the specification."""
    torch.manual_seed(0)
    module = fusedlstm.LayerNormLSTM(3, 6, **options, **noise).double()
    for name, p in module.named_parameters():
        if not name.startswith("weight"):
            nn.init.normal_(p, 0.5)
    x = randn(*((16, 64) if options else (64, 16)), 3)
    lengths = torch.tensor([64, 0, 3, 40] * 4)
    found = []
    for backend, save in (("torch", "gates"), ("torch", "states"), ("reference", "gates")):
        own = copy.deepcopy(module)
        own.backend, own.save = backend, save
        torch.manual_seed(1)
        input = x.clone().requires_grad_()
        output, (h_n, c_n) = own(input, lengths=lengths)
        torch.autograd.backward([output, h_n, c_n], [torch.ones_like(y) for y in (output, h_n, c_n)])
        found.append([output, h_n, c_n, input.grad, *(p.grad for p in own.parameters())])
    for a, b, c in zip(*found, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(b, c, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("H", [1, 2, 3, 4, 5, 16])
def test_rows_of_few_units(H):
    """A norm of few units passes on almost nothing of a gradient. The median over cases, for some of them amplify."""
    errors = {"torch": [], "reference": []}
    for seed in range(16):
        torch.manual_seed(seed)
        module = fusedlstm.LayerNormLSTM(5, H)
        for name, p in module.named_parameters():
            if not name.startswith("weight"):
                nn.init.normal_(p, 0.5)
        x = torch.randn(6, 4, 5)
        found = {}
        for backend, dtype in (("reference", torch.float64), ("reference", torch.float32), ("torch", torch.float32)):
            own, input = copy.deepcopy(module).to(dtype), x.to(dtype, copy=True).requires_grad_()
            own.backend = backend
            output, _ = own(input)
            (output * torch.linspace(-1, 1, output.numel(), dtype=dtype).view(output.shape)).sum().backward()
            found[backend, dtype] = [output, input.grad, *(p.grad for p in own.parameters())]
        exact = found["reference", torch.float64]
        sizes = [y.abs().max().clamp(min=1e-9) for y in exact]
        for backend, of in errors.items():
            same = found[backend, torch.float32]
            of.append([((y - e).abs().max() / s).item() for y, e, s in zip(same, exact, sizes, strict=True)])
    ours, plain = (torch.tensor(of).median(0).values for of in (errors["torch"], errors["reference"]))
    floor = 2 * torch.finfo(torch.float32).eps
    assert (ours <= 2 * plain + floor).all(), (ours / (2 * plain + floor)).tolist()


@pytest.mark.parametrize("cls", [fusedlstm.LayerNormLSTM, fusedlstm.LayerNormLSTMCell])
def test_heads_are_an_error(cls):
    with pytest.raises(ValueError, match="num_heads: expected 1 of layernorm, .* got 2"):
        cls(3, 4, num_heads=2)


@pytest.mark.parametrize("pass_", ["fwd", "bwd"])
def test_plans(pass_):
    """Three barriers a step, no launch a step, no heads and no wave."""
    sizes = ("bf16", 1, DEVICES["sm_90"], pass_)
    for hidden in (64, 512, 1024):
        for p in candidates(Problem("layernorm", 64, hidden, "bf16", 1, pass_, device_limits=DEVICES["sm_90"])):
            assert p.schedule != "stepped" and p.barriers_per_step == (0 if p.local else 3)
    with pytest.raises(PlanError, match="expected one head and one layer a launch of layernorm"):
        plan("layernorm", 64, 512, *sizes, heads=2)
    with pytest.raises(PlanError, match="and a stack"):
        plan("layernorm", 64, 512, *sizes, stack=True)


def test_what_a_step_takes():
    cell = cells.CELLS["layernorm"]
    assert cell.num_vectors == 6 and cell.num_kept == 9 and cell.first_h_block == 5 and not cell.adds
    assert cell.vector_blocks == {"gain_ih": 4, "gain_hh": 4, "gain_c": 1, "bias_c": 1}
