r"""sLSTM (Beck et al. 2024, xLSTM): exponential input gate, normaliser and stabiliser. Gates i, f, g, o; states h, c, n, m.

.. math::
    f, o = \sigma(\mathrm{preact}), \quad g = \tanh(\mathrm{preact}), \quad
    m' = \max(\log f + m, \mathrm{preact}_i), \quad i = e^{\mathrm{preact}_i - m'}, \quad \bar f = e^{\log f + m - m'},

.. math::
    c' = \bar f c + i g, \quad n' = \bar f n + i, \quad h' = o c' / n'

c and n are scaled by e^{-m}, so h does not depend on m. A state with n = 0 holds nothing, and its m counts as
minus infinity: zeros are a valid beginning.
"""

import torch


def _carried(n, m):
    """m of what the state holds."""
    return torch.where(n == 0, float("-inf"), m)


def step(preact_x, preact_h, state, vectors, drop):
    preact_i, preact_f, preact_g, preact_o = (x + h for x, h in zip(preact_x, preact_h, strict=True))
    _, _, n, m = state
    f = torch.sigmoid(preact_f)
    m_new = torch.maximum(torch.nn.functional.logsigmoid(preact_f) + _carried(n, m), preact_i)
    gates = (torch.exp(preact_i - m_new), f, torch.tanh(preact_g), torch.sigmoid(preact_o))
    return gates, _updated(gates, state, m_new, drop)


def _updated(gates, state_prev, m_new, drop):
    i, f, g, o = gates
    _, c, n, m = state_prev
    decay = f * torch.exp(_carried(n, m) - m_new)
    c, n = decay * c + i * (g * drop), decay * n + i
    return o * c / n, c, n, m_new


def step_backward(gates, state_prev, state, dstate, vectors, drop):
    r"""With \bar f = f e^{m - m'}: do = dh c'/n', dc += dh o/n', dn -= dh o c'/n'^2; di = dc g + dn, d\bar f = dc c + dn n.

    m' takes what i and \bar f lose when it grows, -(di i + d\bar f \bar f), and hands it to the larger of both: preact_i,
    where i is 1, or else log f + m.
    """
    i, f, g, o = gates
    _, c_prev, n_prev, m_prev = state_prev
    _, c, n, m = state
    dh, dc, dn, dm = dstate
    decay = f * torch.exp(_carried(n_prev, m_prev) - m)
    dc, dn = dc + dh * o / n, dn - dh * o * c / (n * n)
    di_i = (dc * (g * drop) + dn) * i  # gradient of log i
    df_f = (dc * c_prev + dn * n_prev) * decay  # gradient of log f
    dm = dm - di_i - df_f
    by_input = i == 1
    dpreact_i = di_i + torch.where(by_input, dm, 0)
    dlog_f = df_f + torch.where(by_input, 0, dm)
    dpreact_g = dc * i * drop * (1 - g * g)
    dpreact_o = dh * (c / n) * o * (1 - o)
    dm_prev = torch.where(n_prev == 0, 0, dlog_f)
    return (dpreact_i, dlog_f * (1 - f), dpreact_g, dpreact_o), (torch.zeros_like(dh), dc * decay, dn * decay, dm_prev)
