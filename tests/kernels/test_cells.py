"""kernels/cells: every cell on every schedule, forward and backward, against the specification, also with noise.

A pairwise grid, seeded: for any two of cell, dtype, schedule, layout, directions, hidden size, noise and clip, every
pair of values meets in some case; with whole grids (`grids`) in some case of every cell.
"""

import itertools

import pytest
import torch
import triton
import triton.language as tl

from fusedlstm.cells import CELLS, Grads, Saved
from fusedlstm.cells.cell import EQUATIONS
from fusedlstm.engines import launch, reference
from fusedlstm.kernels.cells import STEPS, Steps
from fusedlstm.noise import NO_NOISE, Noise
from grids import WHOLE, pairwise
from support import DTYPES, assert_accurate, cast, recurrence, recurrence_inputs, tiled, without_padding

SEED = 987654321987
NOISES = {
    "none": NO_NOISE,
    "mean": Noise(None, (0.3, 0.4, 0.5, 0.5)),
    "dropouts": Noise(torch.tensor([SEED]), (0.0, 0.0, 0.3, 0.4)),
    "all": Noise(torch.tensor([SEED]), (0.2, 0.3, 0.4, 0.5), (1, 1 << 33)),
}
SCHEDULES = {
    "single": {"schedule": "single"},
    "counter": {"schedule": "resident"},
    "transposed": {"schedule": "resident", "protocol": "data", "transposed": True},
    "split": {"schedule": "resident", "protocol": "data", "split": 2, "block_k": 32, "groups": 1},
    "streamed": {"schedule": "streamed"},
}
LAYOUTS = {
    "dense": {},
    "resets": {"resets": 0.3},
    "ragged with resets": {"lengths": [2, 0, 3, 1] * 4 + [3, 2], "resets": 0.2},
    "packed": {"packed": [3] * 2 + [2] * 15 + [1]},
}
AXES = {
    "cell": list(STEPS),
    "dtype": list(DTYPES),
    "schedule": list(SCHEDULES),
    "layout": list(LAYOUTS),
    "directions": [1, 2],
    "H": [7, 33],
    "noise": list(NOISES),
    "clip": [None, 0.1],
}


def cases() -> list:
    """All cells in one grid, or with whole grids every cell in one of its own."""
    grids = [pairwise(AXES | {"cell": [cell]}, seed) for seed, cell in enumerate(STEPS)] if WHOLE else [pairwise(AXES)]
    return [pytest.param(*case, id="-".join(map(str, case))) for found in grids for case in found]


