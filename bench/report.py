"""Tables from rows: `python -m bench.report bench/results/cpu.csv`, with `--readme README.md` also into the README.

Every ratio is the baseline's time over the provider's, taken within rounds: above 1 is faster than `torch.nn.LSTM`.
"""

import argparse
import re
import sys
from pathlib import Path

from bench import rows
from bench.registry import AGAIN, BASELINE
from bench.shapes import BY_ID, MODES, SHAPES

OURS = "fusedlstm"
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}
MODE_NAMES = {"infer": "inference", "fwd": "forward", "fwdbwd": "forward + backward"}


def _number(value: float) -> str:
    """Three significant digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def bound_ms(row: rows.Row, roofs: dict[tuple[str, str], float]) -> float | None:
    """Time that the products and bytes of a case take at the measured rates (waiting between steps not counted)."""
    shape = BY_ID.get(row["shape"])
    rate, bandwidth = roofs.get(("matmul", row["dtype"])), roofs.get(("copy", "float32"))
    if shape is None or not rate or not bandwidth:
        return None
    arithmetic = shape.flops(row["mode"]) / (rate * 1e9)
    return max(arithmetic, shape.min_bytes(row["mode"], ITEMSIZE[row["dtype"]]) / (bandwidth * 1e6))


def table(measured: list[rows.Row], kind: str = "") -> tuple[list[str], list[list[str]]]:
    """Header and lines: one line per shape, mode and dtype. `kind` is "" or "_graph" (graph replay)."""
    values: dict[tuple, dict[tuple[str, str], rows.Row]] = {}
    roofs = {(row["metric"], row["dtype"]): float(row["p50"]) for row in measured if row["op"] == "roof"}
    for row in measured:
        if row["op"] == "lstm":
            values.setdefault((row["shape"], row["mode"], row["dtype"]), {})[row["provider"], row["metric"]] = row
    latency, speedup = f"latency{kind}", f"speedup{kind}"
    others = sorted(
        {p for found in values.values() for p, metric in found if metric == latency} - {BASELINE, AGAIN, OURS}
    )
    header = ["shape", "T, B, I, H", "mode", "dtype", "torch.nn.LSTM ms", "fusedlstm ms", "ratio", "noise"]
    header += ["bound ms"] * bool(roofs) + [f"{name} ratio" for name in others]
    order = {shape.id: k for k, shape in enumerate(SHAPES)}
    lines = []
    for (shape, mode, dtype), found in sorted(
        values.items(), key=lambda item: (order.get(item[0][0], 999), item[0][2], MODES.index(item[0][1]))
    ):
        any_row = next(iter(found.values()))
        if not any(metric == latency for _, metric in found):
            continue

        def p50(provider, metric, found=found):
            row = found.get((provider, metric))
            return _number(float(row["p50"])) if row else "-"

        sizes = ", ".join(any_row[name] for name in ("T", "B", "I", "H"))
        if any_row["layers"] != "1" or any_row["directions"] != "1":
            sizes += f" ({any_row['layers']} layers, {any_row['directions']} dir.)"
        if known := BY_ID.get(shape):
            sizes += f", packed, lengths {known.lengths[0]} … {known.lengths[1]}" if known.lengths else ""
            sizes += f", projected to {known.proj}" if known.proj else ""
            sizes += f", resets at {known.resets:.0%} of the steps (torch.nn.LSTM: none)" if known.resets else ""
        ratio = found.get((OURS, speedup))
        noise = found.get((AGAIN, speedup))
        bound = bound_ms(any_row, roofs)
        lines.append(
            [
                shape,
                sizes,
                MODE_NAMES[mode],
                dtype,
                p50(BASELINE, latency),
                p50(OURS, latency),
                f"{float(ratio['p50']):.2f}" if ratio else "-",
                f"{float(noise['p20']):.2f} … {float(noise['p80']):.2f}" if noise else "-",
                *([_number(bound) if bound else "-"] if roofs else []),
                *[f"{float(found[n, speedup]['p50']):.2f}" if (n, speedup) in found else "-" for n in others],
            ]
        )
    return header, lines


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
        text = ["| " + " | ".join(header) + " |", "|" + "---|" * 4 + "---:|" * (len(header) - 4)]
        text += ["| " + " | ".join(line) + " |" for line in lines]
        parts.append(title + "\n".join(text))
    note = f"{_sources(measured)}."
    if command:
        note += f" Command: `{command}`."
    note += (
        " Median over interleaved rounds; ratio = time of `torch.nn.LSTM` / time of the provider in the same round; "
        "noise = the same ratio for a second copy of `torch.nn.LSTM` (p20 … p80): a ratio inside it means nothing."
    )
    return "\n\n".join([*parts, note])


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
    options = parser.parse_args(argv)
    measured = rows.read(options.csv)
    text = markdown(measured, f"python -m bench.run --set {options.block}")
    if options.readme:
        rewrite_block(options.readme, options.block, text)
    if options.markdown:
        print(text)
    else:
        show(measured)
    return 0


if __name__ == "__main__":
    sys.exit(main())
