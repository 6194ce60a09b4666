"""Vanilla RNN with a rectifier. Equations in `fusedlstm.equations.rnn_relu`."""

import torch

from fusedlstm.loops.rnn_tanh import steps_backward, steps_forward


def forward(at):
    return steps_forward(at, _relu)


def _relu(x, out):
    return torch.clamp(x, min=0, out=out)


def backward(at):
    torch.gt(at.gates, 0, out=at.dpreact)
    return steps_backward(at)
