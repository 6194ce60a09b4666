"""Any cell by its equations: for those that have no file here."""

import torch

from fusedlstm import heads
from fusedlstm.cells import CELLS
from fusedlstm.equations import EQUATIONS


class ByEquations:
    """`forward` and `backward` as a file of `fusedlstm.loops` has them."""

    def __init__(self, cell: str):
        self.cell, self.equations = CELLS[cell], EQUATIONS[cell]

    def forward(self, at):
        G = self.cell.num_gates
        preact_x, gates = map(at.by_step, (at.preact_x, at.gates))
        states = [*zip(*map(at.by_step, at.states), strict=True)]  # step by step

        def step(t, state):
            if at.weight_hh is None:
                preact_h = (0.0,) * G
            else:
                preact_h = heads.recurrent(state[0], at.weight_hh).chunk(G, -1)
            found, state = self.equations.step(preact_x[t].chunk(G, -1), preact_h, state, at.vectors, 1.0)
            torch.cat(found, -1, out=gates[t])
            return tuple(seq.copy_(s) for seq, s in zip(states[t], state, strict=True))

        return step

    def backward(self, at):
        gates, dpreact = at.blocks_by_step(at.gates), at.blocks_by_step(at.dpreact)
        before = [*zip(*(at.by_step(at.before(k)) for k in range(len(at.states))), strict=True)]
        states, dh = [*zip(*map(at.by_step, at.states), strict=True)], at.by_step(at.dh)

        def step(t, dstate):
            found, (dh_direct, *dstate_prev) = self.equations.step_backward(
                gates[t].unbind(1), before[t], states[t], (dh[t], *dstate), at.vectors, 1.0
            )
            torch.stack(found, 1, out=dpreact[t])
            for mine, new in zip(dstate, dstate_prev, strict=True):
                mine.copy_(new)
            return dh_direct

        return step
