r"""Peephole LSTM (Gers & Schmidhuber 2000): the gates look at the cell. Gates i, f, g, o; states h, c.

.. math::
    i, f = \sigma(\mathrm{preact} + p c), \quad g = \tanh(\mathrm{preact}), \quad c' = f c + i g, \quad
    o = \sigma(\mathrm{preact} + p_o c'), \quad h' = o \tanh(c')

`vectors` are p_i, p_f and p_o: the weights are diagonal.
"""

import torch


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
    """As the LSTM's, and do reaches c' as do p_o, di and df reach the previous c as di p_i + df p_f."""
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
