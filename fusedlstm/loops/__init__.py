r"""The step work of every cell for `fusedlstm.torch_loop`: one file a cell, torch operations in place on views made beforehand.

    forward(at) -> step(t, state) -> state
    backward(at) -> step(t, dstate) -> dh_direct

Each is called once a direction, and does what can be done for all steps at once; the function that it returns is called step by
step. Forward, it takes the states before a step, each [n, H], fills the rows of step t and returns the states after it.
Backward, it takes the gradients of the states beside h after step t, each [n, H], makes them those before the step in place,
and fills `at.dpreact` of step t from `at.dh`, which is complete by then. It returns the gradient of the h before that does not pass
through `weight_hh`, [n, H], or None. A cell without a file takes these functions from its equations.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from fusedlstm.loops import by_equations, coupled, gru, layernorm, lstm, peephole, rnn_relu, rnn_tanh, slstm

LOOPS = {
    module.__name__.rpartition(".")[2]: module
    for module in (lstm, gru, rnn_tanh, rnn_relu, peephole, coupled, layernorm, slstm)
}


class Forward(NamedTuple):
    """One direction. Rows lie step by step; what is not given is to be filled."""

    sizes: list[int]  # rows of every step
    preact_x: Tensor  # [R, G*H], given
    vectors: tuple[Tensor, ...]  # each [H], given
    gates: Tensor  # [R, K*H]
    states: tuple[Tensor, ...]  # h first, each [R, H]
    weight_hh: Tensor | None  # [G*H, DH], given; None: `preact_x` has the recurrent part
    add_recurrent: Callable[[Tensor, Tensor, Tensor], Tensor]  # preact [n, G*H], h [n, H], out: preact + h U^T

    def by_step(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Views of the rows of every step."""
        return rows.split(self.sizes)


class Backward(NamedTuple):
    """One direction. Rows lie step by step."""

    sizes: list[int]
    vectors: tuple[Tensor, ...]  # each [H]
    gates: Tensor  # [R, K*H]
    states: tuple[Tensor, ...]  # each [R, H]
    before: Callable[[int], Tensor]  # of a state, by its number: what entered every row, [R, H]
    dh: Tensor  # [R, H]
    dpreact: Tensor  # [R, K*H], to be filled

    def by_step(self, rows: Tensor) -> tuple[Tensor, ...]:
        return rows.split(self.sizes)

    def blocks_by_step(self, rows: Tensor) -> tuple[Tensor, ...]:
        """[R, n*H] as [rows of a step, n, H]."""
        return rows.unflatten(1, (-1, self.dh.size(1))).split(self.sizes)


def of(cell: str):
    """`forward` and `backward` of a cell."""
    return LOOPS.get(cell) or by_equations.ByEquations(cell)
