"""Explain how the kernels would run a layer, and why. This needs no GPU.

The planner predicts the time of every way to run the layer on a GPU. This
shows the best one for the forward and the backward, and those that follow.
"""

import argparse

from fusedlstm import checks, commands, engines, plan

EXAMPLES = """\
examples:
  python -m fusedlstm plan --hidden 1024
  python -m fusedlstm plan --hidden 512 --cell gru --dtype bf16 --arch a100
  python -m fusedlstm plan --hidden 768 --heads 12 --batch 16 --steps 1024
  FUSEDLSTM_SMS=64 python -m fusedlstm plan --hidden 1024   # of a shared GPU"""


def add_arguments(add: commands.Add) -> None:
    add("--hidden", type=commands.positive, required=True, help="number of hidden units (required)")
    commands.add_layer(add)
    add("--heads", type=commands.positive, default=1, help="number of heads (default: %(default)s)")
    add("--arch", default="sm_90", help="GPU, such as h100, a100, 4090, l4, mi300x or sm_89 (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    if reason := engines.without_kernels(args.cell):
        args.parser.error(f"--cell: {reason}")
    try:
        checks.num_heads(args.heads, args.hidden)
        text = plan.explain(
            hidden=args.hidden,
            batch=args.batch,
            steps=args.steps,
            dtype=args.dtype,
            arch=args.arch,
            directions=args.directions,
            heads=args.heads,
            cell=args.cell,
        )
    except plan.PlanError as error:
        args.parser.error(str(error), "Fewer hidden units, or another --arch, may fit.")
    except (ValueError, RuntimeError) as error:
        args.parser.error(str(error))
    commands.say(text)
