"""Imports of the package run one way, from what a user calls down to tensors, and the kernels stand apart."""

import ast
import graphlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# From top to bottom; a name stands for its submodules too. A module imports its own level and those below.
LEVELS = (
    {"__init__", "__main__", "commands", "train", "timing", "tuning", "conversion", "inspect", "onnx", "weights"},
    {"modules"},
    {"base"},
    {"checks", "inits", "sequences"},
    {"functional"},
    {"autograd"},
    {"ops", "gradients"},
    {"engines"},
    {"plan"},
    {"cells"},
    {"noise"},
    {"layout"},
    {"products"},
    {"transforms"},
    {"samples"},
)

# What breaks the rule today, and why. An entry that is no longer needed fails the test.
EXCEPTIONS = {
    ("plan.tuned", "__init__"): "the version of the package is part of the key of what was measured",
}

# What stands beside the house and could be left away: nothing of the house imports it.
BESIDE = ("inspect", "onnx", "train", "weights", "tuning", "timing", "commands", "__main__", "engines.offline")
MOST_MODULES = 45  # of the house
MOST_KERNEL_FILES = 22
MOST_LINES, MOST_PARAMETERS = 80, 12  # of a function


def modules(folder: str) -> dict[str, Path]:
    """The files of a folder by their names below it; a package has the name of its folder."""
    found = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        parts = path.relative_to(ROOT / folder).with_suffix("").parts
        if parts[0] != "kernels":  # a link to kernels/, where there is one
            found[".".join(parts[:-1] if parts[-1] == "__init__" and parts[1:] else parts)] = path
    return found


HOST, KERNELS = modules("fusedlstm"), modules("kernels")


def imports(path: Path) -> list[tuple[str, bool]]:
    """Every name that a file imports, in full, and whether a function does so."""
    tree = ast.parse(path.read_text())
    inside = {id(node) for function in ast.walk(tree) if _is_function(function) for node in ast.walk(function)}
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: expected absolute imports, got a relative one in line {node.lineno}"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found += [(name, id(node) in inside) for name in names]
    return found


def _is_function(node: ast.AST) -> bool:
    return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))


def is_of_kernels(name: str) -> bool:
    return name.startswith("fusedlstm.kernels")


def imported_modules(name: str) -> set[str]:
    """The modules of the package that a module imports."""
    found = set()
    for full, _ in imports(HOST[name]):
        top, _, rest = full.partition(".")
        if top == "fusedlstm" and not is_of_kernels(full):
            while rest and rest not in HOST:
                rest = rest.rpartition(".")[0]
            found.add(rest or "__init__")
    return found - {name}


ARROWS = {(name, other) for name in HOST for other in imported_modules(name)}


def level(name: str) -> int:
    found = [k for k, names in enumerate(LEVELS) if name.partition(".")[0] in names]
    assert len(found) == 1, f"{name}: expected a place in one of LEVELS, got {len(found)}"
    return found[0]


def test_imports_run_downwards():
    upwards = {arrow for arrow in ARROWS if level(arrow[1]) < level(arrow[0])}
    assert upwards - EXCEPTIONS.keys() == set(), "a module imports one of a higher level"
    assert EXCEPTIONS.keys() - upwards == set(), "an exception that nothing needs"


def test_imports_have_no_circle():
    """Those in functions count. `TopologicalSorter` names a circle where there is one."""
    below = {name: {b for a, b in ARROWS - EXCEPTIONS.keys() if a == name} for name in HOST}
    order = [*graphlib.TopologicalSorter(below).static_order()]
    assert order.index("transforms") < order.index("autograd") < order.index("modules")


def test_engines_alone_reach_the_kernels():
    doors = {(name, lazy) for name in HOST for full, lazy in imports(HOST[name]) if is_of_kernels(full)}
    beside_engines = {door for door in doors if door[0].partition(".")[0] != "engines"}
    assert beside_engines == {("cells", True)}, "of a user's cell the kernels are registered when there are some"
    assert doors > beside_engines


def test_kernels_know_neither_torch_nor_the_host():
    for name, path in KERNELS.items():
        for full, _ in imports(path):
            top = full.partition(".")[0]
            assert top not in ("torch", "kernels"), f"kernels/{name}: imports {full}"
            assert top != "fusedlstm" or is_of_kernels(full), f"kernels/{name}: imports {full}"
    assert any(is_of_kernels(full) for full, _ in imports(KERNELS["recurrence_fwd"]))


def test_there_are_no_more_files_than_can_be_known():
    house = [name for name in HOST if not {name, name.partition(".")[0]} & {*BESIDE}]
    needed = {arrow for arrow in ARROWS if arrow[0] in house and arrow[1] not in house}
    assert {name for name, _ in needed} <= {"__init__"}, "the house needs what should stand beside it"
    assert len(house) <= MOST_MODULES, f"fusedlstm: expected at most {MOST_MODULES} modules, got {len(house)}"
    assert len(KERNELS) <= MOST_KERNEL_FILES, f"kernels: expected at most {MOST_KERNEL_FILES}, got {len(KERNELS)}"


def test_functions_fit_on_a_screen():
    """A constructor has what a user can ask of a layer; everything else has few parameters."""
    for name, path in HOST.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if _is_function(node):
                of = node.args
                count = len([a for a in (*of.posonlyargs, *of.args, *of.kwonlyargs) if a.arg != "self"])
                assert node.end_lineno - node.lineno < MOST_LINES, f"{name}.{node.name}: expected at most {MOST_LINES}"
                is_constructor = node.name == "__init__" and name in ("base", "modules")
                assert is_constructor or count <= MOST_PARAMETERS, f"{name}.{node.name}: {count} parameters"
