"""examples/long_range.ipynb runs from top to bottom, and what it shows is what it says.

`python tests/cpu/test_notebook.py` runs it with its own settings and writes its outputs anew.
"""

import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FILE = Path(__file__).resolve().parents[2] / "examples" / "long_range.ipynb"
TINY = 'GAP, UNITS, UPDATES, LAYERS = 10, 8, 30, ["RNN", "LSTM, chrono"]'
PICTURES = 5


def executed(settings: str | None = None) -> nbformat.NotebookNode:
    """The notebook with new outputs. `settings` take the place of the cell with the tag "parameters"."""
    book = nbformat.read(FILE, as_version=4)
    (parameters,) = [cell for cell in book.cells if "parameters" in cell.metadata.get("tags", ())]
    parameters.source = settings or parameters.source
    where = {"metadata": {"path": str(FILE.parent)}}
    NotebookClient(
        book, timeout=600, kernel_name="python3", resources=where, record_timing=False, coalesce_streams=True
    ).execute()
    return book


def clean(book: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without what differs from run to run: the progress bars, and the version of Python."""
    book.metadata.language_info = {"name": "python"}
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return book


def printed(book: nbformat.NotebookNode) -> str:
    return "".join(output.get("text", "") for cell in book.cells for output in cell.get("outputs", ()))


def pictures(book: nbformat.NotebookNode) -> list[str]:
    outputs = [output for cell in book.cells for output in cell.get("outputs", ())]
    return [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]


def test_it_runs(monkeypatch, tmp_path):
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    book = executed(TINY)
    assert len(pictures(book)) == PICTURES
    assert re.search(r"^LSTM, chrono +\d\.\d+ +\S+$", printed(book), re.M)
    assert len(re.findall(r"% wrong, loss \d", printed(book))) == 2 and "always keep" in printed(book)


def test_what_it_shows_is_what_it_says():
    book = nbformat.read(FILE, as_version=4)
    wrong = {name: float(share) for name, share in re.findall(r"^(\S.*?) +(\S+)% wrong", printed(book), re.M)}
    assert wrong["LSTM, chrono"] < 1 and min(share for name, share in wrong.items() if name != "LSTM, chrono") > 50
    left = dict(re.findall(r"^(\S.*?)  +\d\.\d+ +(\d\.\de-\d+)$", printed(book), re.M))
    assert float(left["RNN"]) < 1e-8 < 1e-2 < float(left["LSTM, chrono"])
    assert len(pictures(book)) == PICTURES


def test_it_is_small_and_says_nothing_of_whoever_ran_it():
    text, book = FILE.read_text(), nbformat.read(FILE, as_version=4)
    assert len(text) < 300_000 and not re.search(r"/(?:home|root|tmp|work|usr)/", text)
    assert all(cell.metadata.keys() <= {"tags"} for cell in book.cells)
    assert [cell.id for cell in book.cells] == [f"cell-{k}" for k in range(len(book.cells))]
    counts = [cell.execution_count for cell in book.cells if cell.cell_type == "code"]
    assert counts == [*range(1, len(counts) + 1)], "it ran from top to bottom"
    assert clean(nbformat.read(FILE, as_version=4)) == book


if __name__ == "__main__":
    nbformat.write(clean(executed()), FILE)
