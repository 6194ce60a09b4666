"""A forecast that says how sure it is: an LSTM against seasonal-naive, exponential smoothing and SARIMA.

Three monthly series come with statsmodels: the carbon dioxide in the air of Mauna Loa, the temperature of the sea off
Peru, and the turnover of Europe's makers of electrical equipment. From every month of the last six years, the next year
is forecast and compared with what came.

Seasonal-naive repeats the values of a year ago. The LSTM learns what this leaves over: the difference to the value of a
year ago, over the mean size of such differences. One network learns from all series. Before each month it reads the
last difference, the one of a year ago, the month, and which series it is. It answers with a Student t distribution, as
DeepAR (Salinas et al. 2020) answers with others. A forecast is many paths: a month is drawn, handed back as input, and
so on for a year. Ten networks draw 20 paths each, and the deciles of the 200 are the forecast. The series are so short
that a network soon learns them by heart, and then it is too sure of itself. `weight_dropout` acts against that.

Nothing looks ahead. The scales and the parameters of all models come from before the six years. At the beginning of a
forecast, a model knows what came until then and nothing later.

- MASE: the mean absolute error of the median, over the mean difference to the value of a year ago before the six years.
- CRPS: twice the mean pinball loss of the nine deciles, over the same. It comes near the score of this name.
- inside: the share of what came that is between the first and the last decile. 80% is right.

With the defaults, expect a mean MASE of 0.55. Seasonal-naive has 0.93, smoothing 0.56 and SARIMA 0.54. 76% are inside.
The defaults were chosen on the six years before these (`--leave-out 72`). It takes less than a minute on two cores.

    python examples/forecast.py
    python examples/forecast.py --series sea turnover
    python examples/forecast.py --compare     # torch.nn.LSTM in its place: the same losses, and both times
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from statsmodels.datasets import co2, elec_equip, elnino
from statsmodels.tsa.statespace.exponential_smoothing import ExponentialSmoothing
from statsmodels.tsa.statespace.sarimax import SARIMAX
from torch import Tensor, nn
from torch.distributions import Normal, StudentT
from torch.nn.functional import one_hot, softplus
from tqdm import tqdm, trange

import beside_torch
import fusedlstm
from fusedlstm.inspect.plots import new_figure

YEAR = 12
READ = 48  # months before the first one of a forecast
DECILES = torch.arange(1, 10, dtype=torch.float64) / 10
COLOURS = {"seasonal-naive": "#767676", "smoothing": "#E69F00", "SARIMA": "#D55E00", "LSTM": "#0072B2"}
CLASSIC = {
    "smoothing": (ExponentialSmoothing, {"trend": True, "damped_trend": True, "seasonal": YEAR}),
    "SARIMA": (SARIMAX, {"order": (1, 1, 1), "seasonal_order": (0, 1, 1, YEAR)}),
}
# What the picture calls each series, its first month, and how it is read.
SERIES = {
    "co2": ("CO2 (ppm)", (1958, 3), lambda: co2.load_pandas().data["co2"].resample("MS").mean().interpolate()),
    "sea": ("sea surface (°C)", (1950, 1), lambda: elnino.load_pandas().data.drop(columns="YEAR").stack()),
    "turnover": ("turnover (index)", (1995, 1), lambda: elec_equip.load_pandas().data.iloc[:, 0]),
}


class Series(NamedTuple):
    """One series [N], and what is known of it before its first forecast."""

    values: Tensor  # float64 [N]
    first: int  # the first month that is forecast
    scale: float  # the mean absolute difference to the value of a year ago, before that month
    rows: Tensor  # float32 [N, I]: what is known before each month
    targets: Tensor  # float32 [N]: the difference to the value of a year ago, over the scale; two years of zeros first

    @property
    def origins(self) -> range:
        """The first months of all forecasts."""
        return range(self.first, len(self.values) - YEAR + 1)

    def years(self, begins: Iterable[int]) -> Tensor:
        """The values of the year that begins in each of these months, [begins, 12]."""
        return torch.stack([self.values[month : month + YEAR] for month in begins])


def prepared(values: Tensor, first: int, number: int, count: int) -> Series:
    """The series with this number of so many. Nothing from its month `first` on gets into a scale."""
    differences = values[YEAR:] - values[:-YEAR]
    scale = differences[: first - YEAR].abs().mean().item()
    targets = torch.cat([torch.zeros(2 * YEAR), differences[YEAR:].float() / scale])
    phase = 2 * torch.pi * torch.arange(len(values)) / YEAR
    which = one_hot(torch.tensor(number), count).expand(len(values), -1)
    rows = torch.stack([targets.roll(1), targets.roll(YEAR), phase.sin(), phase.cos()], 1)
    return Series(values, first, scale, torch.cat([rows, which], 1), targets)


def read(args: argparse.Namespace) -> dict[str, Series]:
    """The series of the arguments. Five months of the first years of CO2 have no value and are interpolated."""
    found = {}
    for number, name in enumerate(args.series):
        values = torch.tensor(SERIES[name][2]().to_numpy(), dtype=torch.float64)
        values = values[: len(values) - args.leave_out]
        found[name] = prepared(values, len(values) - args.months, number, len(args.series))
    return found


class Forecaster(nn.Module):
    """From rows [T, B, I] and a state to a distribution of the targets [T, B], and the next state."""

    def __init__(self, inputs: int, hidden_size: int, weight_dropout: float = 0.0) -> None:
        super().__init__()
        self.lstm = fusedlstm.LSTM(inputs, hidden_size, weight_dropout=weight_dropout)
        self.head = nn.Linear(hidden_size + inputs, 3)

    def forward(self, rows: Tensor, state=None) -> tuple[StudentT, tuple[Tensor, Tensor]]:
        output, state = self.lstm(rows, state)
        freedom, middle, scale = self.head(torch.cat([output, rows], -1)).unbind(-1)
        return StudentT(2 + softplus(freedom), middle, softplus(scale)), state


def train(model: nn.Module, series: list[Series], args: argparse.Namespace, name: str) -> tuple[list[float], float]:
    """Train on windows from before the first forecasts. Returns the losses, and the median time of an update in ms."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.updates)
    length = READ + YEAR
    windows = [(one, start) for one in series for start in range(2 * YEAR, one.first - length + 1)]
    losses, times = [], []
    for _ in trange(args.updates, desc=name, leave=False, disable=None):
        begin = time.perf_counter()
        drawn = [windows[k] for k in torch.randint(len(windows), (args.batch,))]
        rows = torch.stack([one.rows[start : start + length] for one, start in drawn], 1)
        targets = torch.stack([one.targets[start : start + length] for one, start in drawn], 1)
        distribution, _ = model(rows.to(args.device))
        loss = -distribution.log_prob(targets.to(args.device)).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        times.append(1e3 * (time.perf_counter() - begin))
    return losses, statistics.median(times)


