"""The Python in the documents and in docstrings runs as it is printed."""

import ast
import importlib.util
import inspect
import re
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib.image import imread

import fusedlstm
import page
from bench import report, rows

ROOT = Path(__file__).resolve().parents[2]


def blocks(path: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", path.read_text(), re.S | re.M)


# docs/add_a_cell.md has two files and no program: `test_add_a_cell.py`, here and in tests/kernels, runs those.
PAGES = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if path.name != "add_a_cell.md"]
PROGRAMS = {path.name: "\n".join(found) for path in PAGES if (found := blocks(path))}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_page_is_a_program(name):
    torch.manual_seed(0)
    exec(compile(PROGRAMS[name], name, "exec"), {})


@pytest.mark.parametrize("path", [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")], ids=lambda path: path.name)
def test_files_that_a_page_names_are_there(path):
    text = path.read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    named = re.findall(r"`((?:fusedlstm|kernels|tests|bench|examples|docs)/[\w/.]+)`", text)
    missing = [name for name in links if not (path.parent / name).exists()]
    assert not missing + [name for name in named if not (ROOT / name).exists()]


def test_table_and_picture_are_those_of_the_rows(tmp_path):
    measured = rows.read(ROOT / "bench" / "results" / "cpu.csv")
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    assert report.markdown(measured, "python -m bench.run --set cpu") in text
    report.plot(measured, tmp_path / "picture.png")
    assert imread(tmp_path / "picture.png").shape == imread(ROOT / "docs" / "benchmarks.png").shape


def examples() -> dict[str, str]:
    """The code after `Example::` in every docstring of the package, by module and name."""
    found = {}
    for path in sorted((ROOT / "fusedlstm").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = inspect.cleandoc(ast.get_docstring(node) or "")
                for k, code in enumerate(re.findall(r"^Example::\n\n((?:    .*\n|\n)+)", text + "\n", re.M)):
                    found[f"{path.stem}.{getattr(node, 'name', '')} {k}"] = textwrap.dedent(code)
    return found


EXAMPLES = examples()


@pytest.fixture
def names(tmp_path):
    """What the reader of an example has already."""
    with page.imported(tmp_path) as ugrnn:
        pass
    with page.forgotten():
        yield vars(ugrnn) | {
            "fusedlstm": fusedlstm,
            "torch": torch,
            "lstm": fusedlstm.LSTM(10, 20),
            "model": torch.nn.ModuleDict({"lstm": torch.nn.LSTM(10, 20)}),
            "third_party": SimpleNamespace(Model=lambda: torch.nn.LSTM(10, 20)),
            "head": torch.nn.Linear(20, 1),
            "loader": [(torch.randn(5, 3, 10), torch.rand(5, 3) < 0.1) for _ in range(2)],
        }


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name, names):
    torch.manual_seed(0)
    exec(compile(EXAMPLES[name], name, "exec"), names)


def test_the_text_of_every_mutant_is_there():
    """A fault that cannot be put in proves nothing (`make mutants`)."""
    spec = importlib.util.spec_from_file_location("mutants", ROOT / "tests" / "mutants.py")
    mutants = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutants)
    for name, (file, text, replacement, test) in mutants.MUTANTS.items():
        path, _, function = test.partition("::")
        assert text in (ROOT / file).read_text() and text != replacement, name
        assert f"def {function.partition('[')[0]}" in (ROOT / "tests" / path).read_text(), name


def test_there_are_programs_and_examples():
    assert {"README.md", "lstm.md", "family.md"} <= {*PROGRAMS}
    assert len(EXAMPLES) >= 10
