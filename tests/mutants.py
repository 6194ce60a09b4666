"""Faults put into the code on purpose, one at a time: every one must make a test fail.

`python tests/mutants.py [NAME...]` puts each fault of `mutants.toml` into a copy of the repository and runs the test
that must catch it. It prints which test caught it, and the score at the end, and exits 1 if one survived. Before that
it runs all these tests without a fault, since a test that fails anyway catches nothing. Takes some minutes; not part of
`make test`.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings it
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns(".git", ".venv*", "out", "build", "__pycache__", "*.egg-info")


class Mutant(NamedTuple):
    """`text` of a file becomes `replacement`, wherever it is, and then `test` must fail."""

    file: str
    text: str
    replacement: str
    test: str  # as pytest names it, in tests/


MUTANTS = {
    name: Mutant(file, *of)
    for file, found in tomllib.loads((ROOT / "tests" / "mutants.toml").read_text()).items()
    for name, of in found.items()
}


def failures(tests: list[str], mutant: Mutant | None = None) -> list[str]:
    """The tests that fail, the first is enough, in a copy of the repository that has this fault.

    Raises:
        RuntimeError: pytest did not run them.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "fusedlstm"
        shutil.copytree(ROOT, root, symlinks=True, ignore=LEFT_OUT)
        # The copy is imported in place of the installed package; its kernels/ must then lie inside it.
        inside = root / "fusedlstm" / "kernels"
        inside.unlink(missing_ok=True)
        inside.symlink_to(root / "kernels")
        if mutant is not None:
            path = root / mutant.file
            path.write_text(path.read_text().replace(mutant.text, mutant.replacement))
        result = subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-x",
                "-q",
                "-p",
                "no:cacheprovider",
                *(f"tests/{test}" for test in tests),
            ],
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            timeout=7200,
        )
    if result.returncode < 0 and mutant is not None:  # a fault may end the process
        return [f"{tests[0]} ended by signal {-result.returncode}"]
    found = re.findall(r"^FAILED (\S+)", result.stdout, re.M)
    if result.returncode not in (0, 1, 2) or bool(result.returncode) != bool(found):
        raise RuntimeError(f"{tests}: pytest ended with {result.returncode}\n{result.stdout[-2000:]}{result.stderr}")
    return found


def main() -> int:
    wanted = sys.argv[1:] or list(MUTANTS)
    tests = sorted({MUTANTS[name].test for name in wanted})
    folders = {test.split("/")[0] for test in tests}  # a process each
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        before = pool.map(failures, [[test for test in tests if test.startswith(f"{f}/")] for f in sorted(folders)])
        if found := [test for of_folder in before for test in of_folder]:
            raise SystemExit(f"without a fault: {', '.join(found)} fails")
        caught = 0
        found = pool.map(failures, [[MUTANTS[name].test] for name in wanted], [MUTANTS[name] for name in wanted])
        for name, of_mutant in zip(wanted, found, strict=True):
            caught += bool(of_mutant)
            sys.stdout.write(f"{name:60s} {of_mutant[0] if of_mutant else 'SURVIVED'}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{caught} of {len(wanted)} caught\n")
    return int(caught < len(wanted))


if __name__ == "__main__":
    raise SystemExit(main())
