r"""LSTM with coupled input and forget gate (CIFG; Greff et al. 2015). Gates i, g, o; states h, c.

.. math::
    i, o = \sigma(\mathrm{preact}), \quad g = \tanh(\mathrm{preact}), \quad
    c' = (1 - i) c + i g, \quad h' = o \tanh(c')

Since 1 - σ(x) = σ(-x), it is an LSTM whose forget gate has the negative preactivation of its input gate.
"""

import torch

from fusedlstm.cells.cell import Cell, Equations, Loop
from fusedlstm.cells.lstm import candidate_factor, output_factor, steps_backward

CELL = Cell("coupled", gates=("i", "g", "o"), states=("h", "c"), as_lstm=("i", "-i", "g", "o"))


def step(preact_x, preact_h, state, vectors, drop):
    i, g, o = (x + h for x, h in zip(preact_x, preact_h, strict=True))
    gates = (torch.sigmoid(i), torch.tanh(g), torch.sigmoid(o))
    return gates, update(gates, state, drop)


def update(gates, state_prev, drop):
    i, g, o = gates
    _, c = state_prev
    c = c + i * (g * drop - c)
    return o * torch.tanh(c), c


def step_backward(gates, state_prev, state, dstate, vectors, drop):
    """As for the LSTM, but di = dc (g - c), and the previous dc is dc (1 - i)."""
    i, g, o = gates
    _, c_prev = state_prev
    _, c = state
    dh, dc = dstate
    tanh_c = torch.tanh(c)
    dc = dc + dh * o * (1 - tanh_c * tanh_c)
    dpreact_i = dc * (g * drop - c_prev) * i * (1 - i)
    dpreact_g = dc * i * drop * (1 - g * g)
    dpreact_o = dh * tanh_c * o * (1 - o)
    return (dpreact_i, dpreact_g, dpreact_o), (torch.zeros_like(dh), dc * (1 - i))


# The step of the CPU loop (`fusedlstm.engines.torch_loop`).


def loop_forward(at):
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


def loop_backward(at):
    i, g, _ = at.gates.chunk(3, -1)
    di, dg, _ = at.dpreact.chunk(3, -1)
    torch.sub(g, at.before(1), out=di).mul_(i).addcmul_(di, i, value=-1)
    candidate_factor(i, g, out=dg)
    return steps_backward(at, output_factor(at), 1 - i)


EQUATIONS = Equations(step, step_backward, update)
LOOP = Loop(loop_forward, loop_backward)
