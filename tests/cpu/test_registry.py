"""register_cell: a cell of a user's own is checked, known to every engine, and told wrong in words."""

import importlib.util
import sys

import pytest
import torch

import fusedlstm
import page
from fusedlstm import cells
from fusedlstm.cells import CELLS, Cell

EQUATIONS = tuple(CELLS["gru"].equations)
KERNELS = "fusedlstm.kernels.cells.gru"
PLAIN = Cell("mine", gates=("f", "g"), states=("h",))
KEPT = CELLS["gru"]._replace(name="mine", aten=None)


@pytest.fixture(autouse=True)
def forgotten():
    with page.forgotten():
        yield


class Mine(fusedlstm.Recurrent):
    cell = "mine"


@pytest.mark.parametrize("bias", [True, False])
def test_a_gru_under_another_name_is_a_gru(bias):
    """With blocks of its own, biases in the step, and kernels named by their module."""
    fusedlstm.register_cell(KEPT, EQUATIONS, KERNELS)
    from fusedlstm.kernels.cells import STEPS

    assert STEPS["mine"] == STEPS["gru"]
    gru = fusedlstm.GRU(3, 6, bias=bias, bidirectional=True, dtype=torch.float64)
    mine = Mine(3, 6, bias=bias, bidirectional=True, dtype=torch.float64, backend="torch")
    mine.load_state_dict(gru.state_dict())
    for sequence in page.SEQUENCES:
        found, expected = (page.outcome(module, sequence, torch.float64) for module in (mine, gru))
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11)


def test_vectors_become_parameters():
    fusedlstm.register_cell(CELLS["peephole"]._replace(name="mine", aten=None), tuple(CELLS["peephole"].equations))
    assert [*Mine(3, 6)._parameters] == [*fusedlstm.PeepholeLSTM(3, 6)._parameters]


def test_equations_are_not_those_of_aten_without_a_backward():
    """A cell that names ATen's, but leaves the backward to autograd, is computed by its own step."""
    equations = CELLS["lstm"].equations
    fusedlstm.register_cell(CELLS["lstm"]._replace(name="mine"), (equations.step,))
    module, x = Mine(3, 6), torch.randn(4, 2, 3)
    assert fusedlstm.explain(module, x).engine == "reference" and not module._is_plain(x, None)


def test_without_kernels_the_engine_says_so(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    fusedlstm.register_cell(KEPT, EQUATIONS)
    with pytest.raises(RuntimeError, match="cannot serve this call: the kernels have no cell 'mine', they have lstm, "):
        Mine(3, 6, backend="triton")(torch.randn(4, 2, 3))


def test_where_triton_is_missing_a_module_of_kernels_is_not_imported(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    fusedlstm.register_cell(KEPT, EQUATIONS, "a_module_that_is_not_there")
    assert Mine(3, 6)(torch.randn(4, 2, 3))[0].shape == (4, 2, 6)


def test_without_update_there_is_no_zoneout():
    fusedlstm.register_cell(KEPT, EQUATIONS[:2])
    with pytest.raises(ValueError, match="zoneout: expected 0 for the cell 'mine'"):
        Mine(3, 6, zoneout=0.1)


@pytest.mark.parametrize("like", [fusedlstm.LayerNormGRU, fusedlstm.ResetBeforeGRU])
def test_without_step_backward_autograd_differentiates_the_step(like, monkeypatch):
    """With vectors, or with a product of its own; and with zoneout, which needs no update then."""
    fusedlstm.register_cell(CELLS[like.cell]._replace(name="mine"), (CELLS[like.cell].equations.step,))
    heads = 1 if CELLS[like.cell].norms else 2
    for options in ({"num_layers": 2, "num_heads": heads}, {"bias": False, "zoneout": 0.2}, {"grad_clip": 0.02}):
        stock, mine = (cls(3, 6, bidirectional=True, dtype=torch.float64, **options).eval() for cls in (like, Mine))
        mine.load_state_dict(stock.state_dict())
        for sequence in page.SEQUENCES:
            found, expected = (page.outcome(module, sequence, torch.float64) for module in (mine, stock))
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11)
    found = fusedlstm.explain(mine, torch.randn(4, 2, 3).double())
    assert found.engine == "reference" and "the cell mine has no step_backward" in found.why
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="cannot serve this call: the kernels have no cell 'mine', they have lstm, "):
        Mine(3, 6, backend="triton")(torch.randn(4, 2, 3))


def test_what_a_step_keeps_does_not_pass_through_its_products():
    equations = CELLS["gru_reset_before"].equations
    fusedlstm.register_cell(CELLS["gru_reset_before"]._replace(name="mine"), (equations.step,))
    stock, mine, x = fusedlstm.ResetBeforeGRU(3, 6), Mine(3, 6), torch.randn(4, 2, 3)
    mine.load_state_dict(stock.state_dict())
    found, expected = (fusedlstm.inspect.gates(module, x) for module in (mine, stock))
    torch.testing.assert_close(found.keep, expected.keep)
    torch.testing.assert_close(found.keep, expected.z)


