r"""sLSTM, with exponential input gate, normaliser and stabiliser (Beck et al. 2024, xLSTM).

Gates i, f, g, o; states h, c, n, m.

.. math::
    f, o = \sigma(\mathrm{preact}), \quad g = \tanh(\mathrm{preact}), \quad
    m' = \max(\log f + m, \mathrm{preact}_i), \quad i = e^{\mathrm{preact}_i - m'}, \quad \bar f = e^{\log f + m - m'},

.. math::
    c' = \bar f c + i g, \quad n' = \bar f n + i, \quad h' = o c' / n'

c and n are scaled by e^{-m}, so h does not depend on m. A state with n = 0 is empty, and its m counts as minus
infinity. So zeros are a valid initial state.

In the place of f a step keeps its preactivation: f itself would be zero for a preactivation below -88 in float32 and
below -17 in float16, but log f is not.
"""

import torch
from torch.nn.functional import logsigmoid

from fusedlstm.cells.cell import Cell, Equations, Loop

CELL = Cell("slstm", gates=("i", "f", "g", "o"), states=("h", "c", "n", "m"), before_sigmoid=("f",))


def _carried(n, m):
    """m, or minus infinity if the state is empty."""
    return torch.where(n == 0, float("-inf"), m)


def step(preact_x, preact_h, state, vectors, drop):
    preact_i, preact_f, preact_g, preact_o = (x + h for x, h in zip(preact_x, preact_h, strict=True))
    _, c, n, m = state
    carried = logsigmoid(preact_f) + _carried(n, m)
    m = torch.maximum(carried, preact_i)
    i, g, o, decay = torch.exp(preact_i - m), torch.tanh(preact_g), torch.sigmoid(preact_o), torch.exp(carried - m)
    c, n = decay * c + i * (g * drop), decay * n + i
    return (i, preact_f, g, o), (o * c / n, c, n, m)


def step_backward(gates, state_prev, state, dstate, vectors, drop):
    r"""With \bar f = e^{\log f + m - m'}: do = dh c'/n', dc += dh o/n', dn -= dh o c'/n'^2.

    Then di = dc g + dn, and d\bar f = dc c + dn n.

    i and \bar f shrink when m' grows, so its gradient is dm - (di i + d\bar f \bar f). It passes to the larger argument
    of the maximum: to preact_i if i is 1, and otherwise to log f + m.
    """
    i, preact_f, g, o = gates
    _, c_prev, n_prev, m_prev = state_prev
    _, c, n, m = state
    dh, dc, dn, dm = dstate
    decay = torch.exp(logsigmoid(preact_f) + _carried(n_prev, m_prev) - m)
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
    dpreact_f = dlog_f * torch.sigmoid(-preact_f)  # 1 - f
    return (dpreact_i, dpreact_f, dpreact_g, dpreact_o), (torch.zeros_like(dh), dc * decay, dn * decay, dm_prev)


# The step of the CPU loop (`fusedlstm.engines.torch_loop`).


def loop_forward(at):
    i, preact_f, g, o = map(at.by_step, at.gates.chunk(4, -1))
    preact, gates, h_seq, c_seq, n_seq, m_seq = map(at.by_step, (at.preact_x, at.gates, *at.states))

    def step(t, state):
        h, c, n, m = state
        at.add_recurrent(preact[t], h, gates[t])
        carried = logsigmoid(preact_f[t]).add_(_carried(n, m))
        m = torch.maximum(carried, i[t], out=m_seq[t])
        i[t].sub_(m).exp_()
        g[t].tanh_()
        o[t].sigmoid_()
        decay = carried.sub_(m).exp_()
        c = torch.mul(decay, c, out=c_seq[t]).addcmul_(i[t], g[t])
        n = torch.addcmul(i[t], decay, n, out=n_seq[t])
        return torch.div(c, n, out=h_seq[t]).mul_(o[t]), c, n, m

    return step


def loop_backward(at):
    """Compute in advance the factors by which each gradient depends on those of the states."""
    i, preact_f, g, o = at.gates.chunk(4, -1)
    _, c, n, m = at.states
    c_prev, n_prev, m_prev = (at.before(k) for k in (1, 2, 3))
    decay = _carried(n_prev, m_prev).add_(logsigmoid(preact_f)).sub_(m).exp_()
    c_over_n = c / n
    dc_of_dh = o / n
    factors = (
        dc_of_dh,
        -dc_of_dh * c_over_n,  # dn of dh
        i * g,  # d log i of dc, and i of dn
        i,
        decay * c_prev,  # d log f of dc, and of dn
        decay * n_prev,
        (i == 1).to(i.dtype),  # whether m is the input's
        i - i * g * g,
        c_over_n * o * (1 - o),
        decay,
        torch.sigmoid(-preact_f),  # 1 - f
        (n_prev != 0).to(i.dtype),
    )
    factors = [*zip(*map(at.by_step, factors), strict=True)]  # step by step
    di, df, dg, do = map(at.by_step, at.dpreact.chunk(4, -1))
    dh_seq = at.by_step(at.dh)

    def step(t, dstate):
        dh, (dc, dn, dm) = dh_seq[t], dstate
        dc_dh, dn_dh, i_dc, i_dn, f_dc, f_dn, by_input, dg_dc, do_dh, decay, df_dlog, held = factors[t]
        dc.addcmul_(dh, dc_dh)
        dn.addcmul_(dh, dn_dh)
        torch.mul(dc, i_dc, out=di[t]).addcmul_(dn, i_dn)
        torch.mul(dc, f_dc, out=df[t]).addcmul_(dn, f_dn)
        dm.sub_(di[t]).sub_(df[t])
        to_input = dm * by_input
        di[t].add_(to_input)
        df[t].add_(dm.sub_(to_input))
        torch.mul(df[t], held, out=dm)
        df[t].mul_(df_dlog)
        torch.mul(dc, dg_dc, out=dg[t])
        torch.mul(dh, do_dh, out=do[t])
        dc.mul_(decay)
        dn.mul_(decay)

    return step


EQUATIONS = Equations(step, step_backward)
LOOP = Loop(loop_forward, loop_backward)
