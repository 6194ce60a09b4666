"""docs/compatibility.md is true, and nothing fails with ours that works with torch's layers."""

import re
from pathlib import Path

import features
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
# Seconds each, for graphs, programs and processes: `make compatibility` tries them.
SLOW = ("compile", "graph", "export", "dynamic", "AOT", "autocast, compiled", "new process")
QUICK = [name for name in features.FEATURES if not any(word in name for word in SLOW)]


def cells() -> dict[tuple[str, str], bool]:
    """Whether the page says that a feature works, by the feature and the column."""
    lines = (ROOT / "docs" / "compatibility.md").read_text().splitlines()
    (_, *columns), _, *rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    columns = [re.sub("[|` ]", "", name) for name in columns]
    return {(name, column): cell == "yes" for name, *own in rows for column, cell in zip(columns, own, strict=True)}


def test_the_page_has_every_feature_and_column():
    columns = (features.COLUMNS | features.KERNELS | features.STOCK).keys()
    assert cells().keys() == {(name, column.replace(" ", "")) for name in features.FEATURES for column in columns}


@pytest.mark.parametrize("name", features.FEATURES)
def test_ours_is_nowhere_behind(name):
    behind = [of for of in ("LSTM", "GRU", "RNN") if cells()[name, f"nn.{of}"] and not cells()[name, of]]
    assert not behind


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("column", [*features.COLUMNS, *features.STOCK])
def test_the_page_is_true(column, name):
    layer = (features.COLUMNS | features.STOCK)[column]
    assert (features.outcome(name, layer) == "yes") == cells()[name, column]
