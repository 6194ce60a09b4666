"""What the commands share: their parser, arguments and output. `fusedlstm.__main__` lists the commands.

A command is a module. Its docstring is its --help. `EXAMPLES` follows there, `add_arguments` adds the arguments, and
`run` takes the parsed ones.
"""

import argparse
import contextlib
import re
import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fusedlstm import cells
from fusedlstm.base import Recurrent
from fusedlstm.inspect import checkpoint

Add = Callable[..., Any]  # the method add_argument of a parser
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CLEAR = "\r\033[K"  # the line of a terminal


class Parser(argparse.ArgumentParser):
    """A parser whose errors have two lines: the first says what is wrong, the second says what to do next."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str, then: str = "") -> NoReturn:
        text = " ".join(message.split())
        self.exit(2, f"{self.prog}: error: {text}\n{then or f'{self.prog} --help lists what it takes.'}\n")


def positive(text: str) -> int:
    value = int(text) if text.isascii() and text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return value


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return value


def device(text: str) -> str:
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError, ValueError) as error:  # torch built without it, no driver, no such number
        raise argparse.ArgumentTypeError(f"no device {text!r} here: {str(error).splitlines()[0]}") from None
    return text


def add_device(add: Add) -> None:
    add("--device", type=device, help="cpu, cuda or a GPU such as cuda:1 (default: a GPU if there is one)")


def chosen_device(args: argparse.Namespace) -> str:
    return args.device or ("cuda" if torch.cuda.is_available() else "cpu")


def add_cell(add: Add, use: str, default: str | None = None) -> None:
    names = ", ".join(cells.CELLS)
    text = f"{use}: {names}{' (default: %(default)s)' if default else ''}"
    add("--cell", choices=[*cells.CELLS], default=default, metavar="CELL", help=text)


def add_layer(add: Add) -> None:
    """The arguments that describe a layer."""
    add_cell(add, "name of the cell", default=next(iter(cells.CELLS)))
    add("--batch", type=positive, default=32, help="number of sequences (default: %(default)s)")
    add("--steps", type=positive, default=100, help="number of steps per sequence (default: %(default)s)")
    add("--dtype", choices=DTYPES, default="fp32", help="dtype of input and weights (default: %(default)s)")
    add(
        "--directions",
        type=int,
        choices=(1, 2),
        default=1,
        help="1, or 2 for a bidirectional layer (default: %(default)s)",
    )


def add_stack(add: Add) -> None:
    """The arguments that describe a stack of layers beside `add_layer`."""
    add("--input", type=positive, help="number of input features (default: that of --hidden)")
    add("--layers", type=positive, default=1, help="number of layers (default: %(default)s)")


def layer_and_input(args: argparse.Namespace) -> tuple[Recurrent, Tensor]:
    """A layer of `add_layer` and `add_stack` with random weights, and a random input [T, B, I], under a fixed seed."""
    torch.manual_seed(0)
    features = args.input or args.hidden
    like: dict[str, Any] = {"device": chosen_device(args), "dtype": DTYPES[args.dtype]}
    sizes: dict[str, Any] = {"num_layers": args.layers, "bidirectional": args.directions == 2}
    layer = checkpoint.made(args.cell, features, args.hidden, **sizes, **like)
    return layer, torch.randn(args.steps, args.batch, features, **like)


def chosen_layers(args: argparse.Namespace, modules: dict[str, nn.RNNBase]) -> dict[str, nn.RNNBase]:
    """The layers of a file that --name asks for."""
    chosen = {name: module for name, module in modules.items() if args.name in (None, name)}
    if not chosen:
        args.parser.error(f"--name: expected one of {', '.join(modules)}, got {args.name!r}")
    return chosen


def what_next(error: Exception) -> str:
    """The second line of an error of a file that is read."""
    return "Pass --trust if you trust whoever made the file." if "objects whose code runs" in str(error) else ""


def say(text: str) -> None:
    """Print. On a terminal, lines are broken to fit. In a pipe or a file they stay as they are."""
    print(fitted(text, shutil.get_terminal_size().columns) if sys.stdout.isatty() else text)


def fitted(text: str, width: int) -> str:
    """The text with lines of at most `width` characters. What is left of a line goes on below its second column."""
    found = []
    for line in text.split("\n"):
        if len(line) > width:
            first = re.match(r" *\S+( \S+)*  +| *", line)
            indent = first.end() if first and first.end() <= width // 3 else 2
            line = textwrap.fill(
                line, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
            )
        found.append(line)
    return "\n".join(found)


@contextlib.contextmanager
def working(what: str) -> Iterator[Callable[[str], None]]:
    """Show on a terminal what is under way and for how long. This begins after two seconds.

    Yields a function that says how far it is.
    """
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    progress, done, begin = [""], threading.Event(), time.monotonic()

    def show() -> None:
        wait = 2.0
        while not done.wait(wait):
            wait = 1.0
            line = f"{what}{progress[0]}, {time.monotonic() - begin:.0f} s"
            print(f"{CLEAR}{line[: shutil.get_terminal_size().columns - 1]}", end="", file=sys.stderr, flush=True)

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield lambda text: progress.__setitem__(0, f" {text}")
    finally:
        done.set()
        thread.join()
        print(CLEAR, end="", file=sys.stderr, flush=True)
