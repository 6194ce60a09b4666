"""Months in which the sea was not as usual: an LSTM that knows only calm years is surprised by El Niño.

The series is the monthly temperature of the sea off Peru from 1950 to 2010 (the region Niño 1+2). It comes with
statsmodels. When there was an El Niño is not taken from it, but from NOAA's index of another region, the Oceanic Niño
Index of Niño 3.4: five months or more in a row at 0.5 or above. It is strong if three of them are at 1.5 or above.

A year is calm if it has no month of an El Niño. The LSTM learns the calm years before 1974. It reads how far each month
is from the mean of this calendar month in these years, and predicts the six months that follow. So every month is
predicted six times. The calm years from 1974 to 1981 are held out. The score of a month is the mean of its six squared
errors, each over the mean squared error in the years that are held out. The highest score in these is the threshold.
Everything from 1982 on is the test. The settings were chosen by the errors in the years that are held out.

Months above the threshold with at most five others between them are one alarm. An El Niño is found if an alarm overlaps
it. An alarm is false if it overlaps none. The same is done without a network: the score is then the squared distance to
the mean of the calendar month.

With the defaults, expect that all nine are found, four of them strong, with four false alarms. Without a network, three
alarms are false. It takes seconds.

    python examples/anomaly.py
    python examples/anomaly.py --compare     # torch.nn.LSTM in its place: the same losses, and both times
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from statsmodels.datasets import elnino
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from tqdm import trange

import beside_torch
import fusedlstm
from fusedlstm.inspect.plots import new_figure

YEAR = 12
BEGIN = 1950
AHEAD = 6  # months that are predicted
READ = 24  # months before a prediction
APART = 5  # months without alarm that do not end one
HELD_OUT, TESTED = 1974, 1982  # the first years of both


class Span(NamedTuple):
    """Months in a row. A month is the number of those since January 1950."""

    first: int
    last: int

    def overlaps(self, other: "Span") -> bool:
        return self.first <= other.last and other.first <= self.last

    def __str__(self) -> str:
        return " to ".join(name_of(month) for month in sorted({*self}))


def month_of(name: str) -> int:
    """The number of a month like 1982-05."""
    year, month = map(int, name.split("-"))
    return (year - BEGIN) * YEAR + month - 1


def name_of(month: int) -> str:
    return f"{BEGIN + month // YEAR}-{month % YEAR + 1:02d}"


class ElNino(NamedTuple):
    months: Span
    peak: float  # of the index
    strong: bool


# They follow by the rule above from NOAA's table of the index (ERSST.v5, as it stood in 2021). First and last month,
# highest index, and the number of months at 1.5 or above.
TABLE = """
1951-06 1952-01 1.15 0
1953-02 1954-01 0.84 0
1957-04 1958-07 1.81 4
1958-11 1959-03 0.62 0
1963-06 1964-02 1.37 0
1965-06 1966-04 1.98 5
1968-10 1969-05 1.13 0
1969-08 1970-01 0.86 0
1972-05 1973-03 2.12 5
1976-09 1977-02 0.86 0
1977-09 1978-01 0.81 0
1982-05 1983-06 2.23 7
1986-09 1988-02 1.70 3
1991-06 1992-06 1.71 3
1994-09 1995-03 1.09 0
1997-05 1998-04 2.40 8
2002-06 2003-02 1.31 0
2004-08 2005-02 0.70 0
2006-09 2007-01 0.94 0
2009-08 2010-03 1.56 2
"""
EVENTS = [
    ElNino(Span(month_of(first), month_of(last)), float(peak), int(high) >= 3)
    for first, last, peak, high in map(str.split, TABLE.strip().splitlines())
]
TEST_EVENTS = [event for event in EVENTS if event.months.first >= month_of(f"{TESTED}-01")]


def calm(begin: int, end: int) -> list[int]:
    """The years from `begin` on and before `end` without a month of an El Niño."""
    years = {year: Span((year - BEGIN) * YEAR, (year - BEGIN) * YEAR + YEAR - 1) for year in range(begin, end)}
    return [year for year, own in years.items() if not any(own.overlaps(event.months) for event in EVENTS)]


def months_of(years: list[int]) -> list[int]:
    return [(year - BEGIN) * YEAR + month for year in years for month in range(YEAR)]


def distances(values: Tensor, years: list[int]) -> Tensor:
    """How far each of the values [N] is from the mean of its calendar month in these years."""
    means = values[months_of(years)].view(-1, YEAR).mean(0)
    return values - means.repeat(len(values) // YEAR)


def parts_of(distance: Tensor, years: list[int]) -> list[Tensor]:
    """The distances in these years, [months], each part as long as the years follow one another."""
    parts: list[Tensor] = []
    for year in years:
        own = distance[months_of([year])]
        if year - 1 in years:
            parts[-1] = torch.cat([parts[-1], own])
        else:
            parts.append(own)
    return parts


class Predictor(nn.Module):
    """From distances [T, B] to predictions of the months that follow each, [T, B, 6]."""

    def __init__(self, hidden_size: int, weight_dropout: float = 0.0) -> None:
        super().__init__()
        self.lstm = fusedlstm.LSTM(1, hidden_size, weight_dropout=weight_dropout)
        self.head = nn.Linear(hidden_size, AHEAD)

    def forward(self, distance: Tensor) -> Tensor:
        output, _ = self.lstm(distance[..., None])
        return self.head(output)


def train(model: nn.Module, parts: list[Tensor], args: argparse.Namespace, title: str) -> tuple[list[float], float]:
    """Train on all parts at once. Returns the losses, and the median time of an update in ms."""
    model.train()
    # NaN where nothing is known: shorter parts are padded at their end, where they change nothing before it.
    padded = pad(pad_sequence(parts, padding_value=torch.nan), (0, 0, 0, AHEAD), value=torch.nan).to(args.device)
    read, coming = padded[:-AHEAD].nan_to_num(), padded[1:].unfold(0, AHEAD, 1)
    known = ~coming.isnan()
    optimizer = torch.optim.Adam(model.parameters(), lr=args.rate)
    losses, times = [], []
    for _ in trange(args.updates, desc=title, leave=False, disable=None):
        begin = time.perf_counter()
        loss = (model(read) - coming)[known].square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        times.append(1e3 * (time.perf_counter() - begin))
    return losses, statistics.median(times)


@torch.no_grad()
def errors(model: nn.Module, distance: Tensor, device: str) -> Tensor:
    """What the predictions of each month, made one to six months before it, were off by, [N, 6]; NaN without one."""
    model.eval()
    windows = distance.unfold(0, READ, 1)[:-1].t().to(device)
    predicted = model(windows)[-1].cpu()
    found = torch.full((len(distance), AHEAD), torch.nan)
    for k in range(AHEAD):
        coming = distance[READ + k :]
        found[READ + k :, k] = coming - predicted[: len(coming), k]
    return found


def scored(error: Tensor) -> Tensor:
    """The scores [N] of errors [N, K]: their mean squares, over those in the calm years that are held out."""
    squares = error.square()
    return (squares / squares[months_of(calm(HELD_OUT, TESTED))].mean(0)).mean(1)


def alarms(score: Tensor) -> tuple[float, list[Span]]:
    """The threshold, which is the highest score in the calm years that are held out, and the alarms since 1982."""
    threshold = score[months_of(calm(HELD_OUT, TESTED))].max().item()
    found: list[Span] = []
    for month in (score > threshold).nonzero()[:, 0].tolist():
        if found and month - found[-1].last <= APART:
            found[-1] = Span(found[-1].first, month)
        elif month >= month_of(f"{TESTED}-01"):
            found.append(Span(month, month))
    return threshold, found


class Judged(NamedTuple):
    first: list[int | None]  # of each tested El Niño: the first month of its first alarm; none if it was not found
    false: list[Span]  # alarms that overlap none


def judge(found: list[Span]) -> Judged:
    events = [event.months for event in TEST_EVENTS]
    first = [next((alarm.first for alarm in found if alarm.overlaps(event)), None) for event in events]
    return Judged(first, [alarm for alarm in found if not any(alarm.overlaps(event) for event in events)])


def picture(distance: Tensor, score: Tensor, threshold: float, found: list[Span], path: Path) -> None:
    """Distances and scores since the first year that is held out."""
    figure = new_figure(9, 4.6)
    panels = figure.subplots(2, 1, sharex=True)
    begin = (HELD_OUT - BEGIN) * YEAR
    when = [BEGIN + month / YEAR for month in range(len(distance))]
    for panel in panels:
        for event in EVENTS:
            first, last = event.months
            label = "strong El Niño" if event.strong else "other El Niño"
            colour = "#D55E00" if event.strong else "#F0C9A8"
            panel.axvspan(BEGIN + first / YEAR, BEGIN + (last + 1) / YEAR, color=colour, alpha=0.45, lw=0, label=label)
        for year in calm(HELD_OUT, TESTED):
            panel.axvspan(year, year + 1, color="#009E73", alpha=0.2, linewidth=0, label="calm, held out")
        panel.axvline(TESTED, color="#767676", linewidth=1)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].plot(when[begin:], distance[begin:], color="black", linewidth=1)
    panels[0].set(ylabel="above the mean\nof calm years (°C)", xlim=(HELD_OUT, when[-1]))
    panels[1].plot(when[begin:], score[begin:], color="#0072B2", linewidth=1)
    panels[1].axhline(threshold, color="black", linewidth=1, linestyle="--", label="threshold")
    marks = [when[month] for alarm in found for month in range(alarm.first, alarm.last + 1) if score[month] > threshold]
    above = panels[1].get_xaxis_transform()
    style = {"color": "#0072B2", "markeredgewidth": 2, "clip_on": False, "label": "alarm"}
    panels[1].plot(marks, [1.03] * len(marks), "|", transform=above, **style)
    panels[1].set(ylabel="score", yscale="log", ylim=(0.02, None))
    labels = {label: line for panel in panels for line, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(labels.values(), labels.keys(), loc="outside upper center", ncols=len(labels), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def detect(distance: Tensor, parts: list[Tensor], args: argparse.Namespace, console: Console) -> None:
    """Train the networks, and judge their alarms and those without a network."""
    begin, own = time.perf_counter(), []
    for k in range(args.networks):
        torch.manual_seed(args.seed + k)
        model = Predictor(args.hidden_size, args.weight_dropout).to(args.device)
        train(model, parts, args, f"network {k + 1} of {args.networks}")
        own.append(errors(model, distance, args.device))
    error = torch.stack(own).mean(0)
    seconds = time.perf_counter() - begin
    scores = {"LSTM": scored(error), "mean of the month": scored(distance[:, None])}
    found = {name: alarms(score) for name, score in scores.items()}
    judged = {name: judge(own) for name, (_, own) in found.items()}
    table = Table(title=f"El Niños from {TESTED} on, and when each was found")
    for name in ("months", "peak", "", *judged):
        table.add_column(name, justify="right" if name == "peak" else "left")
    for k, event in enumerate(TEST_EVENTS):
        first = ["not found" if own.first[k] is None else name_of(own.first[k]) for own in judged.values()]
        strong = "strong" if event.strong else ""
        table.add_row(str(event.months), f"{event.peak:.2f}", strong, *first, style="bold" if strong else None)
    console.print(table)
    for name, own in judged.items():
        hits = [event for event, first in zip(TEST_EVENTS, own.first, strict=True) if first is not None]
        strong, of = (sum(event.strong for event in events) for events in (hits, TEST_EVENTS))
        console.print(
            f"{name}: {strong} of {of} strong ones found, {len(hits)} of {len(TEST_EVENTS)} in all. "
            f"False alarms: {', '.join(map(str, own.false)) or 'none'}."
        )
    held_out = months_of(calm(HELD_OUT, TESTED))
    ahead = error[held_out].square().mean(0).sqrt()
    console.print(
        f"In the calm years that are held out, predictions are off by {ahead[0]:.2f} °C one month ahead, by "
        f"{ahead[-1]:.2f} °C {AHEAD} months ahead, and the mean of the month by "
        f"{distance[held_out].square().mean().sqrt():.2f} °C (root of the mean square)."
    )
    console.print(f"{args.networks} networks were trained in {seconds:.0f} seconds on {args.device}.")
    picture(distance, scores["LSTM"], *found["LSTM"], args.out / "anomaly.png")
    console.print(f"picture: {args.out / 'anomaly.png'}")


def compare(parts: list[Tensor], args: argparse.Namespace, console: Console) -> None:
    """The same training with our layer and with torch's, both without `weight_dropout`."""
    beside_torch.compare(
        lambda: Predictor(args.hidden_size).to(args.device),
        lambda model, name: train(model, parts, args, name),
        args.seed,
        console,
        "Mean squared error in training (°C²)",
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    helps = {
        "networks": (5, "whose predictions are averaged"),
        "updates": (40, "of each network"),
        "hidden-size": (16, "hidden units"),
        "seed": (0, "of initial values and masks"),
    }
    for name, (default, text) in helps.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text}; default: {default}")
    for name, value, text in (("rate", 0.01, "of Adam"), ("weight-dropout", 0.3, "rate")):
        parser.add_argument(f"--{name}", type=float, default=value, help=f"{text}; default: {value:g}")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU if any"
    )
    parser.add_argument("--compare", action="store_true", help="train with torch.nn.LSTM too, both without dropout")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for anomaly.png (default: out)")
    args = parser.parse_args(arguments)
    values = torch.tensor(elnino.load_pandas().data.drop(columns="YEAR").to_numpy().ravel(), dtype=torch.float32)
    years = calm(BEGIN, HELD_OUT)
    distance = distances(values, years)
    parts = parts_of(distance, years)
    if args.device == "cpu":
        torch.set_num_threads(1)  # the networks are too small for more
    if args.compare:
        compare(parts, args, Console())
    else:
        detect(distance, parts, args, Console())


if __name__ == "__main__":
    main()
