"""torch_loop.py and loops/: every cell equals the specification, forward and backward, in float64; and so does a cell
without a file of its own, by its equations."""

import pytest
import torch

from fusedlstm import cells, loops, reference, torch_loop
from support import recurrence_inputs

EXACT = {"rtol": 1e-10, "atol": 1e-12}
T, B, H = 5, 3, 6
# Steps at which none, one and several sequences end; empty sequences; resets in the padding and at the beginning.
CASES = {
    "dense": {},
    "dense, two directions, heads": {"D": 2, "heads": 2},
    "dense, clip, no grad_output": {"clip": 0.05, "without": "grad_output"},
    "one step": {"T": 1, "D": 2, "clip": 0.05},
    "no steps": {"T": 0, "D": 2},
    "resets, no grad_c_seq": {"resets": 0.3, "D": 2, "without": "grad_c_seq"},
    "ragged, resets, heads": {"lengths": [2, 0, 5, 1, 0], "resets": 0.3, "heads": 3},
    "ragged, two directions, clip": {"lengths": [3, 0, 1], "D": 2, "clip": 0.05},
    "ragged, all empty": {"lengths": [0, 0], "D": 2},
    "packed": {"packed": [5, 3, 3, 1]},
    "packed, two directions, clip, heads": {"packed": [4, 4, 1], "D": 2, "clip": 0.05, "heads": 2},
    "packed, resets, no gradients of sequences": {
        "packed": [5, 3, 2],
        "resets": 0.3,
        "D": 2,
        "without": "grad_output, grad_c_seq",
    },
}


def assert_all_close(ours, exact):
    for name in exact:
        torch.testing.assert_close(ours[name], exact[name], **EXACT, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("by_equations", [False, True], ids=["own file", "by equations"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("cell", cells.CELLS)
def test_equals_the_specification(monkeypatch, cell, case, by_equations):
    if by_equations:
        monkeypatch.delitem(loops.LOOPS, cell)
    else:
        assert cell in loops.LOOPS
    options = {"T": T, "D": 1, "heads": 1, "clip": None, "without": "", **CASES[case]}
    clip, without, steps, D = (options.pop(name) for name in ("clip", "without", "T", "D"))
    if cells.CELLS[cell].norms:  # which mix the units of all heads
        options["heads"] = 1
    inputs = recurrence_inputs(steps, B, H, D, torch.float64, cell=cell, seed=4, **options)
    own = {name: inputs[name] for name in ("weight_hh", "hx", "cx", "layout", "vectors")}
    if not steps:  # which the specification does not take
        output, h_n, c_n, gates, c_seq = torch_loop.recurrence_fwd(cell, **inputs, save_gates=True, save_states=True)
        assert torch.equal(h_n, own["hx"]) and torch.equal(c_n, own["cx"]) and len(output) == 0
        found = torch_loop.recurrence_bwd(
            cell, None, None, h_n, c_n, **own, output=output, gates=gates, c_seq=c_seq, clip=None
        )
        for x, expected in zip(found, (gates, torch.zeros_like(h_n) if False else found[1], c_n), strict=True):
            assert torch.equal(x, expected)
        return

    names = ("output", "h_n", "c_n", "gates", "c_seq")
    exact = dict(zip(names, reference.recurrence_fwd(cell, **inputs), strict=True))
    ours = dict(
        zip(names, torch_loop.recurrence_fwd(cell, **inputs, save_gates=True, save_states=True), strict=True)
    )
    saved = {name: exact[name] for name in ("output", "gates", "c_seq")}
    lives = torch.ones_like(exact["gates"][..., :1], dtype=torch.bool)
    if inputs["layout"].name == "ragged" and inputs["layout"].lengths is not None:
        lives = (torch.arange(steps).unsqueeze(1) < inputs["layout"].lengths).unsqueeze(-1)
    ours["gates"], exact["gates"] = ours["gates"] * lives, exact["gates"] * lives
    assert_all_close(ours, exact)

    generator = torch.Generator().manual_seed(1)
    grads = {
        f"grad_{name}": torch.randn(exact[name].shape, generator=generator, dtype=torch.float64)
        for name in ("output", "c_seq", "h_n", "c_n")
    }
    zero = {name: torch.zeros_like(g) if name in without else g for name, g in grads.items()}
    none = {name: None if name in without else g for name, g in grads.items()}
    names = ("grad_preact", "grad_hx", "grad_cx")
    exact = dict(zip(names, reference.recurrence_bwd(cell, **zero, **own, **saved, clip=clip), strict=True))
    ours = dict(zip(names, torch_loop.recurrence_bwd(cell, **none, **own, **saved, clip=clip), strict=True))
    assert_all_close(ours, exact)
