r"""GRU as `torch.nn` has it, reset after the product (Cho et al. 2014; Chung et al. 2014). Gates r, z, n; state h.

.. math::
    r, z = \sigma(\mathrm{preact\_x} + \mathrm{preact\_h} + b_h), \quad n_h = \mathrm{preact\_h} + b_h, \quad
    n = \tanh(\mathrm{preact\_x} + r n_h), \quad h' = (1 - z) n + z h

`vectors` are b_h of r, z and n. Kept are n, r, z, n_h: so the gradients of the input's
preactivations (n, r, z) and those of the recurrent ones (r, z, n_h) each lie together.
"""

import torch


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
