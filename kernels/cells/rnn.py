r"""Vanilla RNNs: h' = tanh(preact), or h' = max(0, preact). One gate, which is the state h.

Backward, dpreact = dh (1 - h'^2), or dh where h' > 0.
"""

import triton
import triton.language as tl

from fusedlstm.kernels.activations import tanh


@triton.jit
def tanh_fwd(preact_x, preact_h, state, vectors, drop):
    gates = (tanh(preact_x[0] + preact_h[0]),)
    return gates, update(gates, state, drop)


@triton.jit
def tanh_bwd(gates, state_prev, state, dstate, vectors, drop):
    h = gates[0]
    dh = dstate[0]
    return (dh * drop * (1.0 - h * h),), (tl.zeros_like(dh),)


@triton.jit
def relu_fwd(preact_x, preact_h, state, vectors, drop):
    preact = preact_x[0] + preact_h[0]
    gates = (tl.where(preact < 0, 0.0, preact),)  # NaN stays NaN
    return gates, update(gates, state, drop)


@triton.jit
def relu_bwd(gates, state_prev, state, dstate, vectors, drop):
    dh = dstate[0]
    return (tl.where(gates[0] > 0, dh * drop, 0.0),), (tl.zeros_like(dh),)


@triton.jit
def update(gates, state_prev, drop):
    return (gates[0] * drop,)
