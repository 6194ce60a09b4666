"""kernels/recurrence_bwd.py: every tensor it returns, fed by our own forward, against the specification."""

import pytest
import torch

from fusedlstm import launch, reference
from support import DTYPES, assert_accurate, cast, recurrence_inputs, spec_inputs, strided, tiled

NAMES = ("grad_preact", "grad_hx", "grad_cx")
FORMS = [
    ("single", False),
    ("single", True),
    ("resident", False),
    ("resident", True),
    ("streamed", False),
    ("streamed", True),
]
SIZES = [(1, 1, 1), (2, 3, 13), (17, 3, 16), (2, 16, 17), (1, 17, 16), (2, 37, 37)]


def gradients(leading, B, H, D, dtype, device):
    generator = torch.Generator().manual_seed(1)
    return {
        "grad_output": torch.randn(*leading, D * H, generator=generator).to(dtype).to(device),
        "grad_h_n": torch.randn(D, B, H, generator=generator).to(dtype).to(device),
        "grad_c_n": torch.randn(1, D, B, H, generator=generator).to(dtype).to(device),
    }


def backward_of_reference(inputs, grads, dtype):
    inputs, grads = spec_inputs(inputs, dtype), cast(grads, dtype)
    output, _, _, gates, c_seq = reference.recurrence_fwd("lstm", **inputs)
    del inputs["preact_x"]
    return reference.recurrence_bwd("lstm", **grads, **inputs, output=output, gates=gates, c_seq=c_seq)


def check(T, B, H, D, dtype, device, fwd_plan, bwd_plan, change=lambda grads: grads, lengths=None):
    inputs = recurrence_inputs(T, B, H, D, DTYPES[dtype], device, lengths=lengths)
    B = len(lengths) if lengths else B
    grads = gradients([sum(lengths)] if lengths else [T, B], B, H, D, DTYPES[dtype], device)
    output, _, _, gates, c_seq = launch.recurrence_fwd("lstm", **inputs, save=True, plan=fwd_plan)
    del inputs["preact_x"]
    ours = launch.recurrence_bwd(
        "lstm", **change(dict(grads)), **inputs, output=output, gates=gates, c_seq=c_seq, plan=bwd_plan
    )
    inputs = recurrence_inputs(T, B, H, D, DTYPES[dtype], lengths=lengths)
    torch_results = backward_of_reference(inputs, grads, DTYPES[dtype])
    exact = backward_of_reference(inputs, grads, torch.float64)
    for name, a, b, c in zip(NAMES, ours, torch_results, exact, strict=True):
        assert_accurate(name, a, b, c)


@pytest.mark.parametrize(("T", "B", "H"), SIZES, ids=lambda n: str(n))
@pytest.mark.parametrize(("schedule", "transposed"), FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_specification(device, dtype, schedule, transposed, T, B, H):
    fwd = tiled("fwd", B, H, dtype, schedule="single", precision="ieee")
    bwd = tiled("bwd", B, H, dtype, schedule=schedule, transposed=transposed, block_k=32, precision="ieee")
    check(T, B, H, 1, dtype, device, fwd, bwd)


@pytest.mark.parametrize("schedule", ["single", "resident"])
def test_two_directions(device, schedule):
    plans = [tiled(pass_, 5, 20, "fp32", schedule=schedule, directions=2, precision="ieee") for pass_ in ("fwd", "bwd")]
    check(3, 5, 20, 2, "fp32", device, *plans)


@pytest.mark.parametrize("groups", [1, 2])
def test_walked_batch_tiles(device, groups):
    plans = [tiled(pass_, 70, 20, "fp32", groups=groups, precision="ieee") for pass_ in ("fwd", "bwd")]
    check(2, 70, 20, 1, "fp32", device, *plans)


LENGTHS = {
    "ragged": [7, 6, 6, 3, 1],
    "two tiles": [4] * 3 + [3] * 12 + [3, 2, 2, 1],
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize(("schedule", "transposed"), FORMS)
def test_packed(device, schedule, transposed, directions, lengths):
    options = {"schedule": schedule, "transposed": transposed, "directions": directions, "precision": "ieee"}
    plans = [tiled(pass_, len(lengths), 20, "fp32", **options) for pass_ in ("fwd", "bwd")]
    check(0, 0, 20, directions, "fp32", device, *plans, lengths=lengths)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_packed_in_half_precision(device, dtype):
    """With walked tiles: 37 sequences by one group a direction."""
    plans = [tiled(pass_, 37, 40, dtype, directions=2, groups=1, block_k=64) for pass_ in ("fwd", "bwd")]
    check(0, 0, 40, 2, dtype, device, *plans, lengths=[3] * 9 + [2] * 20 + [1] * 8)


LAYOUTS = {
    "batch-major": lambda g: g.transpose(0, 1).contiguous().transpose(0, 1),
    "gaps": strided,
    "rows apart": lambda g: torch.stack([g, g * float("nan")], 1)[:, 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_grad_output(device, layout):
    plans = [tiled(pass_, 5, 20, "fp32", precision="ieee") for pass_ in ("fwd", "bwd")]

    def change(grads):
        grads["grad_output"] = LAYOUTS[layout](grads["grad_output"])
        return grads

    check(3, 5, 20, 1, "fp32", device, *plans, change)


def test_without_grad_output(device):
    """None means zero, and is not read."""
    inputs = recurrence_inputs(3, 5, 20, 1, torch.float32, device)
    grads = gradients([3, 5], 5, 20, 1, torch.float32, device)
    output, _, _, gates, c_seq = launch.recurrence_fwd("lstm", **inputs, save=True)
    del inputs["preact_x"]
    saved = {**inputs, "output": output, "gates": gates, "c_seq": c_seq}
    none = launch.recurrence_bwd("lstm", **{**grads, "grad_output": None}, **saved)
    zero = launch.recurrence_bwd("lstm", **{**grads, "grad_output": torch.zeros_like(output)}, **saved)
    assert all(torch.equal(a, b) for a, b in zip(none, zero, strict=True))
    assert none[0].norm() > 0
