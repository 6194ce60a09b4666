r"""The equations of every cell in plain torch, any dtype: one file a cell.

    step(preact_x, preact_h, state, vectors, drop) -> gates, state
    step_backward(gates, state_prev, state, dstate, vectors, drop) -> dpreact, dstate_prev
    update(gates, state_prev, drop) -> state
    vectors_backward(dpreact, gates, state_prev, state) -> dvectors

Arguments are tuples of tensors [B, H] (of any leading axes); vectors are [H]. `gates` are what `Cell.kept` names, after the
nonlinearities, and `dpreact` are the gradients in their places. In `dstate_prev`, h is the part that does not pass through
`weight_hh`. `drop` multiplies the candidate, what a step offers to its memory (g of an LSTM, n of a GRU): 1 unless it is
dropped; gates keep the candidate without it. `update` is what follows when the gates are known: the state that a step would have
reached if no zoneout had held it. `vectors_backward` gives every row's part of the gradients of the vectors, but for
biases in the step, which have the gradients of the recurrent preactivations.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from fusedlstm.equations import coupled, gru, layernorm, lstm, peephole, rnn_relu, rnn_tanh, slstm

Tensors = tuple[Tensor, ...]


class Equations(NamedTuple):
    """Of one cell."""

    step: Callable[..., tuple[Tensors, Tensors]]
    step_backward: Callable[..., tuple[Tensors, Tensors]]
    update: Callable[..., Tensors] | None = None  # without it, no zoneout
    vectors_backward: Callable[..., Tensors] | None = None


def of_module(module) -> Equations:
    """The equations that a file of this package defines."""
    return Equations(
        module.step,
        module.step_backward,
        getattr(module, "update", None),
        getattr(module, "vectors_backward", None),
    )


EQUATIONS = {
    module.__name__.rpartition(".")[2]: of_module(module)
    for module in (lstm, gru, rnn_tanh, rnn_relu, peephole, coupled, layernorm, slstm)
}
