r"""What a recurrent cell is made of: its names, its equations in torch, and how it takes a layer's parameters. And what
every engine takes and gives for a recurrence over a cell.

A cell's equations are functions of tuples of tensors [B, H] (of any leading axes); vectors are [H]:

    step(preact_x, preact_h, state, vectors, drop) -> gates, state
    step_backward(gates, state_prev, state, dstate, vectors, drop) -> dpreact, dstate_prev
    update(gates, state_prev, drop) -> state
    vectors_backward(dpreact, gates, state_prev, state) -> dvectors

`gates` are what `Cell.kept` names, after the nonlinearities, and `dpreact` are the gradients in their places. In
`dstate_prev`, h is the part that does not pass through `weight_hh`. `drop` multiplies the candidate, which is what a
step offers to its memory (g of an LSTM, n of a GRU). It is 1 unless the candidate is dropped; gates keep the candidate
without it. `update` is what follows when the gates are known: the state that a step would have reached if no zoneout
had held it. `vectors_backward` gives every row's part of the gradients of the vectors, except biases in the step, which
have the gradients of the recurrent preactivations.

The parameters of one layer and direction are a list: weight_ih, weight_hh (, bias_ih, bias_hh), then the cell's
vectors.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from fusedlstm.products import joined, normed_input, stacked

Tensors = tuple[Tensor, ...]


class Equations(NamedTuple):
    """A cell's equations, in plain torch and any dtype."""

    step: Callable[..., tuple[Tensors, Tensors]]
    step_backward: Callable[..., tuple[Tensors, Tensors]]
    update: Callable[..., Tensors] | None = None  # without it, no zoneout
    vectors_backward: Callable[..., Tensors] | None = None  # needed for vectors of its own


class Loop(NamedTuple):
    """A cell's fast step on a CPU. `fusedlstm.engines.torch_loop` says what both functions take and return."""

    forward: Callable
    backward: Callable


