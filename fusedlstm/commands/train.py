"""Train a model that reads handwritten digits, and compare its time with torch.nn.

The digits come with scikit-learn. The pixels of each are a sequence of 64
steps. The result is an accuracy, two times, and a picture with the learning
curve and the gates.
"""

import argparse
from pathlib import Path

import torch

from fusedlstm import commands, engines, train

EXAMPLES = """\
examples:
  python -m fusedlstm train                             # less than a minute
  python -m fusedlstm train --epochs 5 --hidden 32      # seconds
  python -m fusedlstm train --device cuda --backend triton --out pictures"""


def add_arguments(add: commands.Add) -> None:
    positive = commands.positive
    add("--epochs", type=positive, default=50, help="number of passes over the data (default: %(default)s)")
    add("--hidden", type=positive, default=128, help="number of hidden units (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of the weights, batches and noise (default: %(default)s)")
    add("--backend", choices=engines.BACKENDS, default="auto", help="engine of the LSTM (default: %(default)s)")
    commands.add_device(add)
    add("--out", type=Path, default=Path("out"), help="folder for digits.png (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    where = commands.chosen_device(args)
    try:
        engines.choose(args.backend, torch.device(where), torch.float32)
    except (RuntimeError, ValueError) as error:
        args.parser.error(
            str(error), "--backend auto takes what serves here; python -m fusedlstm info says what that is."
        )
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        args.parser.error(f"--out: {error}", "Name another folder by --out.")
    settings = train.Settings(
        epochs=args.epochs, hidden_size=args.hidden, seed=args.seed, backend=args.backend, device=where
    )
    try:
        train.run(settings, args.out, say=commands.say)
    except ModuleNotFoundError as error:
        args.parser.error(str(error), "Install it and run the same command again.")
