"""Measure the best plans and cuDNN on this GPU, and store the fastest.

Later calls of the same sizes find the choice, in this process and in others.
"""

import argparse

import fusedlstm
from fusedlstm import commands
from fusedlstm.plan import tuned
from fusedlstm.plan.choice import table

EXAMPLES = """\
examples:
  python -m fusedlstm tune --hidden 512 --batch 64 --dtype bf16
  python -m fusedlstm tune --hidden 256 --input 80 --layers 4 --directions 2
  python -m fusedlstm tune --show      # what is stored
  python -m fusedlstm tune --clear"""


def add_arguments(add: commands.Add) -> None:
    add("--hidden", type=commands.positive, help="number of hidden units (required, except with --show and --clear)")
    commands.add_layer(add)
    commands.add_stack(add)
    add(
        "--seconds",
        type=commands.seconds,
        default=20.0,
        help="time to measure, without compiling (default: %(default)s)",
    )
    commands.add_device(add)
    add("--show", action="store_true", help="only print the stored choices")
    add("--clear", action="store_true", help="only delete all stored choices")


def run(args: argparse.Namespace) -> None:
    try:
        file = tuned.path()
    except RuntimeError as error:
        args.parser.error(str(error), "Set FUSEDLSTM_CACHE to a folder that you can write to.")
    if args.clear:
        commands.say(f"{file}: {'removed' if tuned.clear() else 'there was none'}")
    elif args.show:
        commands.say(kept_choices() or f"{file}: no choices")
    elif args.hidden is None:
        args.parser.error("--hidden: expected a number of units, got none", "Or ask for --show or --clear.")
    else:
        measure(args)
        commands.say(f"kept in {file}")


def kept_choices() -> str:
    text = []
    for place, choices in tuned.everything().items():
        rows = []
        for what, choice in choices.items():
            ms = choice.get("ms", {})
            fastest = min(ms, key=lambda name: ms[name], default="")
            rows.append((fastest, f"{ms[fastest]:.3g}" if ms else "", what))
        text.append(f"{place}\n{table(['fastest', 'ms', 'what'], rows)}")
    return "\n\n".join(text)


def measure(args: argparse.Namespace) -> None:
    """Tune a module with random weights and input, and print what was found."""
    try:
        module, x = commands.layer_and_input(args)
        with commands.working("compiling and measuring"):
            found = fusedlstm.tune(module, x, seconds=args.seconds)
    except (OSError, RuntimeError, ValueError) as error:
        args.parser.error(str(error), "python -m fusedlstm plan shows the plans without a GPU.")
    for measured in found:
        kind = "engine" if isinstance(measured.what, tuned.Call) else f"plan {measured.what.pass_}"
        commands.say(f"\n{kind}: {measured.chosen} (predicted: {measured.predicted})")
        rows = [(name, f"{ms:.3f}") for name, ms in sorted(measured.ms.items(), key=lambda item: item[1])]
        commands.say(table(["tried", "ms"], rows))
