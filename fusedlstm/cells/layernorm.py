r"""LSTM with layer normalisation (Ba et al. 2016). Gates i, f, g, o; states h, c.

.. math::
    i, f, o = \sigma(\mathrm{preact}), \quad g = \tanh(\mathrm{preact}), \quad
    \mathrm{preact} = \mathrm{preact\_x} + \mathrm{gain\_hh}\, N(u), \quad u = \mathrm{preact\_h},

.. math::
    c' = f c + i g, \quad m = \tanh(\mathrm{gain\_c}\, N(c') + \mathrm{bias\_c}), \quad h' = o m

N normalises a whole row: u over all 4H values, c' over H (`fusedlstm.products`). `preact_x` is normalised before the
loop, and includes the biases of both norms. `vectors` are the gains of i, f, g and o, then gain_c and bias_c. The step
keeps i, f, g, o, m and the four parts of u. In the place of m the backward puts the gradient of the argument of its
tanh.
"""

import torch
from torch.nn.functional import layer_norm

from fusedlstm.cells.cell import Cell, Equations, Loop
from fusedlstm.cells.lstm import candidate_factor
from fusedlstm.products import EPS, aten_backward, by_gate, normalised, normalised_backward

# Units of a row that has almost no gradient: that of one unit is zero, and ATen's backward makes 1e-5 of it.
FEW = 5
CELL = Cell(
    "layernorm",
    gates=("i", "f", "g", "o"),
    states=("h", "c"),
    # h = o m, and u is the recurrent product before its norm.
    kept=("i", "f", "g", "o", "m", "u_i", "u_f", "u_g", "u_o"),
    x_blocks=(0, 1, 2, 3),
    vectors=("gain_ih", "gain_hh", "gain_c", "bias_c"),
    norms=2,
    without_norms="lstm",
)


def step(preact_x, preact_h, state, vectors, drop):
    *gains, gain_c, bias_c = vectors
    n = by_gate(normalised, preact_h)
    i, f, g, o = (x + gain * n_k for x, gain, n_k in zip(preact_x, gains, n, strict=True))
    i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
    c = f * state[1] + i * (g * drop)
    m = torch.tanh(gain_c * normalised(c) + bias_c)
    return (i, f, g, o, m, *preact_h), (o * m, c)


def update(gates, state_prev, drop):
    i, f, g, o, m, *_ = gates
    return o * m, f * state_prev[1] + i * (g * drop)


def step_backward(gates, state_prev, state, dstate, vectors, drop):
    r"""As for the LSTM. c' also gets the gradient of its norm, from dm = dh o (1 - m^2).

    u gets the gradient of its own norm, from dpreact gain.
    """
    i, f, g, o, m, *u = gates
    *gains, gain_c, _ = vectors
    _, c_prev = state_prev
    _, c = state
    dh, dc = dstate
    dm = dh * o * (1 - m * m)
    dc = dc + normalised_backward(dm * gain_c, c)
    dpreact = (
        dc * (g * drop) * i * (1 - i),
        dc * c_prev * f * (1 - f),
        dc * i * drop * (1 - g * g),
        dh * m * o * (1 - o),
    )
    dn = tuple(d * gain for d, gain in zip(dpreact, gains, strict=True))
    du = by_gate(normalised_backward, dn, u)
    return (*dpreact, dm, *du), (torch.zeros_like(dh), dc * f)


def vectors_backward(dpreact, gates, state_prev, state):
    n = by_gate(normalised, gates[5:])
    dm = dpreact[4]
    return *(d * n_k for d, n_k in zip(dpreact[:4], n, strict=True)), dm * normalised(state[1]), dm


# The step of the CPU loop (`fusedlstm.engines.torch_loop`).


def loop_forward(at):
    *gains, gain_c, bias_c = at.vectors
    H, gain = len(gain_c), torch.cat(gains)
    weight_t = at.weight_hh.t()
    i, f, g, o, m = map(at.by_step, at.gates[:, : 5 * H].chunk(5, -1))
    i_and_f, gates, u = map(at.by_step, (at.gates[:, : 2 * H], at.gates[:, : 4 * H], at.gates[:, 5 * H :]))
    preact, h_seq, c_seq = map(at.by_step, (at.preact_x, *at.states))

    def step(t, state):
        h, c = state
        n = layer_norm(torch.mm(h, weight_t, out=u[t]), (4 * H,), gain, eps=EPS)
        torch.add(preact[t], n, out=gates[t])
        i_and_f[t].sigmoid_()
        g[t].tanh_()
        o[t].sigmoid_()
        c = torch.mul(f[t], c, out=c_seq[t]).addcmul_(i[t], g[t])
        torch.tanh(layer_norm(c, (H,), gain_c, bias_c, EPS), out=m[t])
        return torch.mul(o[t], m[t], out=h_seq[t]), c

    return step


def loop_backward(at):
    """Write a factor to the place of each gradient, and multiply it by dc or dh in the step.

    The gradients through the norms are computed separately.
    """
    *gains, gain_c, _ = at.vectors
    H, gain = len(gain_c), torch.cat(gains)
    i, f, g, o, m = at.gates[:, : 5 * H].chunk(5, -1)
    di, df, dg, do, dm = at.dpreact[:, : 5 * H].chunk(5, -1)
    torch.mul(g, i, out=di).addcmul_(di, i, value=-1)
    torch.mul(at.before(1), f, out=df).addcmul_(df, f, value=-1)
    candidate_factor(i, g, out=dg)
    torch.mul(m, o, out=do)
    torch.addcmul(o, do, m, value=-1, out=dm)
    do.addcmul_(do, o, value=-1)
    norm_c, norm_u = Norm(at, at.states[1], gain_c), Norm(at, at.gates[:, 5 * H :], gain)
    of_c = at.blocks_by_step(at.dpreact[:, : 3 * H])
    of_h = at.blocks_by_step(at.dpreact[:, 3 * H : 5 * H])
    dpreact, du, dm, dh, f = map(at.by_step, (at.dpreact[:, : 4 * H], at.dpreact[:, 5 * H :], dm, at.dh, f))

    def step(t, dstate):
        (dc,) = dstate
        of_h[t].mul_(dh[t].unsqueeze(1))
        dc.add_(norm_c.backward(t, dm[t]))
        of_c[t].mul_(dc.unsqueeze(1))
        du[t].copy_(norm_u.backward(t, dpreact[t]))
        dc.mul_(f[t])

    return step


class Norm:
    """The backward of a norm with a gain."""

    def __init__(self, at, x, gain):
        self.gain, self.shape, self.by_step = gain, x.shape[1:], at.by_step(x)
        self.mean, self.rstd = map(at.by_step, torch.native_layer_norm(x, self.shape, None, None, EPS)[1:])

    def backward(self, t, grad):
        """The gradient of x at step t."""
        x, statistics = self.by_step[t], (self.mean[t], self.rstd[t])
        if len(self.gain) < FEW:
            return normalised_backward(grad * self.gain, x)
        return aten_backward(grad, x, self.shape, *statistics, self.gain, None, [True, False, False])[0]


EQUATIONS = Equations(step, step_backward, update, vectors_backward)
LOOP = Loop(loop_forward, loop_backward)
