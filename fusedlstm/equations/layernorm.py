r"""LSTM with layer normalisation (Ba et al. 2016). Gates i, f, g, o; states h, c.

.. math::
    i, f, o = \sigma(\mathrm{preact}), \quad g = \tanh(\mathrm{preact}), \quad
    \mathrm{preact} = \mathrm{preact\_x} + \mathrm{gain\_hh}\, N(u), \quad u = \mathrm{preact\_h},

.. math::
    c' = f c + i g, \quad m = \tanh(\mathrm{gain\_c}\, N(c') + \mathrm{bias\_c}), \quad h' = o m

N normalises a whole row: u over all 4H, c' over H (`fusedlstm.norms`). `preact_x` is normalised before, and has the biases
of both norms. `vectors` are the gains of i, f, g and o, gain_c and bias_c. Kept are i, f, g, o, m and the four parts of u;
in the place of m the backward has the gradient of what its tanh takes.
"""

import torch

from fusedlstm import norms


def step(preact_x, preact_h, state, vectors, drop):
    *gains, gain_c, bias_c = vectors
    n = _by_gate(norms.normalised, preact_h)
    i, f, g, o = (x + gain * n_k for x, gain, n_k in zip(preact_x, gains, n, strict=True))
    i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
    c = f * state[1] + i * (g * drop)
    m = torch.tanh(gain_c * norms.normalised(c) + bias_c)
    return (i, f, g, o, m, *preact_h), (o * m, c)


def update(gates, state_prev, drop):
    i, f, g, o, m, *_ = gates
    return o * m, f * state_prev[1] + i * (g * drop)


def step_backward(gates, state_prev, state, dstate, vectors, drop):
    r"""As the LSTM's, but c' gets what its norm hands down, of dm = dh o (1 - m^2), and u what its own does, of dpreact gain."""
    i, f, g, o, m, *u = gates
    *gains, gain_c, _ = vectors
    _, c_prev = state_prev
    _, c = state
    dh, dc = dstate
    dm = dh * o * (1 - m * m)
    dc = dc + norms.normalised_backward(dm * gain_c, c)
    dpreact = (
        dc * (g * drop) * i * (1 - i),
        dc * c_prev * f * (1 - f),
        dc * i * drop * (1 - g * g),
        dh * m * o * (1 - o),
    )
    dn = tuple(d * gain for d, gain in zip(dpreact, gains, strict=True))
    du = _by_gate(norms.normalised_backward, dn, u)
    return (*dpreact, dm, *du), (torch.zeros_like(dh), dc * f)


def vectors_backward(dpreact, gates, state_prev, state):
    n = _by_gate(norms.normalised, gates[5:])
    dm = dpreact[4]
    return *(d * n_k for d, n_k in zip(dpreact[:4], n, strict=True)), dm * norms.normalised(state[1]), dm


def _by_gate(norm, *parts):
    """A function of whole rows, of and to its parts by gates."""
    return norm(*(torch.cat(part, -1) for part in parts)).chunk(len(parts[0]), -1)
