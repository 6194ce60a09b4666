"""How a recurrence runs on a device: a pure function from sizes and device limits to a plan.

A program owns `block_h` hidden units of one batch tile of `block_b` rows. Programs that share a batch tile and a
direction form a group and exchange h (forward) or the gradients of the preactivations (backward) at every step.

| schedule | weights | exchange |
|---|---|---|
| `single` | on chip | none: a group of one, all hidden units in one program |
| `resident` | the program's slice stays on chip for all steps | group barrier |
| `streamed` | read from L2 at every step | group barrier |
| `stepped` | the same | one launch a step, of any number of programs; dense only, and where nothing else fits |

Every other group of a launch must be on the device at once, or its programs would wait for ever; a launch therefore has
at most as many programs as the device holds, and walks the remaining batch tiles one after another.

The choice is the candidate with the least predicted time (`fusedlstm.plan.cost`), of those that fit and compile well.
The prediction's constants are not fitted to measurements (`fusedlstm.plan.devices`), so that it orders candidates and
promises nothing; a choice measured by `fusedlstm.tune` overrides it.
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