@pytest.mark.parametrize(tuple(AXES), cases())
def test_equals_specification(device, cell, dtype, schedule, layout, directions, H, noise, clip):
    B, noise = 18, NOISES[noise]
    if not EQUATIONS[cell].update:
        noise = noise._replace(rates=(0.0, 0.0, *noise.rates[2:])) if noise.rates else noise  # it has no zoneout
    inputs = recurrence_inputs(3, B, H, directions, DTYPES[dtype], device, cell=cell, **LAYOUTS[layout])
    inputs = inputs._replace(batch=inputs.batch._replace(noise=cast(noise, DTYPES[dtype], device)))
    B = inputs.state.hx.size(1)
    tiles = {"precision": "ieee", "directions": directions, "cell": cell, **SCHEDULES[schedule]}
    fwd, bwd = (tiled(pass_, B, H, dtype, **tiles) for pass_ in ("fwd", "bwd"))
    spec, precisions = recurrence(cell, clip=clip), (DTYPES[dtype], torch.float64)

    ours = launch.recurrence_fwd(spec, *inputs, plan=fwd)
    same, exact = (reference.recurrence_fwd(spec, *cast(inputs, p)) for p in precisions)
    # One forward for all: a rectifier's gradient jumps where a preactivation is nearly zero.
    saved = cast(same, DTYPES[dtype], device)
    saved = saved._replace(c_seq=saved.c_seq.float())
    generator = torch.Generator().manual_seed(1)
    wanted = (ours.output, ours.c_seq, ours.h_n, ours.c_n)
    grads = Grads(*(torch.randn(x.shape, generator=generator).to(device, DTYPES[dtype]) for x in wanted))
    ours_bwd = launch.recurrence_bwd(spec, grads, saved, *inputs[1:], plan=bwd)
    same_bwd, exact_bwd = (reference.recurrence_bwd(spec, *cast((grads, same, *inputs[1:]), p)) for p in precisions)
    expected = ([*same, *same_bwd], [*exact, *exact_bwd])
    names = (*Saved._fields, "grad_preact", "grad_hx", "grad_cx")
    for name, a, b, c in zip(names, (*ours, *ours_bwd), *expected, strict=True):
        a, b, c = ((without_padding(x, inputs.batch.layout) if name == "gates" else x) for x in (a.cpu(), b, c))
        assert_accurate(name, a, b, c)


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("batch", [1, 18])
@pytest.mark.parametrize("cell", [c for c in STEPS if not CELLS[c].norms])
def test_one_launch_a_step(device, cell, batch, directions):
    """The schedule "stepped", forward and backward."""
    inputs = recurrence_inputs(3, batch, 19, directions, torch.float32, device, cell=cell)
    tiles = {"schedule": "stepped", "protocol": "none", "directions": directions, "cell": cell, "precision": "ieee"}
    tiles |= {"block_b": 1, "block_h": 4} if batch == 1 else {}
    fwd, bwd = (tiled(pass_, batch, 19, "fp32", **tiles) for pass_ in ("fwd", "bwd"))
    ours = launch.recurrence_fwd(recurrence(cell), *inputs, plan=fwd)
    grads = Grads(*(torch.ones_like(x) for x in (ours.output, ours.c_seq, ours.h_n, ours.c_n)))
    ours_bwd = launch.recurrence_bwd(recurrence(cell), grads, ours, *inputs[1:], plan=bwd)
    expected = []
    for precision in (torch.float32, torch.float64):
        own = cast(inputs, precision)
        found = reference.recurrence_fwd(recurrence(cell), *own)
        back = reference.recurrence_bwd(recurrence(cell), cast(grads, precision), found, *own[1:])
        expected.append([*found, *back])
    for k, (a, b, c) in enumerate(zip((*ours, *ours_bwd), *expected, strict=True)):
        assert_accurate(f"tensor {k}", a, b, c)


def test_the_grid_has_every_pair():
    found = pairwise(AXES)
    for a, b in itertools.combinations(range(len(AXES)), 2):
        values = list(AXES.values())
        assert {(case[a], case[b]) for case in found} == set(itertools.product(values[a], values[b]))
    assert len(found) < 60


@triton.jit
def sign(preact_x, preact_h, state, vectors, drop):
    x = preact_x[0] + preact_h[0]
    h = x / tl.abs(x)  # of nothing, which is zero, a NaN
    return (h,), (h,)


@triton.jit
def sign_bwd(gates, state_prev, state, dstate, vectors, drop):
    return (dstate[0] / gates[0],), (tl.zeros_like(dstate[0]),)


@pytest.mark.parametrize("protocol", ["counter", "data"])
@pytest.mark.parametrize("H", [12, 9, 17])
def test_what_a_cell_makes_of_no_unit_reaches_nobody(device, monkeypatch, protocol, H):
    """Rows are padded to 16 bytes, and programs have units beyond H. Two or three programs are compared with one."""
    monkeypatch.setitem(STEPS, "rnn_tanh", Steps(sign, sign_bwd))
    inputs = recurrence_inputs(3, 4, H, 1, torch.float32, device, cell="rnn_tanh")
    results = []
    for options in ({"schedule": "single"}, {"block_h": 8, "protocol": protocol}):
        fwd, bwd = (tiled(p, 4, H, "fp32", cell="rnn_tanh", precision="ieee", **options) for p in ("fwd", "bwd"))
        saved = launch.recurrence_fwd(recurrence("rnn_tanh"), *inputs, plan=fwd)
        given = Grads(torch.ones_like(saved.output), None, saved.h_n, saved.c_n)
        grads = launch.recurrence_bwd(recurrence("rnn_tanh"), given, saved, *inputs[1:], plan=bwd)
        results.append((saved.output, saved.h_n, grads[0], grads[1]))
    for alone, together in zip(*results, strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
        assert together.isfinite().all()
