r"""GRU with the reset before the product (Cho et al. 2014). Gates r, z, n; state h.

.. math::
    r, z = \sigma(\mathrm{preact\_x} + h U^T), \quad n = \tanh(\mathrm{preact\_x} + (r h) U_n^T), \quad
    h' = (1 - z) n + z h

r changes what enters the product of n, so the step multiplies twice. `preact_x` has both biases, because nothing
multiplies them. There is no written-out backward.
"""

import torch

from fusedlstm.cells.cell import Cell, Equations

CELL = Cell("gru_reset_before", gates=("r", "z", "n"), states=("h",), multiplies=True)


def step(preact_x, product, state, vectors, drop):
    (h,) = state
    r, z = (torch.sigmoid(x + u) for x, u in zip(preact_x[:2], product(h, "r", "z"), strict=True))
    (u,) = product(r * h, "n")
    gates = (r, z, torch.tanh(preact_x[2] + u))
    return gates, update(gates, state, drop)


def update(gates, state_prev, drop):
    _, z, n = gates
    (h,) = state_prev
    n = n * drop
    return (n + z * (h - n),)


EQUATIONS = Equations(step, update=update)
