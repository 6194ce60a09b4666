r"""Vanilla RNN with tanh: h' = tanh(preact). One gate, which is the state h; backward, dpreact = dh (1 - h'^2)."""

import triton
import triton.language as tl

from fusedlstm.kernels.activations import tanh


@triton.jit
def step_fwd(preact_x, preact_h, state, vectors, drop):
    gates = (tanh(preact_x[0] + preact_h[0]),)
    return gates, update(gates, state, drop)


@triton.jit
def update(gates, state_prev, drop):
    return (gates[0] * drop,)


@triton.jit
def step_bwd(gates, state_prev, state, dstate, vectors, drop):
    h = gates[0]
    dh = dstate[0]
    return (dh * drop * (1.0 - h * h),), (tl.zeros_like(dh),)
