"""Rows of measurements. Each device has a CSV file, and each key one row, which a new measurement replaces."""

import csv
from pathlib import Path

KEY = (
    "op",
    "provider",
    "mode",
    "shape",
    "T",
    "B",
    "I",
    "H",
    "layers",
    "directions",
    "dtype",
    "metric",
    "unit",
    "device",
)
COLUMNS = (
    *KEY[:-1],
    *("p50", "p20", "p80"),
    *("device", "driver", "cuda", "torch", "triton", "commit", "dirty", "date", "protocol"),
)

Row = dict[str, str]


def key(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in KEY)


def read(path: str | Path) -> list[Row]:
    """Rows of a file, the last of each key; an absent file holds none, a line cut short by a crash is left out."""
    path = Path(path)
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if all(row.get(name) is not None for name in COLUMNS)]
    return list({key(row): row for row in rows}.values())


class Writer:
    """Appends a row as soon as it is measured; `close` rewrites the file with one row per key."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = read(self.path)
        self._write_all(kept)
        self._file = self.path.open("a", newline="")
        self._csv = csv.DictWriter(self._file, COLUMNS, lineterminator="\n")

    def _write_all(self, rows: list[Row]) -> None:
        beside = self.path.with_suffix(".new")  # and then in its place: a run may be killed at any time
        with beside.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        beside.replace(self.path)

    def write(self, row: Row) -> None:
        self._csv.writerow(row)
        self._file.flush()

    def close(self) -> None:
        self._file.close()
        self._write_all(read(self.path))
