"""kernels/recurrence_fwd.py: every tensor it returns, against the specification."""

import pytest
import torch

from fusedlstm.cells import Grads, Saved, Weights
from fusedlstm.engines import launch, reference
from fusedlstm.layout import Layout
from fusedlstm.noise import Batch
from grids import grid
from support import (
    DTYPES,
    LENGTHS,
    RAGGED,
    assert_accurate,
    cast,
    recurrence,
    recurrence_inputs,
    tiled,
    without_padding,
)

FORMS = [
    ("single", False),
    ("single", True),
    ("resident", False),
    ("resident", True),
    ("streamed", False),
    ("streamed", True),
]
# Tiles are 16 x 16 x 16: every size below, at, above and more than twice a block, T at its edges.
SIZES = [(1, 1, 1), (2, 3, 13), (17, 3, 16), (2, 16, 17), (1, 17, 16), (2, 37, 37)]


def check(inputs, plan):
    ours = launch.recurrence_fwd(recurrence(), *inputs, plan=plan)
    torch_results = reference.recurrence_fwd(recurrence(), *cast(inputs, inputs.state.hx.dtype))
    exact = reference.recurrence_fwd(recurrence(), *cast(inputs, torch.float64))
    for name, a, b, c in zip(Saved._fields, ours, torch_results, exact, strict=True):
        if name == "gates":
            a, b, c = (without_padding(x, inputs.batch.layout) for x in (a, b, c))
        assert_accurate(name, a, b, c)
    return ours


@grid({"dtype": list(DTYPES), ("schedule", "transposed"): FORMS, ("T", "B", "H"): SIZES})
def test_equals_specification(device, dtype, schedule, transposed, T, B, H):
    inputs = recurrence_inputs(T, B, H, 1, DTYPES[dtype], device)
    check(inputs, tiled("fwd", B, H, dtype, schedule=schedule, transposed=transposed, precision="ieee"))


@pytest.mark.parametrize("schedule", ["single", "resident"])
def test_two_directions(device, schedule):
    inputs = recurrence_inputs(3, 5, 20, 2, torch.float32, device)
    check(inputs, tiled("fwd", 5, 20, "fp32", schedule=schedule, directions=2, precision="ieee"))


@grid({("schedule", "transposed"): FORMS, "directions": [1, 2], "lengths": LENGTHS})
def test_packed(device, schedule, transposed, directions, lengths):
    """Rows of a step lie together; the reverse direction starts at each sequence's own last step."""
    inputs = recurrence_inputs(0, 0, 20, directions, torch.float32, device, packed=lengths)
    options = {"schedule": schedule, "transposed": transposed, "directions": directions, "precision": "ieee"}
    check(inputs, tiled("fwd", len(lengths), 20, "fp32", **options))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_packed_in_half_precision(device, dtype):
    """With walked tiles: 37 sequences by one group a direction."""
    inputs = recurrence_inputs(0, 0, 40, 2, DTYPES[dtype], device, packed=[3] * 9 + [2] * 20 + [1] * 8)
    check(inputs, tiled("fwd", 37, 40, dtype, directions=2, groups=1, block_k=64))


@grid({("schedule", "transposed"): FORMS, "directions": [1, 2], ("T", "lengths"): RAGGED, "resets": [0.0, 0.3]})
def test_ragged(device, schedule, transposed, directions, T, lengths, resets):
    """Padding is zero, whatever was there; the reverse direction starts at each sequence's own last step."""
    inputs = recurrence_inputs(T, 0, 20, directions, torch.float32, device, lengths=lengths, resets=resets)
    options = {"schedule": schedule, "transposed": transposed, "directions": directions, "precision": "ieee"}
    saved = check(inputs, tiled("fwd", len(lengths), 20, "fp32", **options))
    for b, n in enumerate(lengths):
        assert not saved.output[n:, b].any() and not saved.c_seq[0, n:, b].any()


@pytest.mark.parametrize("packed", [None, LENGTHS["two tiles"]], ids=["dense", "packed"])
@pytest.mark.parametrize(("schedule", "transposed"), FORMS)
def test_resets(device, schedule, transposed, packed):
    inputs = recurrence_inputs(4, 19, 20, 2, torch.float32, device, packed=packed, resets=0.3)
    options = {"schedule": schedule, "transposed": transposed, "directions": 2, "precision": "ieee"}
    check(inputs, tiled("fwd", 19, 20, "fp32", **options))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_ragged_in_half_precision(device, dtype):
    """With walked tiles: 37 sequences by one group a direction."""
    lengths = [3, 0, 1, 2] * 9 + [3]
    inputs = recurrence_inputs(3, 0, 40, 2, DTYPES[dtype], device, lengths=lengths, resets=0.3)
    check(inputs, tiled("fwd", 37, 40, dtype, directions=2, groups=1, block_k=64))


