"""What users do with a layer, for every member; `make compatibility` tries what takes seconds too."""

import re
from pathlib import Path

import features
import pytest

from tests import compatibility

# Graphs, programs and processes.
SLOW = ("compile", "graph", "export", "dynamic", "AOT", "autocast, compiled", "new process")
QUICK = [name for name in features.FEATURES if not any(word in name for word in SLOW)]
# A trace has no operators of ours.
UNKNOWN = {"`torch.jit.trace`": [name for name in features.OURS[3:] if name != "CoupledLSTM"]}


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("column", features.COLUMNS)
def test_every_member(column, name):
    found = features.outcome(name, features.COLUMNS[column])
    assert (found == "yes") == (column not in UNKNOWN.get(name, ())), found


def test_the_page_has_the_table():
    """Of all features and columns, and ours is nowhere behind."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "compatibility.md").read_text()
    head, _, *rows = (line.strip("|").split(" | ") for line in re.findall(r"^\|.*\|$", text, re.M))
    columns = [name.strip("` ") for name in head[1:]]
    assert columns == [*features.COLUMNS, *features.KERNELS, *features.STOCK]
    assert [row[0].strip() for row in rows] == [*features.FEATURES]
    found = {column: {row[0].strip(): row[k].strip() for row in rows} for k, column in enumerate(columns, 1)}
    assert {text for own in found.values() for text in own.values()} <= {"yes", *(f"no ({k})" for k in range(1, 99))}
    assert compatibility.behind(found) == []
    assert compatibility.behind(found | {"GRU": dict.fromkeys(features.FEATURES, "no (1)")})
