r"""LSTM (Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000). Gates i, f, g, o; states h, c.

.. math::
    i, f, o = \sigma(\mathrm{preact}), \quad g = \tanh(\mathrm{preact}), \quad
    c' = f c + i g, \quad h' = o \tanh(c')
"""

import torch

from fusedlstm.cells.cell import Cell, Equations, Loop

CELL = Cell("lstm", gates=("i", "f", "g", "o"), states=("h", "c"), aten="lstm")


def step(preact_x, preact_h, state, vectors, drop):
    i, f, g, o = (x + h for x, h in zip(preact_x, preact_h, strict=True))
    gates = (torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o))
    return gates, update(gates, state, drop)


def update(gates, state_prev, drop):
    i, f, g, o = gates
    _, c = state_prev
    c = f * c + i * (g * drop)
    return o * torch.tanh(c), c


def step_backward(gates, state_prev, state, dstate, vectors, drop):
    r"""With dh and dc the gradients of h' and c': do = dh tanh(c') and dc += dh o (1 - tanh(c')^2).

    Then di = dc g, df = dc c, dg = dc i, and the previous dc is dc f. \sigma' = y (1 - y) and \tanh' = 1 - y^2.
    """
    i, f, g, o = gates
    _, c_prev = state_prev
    _, c = state
    dh, dc = dstate
    tanh_c = torch.tanh(c)
    dc = dc + dh * o * (1 - tanh_c * tanh_c)
    dpreact_i = dc * (g * drop) * i * (1 - i)
    dpreact_f = dc * c_prev * f * (1 - f)
    dpreact_g = dc * i * drop * (1 - g * g)
    dpreact_o = dh * tanh_c * o * (1 - o)
    return (dpreact_i, dpreact_f, dpreact_g, dpreact_o), (torch.zeros_like(dh), dc * f)


# The step of the CPU loop (`fusedlstm.engines.torch_loop`).


def loop_forward(at):
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


def loop_backward(at):
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
    """The factors of dh in the gradients of h = o tanh(c). The last gate is o.

    The factor in do is h (1 - o), and it is written to the place of do. The factor in dc is o (1 - tanh(c)^2), which
    equals o - h h / o. It is returned, [R, H].
    """
    h = at.states[0]
    o, do = at.gates[:, -h.size(1) :], at.dpreact[:, -h.size(1) :]
    torch.addcmul(h, h, o, value=-1, out=do)
    # In one buffer, because the pages of a new one cost more than a pass. If o is 0, so is h.
    tanh_c = o.clamp_min(torch.finfo(o.dtype).tiny)
    torch.div(h, tanh_c, out=tanh_c)
    return torch.addcmul(o, h, tanh_c, value=-1, out=tanh_c)


def steps_backward(at, dc_of_dh, dc_of_dc):
    """Multiply the factor in the place of each preactivation's gradient by dc, and that of the last gate by dh."""
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


EQUATIONS = Equations(step, step_backward, update)
LOOP = Loop(loop_forward, loop_backward)
