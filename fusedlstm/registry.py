"""Cells of a user's own: checked, and put where every engine looks for its part of a cell."""

import importlib
from collections.abc import Callable

from fusedlstm import cells, checks, engines
from fusedlstm.equations import EQUATIONS, Equations


def register_cell(cell: cells.Cell, equations: tuple[Callable | None, ...], kernels: tuple | str | None = None) -> None:
    """Make a cell known, so that subclasses of `Recurrent` and `RecurrentCell` can name it. How to: docs/add_a_cell.md.

    Example::

        fusedlstm.register_cell(
            fusedlstm.cells.Cell("ugrnn", gates=("f", "g"), states=("h",)),
            equations=(step, step_backward, update),
            kernels=(step_fwd, step_bwd, update_fwd),
        )

    Args:
        cell: what the cell is made of, under a name that is not taken.
        equations: functions of torch tensors, step, step_backward, update and vectors_backward in this order; what they take
            and return is told in `fusedlstm.equations`. Without update (None) the cell has no zoneout; vectors_backward is
            needed for the cell's own vectors.
        kernels: functions under `triton.jit`, step_fwd, step_bwd and update in this order, of `fusedlstm.kernels.cells`; update
            is needed if the equations have it. Or the name of a module that has them, which is imported where Triton is
            installed. None: every engine but "triton" serves the cell.

    Raises:
        TypeError, ValueError: a field of the cell or a function is wrong or missing; then nothing is registered.
    """
    checks.new_cell(cell)
    needed = {"step", "step_backward"} | ({"vectors_backward"} if cell.vectors else set())
    checks.functions("equations", equations, Equations._fields, needed)
    equations = Equations(*equations)
    if kernels is not None and engines.TRITON_IS_INSTALLED:
        _register_kernels(cell.name, kernels, equations.update is not None)
    cells.CELLS[cell.name] = cell
    EQUATIONS[cell.name] = equations


def _register_kernels(name: str, kernels: tuple | str, has_update: bool) -> None:
    from triton.runtime.jit import KernelInterface

    from fusedlstm.kernels.cells import STEPS, Steps

    if isinstance(kernels, str):
        module = importlib.import_module(kernels)
        kernels = tuple(getattr(module, function, None) for function in Steps._fields)
    needed = {"step_fwd", "step_bwd"} | ({"update"} if has_update else set())
    checks.functions("kernels", kernels, Steps._fields, needed, KernelInterface, " under triton.jit")
    STEPS[name] = Steps(*kernels)
