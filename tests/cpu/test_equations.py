"""The equations of every cell: the written-out backward equals autograd, in float64, for all states and layouts."""

import pytest
import torch

from fusedlstm import cells
from fusedlstm.cells import Grads
from fusedlstm.cells.cell import EQUATIONS
from fusedlstm.engines import reference
from fusedlstm.noise import NO_NOISE, Noise
from support import recurrence, recurrence_inputs

EXACT = {"rtol": 1e-9, "atol": 1e-11}
LAYOUTS = {
    "dense": {},
    "resets": {"resets": 0.3},
    "ragged": {"lengths": [5, 0, 3], "resets": 0.2},
    "packed": {"packed": [5, 3, 1]},
}
WRITTEN_OUT = {name: of for name, of in EQUATIONS.items() if of.step_backward}


SEED = torch.tensor([1234567890123])
NOISES = {
    "zoneout": Noise(SEED, (0.3, 0.4, 0.0, 0.0), (2, 100)),
    "mean of zoneout": Noise(None, (0.3, 0.4, 0.5, 0.5)),
    "dropouts": Noise(SEED, (0.0, 0.0, 0.3, 0.4)),
    "all": Noise(SEED, (0.2, 0.3, 0.4, 0.5), (1, 1 << 33)),
}


@pytest.mark.parametrize("layout", ["dense", "ragged", "packed"])
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("cell", [name for name, of in WRITTEN_OUT.items() if of.update])
def test_written_out_backward_of_what_is_regularised(cell, noise, layout):
    test_written_out_backward_equals_autograd(cell, 2, layout, NOISES[noise])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("cell", WRITTEN_OUT)
def test_written_out_backward_equals_autograd(cell, directions, layout, noise=NO_NOISE):
    of = cells.CELLS[cell]
    inputs = recurrence_inputs(5, 3, 6, directions, torch.float64, cell=cell, **LAYOUTS[layout])
    inputs = inputs._replace(batch=inputs.batch._replace(noise=noise))
    preact_x, (_, vectors, *_), (hx, cx), _ = inputs
    for x in (preact_x, hx, cx, *(() if vectors is None else (vectors,))):
        x.requires_grad_()
    saved = reference.recurrence_fwd(recurrence(cell), *inputs)
    results = [getattr(saved, name) for name in Grads._fields]
    generator = torch.Generator().manual_seed(1)
    grads = Grads(*(torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in results))
    results = [x for x in results if x.numel()]
    wanted = [x for x in (preact_x, hx, cx) if x.numel()]
    expected = iter(
        torch.autograd.grad(results, wanted, [g for g in grads if g.numel()], retain_graph=vectors is not None)
    )
    with torch.no_grad():
        grad_preact, grad_hx, grad_cx = reference.recurrence_bwd(recurrence(cell), grads, saved, *inputs[1:])
    by_block = grad_preact.unflatten(-1, (directions, of.num_kept, 6)).movedim(-3, 0)  # [D, ..., K, H]
    of_input = by_block[..., list(of.x_blocks) or slice(None), :].flatten(-2)
    torch.testing.assert_close(of_input, next(expected), **EXACT)
    torch.testing.assert_close(grad_hx, next(expected), **EXACT)
    if of.num_cell_states:
        torch.testing.assert_close(grad_cx, next(expected), **EXACT)
