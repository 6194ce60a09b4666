"""One file a cell: its equations, `step_fwd` and `step_bwd` on tuples of tiles.

    step_fwd(preact_x, preact_h, state, vectors, drop) -> gates, state
    step_bwd(gates, state_prev, state, dstate, vectors, drop) -> dpreact, dstate_prev
    update(gates, state_prev, drop) -> state

Tiles are [BLOCK_B, BLOCK_H] in float32, vectors [1, BLOCK_H]. `state` begins with h. In `dstate_prev`, h is the part
that does not pass through `weight_hh`. `drop` multiplies the candidate, what a step offers to its memory. `update`
is what follows when the gates are known, for the backward of zoneout; a cell without it (None) has none. With norms
both steps take also `slots`, `norm`, H and EXCHANGE, to add up what lies with all programs of a group
(`fusedlstm.kernels.norms`).
Names and order of gates and states: `fusedlstm.cells`; the same equations in torch: `fusedlstm.cells.cell`.
"""

from typing import NamedTuple

from triton.runtime.jit import KernelInterface

from fusedlstm.kernels.cells import coupled, gru, layernorm, layernorm_gru, lstm, peephole, rnn, slstm


class Steps(NamedTuple):
    """Of one cell, each under `triton.jit`."""

    step_fwd: KernelInterface
    step_bwd: KernelInterface
    update: KernelInterface | None = None


def of_module(module) -> Steps:
    """What a file of this folder defines."""
    return Steps(module.step_fwd, module.step_bwd, getattr(module, "update", None))


STEPS = {
    "lstm": of_module(lstm),
    "gru": of_module(gru),
    "rnn_tanh": Steps(rnn.tanh_fwd, rnn.tanh_bwd, rnn.update),
    "rnn_relu": Steps(rnn.relu_fwd, rnn.relu_bwd, rnn.update),
    "peephole": of_module(peephole),
    "coupled": of_module(coupled),
    "layernorm": of_module(layernorm),
    "layernorm_gru": of_module(layernorm_gru),
    "slstm": of_module(slstm),
}
