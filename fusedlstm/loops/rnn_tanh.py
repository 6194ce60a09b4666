"""Vanilla RNN with tanh. Equations in `fusedlstm.equations.rnn_tanh`."""

import torch


def forward(at):
    return steps_forward(at, torch.tanh)


def steps_forward(at, activation):
    preact, gates, h_seq = map(at.by_step, (at.preact_x, at.gates, *at.states))

    def step(t, state):
        (h,) = state
        h = activation(at.add_recurrent(preact[t], h, gates[t]), out=h_seq[t])
        gates[t].copy_(h)
        return (h,)

    return step


def backward(at):
    h = at.gates
    torch.addcmul(torch.ones_like(h[:1]), h, h, value=-1, out=at.dpreact)
    return steps_backward(at)


def steps_backward(at):
    """A preactivation's gradient is dh times the factor that stands in its place."""
    dpreact, dh = at.by_step(at.dpreact), at.by_step(at.dh)

    def step(t, dstate):
        dpreact[t].mul_(dh[t])

    return step
