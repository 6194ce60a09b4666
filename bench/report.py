"""Make tables from rows: `python -m bench.report bench/results/cpu.csv`.

`--readme docs/benchmarks.md` also writes the table into that page.

`--overview` prints one line per shape and mode with all dtypes, and the geometric means. `--picture FILE.png` draws the
ratios of the table.

A ratio is the time of the baseline over the time of the provider, taken within a round. Above 1 the provider is faster
than `torch.nn.LSTM`.
"""

import argparse
import importlib.util
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

from bench import expected, rows
from bench.registry import AGAIN, BASELINE
from bench.shapes import BY_ID, MODES, SHAPES

KERNELS = ("fusedlstm", "fusedlstm-triton")  # ours; the second in an interpreted rehearsal
MODE_NAMES = {"infer": "inference", "fwd": "forward", "fwdbwd": "forward + backward"}
DTYPES = ("bfloat16", "float16", "float32")
OVER = "speedup over "  # and the rival, in rows of `bench.loops`
MEMORY = {"peak_memory": "peak", "kept_memory": "kept for the backward"}


def _number(value: float) -> str:
    """Three significant digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def ours(measured: list[rows.Row]) -> str:
    """The provider that the tables are about."""
    seen = {row["provider"] for row in measured}
    return next((name for name in KERNELS if name in seen), KERNELS[0])


def _cases(measured: list[rows.Row]) -> dict[tuple, dict[tuple[str, str], rows.Row]]:
    """(shape, mode, dtype) -> (provider, metric) -> row, in the order of the shapes."""
    found: dict[tuple, dict[tuple[str, str], rows.Row]] = {}
    for row in measured:
        if row["op"] == "lstm":
            found.setdefault((row["shape"], row["mode"], row["dtype"]), {})[row["provider"], row["metric"]] = row
    order = {shape.id: k for k, shape in enumerate(SHAPES)}
    return dict(sorted(found.items(), key=lambda c: (order.get(c[0][0], 999), c[0][2], MODES.index(c[0][1]))))


def _sizes(row: rows.Row) -> str:
    """T, B, I, H and what is special."""
    text = ", ".join(row[name] for name in ("T", "B", "I", "H"))
    if row["layers"] != "1" or row["directions"] != "1":
        text += f" ({row['layers']} layers, {row['directions']} dir.)"
    if known := BY_ID.get(row["shape"]):
        text += ", alternating directions" if known.alternating else ""
        text += f", packed, lengths {known.lengths[0]} … {known.lengths[1]}" if known.lengths else ""
        text += f", projected to {known.proj}" if known.proj else ""
        text += f", {known.heads} heads (torch.nn.LSTM: dense)" if known.heads > 1 else ""
        text += f", resets at {known.resets:.0%} of the steps (torch.nn.LSTM: none)" if known.resets else ""
    return text


def table(measured: list[rows.Row], kind: str = "") -> tuple[list[str], list[list[str]]]:
    """Header and lines: one line per shape, mode and dtype. `kind` is "" or "_graph" (graph replay)."""
    cases, known, own = _cases(measured), expected.rates(measured), ours(measured)
    latency, speedup = f"latency{kind}", f"speedup{kind}"
    timed = {provider for found in cases.values() for provider, metric in found if metric == latency}
    others = sorted(timed - {BASELINE, AGAIN, own})
    bounded = any(metric == "matmul" for metric, _ in known)
    planned = any(metric == "predicted" for found in cases.values() for _, metric in found)
    header = ["shape", "T, B, I, H", "mode", "dtype", "torch.nn.LSTM ms", f"{own} ms", "ratio", "noise"]
    header += ["bound ms", "x bound"] * bounded + ["predicted ms", "x predicted"] * planned
    header += [f"{name} ratio" for name in others]
    lines = []
    for (shape, mode, dtype), found in cases.items():
        if not any(metric == latency for _, metric in found):
            continue
        any_row = next(iter(found.values()))

        def p50(provider, metric, found=found):
            row = found.get((provider, metric))
            return float(row["p50"]) if row else None

        mine, noise = p50(own, latency), found.get((AGAIN, speedup))
        bound, told = expected.bound_ms(any_row, known), p50(own, "predicted")
        lines.append(
            [
                shape,
                _sizes(any_row),
                MODE_NAMES[mode],
                dtype,
                _or_dash(p50(BASELINE, latency)),
                _or_dash(mine),
                _or_dash(p50(own, speedup), "{:.2f}"),
                f"{float(noise['p20']):.2f} … {float(noise['p80']):.2f}" if noise else "-",
                *([_or_dash(bound and bound[0]), _or_dash(bound and mine and mine / bound[0])] if bounded else []),
                *([_or_dash(told), _or_dash(told and mine and mine / told)] if planned else []),
                *[_or_dash(p50(name, speedup), "{:.2f}") for name in others],
            ]
        )
    return header, lines


def family(measured: list[rows.Row]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of what `bench.loops` has measured: one line per cell, sizes and rival."""
    known = {(row["shape"], row["provider"], row["metric"]): row for row in measured}
    lines = []
    for row in measured:
        if row["provider"] == "ours" and row["metric"].startswith(OVER):
            rival = row["metric"].removeprefix(OVER)
            times = [float(known[row["shape"], side, "latency"]["p50"]) for side in (rival, "ours")]
            noise = known.get((row["shape"], AGAIN, row["metric"]))
            of_noise = f"{float(noise['p20']):.2f} … {float(noise['p80']):.2f}" if noise else "-"
            sizes = ", ".join(row[name] for name in "TBH")
            lines.append([row["op"], sizes, rival, *map(_number, times), f"{float(row['p50']):.2f}", of_noise])
    return ["cell", "T, B, H", "rival", "rival ms", "ours ms", "ratio", "noise"], lines