def test_what_padding_holds_is_not_looked_at(device):
    lengths = [3, 0, 5, 1]
    inputs = recurrence_inputs(5, 0, 20, 2, torch.float32, device, lengths=lengths, resets=0.3)
    plan = tiled("fwd", 4, 20, "fp32", directions=2, precision="ieee")
    expected = launch.recurrence_fwd(recurrence(save_gates=False), *inputs, plan=plan)
    for b, n in enumerate(lengths):
        inputs.preact_x[:, n:, b] = float("nan")
        inputs.batch.layout.resets[n:, b] = True
    found = launch.recurrence_fwd(recurrence(save_gates=False), *inputs, plan=plan)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lengths_out_of_range_count_as_the_nearest(device, dtype):
    """On a device nobody looks at them, and they must not become addresses. Both passes, and the recomputation."""
    huge = 2**31 - 1 if dtype == torch.int32 else 2**40 + 1
    results = []
    for lengths in ([-7, 2, huge, 3], [0, 2, 3, 3]):
        inputs = recurrence_inputs(3, 0, 20, 2, torch.float32, device, lengths=[1, 1, 1, 1], resets=0.3)
        layout = inputs.batch.layout._replace(lengths=torch.tensor(lengths, dtype=dtype, device=device))
        inputs = inputs._replace(batch=Batch(layout))
        saved = launch.recurrence_fwd(recurrence(), *inputs)
        output, h_n, c_n, gates, c_seq = saved
        grads = launch.recurrence_bwd(recurrence(), Grads(output, c_seq, h_n, c_n), saved, *inputs[1:])
        again = launch.recompute(recurrence(), inputs.preact_x, None, inputs.state, inputs.batch)
        of_rows = [without_padding(x, Layout(torch.tensor([0, 2, 3, 3]))) for x in (gates, again[0])]
        results.append((output, h_n, c_n, c_seq, *grads, again[1], *of_rows))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("block_b", "block_h", "block_k", "split", "ahead"),
    [(16, 8, 32, 1, 3), (32, 16, 64, 4, 1), (16, 32, 16, 1, 2), (16, 8, 64, 2, 2), (16, 8, 128, 8, 1)],
)
@pytest.mark.parametrize("protocol", ["counter", "data"])
def test_other_tiles(device, protocol, block_b, block_h, block_k, split, ahead):
    """Both passes. 70 is no multiple of the alignment of a row or of a chunk. Chunks are never all loaded at once."""
    inputs = recurrence_inputs(2, 35, 70, 1, torch.float16, device)
    tiles = {"block_b": block_b, "block_h": block_h, "block_k": block_k, "split": split, "ahead": ahead}
    check(inputs, tiled("fwd", 35, 70, "fp16", protocol=protocol, **tiles))


@pytest.mark.parametrize("groups", [1, 2])
def test_walked_batch_tiles(device, groups):
    """Five batch tiles by one or two groups, one after another."""
    inputs = recurrence_inputs(2, 70, 20, 1, torch.float32, device)
    check(inputs, tiled("fwd", 70, 20, "fp32", groups=groups, precision="ieee"))


def test_strides(device):
    """Rows of preact_x in batch-major order, as a batch-first input leaves them; a weight that is a slice."""
    inputs = recurrence_inputs(3, 5, 20, 1, torch.float32, device)
    preact_x = inputs.preact_x.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.full((80, 48), float("nan"), device=device)
    wide[:, :20] = inputs.weights.weight_hh[0]
    assert not preact_x.is_contiguous()
    inputs = inputs._replace(preact_x=preact_x, weights=Weights([wide[:, :20]]))
    check(inputs, tiled("fwd", 5, 20, "fp32", precision="ieee"))


def test_saves_nothing_for_inference(device):
    inputs = recurrence_inputs(3, 5, 20, 1, torch.float32, device)
    plan = tiled("fwd", 5, 20, "fp32", precision="ieee")
    saved = launch.recurrence_fwd(recurrence(), *inputs, plan=plan)
    lean = launch.recurrence_fwd(recurrence(save_gates=False, save_states=False), *inputs, plan=plan)
    assert lean.gates.numel() == lean.c_seq.numel() == 0
    assert all(torch.equal(a, b) for a, b in zip(lean[:3], saved[:3], strict=True))


def test_saturated_preactivations(device):
    """Preactivations of +-50 and +-1e4 saturate the gates and stay finite."""
    inputs = recurrence_inputs(2, 3, 16, 1, torch.float32, device)
    preact_x = inputs.preact_x.sign() * torch.tensor([50.0, 1e4], device=device).view(1, 2, 1, 1)
    check(inputs._replace(preact_x=preact_x), tiled("fwd", 3, 16, "fp32", precision="ieee"))


def test_tiny_values_keep_their_relative_accuracy(device):
    inputs = recurrence_inputs(2, 3, 16, 1, torch.float32, device)
    for x in (inputs.preact_x, *inputs.weights.weight_hh, *inputs.state):
        x *= 1e-6
    check(inputs, tiled("fwd", 3, 16, "fp32", precision="ieee"))


def test_same_bits_every_time(device):
    inputs = recurrence_inputs(3, 5, 40, 1, torch.float32, device)
    plan = tiled("fwd", 5, 40, "fp32", precision="ieee")
    first, second = (launch.recurrence_fwd(recurrence(), *inputs, plan=plan) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
