r"""LSTM. Gates in the order i, f, g, o; states h, c.

.. math::
    i, f, o = \sigma(\mathrm{preact}), \quad g = \tanh(\mathrm{preact}), \quad
    c' = f c + i g, \quad h' = o \tanh(c')

Backward, from dh and dc:

.. math::
    dc \mathrel{+}= dh\, o (1 - \tanh^2 c'), \quad do = dh \tanh c', \quad
    di = dc\, g, \quad df = dc\, c, \quad dg = dc\, i, \quad dc_{prev} = dc\, f

and through the nonlinearities: sigma' = y (1 - y), tanh' = 1 - y^2.
"""

import triton
import triton.language as tl

from fusedlstm.kernels.activations import sigmoid, tanh


@triton.jit
def step_fwd(preact_x, preact_h, state, vectors, drop):
    i = sigmoid(preact_x[0] + preact_h[0])
    f = sigmoid(preact_x[1] + preact_h[1])
    g = tanh(preact_x[2] + preact_h[2])
    o = sigmoid(preact_x[3] + preact_h[3])
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
    dc = dstate[1] + dh * o * (1.0 - tanh_c * tanh_c)
    dpreact_i = dc * (g * drop) * i * (1.0 - i)
    dpreact_f = dc * c_prev * f * (1.0 - f)
    dpreact_g = dc * i * drop * (1.0 - g * g)
    dpreact_o = dh * tanh_c * o * (1.0 - o)
    # h reaches the next step only through the recurrent product
    return (dpreact_i, dpreact_f, dpreact_g, dpreact_o), (tl.zeros_like(dh), dc * f)
