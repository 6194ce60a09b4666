"""What every recurrent cell is made of: the names and the order of its gates and states.

The equations stand in `fusedlstm.reference` (specification) and in `fusedlstm.kernels.cells` (device code).
This module is plain data, so that `plan` can count gates without importing torch or triton.
"""

from typing import NamedTuple


class Cell(NamedTuple):
    """A recurrent cell.

    `gates` are the rows of `weight_ih` and `weight_hh`, in order. `states` begins with h, which is also the output;
    the states after it never leave their program and are saved in float32.
    """

    name: str
    gates: tuple[str, ...]
    states: tuple[str, ...]

    @property
    def num_gates(self) -> int:
        """G: blocks of H rows in `weight_hh`."""
        return len(self.gates)

    @property
    def num_cell_states(self) -> int:
        """S: states beside h."""
        return len(self.states) - 1


LSTM = Cell("lstm", gates=("i", "f", "g", "o"), states=("h", "c"))

CELLS = {cell.name: cell for cell in (LSTM,)}
