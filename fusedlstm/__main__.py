"""The command line: `python -m fusedlstm`. Each command has a file in `fusedlstm.commands`."""

import textwrap

import fusedlstm
from fusedlstm import commands
from fusedlstm.commands import bench, convert, info, inspect, plan, train, tune

# In the order of --help.
COMMANDS = {
    "train": train,
    "info": info,
    "plan": plan,
    "tune": tune,
    "bench": bench,
    "inspect": inspect,
    "convert": convert,
}
DESCRIPTION = """\
Recurrent layers for PyTorch as fused Triton kernels. The commands try them,
measure them, and look into files of weights."""
EPILOG = """\
examples:
  python -m fusedlstm info
  python -m fusedlstm bench --hidden 256
  python -m fusedlstm inspect checkpoint.pt

`python -m fusedlstm COMMAND --help` explains a command, with examples."""


def parser() -> commands.Parser:
    main = commands.Parser("python -m fusedlstm", description=DESCRIPTION, epilog=EPILOG)
    main.add_argument("--version", action="version", version=f"fusedlstm {fusedlstm.__version__}")
    subparsers = main.add_subparsers(dest="command", metavar="COMMAND", title="commands", required=True)
    for name, module in COMMANDS.items():
        summary, _, more = (module.__doc__ or "").partition("\n\n")
        description = "\n\n".join(textwrap.fill(" ".join(part.split()), 78) for part in [summary, *more.split("\n\n")])
        made = subparsers.add_parser(
            name, help=" ".join(summary.split()), description=description, epilog=module.EXAMPLES
        )
        module.add_arguments(made.add_argument)
        made.set_defaults(run=module.run, parser=made)
    return main


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    try:
        args.run(args)
    except KeyboardInterrupt:
        args.parser.exit(130, "\nstopped\n")


if __name__ == "__main__":
    main()
