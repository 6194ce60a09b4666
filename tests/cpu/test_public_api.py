"""The public names and their signatures are those of `public_api.txt`. A change of them is a change for users.

`python tests/cpu/test_public_api.py` writes the file anew.
"""

import inspect
import subprocess
import sys
from pathlib import Path

import fusedlstm

FILE = Path(__file__).with_name("public_api.txt")
MODULES = ("inits", "sequences", "inspect", "cells", "onnx", "weights")


def signature(function) -> str:
    """Names, kinds and defaults; how annotations are written differs from one Python to the next."""
    found = inspect.signature(function)
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()]
    return str(found.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


def lines() -> list[str]:
    found = []
    for name in sorted(fusedlstm.__all__):
        value = getattr(fusedlstm, name)
        if inspect.isclass(value):
            found.append(f"class {name}{signature(value)}")
            call = vars(value).get("__call__", getattr(value, "forward", None))
            found.append(f"    {name}(...){signature(call)}")
        elif inspect.isfunction(value):
            found.append(f"{name}{signature(value)}")
        else:
            found.append(name)
    for module in MODULES:
        public = vars(getattr(fusedlstm, module))
        own = {n: f for n, f in public.items() if inspect.isfunction(f) and not n.startswith("_")}
        found += [f"{module}.{n}{signature(f)}" for n, f in sorted(own.items()) if "fusedlstm" in f.__module__]
    return found


def test_is_as_written_down():
    assert lines() == FILE.read_text().splitlines(), "if that is meant: python tests/cpu/test_public_api.py"


def test_inspect_is_there_without_matplotlib():
    assert "matplotlib" not in imported_by("import fusedlstm.__main__; fusedlstm.inspect.plot_gates")


def test_an_import_brings_no_compiler():
    """Dynamo takes as long to import as torch itself."""
    found = imported_by("import fusedlstm, torch; fusedlstm.LSTM(2, 3)(torch.zeros(2, 1, 2))")
    assert not {"torch._dynamo", "torch._inductor"} & found


def imported_by(code: str) -> set[str]:
    """The modules that a program imports."""
    command = [sys.executable, "-c", f"{code}; import sys; print(*sys.modules)"]
    return {*subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()}


if __name__ == "__main__":
    FILE.write_text("\n".join(lines()) + "\n")