def _or_dash(value: float | None, form: str | None = None) -> str:
    return "-" if value is None else form.format(value) if form else _number(value)


def overview(measured: list[rows.Row]) -> str:
    """Markdown with one line per shape for each mode, which has our times and the ratio for every dtype.

    The geometric means follow.
    """
    cases, own = _cases(measured), ours(measured)
    present = [dtype for dtype in DTYPES if any(case[2] == dtype for case in cases)]
    parts = []
    for mode in MODES:
        shapes = dict.fromkeys(shape for shape, m, _ in cases if m == mode)
        ratios: dict[str, list[float]] = {dtype: [] for dtype in present}
        lines = []
        for shape in shapes:
            cells, any_row = [], None
            for dtype in present:
                found = cases.get((shape, mode, dtype), {})
                any_row = any_row or next(iter(found.values()), None)
                mine, ratio = found.get((own, "latency")), found.get((own, "speedup"))
                ratios[dtype] += [float(ratio["p50"])] if ratio else []
                cells.append(_or_dash(mine and float(mine["p50"])))
                cells.append(_or_dash(ratio and float(ratio["p50"]), "{:.2f}"))
            if any(cell != "-" for cell in cells):
                lines.append([shape, _sizes(any_row), *cells])
        if not lines:
            continue
        header = ["shape", "T, B, I, H", *[text for dtype in present for text in (f"{dtype} ms", "ratio")]]
        means = [f"{dtype} {_mean(values)}" for dtype, values in ratios.items() if values]
        text = f"**{MODE_NAMES[mode]}**" + (f": geometric mean {'; '.join(means)}" if means else "")
        parts.append(text + "\n\n" + _markdown_table(header, lines, left=2))
    return "\n\n".join(parts)


def _mean(ratios: list[float]) -> str:
    slower = sum(ratio < 1 for ratio in ratios)
    mean = math.exp(math.fsum(map(math.log, ratios)) / len(ratios))
    return f"{mean:.2f} over {len(ratios)} shapes, {slower} below 1"


def memory(measured: list[rows.Row]) -> str:
    """Markdown: MiB above inputs and weights of a training step; empty without such rows."""
    cases = {case: found for case, found in _cases(measured).items() if case[1] == "fwdbwd"}
    names = dict.fromkeys(p for found in cases.values() for p, metric in found if metric in MEMORY and p != AGAIN)
    columns = [(name, metric) for name in names for metric in MEMORY]
    lines = [
        [shape, dtype, *[_or_dash(float(found[c]["p50"]) if c in found else None) for c in columns]]
        for (shape, _, dtype), found in cases.items()
        if any(column in found for column in columns)
    ]
    header = ["shape", "dtype", *[f"{name} {MEMORY[metric]}" for name, metric in columns]]
    return _markdown_table(header, lines, left=2) if lines else ""


def _group(shape: str, row: rows.Row) -> str:
    """The kind of work, which has a colour in the picture."""
    if (known := BY_ID.get(shape)) and known.lengths:
        return "LSTM, packed"
    if known and known.resets:
        return "LSTM, resets (torch.nn: none)"
    return "LSTM, a single step" if row["T"] == "1" else "LSTM, dense"


