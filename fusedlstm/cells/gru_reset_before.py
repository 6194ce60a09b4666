r"""GRU with the reset before the product (Cho et al. 2014). Gates r, z, n; state h.

.. math::
    r, z = \sigma(\mathrm{preact\_x} + h U^T), \quad n = \tanh(\mathrm{preact\_x} + (r h) U_n^T), \quad
    h' = (1 - z) n + z h

r changes what enters the product of n, so the step multiplies twice. `preact_x` has both biases, because nothing
multiplies them.
"""

import torch

from fusedlstm.cells.cell import Cell, Equations, Loop

CELL = Cell("gru_reset_before", gates=("r", "z", "n"), states=("h",), multiplies=True)


def step(preact_x, product, state, vectors, drop):
    (h,) = state
    r, z = (torch.sigmoid(x + u) for x, u in zip(preact_x[:2], product(h, "r", "z"), strict=True))
    (u,) = product(r * h, "n")
    gates = (r, z, torch.tanh(preact_x[2] + u))
    return gates, update(gates, state, drop)


def step_backward(gates, state_prev, state, dstate, vectors, drop, product_backward):
    r, z, n = gates
    (h,), (dh,) = state_prev, dstate
    dn = dh * (1 - z) * drop * (1 - n * n)
    dz = dh * (h - n * drop) * z * (1 - z)
    drh = product_backward((dn,), "n")
    dr = drh * h * r * (1 - r)
    return (dr, dz, dn), (dh * z + drh * r + product_backward((dr, dz), "r", "z"),)


def update(gates, state_prev, drop):
    _, z, n = gates
    (h,) = state_prev
    n = n * drop
    return (n + z * (h - n),)


def multiplied(gates, h):
    r, _, _ = gates
    return h, h, r * h


# The step of the CPU loop (`fusedlstm.engines.torch_loop`).

R_AND_Z, N = slice(0, 2), slice(2, 3)  # rows of weight_hh


def loop_forward(at):
    H = at.states[0].size(1)
    add_h, add_rh = at.add_product(R_AND_Z), at.add_product(N)
    x_r_and_z, x_n = map(at.by_step, at.preact_x.split([2 * H, H], -1))
    r_and_z, n = map(at.by_step, at.gates.split([2 * H, H], -1))
    r, z, _ = map(at.by_step, at.gates.chunk(3, -1))
    (h_seq,) = map(at.by_step, at.states)

    def step(t, state):
        (h,) = state
        add_h(x_r_and_z[t], h, r_and_z[t]).sigmoid_()
        add_rh(x_n[t], r[t] * h, n[t]).tanh_()
        return (torch.lerp(n[t], h, z[t], out=h_seq[t]),)

    return step


def loop_backward(at):
    """Write a factor to the place of each preactivation's gradient, and multiply it in the step: by dh, or r's by that
    of r h.
    """
    H = at.dh.size(1)
    add_through_h, add_through_rh = at.add_product_backward(R_AND_Z), at.add_product_backward(N)
    r, z, n = at.gates.chunk(3, -1)
    dr, dz, dn = at.dpreact.chunk(3, -1)
    h = at.before(0)
    torch.addcmul(torch.ones_like(n[:1]), n, n, value=-1, out=dn).addcmul_(dn, z, value=-1)  # (1 - n^2) (1 - z)
    torch.sub(h, n, out=dz).mul_(z).addcmul_(dz, z, value=-1)
    torch.mul(h, r, out=dr).addcmul_(dr, r, value=-1)
    dr_and_dz, dr, dn, r, z, dh = map(at.by_step, (at.dpreact[:, : 2 * H], dr, dn, r, z, at.dh))
    by_dh = [x[:, 1:] for x in at.blocks_by_step(at.dpreact)]

    def step(t, dstate):
        by_dh[t].mul_(dh[t].unsqueeze(1))
        drh = torch.zeros_like(dh[t])
        add_through_rh(drh, dn[t])
        dr[t].mul_(drh)
        dh_before = dh[t].mul_(z[t]).addcmul_(drh, r[t])
        add_through_h(dh_before, dr_and_dz[t])
        return dh_before

    return step


EQUATIONS = Equations(step, step_backward, update, multiplied=multiplied)
LOOP = Loop(loop_forward, loop_backward)