WRONG_CELLS = {
    "name taken": (PLAIN._replace(name="gru"), ValueError, "cell.name: expected a new one, got 'gru', which is taken"),
    "no name": (PLAIN._replace(name="my cell"), ValueError, "cell.name: expected a name of letters"),
    "not a cell": (("mine", ("f",), ("h",)), TypeError, "cell: expected a Cell, got tuple"),
    "a comma forgotten": (PLAIN._replace(states="h"), TypeError, "cell.states: expected a tuple of names, got 'h'"),
    "no gates": (PLAIN._replace(gates=()), ValueError, "cell.gates: expected at least one, got none"),
    "a gate twice": (
        PLAIN._replace(gates=("f", "f")),
        ValueError,
        "cell.gates: expected every name once, got ('f', 'f')",
    ),
    "h not first": (PLAIN._replace(states=("c", "h")), ValueError, "cell.states: expected 'h' first"),
    "too few kept": (
        KEPT._replace(kept=("n", "r")),
        ValueError,
        "cell.kept: expected at least a block for each of the 3 gates",
    ),
    "x_blocks alone": (
        PLAIN._replace(x_blocks=(1, 0)),
        ValueError,
        "cell.x_blocks: expected () without cell.kept, got (1, 0)",
    ),
    "x_blocks missing": (
        KEPT._replace(x_blocks=()),
        ValueError,
        "cell.x_blocks: expected a place for every gate, each of 0 to 2",
    ),
    "x_blocks beyond": (KEPT._replace(x_blocks=(1, 2, 3)), ValueError, "each of 0 to 2 once, got (1, 2, 3)"),
    "x_blocks twice": (KEPT._replace(x_blocks=(1, 1, 0)), ValueError, "each of 0 to 2 once, got (1, 1, 0)"),
    "x_blocks with norms": (
        KEPT._replace(norms=1),
        ValueError,
        "cell.x_blocks: expected the order of the gates with cell.norms, got (1, 2, 0)",
    ),
    "norms that say no number": (
        KEPT._replace(norms=True),
        ValueError,
        "cell.norms: expected 0, or 1 of a cell with h alone, got True",
    ),
    "two norms of one state": (KEPT._replace(norms=2), ValueError, "expected 0, or 1 of a cell with h alone, got 2"),
    "one norm of two states": (
        PLAIN._replace(states=("h", "c"), norms=1),
        ValueError,
        "cell.norms: expected 0, or 2 of a cell with a state beside h, got 1",
    ),
    "not the gates of an LSTM": (
        PLAIN._replace(states=("h", "c"), as_lstm=("f", "-f", "f", "o")),
        ValueError,
        "expected four gates of a cell with states h and c and without vectors, got ('f', '-f', 'f', 'o')",
    ),
    "a parameter of torch's": (
        PLAIN._replace(vectors=("bias_hh",)),
        ValueError,
        "cell.vectors: expected names that the parameters of torch.nn leave, got bias_hh",
    ),
}


def raises(error, text, *arguments):
    before = dict(cells.CELLS), dict(cells.cell.EQUATIONS)
    with pytest.raises(error) as raised:
        fusedlstm.register_cell(*arguments)
    assert text in str(raised.value)
    assert before == (cells.CELLS, cells.cell.EQUATIONS)
    assert "mine" not in sys.modules["fusedlstm.kernels.cells"].STEPS


@pytest.mark.parametrize(("cell", "error", "text"), WRONG_CELLS.values(), ids=WRONG_CELLS.keys())
def test_wrong_cells(cell, error, text):
    raises(error, text, cell, EQUATIONS)


def test_a_name_is_taken_once():
    fusedlstm.register_cell(PLAIN, EQUATIONS)
    with pytest.raises(ValueError, match="cell.name: expected a new one, got 'mine', which is taken"):
        fusedlstm.register_cell(PLAIN, EQUATIONS)


def test_wrong_equations():
    step, step_backward, update, *_ = EQUATIONS
    names = "step, step_backward, update, vectors_backward, multiplied"
    raises(TypeError, f"equations: expected a tuple of {names}, got <module", PLAIN, cells)
    raises(TypeError, f"equations: expected a tuple of {names}, got ", PLAIN, (step,) * 6)
    raises(TypeError, "equations: expected step to be a function, got None", PLAIN, (None, step_backward))
    no_backward = "equations: expected step_backward to be a function, got None"
    raises(TypeError, no_backward, PLAIN, (step,), KERNELS)
    raises(TypeError, no_backward, PLAIN, (step, None, update), None, (step, step))
    multiplies = PLAIN._replace(multiplies=True)
    raises(TypeError, "equations: expected multiplied to be a function, got None", multiplies, (step, step_backward))
    raises(ValueError, "kernels: expected None, because cell.multiplies, got ", multiplies, EQUATIONS, KERNELS)
    raises(TypeError, "equations: expected update to be a function, got 1", PLAIN, (step, step_backward, 1))
    own = PLAIN._replace(vectors=("p",))
    raises(TypeError, "expected vectors_backward to be a function, got None", own, (step, step_backward, update))


def test_wrong_kernels():
    from fusedlstm.kernels.cells import STEPS

    step_fwd, step_bwd, _ = STEPS["gru"]
    raises(
        TypeError,
        "kernels: expected step_bwd to be a function under triton.jit, got None",
        PLAIN,
        EQUATIONS,
        (step_fwd,),
    )
    raises(
        TypeError, "expected update to be a function under triton.jit, got None", PLAIN, EQUATIONS, (step_fwd, step_bwd)
    )
    plain = (step_fwd, step_bwd, EQUATIONS[2])
    raises(TypeError, "expected update to be a function under triton.jit, got <function", PLAIN, EQUATIONS, plain)
    raises(
        TypeError,
        "expected step_fwd to be a function under triton.jit, got None",
        PLAIN,
        EQUATIONS,
        "fusedlstm.products",
    )
    raises(ModuleNotFoundError, "nowhere_at_all", PLAIN, EQUATIONS, "nowhere_at_all")
