r"""Vanilla RNN (Elman 1990) with tanh or a rectifier (Le et al. 2015). One gate, which is the state h.

.. math::
    h' = \tanh(\mathrm{preact}) \quad\text{or}\quad h' = \max(0, \mathrm{preact})
"""

import torch

from fusedlstm.cells.cell import Cell, Equations, Loop

TANH = Cell("rnn_tanh", gates=("h",), states=("h",), aten="rnn_tanh")
RELU = Cell("rnn_relu", gates=("h",), states=("h",), aten="rnn_relu")


def step_tanh(preact_x, preact_h, state, vectors, drop):
    gates = (torch.tanh(preact_x[0] + preact_h[0]),)
    return gates, update(gates, state, drop)


def step_relu(preact_x, preact_h, state, vectors, drop):
    gates = (torch.relu(preact_x[0] + preact_h[0]),)
    return gates, update(gates, state, drop)


def update(gates, state_prev, drop):
    return (gates[0] * drop,)


def step_backward_tanh(gates, state_prev, state, dstate, vectors, drop):
    (h,) = gates
    (dh,) = dstate
    return (dh * drop * (1 - h * h),), (torch.zeros_like(dh),)


def step_backward_relu(gates, state_prev, state, dstate, vectors, drop):
    (h,) = gates
    (dh,) = dstate
    return (dh * drop * (h > 0),), (torch.zeros_like(dh),)


# The step of the CPU loop (`fusedlstm.engines.torch_loop`).


def loop_forward(at, activation):
    preact, h_seq = map(at.by_step, (at.preact_x, *at.states))

    def step(t, state):
        (h,) = state
        return (activation(at.add_recurrent(preact[t], h, h_seq[t])),)

    return step


def loop_forward_tanh(at):
    return loop_forward(at, torch.tanh_)


def loop_forward_relu(at):
    return loop_forward(at, torch.relu_)


def loop_backward(at):
    """Multiply the factor in the place of each preactivation's gradient by dh."""
    dpreact, dh = at.by_step(at.dpreact), at.by_step(at.dh)

    def step(t, dstate):
        dpreact[t].mul_(dh[t])

    return step


def loop_backward_tanh(at):
    h = at.gates
    torch.addcmul(torch.ones_like(h[:1]), h, h, value=-1, out=at.dpreact)
    return loop_backward(at)


def loop_backward_relu(at):
    torch.gt(at.gates, 0, out=at.dpreact)
    return loop_backward(at)


EQUATIONS_TANH = Equations(step_tanh, step_backward_tanh, update)
EQUATIONS_RELU = Equations(step_relu, step_backward_relu, update)
LOOP_TANH = Loop(loop_forward_tanh, loop_backward_tanh)
LOOP_RELU = Loop(loop_forward_relu, loop_backward_relu)
