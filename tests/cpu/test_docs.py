"""The Python in the documents and in docstrings runs as it is printed."""

import ast
import importlib.util
import inspect
import itertools
import re
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib.image import imread

import fusedlstm
import page
from bench import precision, report, rows
from fusedlstm.__main__ import main

ROOT = Path(__file__).resolve().parents[2]


def blocks(path: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", path.read_text(), re.S | re.M)


# docs/add_a_cell.md has two files and no program: `test_add_a_cell.py`, here and in tests/kernels, runs those.
PAGES = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if path.name != "add_a_cell.md"]
KERNELS = (ROOT / "docs" / "kernels.md").read_text()
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


def test_the_plan_is_what_the_command_prints(capsys):
    (command, block) = re.search(r"python -m fusedlstm (plan [^\n]*)\n.*?```text\n(.*?)```", KERNELS, re.S).groups()
    main(command.split())
    assert block in capsys.readouterr().out


def test_the_errors_on_the_page_obey_the_rule():
    text = (ROOT / "docs" / "precision.md").read_text()
    found = re.findall(r"^\| ([\w, ]+) \| (\w+) \| ([\de.-]+) \| ([\de.-]+) \| ([\de.-]+) \|$", text, re.M)
    names = [str(dtype).removeprefix("torch.") for dtype in precision.DTYPES]
    assert [line[:2] for line in found] == [*itertools.product(precision.LAYERS, names)] * 2
    for name, dtype, *errors in found:
        kernels, loop, torchs = map(float, errors)
        assert max(kernels, loop) <= 2 * torchs + 2 * torch.finfo(getattr(torch, dtype)).eps, (name, dtype)


def test_the_reference_has_every_public_name():
    """Functions of a module that are there for the package alone have no underscore, but are no one's business."""
    own = {"sequences.jagged_like", "sequences.put_rows", "sequences.take_rows", "inits.portable"}
    text = (ROOT / "docs" / "api.md").read_text()
    found = {}
    for block in re.findall(r"```{eval-rst}\n(.*?)```", text, re.S):
        module = ""
        for kind, name in re.findall(r"^\.\. (\w+):: ([\w.]+)$", block, re.M):
            if kind == "currentmodule":
                module = f"{name}."
            else:
                found[(module + name).removeprefix("fusedlstm.")] = kind
    lines = (ROOT / "tests" / "cpu" / "public_api.txt").read_text().splitlines()
    public = {line.removeprefix("class ").partition("(")[0] for line in lines if "(" in line and line[0] != " "}
    again = {"cells.register_cell", "inspect.explain", "weights.dense_weight"}  # under their shorter names
    assert not public - own - again - {*found}


def test_errors_have_the_texts_of_the_page(monkeypatch):
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    for error, call in wrong_calls(monkeypatch).items():
        assert f"`{error}`" in text
        with pytest.raises((RuntimeError, ValueError), match=re.escape(error)):
            call()


def wrong_calls(monkeypatch) -> dict:
    """What users do, by what they read then."""
    lstm, x = fusedlstm.LSTM(10, 20), torch.randn(5, 3, 10)
    stream = fusedlstm.Stream(lstm)
    stream(x)
    attached = fusedlstm.Stream(lstm, detach=False)

    def two_chunks():
        for _ in range(2):
            attached(x).sum().backward()

    def in_place():
        lstm(x)[0].mul_(2).sum().backward()

    def no_engine():
        monkeypatch.setenv("FUSEDLSTM_BACKEND", "cudnn")
        lstm(x)

    return {
        "input.size(-1) must be equal to input_size": lambda: lstm(x[..., 1:]),
        "does not match weight dtype": lambda: lstm(x.half()),
        "expects two hidden states, got a tensor": lambda: lstm(x, torch.zeros(1, 3, 20)),
        "Expected hidden[0] size (1, 2, 20), got [1, 3, 20]": lambda: stream(x[:, :2]),
        "lengths: expected 0 to 5, got 6": lambda: lstm(x, lengths=torch.tensor([5, 6, 1])),
        "resets: expected shape [5, 3], got [3, 5]": lambda: lstm(x, resets=torch.zeros(3, 5, dtype=torch.bool)),
        "Trying to backward through the graph a second time": two_chunks,
        "has been modified by an inplace operation": in_place,
        "num_heads: expected a positive divisor of hidden_size": lambda: fusedlstm.LSTM(10, 20, num_heads=3),
        "zoneout and dropouts of a step: expected 0 with proj_size": lambda: fusedlstm.LSTM(
            10, 20, proj_size=5, zoneout=0.1
        ),
        "return_cell_states: expected False": lambda: fusedlstm.GRU(10, 20)(x, return_cell_states=True),
        "backend='triton' cannot serve this call": lambda: fusedlstm.LSTM(10, 20, backend="triton")(x),
        "FUSEDLSTM_BACKEND: expected one of": no_engine,
    }


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


def test_the_citation_is_that_of_the_version():
    told = dict(re.findall(r"^([\w-]+): (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M))
    version, date = re.search(r"^## \[(\d\S+)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.M).groups()
    assert (told["version"], told["date-released"]) == (version, date) and version == fusedlstm.__version__
