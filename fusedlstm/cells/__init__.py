"""The recurrent cells. Each has a file with its declaration, its equations, and its fast step on a CPU.

The cells of this package are registered in the same way as a user's cells, by `register_cell`. The device code of a
cell is in the file of the same name in `fusedlstm.kernels.cells`.
"""

import importlib
import importlib.util
import itertools
from collections.abc import Callable

from fusedlstm.cells import coupled, gru, gru_reset_before, layernorm, layernorm_gru, lstm, peephole, rnn, slstm
from fusedlstm.cells.cell import (
    CELLS,
    EQUATIONS,
    LOOPS,
    Cell,
    Equations,
    Grads,
    Loop,
    Recurrence,
    Saved,
    State,
    Weights,
)

__all__ = [
    "CELLS",
    "Cell",
    "Equations",
    "Grads",
    "Loop",
    "Recurrence",
    "Saved",
    "State",
    "Weights",
    "register_cell",
]

PARAMETERS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")


def register_cell(
    cell: Cell,
    equations: tuple[Callable | None, ...],
    kernels: tuple | str | None = None,
    loop: tuple[Callable, Callable] | None = None,
) -> None:
    """Make a cell known, so that subclasses of `Recurrent` and `RecurrentCell` can name it.

    docs/add_a_cell.md shows a complete example.

    Example::

        fusedlstm.register_cell(
            fusedlstm.cells.Cell("ugrnn", gates=("f", "g"), states=("h",)),
            equations=(step, step_backward, update),
            kernels=(step_fwd, step_bwd, update_fwd),
        )

    Args:
        cell: The names of the cell, its gates, its states and its vectors. The name of the cell must be a new one.
        equations: The functions step, step_backward, update, vectors_backward and multiplied, in this order. They work
            on torch tensors, and `fusedlstm.cells.cell` says what they take and return. Without step_backward (None)
            the engine "reference" serves the cell, and autograd differentiates step. With it, vectors_backward is
            needed if the cell has vectors, and multiplied if it multiplies. Without update the cell has no zoneout.
        kernels: The functions step_fwd, step_bwd and update, in this order, each under `triton.jit`.
            `fusedlstm.kernels.cells` says what they take and return. update is needed if the equations have it. You can
            also pass the name of a module with these functions. It is imported only if Triton is installed. With None,
            every engine except "triton" serves the cell. They need a step_backward in the equations.
        loop: Two functions, forward and backward, for a faster step on a CPU (`fusedlstm.engines.torch_loop`). Without
            them, the CPU runs the equations. They need a step_backward too.

    Raises:
        TypeError, ValueError: A field of the cell or a function is wrong or missing. Nothing is registered then.
    """
    _check_cell(cell)
    _check_functions("equations", equations, Equations._fields, {"step"})
    has_backward = len(equations) > 1 and equations[1] is not None
    if kernels is not None and cell.multiplies:
        raise ValueError(f"kernels: expected None, because cell.multiplies, got {kernels!r}")
    needed = {"step_backward"} if kernels is not None or loop is not None else set()
    needed |= {"vectors_backward"} if has_backward and cell.vectors else set()
    needed |= {"multiplied"} if has_backward and cell.multiplies else set()
    _check_functions("equations", equations, Equations._fields, needed)
    if loop is not None:
        _check_functions("loop", loop, Loop._fields, {*Loop._fields})
    equations = Equations(*equations)
    if kernels is not None and importlib.util.find_spec("triton") is not None:
        _register_kernels(cell.name, kernels, equations.update is not None)
    CELLS[cell.name], EQUATIONS[cell.name] = cell, equations
    if loop is not None:
        LOOPS[cell.name] = Loop(*loop)


def _register_kernels(name: str, kernels: tuple | str, has_update: bool) -> None:
    from triton.runtime.jit import KernelInterface

    from fusedlstm.kernels.cells import STEPS, Steps

    if isinstance(kernels, str):
        module = importlib.import_module(kernels)
        kernels = tuple(getattr(module, function, None) for function in Steps._fields)
    needed = {"step_fwd", "step_bwd"} | ({"update"} if has_update else set())
    _check_functions("kernels", kernels, Steps._fields, needed, KernelInterface, " under triton.jit")
    STEPS[name] = Steps(*kernels)


