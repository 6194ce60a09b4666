"""Plan how a recurrence runs on a device. A plan is a pure function of sizes and device limits.

A program owns `block_h` hidden units of one batch tile of `block_b` rows. Programs that share a batch tile and a
direction form a group. They exchange h (forward) or the gradients of the preactivations (backward) at every step.

| schedule | weights | exchange |
|---|---|---|
| `single` | on chip | none: the group is one program, which has all hidden units |
| `resident` | the program's slice stays on chip for all steps | group barrier |
| `streamed` | read from the L2 at every step | group barrier |
| `stepped` | the same | one launch per step, with any number of programs; for dense batches, if nothing else fits |

All programs of a group must be on the device at once, except with `stepped`, or they would wait forever. A launch
therefore has at most as many programs as the device holds, and takes the remaining batch tiles one after another.

The planner takes the candidate with the least predicted time (`fusedlstm.plan.cost`) of those that fit and compile
well. The constants of the prediction are not fitted to measurements (`fusedlstm.plan.devices`). So it orders the
candidates, but it promises nothing. A choice that `fusedlstm.tune` measured replaces it.
"""

from fusedlstm.plan.choice import CLEARLY, beside_cudnn, candidates, explain, plan, step_plan, step_plans, wave
from fusedlstm.plan.problem import ATTEMPT_LIMIT, COUNTER_STRIDE, LAYOUTS, SPIN_LIMIT, Plan, PlanError
from fusedlstm.plan.tiles import allowed_bytes, variants

__all__ = [
    "ATTEMPT_LIMIT",
    "CLEARLY",
    "COUNTER_STRIDE",
    "LAYOUTS",
    "SPIN_LIMIT",
    "Plan",
    "PlanError",
    "allowed_bytes",
    "beside_cudnn",
    "candidates",
    "explain",
    "plan",
    "step_plan",
    "step_plans",
    "variants",
    "wave",
]
