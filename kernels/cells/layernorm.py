r"""LSTM with layer normalisation. Gates i, f, g, o; states h, c; vectors the gains of i, f, g, o, and gain_c, bias_c.

.. math::
    i, f, o = \sigma(\mathrm{preact}), \quad g = \tanh(\mathrm{preact}), \quad
    \mathrm{preact} = \mathrm{preact\_x} + \mathrm{gain}\, N(u), \quad u = \mathrm{preact\_h},

.. math::
    c' = f c + i g, \quad m = \tanh(\mathrm{gain\_c}\, N(c') + \mathrm{bias\_c}), \quad h' = o m

N is a norm over a row, of which a program has a part (`norms`): over all 4H of u, and over H of c'. Kept are i, f, g,
o, m and u. Backward as the LSTM's with m for tanh c', where dm = dh o (1 - m^2) goes through the second norm to dc, and
dpreact through the first one to du. A step has two exchanges more in either pass.
"""

import triton
import triton.language as tl

from fusedlstm.kernels.activations import sigmoid, tanh
from fusedlstm.kernels.norms import normalised, normalised_bwd, statistics


@triton.jit
def step_fwd(preact_x, preact_h, state, vectors, drop, slots, norm, H: tl.constexpr, EXCHANGE: tl.constexpr):
    mean, rstd = norm
    # One gate after the other: all four norms at once would take more registers.
    i = sigmoid(preact_x[0] + vectors[0] * ((preact_h[0] - mean) * rstd))
    f = sigmoid(preact_x[1] + vectors[1] * ((preact_h[1] - mean) * rstd))
    g = tanh(preact_x[2] + vectors[2] * ((preact_h[2] - mean) * rstd))
    o = sigmoid(preact_x[3] + vectors[3] * ((preact_h[3] - mean) * rstd))
    c = f * state[1] + i * (g * drop)
    mean, rstd = statistics(c, slots.mask, 1, slots, 1, H, EXCHANGE)
    m = tanh(vectors[4] * ((c - mean) * rstd) + vectors[5])
    return (i, f, g, o, m) + preact_h, (o * m, c)


@triton.jit
def update(gates, state_prev, drop):
    i, f, g, o, m = gates[:5]
    return o * m, f * state_prev[1] + i * (g * drop)


@triton.jit
def step_bwd(gates, state_prev, state, dstate, vectors, drop, slots, norm, H: tl.constexpr, EXCHANGE: tl.constexpr):
    i, f, g, o, m = gates[:5]
    mean_u, rstd_u, mean_c, rstd_c = norm
    dh = dstate[0]
    dm = dh * o * (1.0 - m * m)
    n_c = (state[1] - mean_c) * rstd_c
    dc = dstate[1] + normalised_bwd((dm * vectors[4],), (n_c,), rstd_c, 1, slots, 0, H, EXCHANGE)[0]
    dpreact_i = dc * (g * drop) * i * (1.0 - i)
    dpreact_f = dc * state_prev[1] * f * (1.0 - f)
    dpreact_g = dc * i * drop * (1.0 - g * g)
    dpreact_o = dh * m * o * (1.0 - o)
    dn = (dpreact_i * vectors[0], dpreact_f * vectors[1], dpreact_g * vectors[2], dpreact_o * vectors[3])
    n = normalised(gates[5:], mean_u, rstd_u, 4)
    du = normalised_bwd(dn, n, rstd_u, 4, slots, 1, H, EXCHANGE)
    return (dpreact_i, dpreact_f, dpreact_g, dpreact_o, dm) + du, (tl.zeros_like(dh), dc * f)
