"""How long can a recurrent network remember? Three tasks, at growing gaps, for an RNN, a GRU and LSTMs.

Every sequence shows two things that count, and the answer is due at the end. The first is shown at least `gap` steps
before the end, in a window of a tenth of the gap. The second comes about half of a gap later. What else is shown does
not matter.

- adding: two of many numbers from -1 to 1 are marked. The answer is 0.5 + their sum / 4.
- order: two of many letters are X or Y. The answer is which two, and in which order: one of four.
- copy: two letters of four, one after the other, and then blanks. After a bell, the answer is both of them.

The first two are tasks 4 and 6a of Hochreiter & Schmidhuber 1997, a little simplified: sequences have one length, and
the second number is not anywhere in the first half. Their limits are kept. An answer to `adding` is right if it is off
by less than 0.04, and one to the others if every output is off by less than 0.3. The paper trains until 2000 sequences
in a row are right and the mean error is low, and then counts the wrong ones of 2560. Here a training ends when less
than 0.5% of the last 40 batches were wrong, and a task is solved if less than 1% of 2560 new sequences are wrong. The
table also has the loss over that of a guess, which tells who has begun to learn from who has not. A guess is right in
15% of `adding`.

Every layer has 32 units and the same rate, clipping and number of updates. Only the layer and its first biases differ.
They decide what an LSTM remembers before it has learned anything. With those of torch it keeps about half of c at a
step, and 73% with a forget bias of 1. Chrono biases (Tallec & Ollivier 2018) are spread so that some units keep c for
as long as the gap is. A second picture shows the gates of a network that has solved a task: the input gate opens when
what counts is shown, and the forget gate stays open.

With the defaults, expect that the LSTM with chrono biases solves everything but `copy` at gap 100, that the GRU solves
`adding` and `order`, that the other LSTMs solve these at gap 20 only, or nearly do, and that the RNN solves nothing.
This took 1.4 minutes on two cores, and 15 on two that other jobs used too.

    python examples/long_range.py
    python examples/long_range.py --gaps 20 --tasks order           # half a minute
    python examples/long_range.py --gaps 100 200 500 --seeds 3      # hours
    python examples/long_range.py --compare                         # torch.nn's layers: the same losses, and both times
"""

import argparse
import functools
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch import multiprocessing as mp
from torch.nn.functional import cross_entropy, mse_loss, one_hot
from tqdm import tqdm

import fusedlstm
from fusedlstm import inits, inspect
from fusedlstm.inspect.plots import new_figure

TESTED = 2560  # sequences, as in the paper
RECENT = 40  # batches, over which the wrong answers are counted during a training
LETTERS, COPIED = 4, 2
# What the paper reports in its tables 7 and 9: training sequences, and wrong ones of 2560. Its T is our gap.
PAPER = {("adding", 100): (74_000, 1), ("adding", 500): (209_000, 0), ("order", 100): (31_390, 1)}


