r"""Vanilla RNN with tanh (Elman 1990). One gate, which is the state h.

.. math::
    h' = \tanh(\mathrm{preact})
"""

import torch


def step(preact_x, preact_h, state, vectors, drop):
    gates = (torch.tanh(preact_x[0] + preact_h[0]),)
    return gates, update(gates, state, drop)


def update(gates, state_prev, drop):
    return (gates[0] * drop,)


def step_backward(gates, state_prev, state, dstate, vectors, drop):
    (h,) = gates
    (dh,) = dstate
    return (dh * drop * (1 - h * h),), (torch.zeros_like(dh),)
