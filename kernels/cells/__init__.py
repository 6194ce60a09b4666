"""One file a cell: its equations, `step_fwd` and `step_bwd` on tuples of tiles.

    step_fwd(preact_x, preact_h, state) -> gates, state
    step_bwd(gates, state_prev, state, dstate) -> dpreact, dstate_prev

`state` begins with h. In `dstate_prev`, h is the part that does not pass through `weight_hh`.
Names and order of gates and states: `fusedlstm.cells`.
"""

from fusedlstm.kernels.cells import lstm

STEPS = {"lstm": (lstm.step_fwd, lstm.step_bwd)}