@torch.no_grad()
def draw(model: nn.Module, rows: Tensor, paths: int) -> Tensor:
    """Targets of a year, [12, B, paths], after the first of the rows [READ + 12, B, I] were read.

    Of the later rows, only what is known at the beginning of the year is used: all but the last difference.
    """
    model.eval()
    _, state = model(rows[:READ])
    state = tuple(part.repeat_interleave(paths, 1) for part in state)
    year = rows[READ:].repeat_interleave(paths, 1)
    drawn = []
    for month in range(YEAR):
        if month:
            year[month, :, 0] = drawn[-1]
        distribution, state = model(year[month : month + 1], state)
        drawn.append(distribution.sample()[0])
    return torch.stack(drawn).unflatten(1, (-1, paths))


def of_lstm(models: list[nn.Module], series: Series, args: argparse.Namespace) -> Tensor:
    """Deciles of the year that begins at each origin, [origins, 12, 9], from the paths of all networks."""
    rows = torch.stack([series.rows[month - READ : month + YEAR] for month in series.origins], 1).to(args.device)
    paths = torch.cat([draw(model, rows, args.paths) for model in models], -1).cpu().double()
    year_ago = series.years(month - YEAR for month in series.origins)
    return year_ago[..., None] + series.scale * paths.quantile(DECILES, -1).permute(2, 1, 0)


