r"""LSTM (Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000). Gates i, f, g, o; states h, c.

.. math::
    i, f, o = \sigma(\mathrm{preact}), \quad g = \tanh(\mathrm{preact}), \quad
    c' = f c + i g, \quad h' = o \tanh(c')
"""

import torch


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
    r"""With dh and dc the gradients of h' and c': do = dh tanh(c'), dc += dh o (1 - tanh(c')^2), then
    di = dc g, df = dc c, dg = dc i, and the previous dc is dc f. \sigma' = y (1 - y), \tanh' = 1 - y^2.
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
