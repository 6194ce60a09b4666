"""LSTM. Equations in `fusedlstm.equations.lstm`."""

import torch


def forward(at):
    i, f, g, o = map(at.by_step, at.gates.chunk(4, -1))
    i_and_f = at.by_step(at.gates.chunk(2, -1)[0])
    preact, gates, h_seq, c_seq = map(at.by_step, (at.preact_x, at.gates, *at.states))

    def step(t, state):
        h, c = state
        at.add_recurrent(preact[t], h, gates[t])
        i_and_f[t].sigmoid_()
        g[t].tanh_()
        o[t].sigmoid_()
        c = torch.mul(f[t], c, out=c_seq[t]).addcmul_(i[t], g[t])
        return torch.tanh(c, out=h_seq[t]).mul_(o[t]), c

    return step


def backward(at):
    i, f, g, _ = at.gates.chunk(4, -1)
    di, df, dg, _ = at.dpreact.chunk(4, -1)
    torch.mul(g, i, out=di).addcmul_(di, i, value=-1)
    torch.mul(at.before(1), f, out=df).addcmul_(df, f, value=-1)
    candidate_factor(i, g, out=dg)
    return steps_backward(at, output_factor(at), f)


def candidate_factor(i, g, out):
    """i (1 - g^2)"""
    torch.mul(g, g, out=out)
    return torch.addcmul(i, i, out, value=-1, out=out)


def output_factor(at):
    """Of h = o tanh(c), the last gate being o: do = dh times h (1 - o), which is put in its place, and dc = dh times
    o (1 - tanh(c)^2) = o - h^2 / o, which is returned, [R, H]."""
    h = at.states[0]
    o, do = at.gates[:, -h.size(1) :], at.dpreact[:, -h.size(1) :]
    torch.addcmul(h, h, o, value=-1, out=do)
    square = (h * h).div_(o.clamp_min(torch.finfo(o.dtype).tiny))  # 0 where o is
    return torch.sub(o, square, out=square)


def steps_backward(at, dc_of_dh, dc_of_dc):
    """Every preactivation's gradient is dc, and the last one's dh, times the factor that stands in its place."""
    H = dc_of_dh.size(1)
    of_c, of_h = at.blocks_by_step(at.dpreact[:, :-H]), at.by_step(at.dpreact[:, -H:])
    dh, dc_of_dh, dc_of_dc = map(at.by_step, (at.dh, dc_of_dh, dc_of_dc))

    def step(t, dstate):
        (dc,) = dstate
        dc.addcmul_(dh[t], dc_of_dh[t])
        of_c[t].mul_(dc.unsqueeze(1))
        of_h[t].mul_(dh[t])
        dc.mul_(dc_of_dc[t])

    return step