def of_naive(series: Series) -> Tensor:
    """The values of a year ago, with the deviation that such forecasts had before the first origin."""
    known = series.values[: series.first]
    deviation = (known[YEAR:] - known[:-YEAR]).square().mean().sqrt()
    year_ago = series.years(month - YEAR for month in series.origins)
    return Normal(year_ago[..., None], deviation).icdf(DECILES)


def of_classic(name: str, series: Series, bar: tqdm) -> Tensor:
    """Deciles by a model of statsmodels. It is fitted before the first origin, and its state is brought up to each."""
    kind, options = CLASSIC[name]
    values, found = series.values.numpy(), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a model of no trend at all begins at other values
        fitted = kind(values[: series.first], **options).fit(disp=False)
    for origin in series.origins:
        year = fitted.apply(values[:origin]).get_forecast(YEAR)
        mean, deviation = (torch.from_numpy(x)[:, None] for x in (year.predicted_mean, year.se_mean))
        found.append(Normal(mean, deviation).icdf(DECILES))
        bar.update()
    return torch.stack(found)


class Scores(NamedTuple):
    mase: float
    crps: float
    inside: float


def judge(deciles: Tensor, truth: Tensor, scale: float) -> Scores:
    """The scores of deciles [..., 9] when this came, [...]."""
    errors = truth[..., None] - deciles
    pinball = torch.maximum(DECILES * errors, (DECILES - 1) * errors)
    inside = (errors[..., 0] >= 0) & (errors[..., -1] <= 0)
    mase = errors[..., 4].abs().mean() / scale
    return Scores(mase.item(), 2 * pinball.mean().item() / scale, inside.double().mean().item())


def table_of(scores: dict[tuple[str, str], Scores], args: argparse.Namespace) -> Table:
    table = Table(title=f"Forecasts of a year, in {args.months} months")
    for name in ("series", "model", "MASE", "CRPS", "inside"):
        table.add_column(name, justify="right" if name in ("MASE", "CRPS", "inside") else "left")
    means = {}
    for model in COLOURS:
        of_series = zip(*(scores[name, model] for name in args.series), strict=True)
        means["mean", model] = Scores(*map(statistics.fmean, of_series))
    for (name, model), (mase, crps, inside) in {**scores, **means}.items():
        row = name, model, f"{mase:.3f}", f"{crps:.3f}", f"{inside:.1%}"
        table.add_row(*row, style="bold" if model == "LSTM" else None, end_section=model == "LSTM")
    return table