def _check_cell(cell: Cell) -> None:
    if not isinstance(cell, Cell):
        raise TypeError(f"cell: expected a Cell, got {type(cell).__name__}")
    if not isinstance(cell.name, str) or not cell.name.isidentifier():
        raise ValueError(f"cell.name: expected a name of letters, digits and underscores, got {cell.name!r}")
    if cell.name in CELLS:
        raise ValueError(f"cell.name: expected a new one, got {cell.name!r}, which is taken")
    for field in ("gates", "states", "kept", "vectors"):
        names = getattr(cell, field)
        if not isinstance(names, tuple) or not all(isinstance(name, str) and name.isidentifier() for name in names):
            raise TypeError(f"cell.{field}: expected a tuple of names, got {names!r}")
        if len({*names}) < len(names):
            raise ValueError(f"cell.{field}: expected every name once, got {names}")
    if not cell.gates:
        raise ValueError("cell.gates: expected at least one, got none")
    if cell.states[:1] != ("h",):
        raise ValueError(f"cell.states: expected 'h' first, which is the output, got {cell.states}")
    if cell.kept and len(cell.kept) < len(cell.gates):
        raise ValueError(
            f"cell.kept: expected at least a block for each of the {len(cell.gates)} gates, got {cell.kept}"
        )
    places = range(len(cell.gates) if cell.kept else 0)
    if not isinstance(cell.x_blocks, tuple) or {*cell.x_blocks} != {*places} or len(cell.x_blocks) != len(places):
        wanted = f"a place for every gate, each of 0 to {places[-1]} once" if places else "() without cell.kept"
        raise ValueError(f"cell.x_blocks: expected {wanted}, got {cell.x_blocks!r}")
    expected = 2 if len(cell.states) > 1 else 1
    if isinstance(cell.norms, bool) or cell.norms not in (0, expected):
        what = "0, or 2 of a cell with a state beside h" if expected == 2 else "0, or 1 of a cell with h alone"
        raise ValueError(f"cell.norms: expected {what}, got {cell.norms!r}")
    if cell.norms and [*cell.x_blocks] != [*places]:
        raise ValueError(f"cell.x_blocks: expected the order of the gates with cell.norms, got {cell.x_blocks!r}")
    of_gates = [name.removeprefix("-") in cell.gates for name in cell.as_lstm]
    if cell.as_lstm and (of_gates != [True] * 4 or cell.states != ("h", "c") or cell.vectors):
        raise ValueError(
            f"cell.as_lstm: expected four gates of a cell with states h and c and without vectors, got {cell.as_lstm!r}"
        )
    if taken := sorted({*cell.vectors} & {*PARAMETERS}):
        raise ValueError(f"cell.vectors: expected names that the parameters of torch.nn leave, got {', '.join(taken)}")


def _check_functions(
    argument: str, given: tuple, names: tuple[str, ...], needed: set[str], cls: type = object, kind: str = ""
) -> None:
    """Check a tuple of functions. A function that is not `needed` may be None, or left out at the end."""
    if not isinstance(given, tuple) or len(given) > len(names):
        raise TypeError(f"{argument}: expected a tuple of {', '.join(names)}, got {given!r}")
    for name, function in itertools.zip_longest(names, given):
        if (name in needed or function is not None) and not (callable(function) and isinstance(function, cls)):
            raise TypeError(f"{argument}: expected {name} to be a function{kind}, got {function!r}")


for _cell, _equations, _loop in (
    (lstm.CELL, lstm.EQUATIONS, lstm.LOOP),
    (gru.CELL, gru.EQUATIONS, gru.LOOP),
    (rnn.TANH, rnn.EQUATIONS_TANH, rnn.LOOP_TANH),
    (rnn.RELU, rnn.EQUATIONS_RELU, rnn.LOOP_RELU),
    (peephole.CELL, peephole.EQUATIONS, peephole.LOOP),
    (coupled.CELL, coupled.EQUATIONS, coupled.LOOP),
    (layernorm.CELL, layernorm.EQUATIONS, layernorm.LOOP),
    (slstm.CELL, slstm.EQUATIONS, slstm.LOOP),
    (gru_reset_before.CELL, gru_reset_before.EQUATIONS, gru_reset_before.LOOP),
    (layernorm_gru.CELL, layernorm_gru.EQUATIONS, layernorm_gru.LOOP),
):
    register_cell(_cell, _equations, loop=_loop)
