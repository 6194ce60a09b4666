"""Pictures of what `fusedlstm.inspect` measures. Each function returns a matplotlib figure.

The colours are those of Okabe & Ito 2008, and maps that people with a deficient colour vision can read too.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedlstm import checks
from fusedlstm.inspect.measures import OPEN, SHARES, SHUT, GradientFlow, Saturation, Trace, place_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#767676"
STATE_COLOURS = {"h": BLUE, "c": ORANGE, "n": GREEN, "m": PINK}
GATE_WORDS = {
    "i": "input gate",
    "f": "forget gate",
    "o": "output gate",
    "r": "reset gate",
    "z": "update gate",
    "g": "candidate",
    "n": "candidate",
}
STATE_WORDS = {"h": "hidden state", "c": "cell state", "n": "normaliser", "m": "stabiliser"}
_LOWEST = 1e-12  # norm that the logarithmic axis shows


def plot_gates(trace: Trace, *, sample: int = 0, figure: Any = None, period: int | None = None) -> "Figure":
    """Draw the gates and states of one sequence as heat maps, with units as rows and steps as columns.

    Example::

        gru = fusedlstm.GRU(10, 20)
        figure = fusedlstm.inspect.plot_gates(fusedlstm.inspect.gates(gru, torch.randn(50, 3, 10)), sample=1)

    Args:
        trace: The result of :func:`gates`.
        sample: The number of the sequence in the batch.
        figure: A matplotlib `Figure` or `SubFigure` to draw on. If it is not given, a new one.
        period: The distance between two ticks, in steps. If it is not given, matplotlib chooses.

    Returns:
        The figure, with the gates above and the states below. All panels have the units in the same order: by the mean
        step at which their memory changes, with the earliest on top. A projected h has units of its own, which stay in
        their order. Padding is not shown.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
        IndexError: The batch has no such sequence.
    """
    steps = trace.valid[:, sample].nonzero()[:, 0].tolist() or [0]
    first, last = steps[0], steps[-1] + 1

    def of_sample(x: Tensor) -> Tensor:
        return x[first:last, sample].detach().float().cpu()

    gates = {name: of_sample(x) for name, x in trace.gates.items() if name not in trace.states}
    states = {name: of_sample(x) for name, x in trace.states.items()}
    order = _order_of_activity([*states.values()][:2][-1])
    rows = [row for row in (gates, dict([*[*states.items()][1:], ("h", states["h"])])) if row]
    figure = figure or new_figure(max(6.0, 3.2 * max(map(len, rows))), 2.7 * len(rows) + 0.8)
    columns = math.lcm(*map(len, rows))
    grid = figure.add_gridspec(len(rows), columns)
    for r, row in enumerate(rows):
        width = columns // len(row)
        for k, (name, x) in enumerate(row.items()):
            panel = figure.add_subplot(grid[r, k * width : (k + 1) * width])
            own_units = x.size(1) != len(order)
            _heat_map(figure, panel, x if own_units else x[:, order], first, share=row is gates and name in SHARES)
            words = (GATE_WORDS if row is gates else STATE_WORDS).get(name, "")
            panel.set_title(f"{words}  ${name}${', projected' if own_units else ''}".strip(), fontsize=11)
            if period:
                panel.set_xticks(range(first, last + 1, period))
            panel.tick_params(labelleft=k == 0 or own_units)
            panel.set(xlabel="step" if r == len(rows) - 1 else "", ylabel="" if k else "unit, by when it is active")
    return figure


def _heat_map(figure: Any, panel: Any, x: Tensor, first: int, share: bool) -> None:  # [T, H]
    largest = float(x.abs().max()) if x.numel() else 1.0
    bounded = share or largest <= 1
    # A few units that count far must not wash out the others.
    high = 1.0 if bounded else max(float(x.abs().flatten()[:: max(1, x.numel() >> 20)].quantile(0.98)), 1e-6)
    has_sign = not share and bool((x < 0).any())
    image = panel.imshow(
        x.t().numpy(),
        aspect="auto",
        # What is never negative gets a sequential map; what has a sign gets a diverging one around zero.
        cmap="RdBu_r" if has_sign else "viridis",
        vmin=-high if has_sign else 0,
        vmax=high,
        interpolation="nearest",
        extent=(first, first + len(x), x.size(1), 0),
    )
    extend = "neither" if bounded else "both" if has_sign else "max"
    figure.colorbar(image, ax=panel, pad=0.02, fraction=0.05, extend=extend)


def _order_of_activity(x: Tensor) -> Tensor:  # [T, H] -> [H]
    change = torch.diff(x, dim=0, prepend=torch.zeros_like(x[:1])).abs()
    steps = torch.arange(len(x), dtype=x.dtype, device=x.device).unsqueeze(1)
    return ((change * steps).sum(0) / change.sum(0).clamp_min(1e-12)).argsort()


def plot_gradient_flow(flows: GradientFlow | Mapping[str, GradientFlow], *, figure: Any = None) -> "Figure":
    """Draw how the norms of gradients change with the distance to the last step, on a logarithmic axis.

    Example::

        lstm, x = fusedlstm.LSTM(10, 20, num_layers=2), torch.randn(50, 3, 10)
        flows = {f"layer {k}": fusedlstm.inspect.gradient_flow(lstm, x, layer=k) for k in range(2)}
        figure = fusedlstm.inspect.plot_gradient_flow(flows)

    Args:
        flows: The result of :func:`gradient_flow`, or several by their titles. Each gets a panel.
        figure: A matplotlib `Figure` or `SubFigure` to draw on. If it is not given, a new one.

    Returns:
        The figure. A line is the mean over the batch. The dashed line is the product of what the steps keep. It is
        left out if that is 0. Values below 1e-12 are not shown.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    named = {"": flows} if isinstance(flows, GradientFlow) else flows
    columns = min(4, len(named))
    rows = math.ceil(len(named) / columns)
    figure = figure or new_figure(5.6 if columns == 1 else 3.4 * columns + 0.6, 3.0 * rows + 0.6)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    lowest, highest = 1.0, 1.0
    for panel, (title, flow) in zip(panels.flat, named.items(), strict=False):
        panel.axhline(1, color="black", linewidth=0.6)
        lines = {rf"$\partial {name}_T / \partial {name}_t$": name for name in flow.norms}
        lines["kept by the gates"] = "kept"
        for label, name in lines.items():
            norm = flow.by_distance(name).double().cpu()
            shown = norm[norm > 0]
            if name == "kept" and not (norm[1:] > 0).any():
                continue
            colour = GREY if name == "kept" else STATE_COLOURS.get(name)
            style = (0, (4, 2)) if name == "kept" else "-"
            panel.semilogy(torch.arange(len(norm)), norm, color=colour, linestyle=style, linewidth=1.8, label=label)
            lowest, highest = min(lowest, float(shown.min())), max(highest, float(shown.max()))
        panel.set_title(title, fontsize=11)
        _bare(panel)
    for panel in panels.flat[len(named) :]:
        panel.set_axis_off()
    panels.flat[0].set_ylim(max(lowest, _LOWEST) / 2, highest * 2)
    panels.flat[0].set_xlim(0, None)
    richest = max(panels.flat, key=lambda panel: len(panel.get_legend_handles_labels()[1]))  # an RNN has no c
    richest.legend(frameon=False, fontsize=9)
    figure.supxlabel("distance to the last step (steps)", fontsize=10)
    figure.supylabel("norm of the gradient", fontsize=10)
    return figure


