r"""Peephole LSTM. Gates i, f, g, o; states h, c; vectors p of i, f and o: the gates look at c of their own unit.

.. math::
    i, f = \sigma(\mathrm{preact} + p c), \quad g = \tanh(\mathrm{preact}), \quad c' = f c + i g, \quad
    o = \sigma(\mathrm{preact} + p_o c'), \quad h' = o \tanh(c')

Backward as the LSTM's, and c' also gets do p_o, the previous c also di p_i + df p_f.
"""

import triton
import triton.language as tl

from fusedlstm.kernels.activations import sigmoid, tanh


@triton.jit
def step_fwd(preact_x, preact_h, state, vectors, drop):
    c = state[1]
    i = sigmoid(preact_x[0] + preact_h[0] + vectors[0] * c)
    f = sigmoid(preact_x[1] + preact_h[1] + vectors[1] * c)
    g = tanh(preact_x[2] + preact_h[2])
    o = sigmoid(preact_x[3] + preact_h[3] + vectors[2] * (f * c + i * (g * drop)))
    gates = (i, f, g, o)
    return gates, update(gates, state, drop)


@triton.jit
def update(gates, state_prev, drop):
    i, f, g, o = gates
    c = f * state_prev[1] + i * (g * drop)
    h = o * tanh(c)
    return h, c


@triton.jit
def step_bwd(gates, state_prev, state, dstate, vectors, drop):
    i, f, g, o = gates
    c_prev = state_prev[1]
    tanh_c = tanh(state[1])
    dh = dstate[0]
    dpreact_o = dh * tanh_c * o * (1.0 - o)
    dc = dstate[1] + dh * o * (1.0 - tanh_c * tanh_c) + dpreact_o * vectors[2]
    dpreact_i = dc * (g * drop) * i * (1.0 - i)
    dpreact_f = dc * c_prev * f * (1.0 - f)
    dpreact_g = dc * i * drop * (1.0 - g * g)
    dc_prev = dc * f + dpreact_i * vectors[0] + dpreact_f * vectors[1]
    return (dpreact_i, dpreact_f, dpreact_g, dpreact_o), (tl.zeros_like(dh), dc_prev)
