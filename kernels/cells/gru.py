r"""GRU, reset after the product. Gates r, z, n; state h; vectors the biases b of `preact_h`; kept n, r, z, n_h.

.. math::
    r, z = \sigma(\mathrm{preact\_x} + \mathrm{preact\_h} + b), \quad n_h = \mathrm{preact\_h} + b, \quad
    n = \tanh(\mathrm{preact\_x} + r n_h), \quad h' = n + z (h - n)

Backward, from dh:

.. math::
    dn = dh (1 - z), \quad dr = dn\, n_h, \quad dn_h = dn\, r, \quad dz = dh (h - n), \quad dh_{prev} = dh\, z

dn through tanh, and the rest through sigma: tanh' = 1 - y^2, sigma' = y (1 - y).
"""

import triton
import triton.language as tl  # noqa: F401  the interpreter looks for it

from fusedlstm.kernels.activations import sigmoid, tanh


@triton.jit
def step_fwd(preact_x, preact_h, state, vectors, drop):
    r = sigmoid(preact_x[0] + preact_h[0] + vectors[0])
    z = sigmoid(preact_x[1] + preact_h[1] + vectors[1])
    n_h = preact_h[2] + vectors[2]
    n = tanh(preact_x[2] + r * n_h)
    gates = (n, r, z, n_h)
    return gates, update(gates, state, drop)


@triton.jit
def update(gates, state_prev, drop):
    n, _, z, _ = gates
    offered = n * drop
    return (offered + z * (state_prev[0] - offered),)


@triton.jit
def step_bwd(gates, state_prev, state, dstate, vectors, drop):
    n, r, z, n_h = gates
    h = state_prev[0]
    dh = dstate[0]
    dpreact_n = dh * (1.0 - z) * drop * (1.0 - n * n)
    dpreact_r = dpreact_n * n_h * r * (1.0 - r)
    dpreact_z = dh * (h - n * drop) * z * (1.0 - z)
    return (dpreact_n, dpreact_r, dpreact_z, dpreact_n * r), (dh * z,)