def places(gap: int, batch: int) -> Tensor:
    """Where the two things that count are shown, [2, B]."""
    window = max(1, gap // 10)
    return torch.randint(window, (2, batch)) + torch.tensor([[0], [gap // 2]])


def adding(gap: int, batch: int) -> tuple[Tensor, Tensor]:
    """Numbers and marks [T, B, 2], and the answer [1, B, 1]. T is a tenth more than the gap."""
    steps = gap + max(1, gap // 10)
    numbers = torch.rand(steps, batch) * 2 - 1
    marks = torch.zeros(steps, batch).scatter_(0, places(gap, batch), 1.0)
    return torch.stack([numbers, marks], -1), (0.5 + (numbers * marks).sum(0) / 4)[None, :, None]


def order(gap: int, batch: int) -> tuple[Tensor, Tensor]:
    """Letters X, Y, a, b, c, d, one-hot [T, B, 6], and which of XX, XY, YX, YY, [1, B, 4]."""
    chosen = torch.randint(2, (2, batch))
    letters = torch.randint(2, 6, (gap + max(1, gap // 10), batch)).scatter_(0, places(gap, batch), chosen)
    return one_hot(letters, 6).float(), one_hot(2 * chosen[:1] + chosen[1:], 4).float()


def copy(gap: int, batch: int) -> tuple[Tensor, Tensor]:
    """Letters, then blanks, then a bell, one-hot [T, B, 6], and the letters [2, B, 4]."""
    letters = torch.randint(LETTERS, (COPIED, batch))
    shown = torch.full((gap + 2 * COPIED, batch), LETTERS)
    shown[:COPIED], shown[-COPIED] = letters, LETTERS + 1
    return one_hot(shown, LETTERS + 2).float(), one_hot(letters, LETTERS).float()


class Task(NamedTuple):
    draw: Callable[[int, int], tuple[Tensor, Tensor]]  # from a gap and a batch size to x [T, B, I] and the answers
    inputs: int
    outputs: int
    near: float  # an answer is right if every output is nearer than this
    guessing: float  # the loss of who knows only the mean

    def judge(self, found: Tensor, answer: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and which sequences are wrong [B]. Outputs are [steps, B, outputs]; of several, logits."""
        if self.outputs == 1:
            loss = mse_loss(found, answer)
        else:
            loss = cross_entropy(found.flatten(0, 1), answer.flatten(0, 1))
            found = found.softmax(-1)
        return loss, ((found - answer).abs() >= self.near).any(-1).any(0)


TASKS = {
    "adding": Task(adding, 2, 1, 0.04, 1 / 24),
    "order": Task(order, 6, 4, 0.3, math.log(4)),
    "copy": Task(copy, LETTERS + 2, LETTERS, 0.3, math.log(LETTERS)),
}
LAYERS = {
    "RNN": (fusedlstm.RNN, None),
    "GRU": (fusedlstm.GRU, None),
    "LSTM": (fusedlstm.LSTM, None),
    "LSTM, forget bias": (fusedlstm.LSTM, inits.forget_bias_),
    "LSTM, chrono": (fusedlstm.LSTM, inits.chrono_),
}


class Run(NamedTuple):
    """One training: what to do, and with which settings."""

    task: str
    layer: str
    gap: int
    seed: int
    args: argparse.Namespace

    def network(self) -> nn.ModuleList:
        """The layer and its head."""
        task, (layer, init) = TASKS[self.task], LAYERS[self.layer]
        torch.manual_seed(self.seed)
        if init is inits.chrono_:
            init = functools.partial(init, longest=self.gap)
        elif init is inits.forget_bias_:
            init = functools.partial(init, value=self.args.forget_bias)
        hidden_size = self.args.hidden_size
        return nn.ModuleList([layer(task.inputs, hidden_size, init=init), nn.Linear(hidden_size, task.outputs)]).to(
            self.args.device
        )

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        x, answer = TASKS[self.task].draw(self.gap, size)
        return x.to(self.args.device), answer.to(self.args.device)


class Found(NamedTuple):
    wrong: float  # share of the tested sequences
    loss: float  # on these, over that of guessing
    sequences: int  # that were seen in the training
    state: dict[str, Tensor]  # of the network


def judged(run: Run, network: nn.ModuleList, batch: int) -> tuple[Tensor, Tensor]:
    """Loss and wrong sequences on a new batch."""
    (layer, head), (x, answer) = network, run.batch(batch)
    output, _ = layer(x)
    return TASKS[run.task].judge(head(output[-len(answer) :]), answer)


def updates(run: Run, network: nn.ModuleList, limit: int):
    """Train, and yield the loss and the share of wrong sequences of each update."""
    optimizer = torch.optim.Adam(network.parameters(), lr=run.args.rate)
    for _ in range(limit):
        loss, wrong = judged(run, network, run.args.batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        yield loss.item(), wrong.float().mean().item()


def train(run: Run) -> Found:
    """Train until less than 1% of the recent sequences are wrong, or the updates are used up. Then test."""
    if run.args.device == "cpu":
        torch.set_num_threads(1)
    network, wrong = run.network(), []
    for _, share in updates(run, network, run.args.updates):
        wrong.append(share)
        if len(wrong) >= RECENT and statistics.fmean(wrong[-RECENT:]) < 0.005:
            break
    with torch.no_grad():
        loss, failed = judged(run, network, TESTED)
    state = {name: value.cpu() for name, value in network.state_dict().items()}
    loss_share = loss.item() / TASKS[run.task].guessing
    return Found(failed.float().mean().item(), loss_share, len(wrong) * run.args.batch, state)


def train_all(runs: list[Run], processes: int) -> dict[tuple, Found]:
    """Train every network, some at the same time."""
    if processes == 1:
        found = [train(run) for run in tqdm(runs, desc="networks", disable=None)]
    else:
        with mp.get_context("spawn").Pool(processes) as pool:
            found = list(tqdm(pool.imap(train, runs), total=len(runs), desc="networks", disable=None))
    return {run[:4]: result for run, result in zip(runs, found, strict=True)}


def table_of(found: dict[tuple, Found], args: argparse.Namespace) -> Table:
    """Medians over the seeds, and what the paper reports."""
    table = Table(title=f"Median of {args.seeds} seed(s), at most {args.updates * args.batch:,} training sequences")
    table.add_column("task")
    table.add_column("layer", no_wrap=True)
    for name in ("gap", "wrong", "loss / guessing", "sequences", "solved"):
        table.add_column(name, justify="right")
    for task in args.tasks:
        for gap in args.gaps:
            for layer in args.layers:
                own = [found[task, layer, gap, seed] for seed in range(args.seeds)]
                wrong, loss, sequences = (statistics.median(x[:3][k] for x in own) for k in range(3))
                solved = sum(x.wrong < 0.01 for x in own)
                table.add_row(
                    task,
                    layer,
                    str(gap),
                    f"{wrong:.1%}",
                    f"{loss:.4f}",
                    f"{sequences:,.0f}",
                    f"{solved} of {args.seeds}",
                    style="bold" if 2 * solved > args.seeds else None,
                )
            if (task, gap) in PAPER:
                sequences, failed = PAPER[task, gap]
                table.add_row(task, "the LSTM of 1997", str(gap), f"{failed / TESTED:.1%}", "", f"{sequences:,}", "")
            table.add_section()
    return table


def picture(found: dict[tuple, Found], args: argparse.Namespace, path: Path) -> None:
    """A panel for each task, a row for each layer, a column for each gap."""
    width = 1.8 + (0.62 * len(args.gaps) + 0.5) * len(args.tasks)
    figure = new_figure(max(5, width), 1.1 + 0.44 * len(args.layers))
    panels = figure.subplots(1, len(args.tasks), squeeze=False, sharey=True)[0]
    for panel, task in zip(panels, args.tasks, strict=True):
        right = [
            [
                1 - statistics.median(found[task, layer, gap, seed].wrong for seed in range(args.seeds))
                for gap in args.gaps
            ]
            for layer in args.layers
        ]
        panel.imshow(right, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        for r, row in enumerate(right):
            for k, share in enumerate(row):
                shade = "black" if share > 0.5 else "white"
                weight = "bold" if share > 0.99 else "normal"
                panel.text(k, r, f"{100 * share:.0f}", color=shade, weight=weight, ha="center", va="center")
        panel.set_title(task, fontsize=11)
        panel.set_xticks(range(len(args.gaps)), args.gaps)
        panel.set_yticks(range(len(args.layers)), args.layers)
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
        panel.set_xticks([k + 0.5 for k in range(len(args.gaps) - 1)], minor=True)
        panel.set_yticks([r + 0.5 for r in range(len(args.layers) - 1)], minor=True)
        panel.grid(which="minor", color="white", linewidth=2)
        panel.tick_params(which="minor", length=0)
    figure.suptitle("right answers (%) after the same number of updates", fontsize=12)
    figure.supxlabel("gap (steps)", fontsize=10)
    figure.savefig(path, dpi=130)


def gates_picture(found: dict[tuple, Found], args: argparse.Namespace, path: Path) -> str | None:
    """The gates of the LSTM that solved a task at the longest gap, and what that is; none if there is none."""
    solved = [key for key, result in found.items() if "LSTM" in key[1] and result.wrong < 0.01]
    if not solved:
        return None
    best = max(solved, key=lambda key: (key[2], -args.tasks.index(key[0])))
    run = Run(*best, args)
    network = run.network()
    network.load_state_dict(found[best].state)
    gates_figure(run, network).savefig(path, dpi=110)
    return f"{run.task}, gap {run.gap}: {run.layer}"


def gates_figure(run: Run, network: nn.ModuleList) -> Figure:
    """The gates and states of a network while it reads a new sequence, with triangles at the steps that count."""
    x, _ = run.batch(1)
    figure = inspect.plot_gates(inspect.gates(network[0], x))
    if run.task == "copy":
        shown = [*range(COPIED), len(x) - COPIED]
    else:
        shown = (x[:, 0, 1] if run.task == "adding" else x[:, 0, :2].sum(-1)).nonzero()[:, 0].tolist()
    for panel in figure.axes:
        if panel.get_title():
            panel.autoscale(False)
            panel.set_title(panel.get_title(), fontsize=11, pad=12)
            marks, above = [step + 0.5 for step in shown], panel.get_xaxis_transform()
            panel.plot(marks, [1.03] * len(marks), "v", color="black", markersize=5, transform=above, clip_on=False)
    figure.suptitle(f"{run.task}, gap {run.gap}: {run.layer}. Triangles: the steps that count", fontsize=12)
    return figure


def compare(args: argparse.Namespace, console: Console) -> None:
    """The first updates with torch.nn's layers in place of ours, from the same values and sequences."""
    table = Table(title=f"The first {args.updates} updates of {args.tasks[0]} at gap {args.gaps[0]}")
    for name in ("layer", "last loss, ours", "torch.nn", "largest difference", "ours", "torch.nn"):
        table.add_column(name, justify="left" if name == "layer" else "right")
    for layer in args.layers:
        losses, times = [], []
        for restored in (False, True):
            run = Run(args.tasks[0], layer, args.gaps[0], 0, args)
            network = run.network()
            if restored:
                network = fusedlstm.restore(network)
            start = time.perf_counter()
            losses.append(torch.tensor([loss for loss, _ in updates(run, network, args.updates)], dtype=torch.float64))
            times.append(time.perf_counter() - start)
        apart = (losses[0] - losses[1]).abs().max()
        table.add_row(
            layer, *(f"{loss[-1]:.6f}" for loss in losses), f"{apart:.1e}", *(f"{seconds:.1f} s" for seconds in times)
        )
    console.print(table)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[*TASKS], help="default: all")
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=[*LAYERS], help="default: all")
    parser.add_argument("--gaps", nargs="+", type=int, default=[20, 50, 100], help="at least 10; default: 20 50 100")
    helps = {
        "seeds": (1, "networks for each layer, task and gap"),
        "updates": (1000, "at most, for each network"),
        "batch": (32, "sequences of an update"),
        "hidden-size": (32, "hidden units"),
        "processes": (1 if torch.cuda.is_available() else 2, "that train at the same time"),
    }
    for name, (default, text) in helps.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text}; default: {default}")
    parser.add_argument("--rate", type=float, default=1e-2, help="of Adam; default: 0.01")
    parser.add_argument("--forget-bias", type=float, default=1.0, help="of that LSTM; default: 1")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU if any"
    )
    parser.add_argument("--compare", action="store_true", help="run torch.nn's layers too, and stop after 50 updates")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the pictures (default: out)")
    args = parser.parse_args(arguments)
    if min(args.gaps) < 10:
        parser.error(f"--gaps: expected 10 steps or more, got {min(args.gaps)}")
    return args


def main(arguments: list[str] | None = None) -> None:
    args, console = parsed(arguments), Console()
    if args.compare:
        args.updates = min(args.updates, 50)
        compare(args, console)
        return
    runs = [
        Run(task, layer, gap, seed, args)
        for gap in sorted(args.gaps, reverse=True)  # the longest first, so that no process waits at the end
        for task in args.tasks
        for layer in args.layers
        for seed in range(args.seeds)
    ]
    start = time.perf_counter()
    found = train_all(runs, args.processes)
    console.print(table_of(found, args))
    console.print(f"{len(runs)} networks in {(time.perf_counter() - start) / 60:.1f} minutes on {args.device}")
    args.out.mkdir(parents=True, exist_ok=True)
    picture(found, args, args.out / "long_range.png")
    title = gates_picture(found, args, args.out / "long_range_gates.png")
    console.print(
        f"pictures: {args.out / 'long_range.png'}" + (f" and long_range_gates.png ({title})" if title else "")
    )


if __name__ == "__main__":
    main()