def plot_saturation(found: Saturation, *, figure: Any = None) -> "Figure":
    """Draw for every unit how often each of its gates is shut and open.

    Example::

        counts = fusedlstm.inspect.saturation(fusedlstm.LSTM(10, 20), [torch.randn(50, 3, 10)])
        figure = fusedlstm.inspect.plot_saturation(counts)

    Args:
        found: The result of :func:`saturation`.
        figure: A matplotlib `Figure` or `SubFigure` to draw on. If it is not given, a new one.

    Returns:
        The figure, with a row for each layer and direction, and a column for each gate. A unit is a column of a panel,
        and its steps are divided into those at which the gate is shut, between, and open. Units are sorted, with the
        most often shut on the left.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    names = [*next(iter(found.units.values())).shut]
    figure = figure or new_figure(max(4.8, 2.7 * len(names) + 0.8), 1.9 * len(found.units) + 1.1)
    panels = figure.subplots(len(found.units), len(names), sharey=True, sharex=True, squeeze=False)
    for row, (place, own) in zip(panels, found.units.items(), strict=True):
        for panel, name in zip(row, names, strict=True):
            shut, opened = own.shut[name].cpu(), own.open[name].cpu()
            order = (shut - opened).argsort(descending=True)
            shut, opened, units = shut[order], opened[order], torch.arange(len(order) + 1).numpy()
            shares = (shut, 1 - shut - opened, opened)
            labels = (f"below {SHUT}", "between", f"above {OPEN}")
            bottom = torch.zeros_like(shut)
            for share, label, colour in zip(shares, labels, (BLUE, "#DDDDDD", "#E69F00"), strict=True):
                top = bottom + share
                panel.stairs(top.numpy(), units, baseline=bottom.numpy(), fill=True, color=colour, label=label)
                bottom = top
            panel.set(xlim=(0, len(order)), ylim=(0, 1), yticks=(0, 0.5, 1), yticklabels=("0 %", "50 %", "100 %"))
            if panel in panels[0]:
                words = GATE_WORDS.get(name, "")
                panel.set_title(f"{words}  ${name}$".strip(), fontsize=11)
        row[0].set_ylabel(f"layer {place_name(*place)}\nshare of the steps")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    figure.supxlabel("unit, sorted", fontsize=10)
    return figure


def new_figure(width: float, height: float) -> "Figure":
    """A figure of so many inches, without pyplot, which would keep it."""
    checks.needs("matplotlib.figure", "demo")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _bare(panel: Any) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", which="major", color="#E5E5E5", linewidth=0.6)
    panel.set_axisbelow(True)
