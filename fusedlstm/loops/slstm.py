"""sLSTM. Equations in `fusedlstm.equations.slstm`."""

import torch
from torch.nn.functional import logsigmoid


def _carried(n, m):
    return torch.where(n == 0, float("-inf"), m)


def forward(at):
    i, f, g, o = map(at.by_step, at.gates.chunk(4, -1))
    preact, gates, h_seq, c_seq, n_seq, m_seq = map(at.by_step, (at.preact_x, at.gates, *at.states))

    def step(t, state):
        h, c, n, m = state
        at.add_recurrent(preact[t], h, gates[t])
        carried = _carried(n, m)
        m = torch.maximum(logsigmoid(f[t]).add_(carried), i[t], out=m_seq[t])
        i[t].sub_(m).exp_()
        f[t].sigmoid_()
        g[t].tanh_()
        o[t].sigmoid_()
        decay = carried.sub_(m).exp_().mul_(f[t])
        c = torch.mul(decay, c, out=c_seq[t]).addcmul_(i[t], g[t])
        n = torch.addcmul(i[t], decay, n, out=n_seq[t])
        return torch.div(c, n, out=h_seq[t]).mul_(o[t]), c, n, m

    return step


def backward(at):
    """Every gradient is a sum of those of the states times factors, which are put together beforehand."""
    i, f, g, o = at.gates.chunk(4, -1)
    _, c, n, m = at.states
    c_prev, n_prev, m_prev = (at.before(k) for k in (1, 2, 3))
    decay = _carried(n_prev, m_prev).sub_(m).exp_().mul_(f)
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
        1 - f,
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
