r"""GRU as in `torch.nn`, with the reset after the product (Cho et al. 2014; Chung et al. 2014). Gates r, z, n; state h.

.. math::
    r, z = \sigma(\mathrm{preact\_x} + \mathrm{preact\_h} + b_h), \quad n_h = \mathrm{preact\_h} + b_h, \quad
    n = \tanh(\mathrm{preact\_x} + r n_h), \quad h' = (1 - z) n + z h

`vectors` are b_h of r, z and n. The step keeps n, r, z and n_h, in this order. So the gradients of the input's
preactivations (n, r, z) and those of the recurrent ones (r, z, n_h) are both side by side.
"""

import torch

from fusedlstm.cells.cell import Cell, Equations, Loop

CELL = Cell(
    "gru",
    gates=("r", "z", "n"),
    states=("h",),
    kept=("n", "r", "z", "n_h"),  # n_h is what r multiplies
    x_blocks=(1, 2, 0),
    bias_in_step=True,
    aten="gru",
)


def step(preact_x, preact_h, state, vectors, drop):
    r, z, n_h = (h + b for h, b in zip(preact_h, vectors, strict=True))
    r = torch.sigmoid(preact_x[0] + r)
    z = torch.sigmoid(preact_x[1] + z)
    n = torch.tanh(preact_x[2] + r * n_h)
    gates = (n, r, z, n_h)
    return gates, update(gates, state, drop)


def update(gates, state_prev, drop):
    n, _, z, _ = gates
    (h,) = state_prev
    n = n * drop
    return (n + z * (h - n),)


def step_backward(gates, state_prev, state, dstate, vectors, drop):
    r"""With dh the gradient of h': dn = dh (1 - z) before tanh, dr = dn n_h, dn_h = dn r, dz = dh (h - n)."""
    n, r, z, n_h = gates
    (h,) = state_prev
    (dh,) = dstate
    dpreact_n = dh * (1 - z) * drop * (1 - n * n)
    dpreact_r = dpreact_n * n_h * r * (1 - r)
    dpreact_z = dh * (h - n * drop) * z * (1 - z)
    return (dpreact_n, dpreact_r, dpreact_z, dpreact_n * r), (dh * z,)


# The step of the CPU loop (`fusedlstm.engines.torch_loop`).


def loop_forward(at):
    H = at.states[0].size(1)
    n, r, z, n_h = at.gates.chunk(4, -1)
    r_and_z, of_h = at.gates[:, H : 3 * H], at.gates[:, H:]
    # Everything except the product is written to its place before the first step.
    bias_r_and_z, bias_n = torch.cat(at.vectors).split([2 * H, H])
    x_r_and_z, x_n = at.preact_x.split([2 * H, H], -1)
    torch.add(x_r_and_z, bias_r_and_z, out=r_and_z)
    n.copy_(x_n)
    n_h.copy_(bias_n)
    n, r, z, n_h, r_and_z, of_h, h_seq = map(at.by_step, (n, r, z, n_h, r_and_z, of_h, *at.states))

    def step(t, state):
        (h,) = state
        at.add_recurrent(of_h[t], h, of_h[t])
        r_and_z[t].sigmoid_()
        n[t].addcmul_(r[t], n_h[t]).tanh_()
        return (torch.lerp(n[t], h, z[t], out=h_seq[t]),)

    return step


def loop_backward(at):
    """Write a factor to the place of each preactivation's gradient, and multiply it by dh in the step."""
    n, r, z, n_h = at.gates.chunk(4, -1)
    dn, dr, dz, dn_h = at.dpreact.chunk(4, -1)
    torch.addcmul(torch.ones_like(n[:1]), n, n, value=-1, out=dn).addcmul_(dn, z, value=-1)  # (1 - n^2) (1 - z)
    torch.mul(dn, r, out=dn_h)
    torch.mul(dn_h, n_h, out=dr).addcmul_(dr, r, value=-1)
    torch.sub(at.before(0), n, out=dz).mul_(z).addcmul_(dz, z, value=-1)
    dpreact, dh, z = at.blocks_by_step(at.dpreact), at.by_step(at.dh), at.by_step(z)

    def step(t, dstate):
        dpreact[t].mul_(dh[t].unsqueeze(1))
        return dh[t].mul_(z[t])

    return step


EQUATIONS = Equations(step, step_backward, update)
LOOP = Loop(loop_forward, loop_backward)