class Cell(NamedTuple):
    """A recurrent cell: the names and the order of its gates, states and vectors.

    Attributes:
        gates: The rows of `weight_ih` and `weight_hh`, in order.
        states: h first, which is also the output. The others never leave their program, and are saved in float32.
        kept: The blocks of H that a step keeps for the backward; the gates, if none are named. The backward puts as
            many gradients in their places. The gradients of the recurrent preactivations are the last G of them, in the
            order of the gates. Those of the input's preactivations are the first G, and gate k's is the one at
            `x_blocks[k]`.
        x_blocks: See `kept`.
        vectors: Parameters with one number a unit, beside the four of `torch.nn`.
        bias_in_step: Whether the step adds `bias_hh` to the recurrent product itself, as vectors before the others. If
            not, it is a part of the input's preactivations.
        norms: Whether both products are normalised over all their G*H before they are added, so that units need each
            other's sums within a step. The first two vectors are then the gains of these norms, G*H each, of which the
            step takes only the second, as G vectors.
        without_norms: The name of the cell with the same gates and states beside h, of one with norms.
        aten: The name of ATen's function of the same cell, or None.
    """

    name: str
    gates: tuple[str, ...]
    states: tuple[str, ...]
    kept: tuple[str, ...] = ()
    x_blocks: tuple[int, ...] = ()
    vectors: tuple[str, ...] = ()
    bias_in_step: bool = False
    norms: bool = False
    without_norms: str | None = None
    aten: str | None = None

    @property
    def equations(self) -> Equations:
        return EQUATIONS[self.name]

    @property
    def loop(self) -> Loop | None:
        """None: the CPU loop derives a step from the equations."""
        return LOOPS.get(self.name)

    @property
    def plain(self) -> "Cell":
        """What is left of a cell with norms when both products are normalised already."""
        return CELLS[self.without_norms or self.name]

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

    def has_bias(self, parameters: list[Tensor]) -> bool:
        return len(parameters) - len(self.vectors) == 4

    def input_bias(self, parameters: list[Tensor]) -> Tensor | None:
        """What is added to the input product, [G*H]; None: nothing."""
        if not self.has_bias(parameters):
            return None
        return parameters[2] if self.bias_in_step else parameters[2] + parameters[3]

    def normed(self, products: Tensor, per_direction: list[list[Tensor]]) -> Tensor:
        """Input products [..., D, G*H] of a cell with norms as preactivations, with their biases."""
        gains = [p[-len(self.vectors)] for p in per_direction]
        return normed_input(products, gains, [self.input_bias(p) for p in per_direction])

    def step_vectors(self, per_direction: list[list[Tensor]]) -> Tensor | None:
        """What a step takes beside the preactivations, [D, V, H]; None: nothing."""
        return stacked([self._step_vectors(p) for p in per_direction]) if self.num_vectors else None

    def _step_vectors(self, parameters: list[Tensor]) -> Tensor:
        """[V, H]"""
        weight_hh, own = parameters[1], list(parameters[len(parameters) - len(self.vectors) :])
        if self.norms:
            own = own[1:]  # the first gain belongs to the input product
        if self.bias_in_step:
            bias_hh = parameters[3] if self.has_bias(parameters) else weight_hh.new_zeros(len(weight_hh))
            own = [bias_hh, *own]
        return joined(own).view(self.num_vectors, len(weight_hh) // self.num_gates)

    def vectors_gradients(self, gradient: Tensor) -> list[Tensor]:
        """Gradients [V, H] of what `step_vectors` takes as those of the parameters: of all vectors, or with norms all
        but the first.
        """
        if not self.norms:
            return list(gradient.unbind(0))
        G = self.num_gates
        return [gradient[:G].flatten(), *gradient[G:].unbind(0)]


# A recurrence over a cell, as every engine has it (`fusedlstm.engines`):
#
#     recurrence_fwd(spec, preact_x, weights, state, batch) -> Saved
#     recurrence_bwd(spec, grads, saved, weights, state, batch) -> grad_preact, grad_hx, grad_cx
#
# preact_x [D, T, B, G*H] or packed [D, R, G*H] is the input's part of the preactivations. `batch` is a
# `fusedlstm.noise.Batch`. D recurrences are the directions of one layer.


class Recurrence(NamedTuple):
    """What is asked of a recurrence; it has no tensors."""

    cell: Cell
    # The largest element of the gradient of a state that enters a step; None: any.
    clip: float | None = None
    # Whether the forward keeps what the backward needs. What is not kept is empty.
    save_gates: bool = True
    save_states: bool = True


class Weights(NamedTuple):
    """What multiplies and shifts h at every step."""

    weight_hh: list[Tensor]  # D times [G*H, DH]; none if preact_x has the recurrent part already
    vectors: Tensor | None = None  # [D, V, H]
    # Of a wave, in which the recurrences are the layers of a stack: what those above the first make of the h below.
    weight_ih: Tensor | None = None  # [D-1, G*H, H]
    bias: Tensor | None = None  # [D-1, G*H], for the forward
    # A projection of h, which the specification alone has.
    weight_hr: list[Tensor] | None = None  # D times [P, H]


class State(NamedTuple):
    """The states before the first step."""

    hx: Tensor  # [D, B, H]
    cx: Tensor  # [S, D, B, H]: the states beside h


class Saved(NamedTuple):
    """What a forward returns. Packed sequences have [R] in place of [T, B]. A wave has [D, T, B, H] and the like."""

    output: Tensor  # [T, B, D*H]: zero in padding
    h_n: Tensor  # [D, B, H]
    c_n: Tensor  # [S, D, B, H]
    gates: Tensor  # [T, B, D*K*H]: after the nonlinearities; of no meaning in padding
    c_seq: Tensor  # [S, T, B, D*H]: zero in padding


class Grads(NamedTuple):
    """The gradients of what a forward returns. None: zero."""

    output: Tensor | None
    c_seq: Tensor | None
    h_n: Tensor
    c_n: Tensor


# By name: filled by `fusedlstm.cells.register_cell`.
CELLS: dict[str, Cell] = {}
EQUATIONS: dict[str, Equations] = {}
LOOPS: dict[str, Loop] = {}
