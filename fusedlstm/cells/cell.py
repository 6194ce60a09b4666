r"""The parts of a recurrent cell: its names, its equations in torch, and how it takes the parameters of a layer.

The file also has the arguments and results that every engine has for a recurrence over a cell.

The equations of a cell are four functions. Their arguments are tuples of tensors [B, H], or with any leading axes in
place of B. Vectors are [H]:

    step(preact_x, preact_h, state, vectors, drop) -> gates, state
    step_backward(gates, state_prev, state, dstate, vectors, drop) -> dpreact, dstate_prev
    update(gates, state_prev, drop) -> state
    vectors_backward(dpreact, gates, state_prev, state) -> dvectors

`gates` are the blocks that `Cell.kept` names, after the nonlinearities. `dpreact` are the gradients in their places. In
`dstate_prev`, the gradient of h has only the part that does not pass through `weight_hh`. `drop` multiplies the
candidate, which is the value that a step offers to its memory (g of an LSTM, n of a GRU). It is 1 unless the candidate
is dropped. `gates` hold the candidate without this factor. `update` computes the state that follows from the gates,
without zoneout. `vectors_backward` returns the part of each row in the gradients of the vectors. Biases inside of the
step are not among them, because their gradients are those of the recurrent preactivations. With norms they are: the
recurrent preactivations are then what is normalised, and the biases are added after it.

A cell may leave out `step_backward`. Then autograd differentiates its step, and only the engine "reference" serves it.

A cell may multiply with the recurrent weight itself (`Cell.multiplies`), as for a gate that changes what enters the
product. In the place of `preact_h` its step gets a function: product(x, *names) multiplies x [B, H] with the rows of
the gates that are named, and returns a tuple by gate, [B, H] each. Its `step_backward` gets one more argument:
product_backward(dpreact, *names) takes the gradients of the products, a tuple by gate, and returns that of x. The
gradient of h in its `dstate_prev` is then whole. A function `multiplied(gates, h)` tells for each gate what its rows
were multiplied with.

The parameters of one layer and direction are a list: weight_ih, weight_hh, bias_ih and bias_hh if there are biases, and
then the vectors of the cell.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fusedlstm.products import joined, normed_input, stacked

Tensors = tuple[Tensor, ...]


class Equations(NamedTuple):
    """The equations of a cell, in plain torch and for any dtype."""

    step: Callable[..., tuple[Tensors, Tensors]]
    step_backward: Callable[..., tuple[Tensors, Tensors]] | None = None  # without it, autograd through the step
    update: Callable[..., Tensors] | None = None  # a step_backward without it has no zoneout
    vectors_backward: Callable[..., Tensors] | None = None  # a step_backward needs it for vectors of its own
    multiplied: Callable[..., Tensors] | None = None  # a step_backward needs it in a cell that multiplies


class Loop(NamedTuple):
    """The fast step of a cell on a CPU. `fusedlstm.engines.torch_loop` says what both functions take and return."""

    forward: Callable
    backward: Callable


class Cell(NamedTuple):
    """A recurrent cell: the names and the order of its gates, states and vectors.

    G is the number of gates, and H the number of hidden units.

    Args:
        name: The name that a subclass of `Recurrent` gives as `cell`: letters, digits and underscores.
        gates: The names of the gates, in the order of the rows of `weight_ih` and `weight_hh`. Each has H rows.
        states: The names of the states. The first is h, which is also the output. The kernels keep the others in
            registers, and save them in float32.
        kept: The names of the blocks of H values that a step keeps for the backward. They are the gates if you name
            none. The backward returns one gradient for each block. The last G of these are the gradients of the
            recurrent preactivations, in the order of the gates. The first G are the gradients of the input's
            preactivations, in the order that `x_blocks` gives.
        x_blocks: The place of each gate among the first G blocks of `kept`.
        vectors: The names of parameters [H], beside the four of `torch.nn`.
        bias_in_step: Whether the step itself adds `bias_hh` to the recurrent product. It then comes as the first G of
            the vectors. If not, `bias_hh` is a part of the input's preactivations.
        norms: How many norms over all units a step has: 0; or 1, of the recurrent product over its G*H values, if h is
            the only state; or 2, also of the state beside h. With any, the input product is normalised too, before the
            loop. The first two vectors are then the gains of both products, [G*H] each. The step takes the second one
            only, as G vectors. They come after the biases of `bias_in_step`.
        without_norms: For a cell with norms and a state beside h, the name of the cell with the same gates and states
            but without them.
        aten: The name of ATen's function of the same cell, or None.
        as_lstm: For each gate i, f, g and o of an LSTM the gate of this cell that has its preactivation, with a minus
            before the name if the sign is the other. The LSTM then has the states of this cell, and ATen can serve it.
        before_sigmoid: The names of gates that a step keeps before their sigmoid. `fusedlstm.inspect` shows them after
            it.
        multiplies: Whether the step itself multiplies with the recurrent weight. There are no kernels for that.
    """

    name: str
    gates: tuple[str, ...]
    states: tuple[str, ...]
    kept: tuple[str, ...] = ()
    x_blocks: tuple[int, ...] = ()
    vectors: tuple[str, ...] = ()
    bias_in_step: bool = False
    norms: int = 0
    without_norms: str | None = None
    aten: str | None = None
    as_lstm: tuple[str, ...] = ()
    before_sigmoid: tuple[str, ...] = ()
    multiplies: bool = False

    @property
    def equations(self) -> Equations:
        return EQUATIONS[self.name]

    @property
    def loop(self) -> Loop | None:
        """The fast step on a CPU. With None the CPU loop derives a step from the equations."""
        return LOOPS.get(self.name)

    @property
    def plain(self) -> "Cell":
        """The cell that is left of a cell with norms if both products are normalised already."""
        return CELLS[self.without_norms or self.name]

    @property
    def num_gates(self) -> int:
        """G, the number of blocks of H rows in `weight_hh`."""
        return len(self.gates)

    @property
    def num_cell_states(self) -> int:
        """S, the number of states beside h."""
        return len(self.states) - 1

    @property
    def num_kept(self) -> int:
        """K, the number of blocks that a step keeps."""
        return len(self.kept or self.gates)

    @property
    def first_h_block(self) -> int:
        """The number of the block with which the gradients of the recurrent preactivations begin."""
        return self.num_kept - self.num_gates

    @property
    def num_vectors(self) -> int:
        """V, the number of vectors that a step takes."""
        more = (self.num_gates if self.bias_in_step else 0) + (self.num_gates - 2 if self.norms else 0)
        return len(self.vectors) + more

    @property
    def vector_blocks(self) -> dict[str, int]:
        """For each of the parameters called vectors, how many elements it has per unit."""
        return {name: self.num_gates if self.norms and k < 2 else 1 for k, name in enumerate(self.vectors)}

    @property
    def adds(self) -> bool:
        """Whether a step needs only the sum of both parts of a preactivation."""
        return not (self.kept or self.bias_in_step or self.norms or self.multiplies)

    def rows_of_lstm(self, parameter: Tensor) -> Tensor:
        """One of the parameters [G*H, ...] as that [4*H, ...] of the LSTM that `as_lstm` tells."""
        of_gate = dict(zip(self.gates, parameter.chunk(self.num_gates), strict=True))
        return torch.cat([-of_gate[k[1:]] if k.startswith("-") else of_gate[k] for k in self.as_lstm])

    def has_bias(self, parameters: list[Tensor]) -> bool:
        return len(parameters) - len(self.vectors) == 4

    def input_bias(self, parameters: list[Tensor]) -> Tensor | None:
        """The bias of the input product, [G*H], or None."""
        if not self.has_bias(parameters):
            return None
        return parameters[2] if self.bias_in_step else parameters[2] + parameters[3]

    def normed(self, products: Tensor, per_direction: list[list[Tensor]]) -> Tensor:
        """The preactivations of a cell with norms, from input products [..., D, G*H]."""
        gains = [p[-len(self.vectors)] for p in per_direction]
        return normed_input(products, gains, [self.input_bias(p) for p in per_direction])

    def step_vectors(self, per_direction: list[list[Tensor]]) -> Tensor | None:
        """The vectors that a step takes beside the preactivations, [D, V, H], or None."""
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
        """The gradients of the vectors as parameters, from those [V, H] that `vectors_backward` returns.

        With norms, the first vector is not among them. With norms and biases in the step, bias_hh comes first.
        """
        if not self.norms:
            return list(gradient.unbind(0))
        blocks = gradient.split([self.num_gates] * (1 + self.bias_in_step) + [1] * (len(self.vectors) - 2))
        return [block.flatten() for block in blocks]


# Every engine has these two functions for a recurrence over a cell (`fusedlstm.engines`):
#
#     recurrence_fwd(spec, preact_x, weights, state, batch) -> Saved
#     recurrence_bwd(spec, grads, saved, weights, state, batch) -> grad_preact, grad_hx, grad_cx
#
# preact_x [D, T, B, G*H] or packed [D, R, G*H] is the input's part of the preactivations. `batch` is a
# `fusedlstm.noise.Batch`. D recurrences are the directions of one layer.


class Recurrence(NamedTuple):
    """The settings of a recurrence, without tensors."""

    cell: Cell
    # The limit for an element of the gradient of a state that enters a step. None is no limit.
    clip: float | None = None
    # Whether the forward keeps what the backward needs. A tensor that is not kept is empty.
    save_gates: bool = True
    save_states: bool = True


class Weights(NamedTuple):
    """The parameters that a step needs."""

    weight_hh: list[Tensor]  # D times [G*H, DH]; none if preact_x has the recurrent part already
    vectors: Tensor | None = None  # [D, V, H]
    # In a wave the recurrences are the layers of a stack. These are the input weights of the layers above the first.
    weight_ih: Tensor | None = None  # [D-1, G*H, H]
    bias: Tensor | None = None  # [D-1, G*H], for the forward
    # A projection of h, which only the specification has.
    weight_hr: list[Tensor] | None = None  # D times [P, H]


class State(NamedTuple):
    """The states before the first step."""

    hx: Tensor  # [D, B, H]
    cx: Tensor  # [S, D, B, H]: the states beside h


class Saved(NamedTuple):
    """The results of a forward. Packed sequences have [R] in place of [T, B]. A wave has [D, T, B, H] and so on."""

    output: Tensor  # [T, B, D*H]: zero in padding
    h_n: Tensor  # [D, B, H]
    c_n: Tensor  # [S, D, B, H]
    gates: Tensor  # [T, B, D*K*H]: after the nonlinearities; of no meaning in padding
    c_seq: Tensor  # [S, T, B, D*H]: zero in padding


class Grads(NamedTuple):
    """The gradients of the results of a forward. None is zero."""

    output: Tensor | None
    c_seq: Tensor | None
    h_n: Tensor
    c_n: Tensor


# All by the name of the cell. `fusedlstm.cells.register_cell` fills them.
CELLS: dict[str, Cell] = {}
EQUATIONS: dict[str, Equations] = {}
LOOPS: dict[str, Loop] = {}