class _Point(NamedTuple):
    """A ratio in the picture."""

    label: str
    group: str  # the kind of work, which has a colour
    mode: str
    dtype: str
    ratio: float
    noise: tuple[float, float] | None


def _points(measured: list[rows.Row]) -> list[_Point]:
    own, points = ours(measured), []

    def point(label, group, row, noise):
        between = (float(noise["p20"]), float(noise["p80"])) if noise else None
        points.append(_Point(label, group, row["mode"], row["dtype"], float(row["p50"]), between))

    for (shape, _, _), found in _cases(measured).items():
        if row := found.get((own, "speedup")):
            label = f"{shape}   {_sizes(row).split(', packed')[0].split(', resets')[0]}"
            point(label, _group(shape, row), row, found.get((AGAIN, "speedup")))
    known = {(row["shape"], row["provider"], row["metric"]): row for row in measured}
    for row in measured:
        if row["provider"] == "ours" and row["metric"].startswith(f"{OVER}torch.nn") and row["op"] != "lstm (loop)":
            name = row["op"].replace("rnn_", "rnn ")
            label = f"{name}   " + ", ".join(row[size] for size in "TBIH")
            noise = known.get((row["shape"], AGAIN, row["metric"]))
            point(label, row["metric"].removeprefix(f"{OVER}torch.nn."), row, noise)
    return points


