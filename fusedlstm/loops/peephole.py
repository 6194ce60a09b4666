"""Peephole LSTM. Equations in `fusedlstm.equations.peephole`."""

import torch

from fusedlstm.loops.lstm import candidate_factor, output_factor, steps_backward


def forward(at):
    p_i, p_f, p_o = at.vectors
    p_i_and_f = torch.stack([p_i, p_f])
    i, f, g, o = map(at.by_step, at.gates.chunk(4, -1))
    i_and_f = at.by_step(at.gates.chunk(2, -1)[0].unflatten(1, (2, -1)))
    preact, gates, h_seq, c_seq = map(at.by_step, (at.preact_x, at.gates, *at.states))

    def step(t, state):
        h, c = state
        at.add_recurrent(preact[t], h, gates[t])
        i_and_f[t].addcmul_(p_i_and_f, c.unsqueeze(1)).sigmoid_()
        g[t].tanh_()
        c = torch.mul(f[t], c, out=c_seq[t]).addcmul_(i[t], g[t])
        o[t].addcmul_(p_o, c).sigmoid_()
        return torch.tanh(c, out=h_seq[t]).mul_(o[t]), c

    return step


def backward(at):
    """What the gates' gradients hand to c by the peepholes is dc and dh times factors too."""
    p_i, p_f, p_o = at.vectors
    i, f, g, _ = at.gates.chunk(4, -1)
    di, df, dg, do = at.dpreact.chunk(4, -1)
    torch.mul(g, i, out=di).addcmul_(di, i, value=-1)
    torch.mul(at.before(1), f, out=df).addcmul_(df, f, value=-1)
    candidate_factor(i, g, out=dg)
    dc_of_dh = output_factor(at).addcmul_(do, p_o)
    dc_of_dc = torch.addcmul(f, di, p_i).addcmul_(df, p_f)
    return steps_backward(at, dc_of_dh, dc_of_dc)
