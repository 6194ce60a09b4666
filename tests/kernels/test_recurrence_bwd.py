"""kernels/recurrence_bwd.py: every tensor it returns, fed by our own forward, against the specification."""

import pytest
import torch

from fusedlstm.cells import Grads
from fusedlstm.engines import launch, reference
from grids import grid
from support import DTYPES, LENGTHS, RAGGED, assert_accurate, cast, recurrence, recurrence_inputs, strided, tiled

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
    shapes = ((*leading, D * H), (1, *leading, D * H), (D, B, H), (1, D, B, H))
    return Grads(*(torch.randn(shape, generator=generator).to(dtype).to(device) for shape in shapes))


def backward_of_reference(inputs, grads, dtype, clip):
    inputs, grads = cast(inputs, dtype), cast(grads, dtype)
    saved = reference.recurrence_fwd(recurrence(), *inputs)
    return reference.recurrence_bwd(recurrence(clip=clip), grads, saved, *inputs[1:])


def check(T, B, H, D, dtype, device, fwd_plan, bwd_plan, change=lambda grads: grads, clip=None, **layout):
    inputs = recurrence_inputs(T, B, H, D, DTYPES[dtype], device, **layout)
    grads = gradients(inputs.preact_x.shape[1:-1], inputs.state.hx.size(1), H, D, DTYPES[dtype], device)
    saved = launch.recurrence_fwd(recurrence(), *inputs, plan=fwd_plan)
    ours = launch.recurrence_bwd(recurrence(clip=clip), change(grads), saved, *inputs[1:], plan=bwd_plan)
    inputs = recurrence_inputs(T, B, H, D, DTYPES[dtype], **layout)
    torch_results = backward_of_reference(inputs, grads, DTYPES[dtype], clip)
    exact = backward_of_reference(inputs, grads, torch.float64, clip)
    for name, a, b, c in zip(NAMES, ours, torch_results, exact, strict=True):
        assert_accurate(name, a, b, c)


@grid({"dtype": list(DTYPES), ("schedule", "transposed"): FORMS, ("T", "B", "H"): SIZES})
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


@pytest.mark.parametrize(
    ("block_b", "block_k", "split", "ahead"), [(16, 64, 4, 2), (32, 32, 2, 1), (16, 128, 8, 1), (16, 32, 1, 4)]
)
@pytest.mark.parametrize("protocol", ["counter", "data"])
def test_parts_of_the_reduction(device, protocol, block_b, block_k, split, ahead):
    """280 gradients in chunks whose parts are added at the end, some or all of them loaded at once."""
    fwd = tiled("fwd", 35, 70, "fp16", schedule="single", precision="ieee")
    tiles = {"block_b": block_b, "block_k": block_k, "split": split, "ahead": ahead}
    check(2, 35, 70, 1, "fp16", device, fwd, tiled("bwd", 35, 70, "fp16", protocol=protocol, **tiles))


@grid({("schedule", "transposed"): FORMS, "directions": [1, 2], "lengths": LENGTHS})
def test_packed(device, schedule, transposed, directions, lengths):
    options = {"schedule": schedule, "transposed": transposed, "directions": directions, "precision": "ieee"}
    plans = [tiled(pass_, len(lengths), 20, "fp32", **options) for pass_ in ("fwd", "bwd")]
    check(0, 0, 20, directions, "fp32", device, *plans, packed=lengths)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_packed_in_half_precision(device, dtype):
    """With walked tiles: 37 sequences by one group a direction."""
    plans = [tiled(pass_, 37, 40, dtype, directions=2, groups=1, block_k=64) for pass_ in ("fwd", "bwd")]
    check(0, 0, 40, 2, dtype, device, *plans, packed=[3] * 9 + [2] * 20 + [1] * 8)


@grid({("schedule", "transposed"): FORMS, "directions": [1, 2], ("T", "lengths"): RAGGED, "resets": [0.0, 0.3]})
def test_ragged(device, schedule, transposed, directions, T, lengths, resets):
    options = {"schedule": schedule, "transposed": transposed, "directions": directions, "precision": "ieee"}
    plans = [tiled(pass_, len(lengths), 20, "fp32", **options) for pass_ in ("fwd", "bwd")]
    check(T, 0, 20, directions, "fp32", device, *plans, lengths=lengths, resets=resets)


@grid(
    {
        ("schedule", "transposed"): FORMS,
        "packed": {"dense": None, "packed": LENGTHS["two tiles"]},
        "clip": [None, 0.3],
    }
)
def test_resets(device, schedule, transposed, packed, clip):
    """No gradient crosses a cut; and none that enters a step is larger than the clip."""
    options = {"schedule": schedule, "transposed": transposed, "directions": 2, "precision": "ieee"}
    plans = [tiled(pass_, 19, 20, "fp32", **options) for pass_ in ("fwd", "bwd")]
    check(4, 19, 20, 2, "fp32", device, *plans, packed=packed, resets=0.3, clip=clip)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_ragged_in_half_precision(device, dtype):
    """With walked tiles: 37 sequences by one group a direction."""
    plans = [tiled(pass_, 37, 40, dtype, directions=2, groups=1, block_k=64) for pass_ in ("fwd", "bwd")]
    check(3, 0, 40, 2, dtype, device, *plans, lengths=[3, 0, 1, 2] * 9 + [3], resets=0.3)


@pytest.mark.parametrize(("schedule", "transposed"), FORMS)
def test_clipped(device, schedule, transposed):
    plans = [
        tiled(pass_, 5, 20, "fp32", schedule=schedule, transposed=transposed, precision="ieee")
        for pass_ in ("fwd", "bwd")
    ]
    check(6, 5, 20, 1, "fp32", device, *plans, clip=0.3)


LAYOUTS = {
    "batch-major": lambda g: g.transpose(0, 1).contiguous().transpose(0, 1),
    "gaps": strided,
    "rows apart": lambda g: torch.stack([g, g * float("nan")], 1)[:, 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_grad_output(device, layout):
    plans = [tiled(pass_, 5, 20, "fp32", precision="ieee") for pass_ in ("fwd", "bwd")]

    def change(grads):
        return grads._replace(output=LAYOUTS[layout](grads.output))

    check(3, 5, 20, 1, "fp32", device, *plans, change)


def test_without_gradients_of_sequences(device):
    """None means zero, and is not read."""
    inputs = recurrence_inputs(3, 5, 20, 1, torch.float32, device)
    grads = gradients([3, 5], 5, 20, 1, torch.float32, device)
    saved = launch.recurrence_fwd(recurrence(), *inputs)
    nothing = grads._replace(output=None, c_seq=None)
    zeros = grads._replace(output=torch.zeros_like(saved.output), c_seq=torch.zeros_like(saved.c_seq))
    none, zero = (launch.recurrence_bwd(recurrence(), g, saved, *inputs[1:]) for g in (nothing, zeros))
    assert all(torch.equal(a, b) for a, b in zip(none, zero, strict=True))
    assert none[0].norm() > 0
