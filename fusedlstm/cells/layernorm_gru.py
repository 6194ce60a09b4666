r"""GRU with layer normalisation of both products, and the reset after the product. Gates r, z, n; state h.

.. math::
    r, z = \sigma(\mathrm{preact\_x} + v), \quad n = \tanh(\mathrm{preact\_x} + r v), \quad
    v = \mathrm{gain\_hh}\, N(u) + b_h, \quad u = \mathrm{preact\_h}, \quad h' = (1 - z) n + z h

N normalises a whole row of 3H values (`fusedlstm.products`). `preact_x` is normalised before the loop, and includes the
biases of the input. `vectors` are b_h of r, z and n, then the gains of r, z and n. The step keeps r, z, n, v_n and the
three parts of u. In their places the backward puts the gradients of the input's preactivations, that of v_n, and those
of u.
"""

import torch
from torch.nn.functional import layer_norm

from fusedlstm.cells import gru
from fusedlstm.cells.cell import Cell, Equations, Loop
from fusedlstm.cells.layernorm import Norm
from fusedlstm.products import EPS, by_gate, normalised, normalised_backward

CELL = Cell(
    "layernorm_gru",
    gates=("r", "z", "n"),
    states=("h",),
    kept=("r", "z", "n", "v_n", "u_r", "u_z", "u_n"),
    x_blocks=(0, 1, 2),
    vectors=("gain_ih", "gain_hh"),
    bias_in_step=True,
    norms=1,
)


def step(preact_x, preact_h, state, vectors, drop):
    biases, gains = vectors[:3], vectors[3:]
    v = tuple(gain * n for gain, n in zip(gains, by_gate(normalised, preact_h), strict=True))
    (n, r, z, v_n), state = gru.step(preact_x, v, state, biases, drop)
    return (r, z, n, v_n, *preact_h), state


def update(gates, state_prev, drop):
    r, z, n, v_n, *_ = gates
    return gru.update((n, r, z, v_n), state_prev, drop)


def step_backward(gates, state_prev, state, dstate, vectors, drop):
    """As for the GRU, whose gradients of v then pass through the norm of u."""
    r, z, n, v_n, *u = gates
    (dn, dr, dz, dv_n), dstate_prev = gru.step_backward((n, r, z, v_n), state_prev, state, dstate, vectors[:3], drop)
    of_norm = tuple(dv * gain for dv, gain in zip((dr, dz, dv_n), vectors[3:], strict=True))
    return (dr, dz, dn, dv_n, *by_gate(normalised_backward, of_norm, u)), dstate_prev


def vectors_backward(dpreact, gates, state_prev, state):
    dr, dz, _, dv_n, *_ = dpreact
    dv = (dr, dz, dv_n)
    return *dv, *(d * n for d, n in zip(dv, by_gate(normalised, gates[4:]), strict=True))


# The step of the CPU loop (`fusedlstm.engines.torch_loop`).


def loop_forward(at):
    bias, gain = torch.cat(at.vectors).chunk(2)
    H = len(gain) // 3
    weight_t = at.weight_hh.t()
    x_r_and_z, x_n, r, z, n, v_n = map(
        at.by_step, (at.preact_x[:, : 2 * H], at.preact_x[:, 2 * H :], *at.gates[:, : 4 * H].chunk(4, -1))
    )
    r_and_z, u, h_seq = map(at.by_step, (at.gates[:, : 2 * H], at.gates[:, 4 * H :], *at.states))

    def step(t, state):
        (h,) = state
        v = layer_norm(torch.mm(h, weight_t, out=u[t]), (3 * H,), gain, bias, EPS)
        torch.add(x_r_and_z[t], v[:, : 2 * H], out=r_and_z[t]).sigmoid_()
        v_n[t].copy_(v[:, 2 * H :])
        torch.addcmul(x_n[t], r[t], v_n[t], out=n[t]).tanh_()
        return (torch.lerp(n[t], h, z[t], out=h_seq[t]),)

    return step


def loop_backward(at):
    """Write a factor to the place of each gradient, and multiply it by dh in the step.

    The gradient through the norm is computed separately.
    """
    gain = torch.cat(at.vectors[3:])
    r, z, n, v_n, *_ = at.gates.chunk(7, -1)
    dr, dz, dn, dv_n, *_ = at.dpreact.chunk(7, -1)
    torch.addcmul(torch.ones_like(n[:1]), n, n, value=-1, out=dn).addcmul_(dn, z, value=-1)  # (1 - n^2) (1 - z)
    torch.mul(dn, r, out=dv_n)
    torch.mul(dv_n, v_n, out=dr).addcmul_(dr, r, value=-1)
    torch.sub(at.before(0), n, out=dz).mul_(z).addcmul_(dz, z, value=-1)
    H = n.size(1)
    norm, of_h = Norm(at, at.gates[:, 4 * H :], gain), at.blocks_by_step(at.dpreact[:, : 4 * H])
    dr, dz, dv_n, du, dh, z = map(at.by_step, (dr, dz, dv_n, at.dpreact[:, 4 * H :], at.dh, z))

    def step(t, dstate):
        of_h[t].mul_(dh[t].unsqueeze(1))
        du[t].copy_(norm.backward(t, torch.cat((dr[t], dz[t], dv_n[t]), 1)))
        return dh[t].mul_(z[t])

    return step


EQUATIONS = Equations(step, step_backward, update, vectors_backward)
LOOP = Loop(loop_forward, loop_backward)