def plot(measured: list[rows.Row], path: Path) -> str:
    """Draw the ratios of every shape, forward + backward and inference; returns what was done, in a line.

    A grey bar is the noise of a shape: the ratio of a second copy of torch's layer.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return "plot: skipped, matplotlib is not installed"
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    points = [point for point in _points(measured) if point.mode in ("fwdbwd", "infer")]
    modes = [mode for mode in ("fwdbwd", "infer") if any(point.mode == mode for point in points)]
    if not modes:
        return "plot: skipped, there are no ratios"
    groups = [*dict.fromkeys(point.group for point in points)]
    labels = [*dict.fromkeys(p.label for group in groups[::-1] for p in points[::-1] if p.group == group)]  # from below
    colours = {group: f"C{k}" for k, group in enumerate(groups)}
    dtypes = [dtype for dtype in DTYPES if any(point.dtype == dtype for point in points)]
    figure, axes = pyplot.subplots(
        1,
        len(modes),
        figsize=(2.5 + 4.5 * len(modes), 1.6 + 0.3 * len(labels)),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    for axis, mode in zip(axes[0], modes, strict=True):
        for point in (point for point in points if point.mode == mode):
            y, marker = labels.index(point.label), "os^"[DTYPES.index(point.dtype)] if len(dtypes) > 1 else "o"
            if point.noise:
                axis.plot(point.noise, [y, y], color="0.8", linewidth=7, zorder=1)
            axis.scatter(point.ratio, y, marker=marker, s=36, color=colours[point.group], zorder=3)
            if len(dtypes) == 1:
                at = axis.get_yaxis_transform()
                axis.text(0.98, y, f"{point.ratio:.2f}", transform=at, ha="right", va="center", fontsize=8)
        axis.axvline(1, color="black", linewidth=1, zorder=2)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:g}"))
        axis.grid(axis="x", color="0.92", zorder=0)
        axis.set_yticks(range(len(labels)), labels, fontsize=8)
        axis.set_xlabel("parity at 1; to the right ours is faster")
        axis.set_title(MODE_NAMES[mode])
    low, high = axes[0][0].get_xlim()
    axes[0][0].set_xlim(min(low, 0.7), max(high * 1.4, 1.5))  # the numbers stand to the right of the points
    marks = [("o", colour, group) for group, colour in colours.items()] + [("s", "0.8", "noise")]
    marks += [("os^"[DTYPES.index(dtype)], "black", dtype) for dtype in dtypes if len(dtypes) > 1]
    handles = [
        pyplot.Line2D([], [], marker=marker, linestyle="", color=colour, label=text) for marker, colour, text in marks
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
    title = "Time of torch.nn's layer / time of ours, by shape: T, B, I, H"
    figure.suptitle(f"{title}\n{', '.join(dtypes)}; {_sources(measured)}", fontsize=9)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return f"plot: {path.name}"


def _markdown_table(header: list[str], lines: list[list[str]], left: int) -> str:
    text = ["| " + " | ".join(header) + " |", "|" + "---|" * left + "---:|" * (len(header) - left)]
    return "\n".join([*text, *["| " + " | ".join(line) + " |" for line in lines]])


def _sources(measured: list[rows.Row]) -> str:
    """One line: device, versions, commits and dates of the rows."""

    def seen(name):
        return ", ".join(sorted({row[name] for row in measured if row[name]}))

    commits = {row["commit"] + ("+" if row["dirty"] == "true" else "") for row in measured}
    parts = [seen("device"), f"torch {seen('torch')}", f"triton {seen('triton')}"]
    parts += [f"CUDA {seen('cuda')}, driver {seen('driver')}"] if seen("driver") else []
    return "; ".join([*parts, f"commit {', '.join(sorted(commits))}", seen("date")])


def markdown(measured: list[rows.Row], command: str = "") -> str:
    """Table with its sources; a second table for graph replays if there are any."""
    if not measured:
        return "No rows."
    parts = []
    for kind, title in (("", ""), ("_graph", "Device time alone (CUDA graph replay):\n\n")):
        header, lines = table(measured, kind)
        if not lines:
            continue
        parts.append(title + _markdown_table(header, lines, left=4))
    return "\n\n".join([*parts, _note(measured, command)])


def family_markdown(measured: list[rows.Row]) -> str:
    """The table of `bench.loops` with its sources."""
    header, lines = family(measured)
    sources = _sources([row for row in measured if row["provider"] == "ours"])
    return f"{_markdown_table(header, lines, left=3)}\n\n{sources}. Command: `python -m bench.loops`."


def _note(measured: list[rows.Row], command: str) -> str:
    """What the tables hold, and where it comes from."""
    note = f"{_sources([row for row in measured if row['op'] == 'lstm'])}."
    if command:
        note += f" Command: `{command}`."
    return note + (
        " Median over interleaved rounds; ratio = time of `torch.nn.LSTM` / time of the provider in the same round; "
        "noise = the same ratio for a second copy of `torch.nn.LSTM` (p20 … p80): a ratio inside it means nothing."
    )


def rewrite_block(readme: Path, block: str, text: str) -> None:
    """Put `text` between `<!-- bench:BLOCK -->` and the next `<!-- /bench -->`.

    Raises:
        ValueError: the markers are not there, exactly once.
    """
    content = readme.read_text()
    pattern = re.compile(rf"(<!-- bench:{re.escape(block)} -->\n).*?(<!-- /bench -->)", re.DOTALL)
    content, count = pattern.subn(lambda match: f"{match[1]}{text}\n{match[2]}", content)
    if count != 1:
        raise ValueError(f"{readme}: expected one block '<!-- bench:{block} --> … <!-- /bench -->', found {count}")
    readme.write_text(content)


def show(measured: list[rows.Row]) -> None:
    """The table on the terminal; without rich as markdown."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(markdown(measured))
        return
    console = Console(width=None if sys.stdout.isatty() else 160)
    for kind, title in (("", "latency"), ("_graph", "latency, graph replay")):
        header, lines = table(measured, kind)
        if not lines:
            continue
        drawn = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
        for k, name in enumerate(header):
            drawn.add_column(name, justify="left" if k < 4 else "right", no_wrap=k in (0, 1))
        for line in lines:
            ratio = line[6]
            style = "" if ratio == "-" or 0.97 <= float(ratio) <= 1.03 else ("green" if float(ratio) > 1 else "red")
            drawn.add_row(*line[:6], f"[{style}]{ratio}[/]" if style else ratio, *line[7:])
        console.print(drawn)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("csv", type=Path)
    parser.add_argument("--readme", type=Path, help="rewrite the block of this file")
    parser.add_argument("--block", default="cpu", help="name in the marker <!-- bench:NAME -->")
    parser.add_argument("--markdown", action="store_true", help="print markdown")
    parser.add_argument("--overview", action="store_true", help="one line a shape; the default for the block gpu")
    parser.add_argument(
        "--picture", "--plot", dest="plot", type=Path, help="PNG file for the ratios; without matplotlib it is left out"
    )
    options = parser.parse_args(argv)
    measured = rows.read(options.csv)
    if not measured:
        print(f"no rows in {options.csv}")
        return 1
    command = "make gpu" if options.block == "gpu" else f"python -m bench.run --set {options.block}"
    short = options.overview or options.block == "gpu"
    text = overview(measured) + "\n\n" + _note(measured, command) if short else markdown(measured, command)
    if options.readme:
        rewrite_block(options.readme, options.block, text)
        if options.block == "cpu":
            rewrite_block(options.readme, "loops", family_markdown(measured))
    if options.markdown or options.overview:
        print(text)
    else:
        show(measured)
    if options.plot:
        print(plot(measured, options.plot))
    return 0


if __name__ == "__main__":
    sys.exit(main())
