r"""Vanilla RNN with a rectifier (Le et al. 2015 train it from an identity). One gate, which is the state h.

.. math::
    h' = \max(0, \mathrm{preact})
"""

import torch


def step(preact_x, preact_h, state, vectors, drop):
    gates = (torch.relu(preact_x[0] + preact_h[0]),)
    return gates, update(gates, state, drop)


def update(gates, state_prev, drop):
    return (gates[0] * drop,)


def step_backward(gates, state_prev, state, dstate, vectors, drop):
    (h,) = gates
    (dh,) = dstate
    return (dh * drop * (h > 0),), (torch.zeros_like(dh),)
