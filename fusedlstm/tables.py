"""Tables in text: by rich where it is installed, in plain columns where not."""

import importlib.util
import io
from collections.abc import Iterable, Sequence


def text(columns: list[str], rows: Iterable[Sequence]) -> str:
    """Rows under their columns, without a trailing newline."""
    cells = [[str(value) for value in row] for row in rows]
    if importlib.util.find_spec("rich"):
        from rich import box
        from rich.console import Console
        from rich.table import Table

        table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
        for row in cells:
            table.add_row(*row)
        out = io.StringIO()
        Console(file=out, width=120).print(table)
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip("\n")
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    return "\n".join(
        "  ".join(v.ljust(w) for v, w in zip(row, widths, strict=True)).rstrip() for row in [columns, *cells]
    )
