r"""LSTM with coupled input and forget gate, f = 1 - i. Gates i, g, o; states h, c.

.. math::
    i, o = \sigma(\mathrm{preact}), \quad g = \tanh(\mathrm{preact}), \quad c' = c + i (g - c), \quad h' = o \tanh(c')

Backward as the LSTM's, with di = dc (g - c) and the previous dc = dc (1 - i).
"""

import triton
import triton.language as tl

from fusedlstm.kernels.activations import sigmoid, tanh


@triton.jit
def step_fwd(preact_x, preact_h, state, vectors, drop):
    i = sigmoid(preact_x[0] + preact_h[0])
    g = tanh(preact_x[1] + preact_h[1])
    o = sigmoid(preact_x[2] + preact_h[2])
    gates = (i, g, o)
    return gates, update(gates, state, drop)


@triton.jit
def update(gates, state_prev, drop):
    i, g, o = gates
    c = state_prev[1]
    c = c + i * (g * drop - c)
    h = o * tanh(c)
    return h, c


@triton.jit
def step_bwd(gates, state_prev, state, dstate, vectors, drop):
    i, g, o = gates
    c_prev = state_prev[1]
    tanh_c = tanh(state[1])
    dh = dstate[0]
    dc = dstate[1] + dh * o * (1.0 - tanh_c * tanh_c)
    dpreact_i = dc * (g * drop - c_prev) * i * (1.0 - i)
    dpreact_g = dc * i * drop * (1.0 - g * g)
    dpreact_o = dh * tanh_c * o * (1.0 - o)
    return (dpreact_i, dpreact_g, dpreact_o), (tl.zeros_like(dh), dc * (1.0 - i))
