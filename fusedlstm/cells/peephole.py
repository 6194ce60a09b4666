r"""LSTM with peepholes (Gers & Schmidhuber 2000): the gates depend on c too. Gates i, f, g, o; states h, c.

.. math::
    i, f = \sigma(\mathrm{preact} + p c), \quad g = \tanh(\mathrm{preact}), \quad c' = f c + i g, \quad
    o = \sigma(\mathrm{preact} + p_o c'), \quad h' = o \tanh(c')

`vectors` are p_i, p_f and p_o: the weights are diagonal.
"""

import torch

from fusedlstm.cells.cell import Cell, Equations, Loop
from fusedlstm.cells.lstm import candidate_factor, output_factor, steps_backward

CELL = Cell("peephole", gates=("i", "f", "g", "o"), states=("h", "c"), vectors=("weight_ci", "weight_cf", "weight_co"))


def step(preact_x, preact_h, state, vectors, drop):
    i, f, g, o = (x + h for x, h in zip(preact_x, preact_h, strict=True))
    p_i, p_f, p_o = vectors
    _, c = state
    i = torch.sigmoid(i + p_i * c)
    f = torch.sigmoid(f + p_f * c)
    g = torch.tanh(g)
    o = torch.sigmoid(o + p_o * (f * c + i * (g * drop)))
    gates = (i, f, g, o)
    return gates, update(gates, state, drop)


def update(gates, state_prev, drop):
    i, f, g, o = gates
    _, c = state_prev
    c = f * c + i * (g * drop)
    return o * torch.tanh(c), c


def step_backward(gates, state_prev, state, dstate, vectors, drop):
    """As for the LSTM. dc also gets do p_o, and the previous dc also gets di p_i + df p_f."""
    i, f, g, o = gates
    p_i, p_f, p_o = vectors
    _, c_prev = state_prev
    _, c = state
    dh, dc = dstate
    tanh_c = torch.tanh(c)
    dpreact_o = dh * tanh_c * o * (1 - o)
    dc = dc + dh * o * (1 - tanh_c * tanh_c) + dpreact_o * p_o
    dpreact_i = dc * (g * drop) * i * (1 - i)
    dpreact_f = dc * c_prev * f * (1 - f)
    dpreact_g = dc * i * drop * (1 - g * g)
    dc_prev = dc * f + dpreact_i * p_i + dpreact_f * p_f
    return (dpreact_i, dpreact_f, dpreact_g, dpreact_o), (torch.zeros_like(dh), dc_prev)


def vectors_backward(dpreact, gates, state_prev, state):
    dpreact_i, dpreact_f, _, dpreact_o = dpreact
    return dpreact_i * state_prev[1], dpreact_f * state_prev[1], dpreact_o * state[1]


# The step of the CPU loop (`fusedlstm.engines.torch_loop`).


def loop_forward(at):
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


def loop_backward(at):
    """The gradients that pass from the gates to c through the peepholes are dc and dh times factors too."""
    p_i, p_f, p_o = at.vectors
    i, f, g, _ = at.gates.chunk(4, -1)
    di, df, dg, do = at.dpreact.chunk(4, -1)
    torch.mul(g, i, out=di).addcmul_(di, i, value=-1)
    torch.mul(at.before(1), f, out=df).addcmul_(df, f, value=-1)
    candidate_factor(i, g, out=dg)
    dc_of_dh = output_factor(at).addcmul_(do, p_o)
    dc_of_dc = torch.addcmul(f, di, p_i).addcmul_(df, p_f)
    return steps_backward(at, dc_of_dh, dc_of_dc)


EQUATIONS = Equations(step, step_backward, update, vectors_backward)
LOOP = Loop(loop_forward, loop_backward)
