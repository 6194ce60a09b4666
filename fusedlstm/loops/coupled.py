"""LSTM with coupled input and forget gate. Equations in `fusedlstm.equations.coupled`."""

import torch

from fusedlstm.loops.lstm import candidate_factor, output_factor, steps_backward


def forward(at):
    i, g, o = map(at.by_step, at.gates.chunk(3, -1))
    preact, gates, h_seq, c_seq = map(at.by_step, (at.preact_x, at.gates, *at.states))

    def step(t, state):
        h, c = state
        at.add_recurrent(preact[t], h, gates[t])
        i[t].sigmoid_()
        g[t].tanh_()
        o[t].sigmoid_()
        c = torch.lerp(c, g[t], i[t], out=c_seq[t])
        return torch.tanh(c, out=h_seq[t]).mul_(o[t]), c

    return step


def backward(at):
    i, g, _ = at.gates.chunk(3, -1)
    di, dg, _ = at.dpreact.chunk(3, -1)
    torch.sub(g, at.before(1), out=di).mul_(i).addcmul_(di, i, value=-1)
    candidate_factor(i, g, out=dg)
    return steps_backward(at, output_factor(at), 1 - i)
