r"""GRU with layer normalisation of both products. Gates r, z, n; state h; kept r, z, n, v_n and the three parts of u.

.. math::
    r, z = \sigma(\mathrm{preact\_x} + v), \quad n = \tanh(\mathrm{preact\_x} + r v_n), \quad
    v = \mathrm{gain}\, N(u) + b, \quad u = \mathrm{preact\_h}, \quad h' = n + z (h - n)

N is a norm over the 3H numbers of a row of u, of which a program has a part (`norms`). `vectors` are b of r, z and n,
then their gains. Backward as the GRU's, whose gradients of v go through the norm to du.
"""

import triton
import triton.language as tl

from fusedlstm.kernels.cells import gru
from fusedlstm.kernels.norms import normalised, normalised_bwd


@triton.jit
def step_fwd(preact_x, preact_h, state, vectors, drop, slots, norm, H: tl.constexpr, EXCHANGE: tl.constexpr):
    mean, rstd = norm
    n_r, n_z, n_n = normalised(preact_h, mean, rstd, 3)
    scaled = (vectors[3] * n_r, vectors[4] * n_z, vectors[5] * n_n)
    kept, stepped = gru.step_fwd(preact_x, scaled, state, vectors, drop)
    n, r, z, v_n = kept
    return (r, z, n, v_n) + preact_h, stepped


@triton.jit
def update(gates, state_prev, drop):
    r, z, n, v_n = gates[:4]
    return gru.update((n, r, z, v_n), state_prev, drop)


@triton.jit
def step_bwd(gates, state_prev, state, dstate, vectors, drop, slots, norm, H: tl.constexpr, EXCHANGE: tl.constexpr):
    r, z, n, v_n = gates[:4]
    mean, rstd = norm
    dpreact, dstate_prev = gru.step_bwd((n, r, z, v_n), state_prev, state, dstate, vectors, drop)
    dpreact_n, dpreact_r, dpreact_z, dv_n = dpreact
    dn = (dpreact_r * vectors[3], dpreact_z * vectors[4], dv_n * vectors[5])
    du = normalised_bwd(dn, normalised(gates[4:], mean, rstd, 3), rstd, 3, slots, 0, H, EXCHANGE)
    return (dpreact_r, dpreact_z, dpreact_n, dv_n) + du, dstate_prev
