"""kernels/step_bwd.py: sequences as a launch a step, every tensor that it returns, against the specification."""

import pytest
import torch

from fusedlstm.cells import Grads
from fusedlstm.engines import launch, reference
from support import DTYPES, assert_accurate, cast, recurrence, recurrence_inputs, strided, tiled

NAMES = ("grad_preact", "grad_hx", "grad_cx")
FORMS = {"row": (1, False), "plain": (16, False), "transposed": (16, True)}
# Tiles are 16 x 16 x 32. In half precision one size: the edges of blocks are the same there.
SIZES = {
    "fp32": [(1, 1, 1), (4, 3, 13), (2, 16, 17), (2, 17, 16)],
    "fp16": [(2, 3, 19)],
    "bf16": [(2, 3, 19)],
}


def given_and_saved(T, B, H, D, dtype, device="cpu", heads=1):
    """Gradients and what else a backward takes, on the device: saved results are those of the specification,
    rounded.
    """
    inputs = recurrence_inputs(T, B, H, D, dtype, heads=heads)
    saved = reference.recurrence_fwd(recurrence(), *inputs)
    generator = torch.Generator().manual_seed(1)
    wanted = (saved.output, saved.c_seq, saved.h_n, saved.c_n)
    grads = Grads(*(torch.randn(x.shape, generator=generator) for x in wanted))
    grads, saved, *others = cast((grads, saved, *inputs[1:]), dtype, device)
    return grads, saved._replace(c_seq=saved.c_seq.float()), *others


def check(dtype, device, plan, change=lambda grads: grads, clip=None, **sizes):
    spec = recurrence(clip=clip)
    grads, *others = given_and_saved(**sizes, dtype=DTYPES[dtype], device=device)
    ours = launch.recurrence_bwd(spec, change(grads), *others, plan=plan)
    torch_results = reference.recurrence_bwd(spec, *cast((grads, *others), DTYPES[dtype]))
    exact = reference.recurrence_bwd(spec, *cast((grads, *others), torch.float64))
    for name, a, b, c in zip(NAMES, ours, torch_results, exact, strict=True):
        assert_accurate(name, a, b, c)


@pytest.mark.parametrize(("dtype", "T", "B", "H"), [(d, *size) for d in SIZES for size in SIZES[d]], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_equals_specification(device, dtype, form, T, B, H):
    block_b, transposed = FORMS[form]
    B = B if block_b > 1 else 1
    options = {"schedule": "stepped", "transposed": transposed, "directions": 2, "precision": "ieee"}
    plan = tiled("bwd", B, H, dtype, block_b=block_b, block_k=32, **options)
    check(dtype, device, plan, T=T, B=B, H=H, D=2)


def stepped(B=5, H=20, D=1, **options):
    return tiled("bwd", B, H, "fp32", schedule="stepped", directions=D, precision="ieee", **options)


def test_one_direction(device):
    check("fp32", device, stepped(), T=3, B=5, H=20, D=1)


@pytest.mark.parametrize("batch", [1, 5])
def test_heads(device, batch):
    """A head's gradients are a part of every gate."""
    plan = stepped(batch, 18, 2, heads=3, block_h=4, block_b=1 if batch == 1 else 16)
    check("fp32", device, plan, T=2, B=batch, H=18, D=2, heads=3)


@pytest.mark.parametrize("D", [1, 2])
def test_clipped(device, D):
    """What enters a step is, what the caller gives for the final states is not."""
    check("fp32", device, stepped(D=D), T=4, B=5, H=20, D=D, clip=0.3)


LAYOUTS = {
    "batch-major": lambda g: g.transpose(0, 1).contiguous().transpose(0, 1),
    "gaps": strided,
    "rows apart": lambda g: torch.stack([g, g * float("nan")], 1)[:, 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_grad_output(device, layout):
    def change(grads):
        return grads._replace(output=LAYOUTS[layout](grads.output))

    check("fp32", device, stepped(D=2), change, T=3, B=5, H=20, D=2)


def test_without_gradients_of_sequences(device):
    """None means zero, and is not read."""
    grads, *others = given_and_saved(3, 5, 20, 1, torch.float32, device)
    nothing = grads._replace(output=None, c_seq=None)
    zeros = grads._replace(output=torch.zeros_like(grads.output), c_seq=torch.zeros_like(grads.c_seq))
    none, zero = (launch.recurrence_bwd(recurrence(), g, *others, plan=stepped()) for g in (nothing, zeros))
    assert all(torch.equal(a, b) for a, b in zip(none, zero, strict=True))
    assert none[0].norm() > 0
