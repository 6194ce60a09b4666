"""A table of what works: `python tests/compatibility.py` does all that users do with a recurrent layer.

Features and columns are in `tests/helpers/features.py`. Every column has a process of its own, those of the kernels
with an interpreter. A cell says "yes", or has a number of a note with the first line of the error. Exit status 1 means
that something fails with ours where it works with torch's.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HELPERS = ROOT / "tests" / "helpers"
sys.path.insert(0, str(HELPERS))

import features  # noqa: E402

NOTE = 160  # characters of an error
RIVALS = {"LSTM": "nn.LSTM", "GRU": "nn.GRU", "RNN": "nn.RNN"}


def outcomes(column: str) -> dict[str, str]:
    """What a column's process says of every feature. A process that ends says nothing of the rest."""
    environment = {**os.environ, "PYTHONPATH": f"{HELPERS}{os.pathsep}{ROOT}", "TOKENIZERS_PARALLELISM": "false"}
    environment["TRITON_INTERPRET"] = str(int(column in features.KERNELS))
    command = [sys.executable, "-W", "ignore", __file__, "--column", column]
    lines = subprocess.run(command, env=environment, capture_output=True, text=True).stdout.splitlines()
    found = dict(json.loads(line[1:]) for line in lines if line.startswith("="))
    return {name: found.get(name, "the process ended") for name in features.FEATURES}


def table(found: dict[str, dict[str, str]]) -> str:
    """Markdown: a line for every feature, and the notes."""
    notes: list[str] = []

    def cell(text: str) -> str:
        if text == "yes":
            return "yes"
        text = re.sub(r"\x1b\[\d+m", "", text)[:NOTE].replace("|", "\\|")  # without colours
        if text not in notes:
            notes.append(text)
        return f"no ({notes.index(text) + 1})"

    rows = [f"| | {' | '.join(f'`{column}`' for column in found)} |", "|---" * (len(found) + 1) + "|"]
    for name in features.FEATURES:
        rows.append(f"| {name} | {' | '.join(cell(own[name]) for own in found.values())} |")
    return "\n".join([*rows, "", *(f"{k}. `{note}`" for k, note in enumerate(notes, 1))])


def behind(found: dict[str, dict[str, str]]) -> list[str]:
    """Where torch's layer passes and ours fails."""
    return [
        f"{ours}: {name}"
        for ours, rival in RIVALS.items()
        for name, text in found[ours].items()
        if text != "yes" and found[rival][name] == "yes"
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "compatibility.md", help="the file to write")
    parser.add_argument("--column", help="print the outcomes of one column, and write nothing")
    column = (options := parser.parse_args()).column
    if column is not None:
        layer = (features.COLUMNS | features.KERNELS | features.STOCK)[column]
        for name in features.FEATURES:
            sys.stdout.write(f"\n={json.dumps([name, features.outcome(name, layer)])}\n")
            sys.stdout.flush()
        return 0
    columns = [*features.COLUMNS, *features.KERNELS, *features.STOCK]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip(columns, pool.map(outcomes, columns), strict=True))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(f"{table(found)}\n")
    for line in (lines := behind(found)):
        sys.stdout.write(f"behind torch: {line}\n")
    return int(bool(lines))


if __name__ == "__main__":
    raise SystemExit(main())
