r"""Vanilla RNN with a rectifier: h' = max(0, preact). One gate, which is the state h; backward, dpreact = dh where h' >
0.
"""

import triton
import triton.language as tl


@triton.jit
def step_fwd(preact_x, preact_h, state, vectors, drop):
    preact = preact_x[0] + preact_h[0]
    gates = (tl.where(preact < 0, 0.0, preact),)  # NaN stays NaN
    return gates, update(gates, state, drop)


@triton.jit
def update(gates, state_prev, drop):
    return (gates[0] * drop,)


@triton.jit
def step_bwd(gates, state_prev, state, dstate, vectors, drop):
    dh = dstate[0]
    return (tl.where(gates[0] > 0, dh * drop, 0.0),), (tl.zeros_like(dh),)
