r"""sLSTM: exponential input gate, normaliser n and stabiliser m. Gates i, f, g, o; states h, c, n, m.

.. math::
    f, o = \sigma(\mathrm{preact}), \quad g = \tanh(\mathrm{preact}), \quad
    m' = \max(\log f + m, \mathrm{preact}_i), \quad i = e^{\mathrm{preact}_i - m'}, \quad \bar f = e^{\log f + m - m'},

.. math::
    c' = \bar f c + i g, \quad n' = \bar f n + i, \quad h' = o c' / n'

A state with n = 0 holds nothing, and its m counts as minus infinity. In the place of f a step keeps its preactivation,
since f may be too small for its dtype where log f is not. Backward:

.. math::
    dc \mathrel{+}= dh\, o / n', \quad dn \mathrel{-}= dh\, o c' / n'^2, \quad do = dh\, c' / n', \quad
    d \log i = (dc\, g + dn) i, \quad d \log \bar f = (dc\, c + dn\, n) \bar f,

and what m' is to get, dm - dlog i - dlog fbar, goes to the larger of both: preact_i, where i is 1, or else log f + m.
"""

import triton
import triton.language as tl

from fusedlstm.kernels.activations import sigmoid, tanh


@triton.jit
def _carried(n, m):
    """m of what the state holds."""
    return tl.where(n == 0, float("-inf"), m)


@triton.jit
def _log_sigmoid(x):
    return tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def step_fwd(preact_x, preact_h, state, vectors, drop):
    _, c, n, m = state
    preact_i = preact_x[0] + preact_h[0]
    preact_f = preact_x[1] + preact_h[1]
    carried = _log_sigmoid(preact_f) + _carried(n, m)
    m = tl.maximum(carried, preact_i)
    i = tl.exp(preact_i - m)
    decay = tl.exp(carried - m)
    g = tanh(preact_x[2] + preact_h[2])
    o = sigmoid(preact_x[3] + preact_h[3])
    c = decay * c + i * (g * drop)
    n = decay * n + i
    h = o * c / n
    return (i, preact_f, g, o), (h, c, n, m)


@triton.jit
def step_bwd(gates, state_prev, state, dstate, vectors, drop):
    i, preact_f, g, o = gates
    _, c_prev, n_prev, m_prev = state_prev
    _, c, n, m = state
    dh, dc, dn, dm = dstate
    n = tl.where(n == 0, 1.0, n)  # where there is no unit
    decay = tl.exp(_log_sigmoid(preact_f) + _carried(n_prev, m_prev) - m)
    h_over_o = c / n
    dc += dh * o / n
    dn -= dh * o * h_over_o / n
    dlog_i = (dc * (g * drop) + dn) * i
    dlog_decay = (dc * c_prev + dn * n_prev) * decay
    dm -= dlog_i + dlog_decay
    by_input = i == 1.0
    dlog_f = dlog_decay + tl.where(by_input, 0.0, dm)
    dpreact_i = dlog_i + tl.where(by_input, dm, 0.0)
    dpreact_f = dlog_f * sigmoid(-preact_f)  # 1 - f
    dpreact_g = dc * i * drop * (1.0 - g * g)
    dpreact_o = dh * h_over_o * o * (1.0 - o)
    dm_prev = tl.where(n_prev == 0, 0.0, dlog_f)
    return (dpreact_i, dpreact_f, dpreact_g, dpreact_o), (tl.zeros_like(dh), dc * decay, dn * decay, dm_prev)
