"""What other examples do for `--compare`: the same training with our layers and with those of `torch.nn`."""

from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import fusedlstm

Training = tuple[list[float], float]  # the loss of every update, and the median milliseconds of one


def compare(
    make: Callable[[], nn.Module], train: Callable[[nn.Module, str], Training], seed: int, console: Console, what: str
) -> None:
    """Train a model twice from the same seed, and print both losses and times. `what` says what the losses are."""
    found = {}
    for name in ("fusedlstm", "torch.nn"):
        torch.manual_seed(seed)
        model = make()
        found[name] = train(fusedlstm.restore(model) if name == "torch.nn" else model, name)
    table = Table(title=what)
    for name in ("update", *found, "difference"):
        table.add_column(name, justify="right")
    ours, theirs = (losses for losses, _ in found.values())
    updates = len(ours)
    for update in sorted({1, *range(0, updates + 1, max(1, updates // 5))} - {0}):
        a, b = ours[update - 1], theirs[update - 1]
        table.add_row(str(update), f"{a:.6f}", f"{b:.6f}", f"{abs(a - b):.1e}")
    console.print(table)
    apart = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    times = ", ".join(f"{name} {ms:.1f} ms" for name, (_, ms) in found.items())
    console.print(f"The losses are at most {apart:.1e} apart. Median update: {times}.")
