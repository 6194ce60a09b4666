"""What every recurrent cell is made of: the names and the order of its gates, states and parameters of single units.

The equations stand in `fusedlstm.equations` (specification), in `fusedlstm.kernels.cells` (device code) and, for a fast loop
of torch operations, in `fusedlstm.loops`: one file a cell in each, with the name of the cell.
This module is plain data, so that `plan` can count gates without importing torch or triton.
"""

from typing import NamedTuple


class Cell(NamedTuple):
    """A recurrent cell.

    `gates` are the rows of `weight_ih` and `weight_hh`, in order. `states` begins with h, which is also the output;
    the states after it never leave their program and are saved in float32.

    `kept` are the blocks of H that a step keeps for the backward, the same as the gates unless told; the backward puts as
    many gradients in their places. Those of the recurrent preactivations are the last G of them, in the order of the gates;
    those of the input's are the first G, and gate k's is the one at `x_blocks[k]`.

    `vectors` are parameters with one number a unit, beside the four of `torch.nn`. With `bias_in_step` the step adds
    `bias_hh` to the recurrent product itself, as vectors before the others; else it is a part of the input's preactivations.

    With `norms` both products are normalised over all their G*H before they are added (`fusedlstm.norms`), so that units need
    each other's sums within a step. The first two vectors are then the gains of these norms, G*H each, of which
    the step takes only the second, as G vectors.
    """

    name: str
    gates: tuple[str, ...]
    states: tuple[str, ...]
    kept: tuple[str, ...] = ()
    x_blocks: tuple[int, ...] = ()
    vectors: tuple[str, ...] = ()
    bias_in_step: bool = False
    norms: bool = False

    @property
    def num_gates(self) -> int:
        """G: blocks of H rows in `weight_hh`."""
        return len(self.gates)

    @property
    def num_cell_states(self) -> int:
        """S: states beside h."""
        return len(self.states) - 1

    @property
    def num_kept(self) -> int:
        """K: blocks that a step keeps."""
        return len(self.kept or self.gates)

    @property
    def first_h_block(self) -> int:
        """Where the gradients of the recurrent preactivations begin."""
        return self.num_kept - self.num_gates

    @property
    def num_vectors(self) -> int:
        """V: vectors that a step takes."""
        more = self.num_gates if self.bias_in_step else self.num_gates - 2 if self.norms else 0
        return len(self.vectors) + more

    @property
    def vector_blocks(self) -> dict[str, int]:
        """How many numbers a unit the parameters have that are called vectors."""
        return {name: self.num_gates if self.norms and k < 2 else 1 for k, name in enumerate(self.vectors)}

    @property
    def adds(self) -> bool:
        """Whether a step looks at the sum of both parts of a preactivation only."""
        return not (self.kept or self.bias_in_step or self.norms)


LSTM = Cell("lstm", gates=("i", "f", "g", "o"), states=("h", "c"))
GRU = Cell(
    "gru",
    gates=("r", "z", "n"),
    states=("h",),
    kept=("n", "r", "z", "n_h"),  # n_h: what r multiplies
    x_blocks=(1, 2, 0),
    bias_in_step=True,
)
RNN_TANH = Cell("rnn_tanh", gates=("h",), states=("h",))
RNN_RELU = Cell("rnn_relu", gates=("h",), states=("h",))
PEEPHOLE = Cell(
    "peephole", gates=("i", "f", "g", "o"), states=("h", "c"), vectors=("weight_ci", "weight_cf", "weight_co")
)
COUPLED = Cell("coupled", gates=("i", "g", "o"), states=("h", "c"))
LAYERNORM = Cell(
    "layernorm",
    gates=("i", "f", "g", "o"),
    states=("h", "c"),
    kept=("i", "f", "g", "o", "m", "u_i", "u_f", "u_g", "u_o"),  # h = o m; u: the recurrent product before its norm
    x_blocks=(0, 1, 2, 3),
    vectors=("gain_ih", "gain_hh", "gain_c", "bias_c"),
    norms=True,
)
SLSTM = Cell("slstm", gates=("i", "f", "g", "o"), states=("h", "c", "n", "m"))

CELLS = {cell.name: cell for cell in (LSTM, GRU, RNN_TANH, RNN_RELU, PEEPHOLE, COUPLED, LAYERNORM, SLSTM)}