def picture(every: dict[str, Series], deciles: dict[tuple[str, str], Tensor], path: Path) -> None:
    """The forecasts that begin a year apart, and the error by the number of months ahead."""
    figure = new_figure(9, 2.3 * len(every) + 0.4)
    panels = figure.subplots(len(every), 2, squeeze=False, width_ratios=(2.6, 1))
    for (name, series), (left, right) in zip(every.items(), panels, strict=True):
        label, (year, month), _ = SERIES[name]
        when = [year + (month - 1 + k) / YEAR for k in range(len(series.values))]
        left.plot(when[series.first - YEAR :], series.values[series.first - YEAR :], color="black", linewidth=1)
        for k in range(0, len(series.origins), YEAR):
            own = slice(series.origins[k], series.origins[k] + YEAR)
            found = deciles[name, "LSTM"][k]
            left.fill_between(when[own], found[:, 0], found[:, -1], color=COLOURS["LSTM"], alpha=0.3, linewidth=0)
            left.plot(when[own], found[:, 4], color=COLOURS["LSTM"], linewidth=1.2)
            left.axvline(when[own][0], color="#cccccc", linewidth=0.6, zorder=0)
        left.set(ylabel=label, xlim=(when[series.first - YEAR], when[-1]))
        truth = series.years(series.origins)
        for model, colour in COLOURS.items():
            errors = (deciles[name, model][..., 4] - truth).abs().mean(0) / series.scale
            right.plot(range(1, YEAR + 1), errors, color=colour, linewidth=2 if model == "LSTM" else 1.2, label=model)
        right.set(ylim=(0, None), xticks=(1, 4, 8, 12), ylabel="MASE")
        for panel in (left, right):
            panel.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_title("what came, and yearly forecasts of the LSTM with 80% intervals", fontsize=11)
    panels[0, 1].set_title("error", fontsize=11)
    panels[-1, 1].set_xlabel("months ahead")
    panels[0, 1].set_ylim(0, 1.6 * panels[0, 1].get_ylim()[1])
    panels[0, 1].legend(frameon=False, fontsize=8, ncols=2, loc="upper center", columnspacing=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def forecast(every: dict[str, Series], args: argparse.Namespace, console: Console) -> None:
    begin, models = time.perf_counter(), []
    for k in range(args.networks):
        torch.manual_seed(args.seed + k)
        model = Forecaster(next(iter(every.values())).rows.size(1), args.hidden_size, args.weight_dropout)
        models.append(model.to(args.device))
        train(models[-1], [*every.values()], args, f"network {k + 1} of {args.networks}")
    trained, deciles = time.perf_counter() - begin, {}
    total = len(CLASSIC) * sum(len(series.origins) for series in every.values())
    with tqdm(total=total, desc="models of statsmodels", leave=False, disable=None) as bar:
        for name, series in every.items():
            deciles[name, "seasonal-naive"] = of_naive(series)
            for model in CLASSIC:
                deciles[name, model] = of_classic(model, series, bar)
            deciles[name, "LSTM"] = of_lstm(models, series, args)
    scores = {
        key: judge(found, every[key[0]].years(every[key[0]].origins), every[key[0]].scale)
        for key, found in deciles.items()
    }
    console.print(table_of(scores, args))
    console.print(f"{args.networks} networks were trained in {trained:.0f} seconds on {args.device}.")
    picture(every, deciles, args.out / "forecast.png")
    console.print(f"picture: {args.out / 'forecast.png'}")


def compare(every: dict[str, Series], args: argparse.Namespace, console: Console) -> None:
    """The same training with our layer and with torch's, both without `weight_dropout`."""
    beside_torch.compare(
        lambda: Forecaster(next(iter(every.values())).rows.size(1), args.hidden_size).to(args.device),
        lambda model, name: train(model, [*every.values()], args, name),
        args.seed,
        console,
        "Negative log likelihood in training",
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--series", nargs="+", choices=SERIES, default=[*SERIES], help="default: all")
    helps = {
        "months": (72, "at the end of each series, from which the forecasts are made"),
        "leave-out": (0, "months after these that are not read at all"),
        "networks": (10, "that draw the paths of a forecast together"),
        "paths": (20, "of each network"),
        "updates": (200, "of each network"),
        "batch": (32, "windows of five years"),
        "hidden-size": (32, "hidden units"),
        "seed": (0, "of initial values, windows, masks and paths"),
    }
    for name, (default, text) in helps.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text}; default: {default}")
    for name, value, text in (("rate", 0.01, "of AdamW at first; it falls to 0"), ("weight-dropout", 0.4, "rate")):
        parser.add_argument(f"--{name}", type=float, default=value, help=f"{text}; default: {value:g}")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU if any"
    )
    parser.add_argument("--compare", action="store_true", help="train with torch.nn.LSTM too, both without dropout")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for forecast.png (default: out)")
    args = parser.parse_args(arguments)
    every = read(args)
    name, shortest = min(every.items(), key=lambda item: len(item[1].values))
    longest = len(shortest.values) - 2 * YEAR - READ - YEAR
    if not YEAR <= args.months <= longest:
        parser.error(f"--months: expected {YEAR} to {longest}, so that {name} has enough before, got {args.months}")
    if args.device == "cpu":
        torch.set_num_threads(1)  # the networks are too small for more
    run = compare if args.compare else forecast
    run(every, args, Console())


if __name__ == "__main__":
    main()
