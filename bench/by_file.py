"""Run pytest with one process per file, several at once, if pytest-xdist is missing.

    python -m bench.by_file PATH... -- OPTIONS

The result of a test is printed when it is known, and the rest of the output of a file when the file ends. The last line
has the counts, as pytest prints them. If an assertion on the device ends a process, the other files still run. The exit
status is that of pytest.
"""

import argparse
import collections
import concurrent.futures
import re
import subprocess
import sys
import time
from pathlib import Path

NO_TESTS = 5  # pytest's exit status


def run(file: Path, options: list[str]) -> tuple[int, collections.Counter]:
    """Exit status and numbers of a file's tests, by verdict."""
    command = [sys.executable, "-m", "pytest", str(file), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    kept = []
    for line in process.stdout:
        if re.match(r"\S+::.* (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)", line):
            sys.stdout.write(line)  # whole lines: threads do not mix within
            sys.stdout.flush()
        else:
            kept.append(line)
    status, text = process.wait(), "".join(kept)
    counts = collections.Counter()
    totals = re.findall(r"^=*\s*((?:\d+ \w+,? ?)+) in [\d.]+s", text, re.M)
    for number, word in re.findall(r"(\d+) (\w+)", totals[-1] if totals else ""):
        counts[{"errors": "error", "warnings": "warning"}.get(word, word)] += int(number)
    if status not in (0, 1, NO_TESTS):
        counts["ended"] += 1
        text += f"ERROR {file} ended with status {status}\n"
    sys.stdout.write(text)
    sys.stdout.flush()
    return status, counts


def main(argv: list[str] | None = None) -> int:
    """Returns 0 if all tests passed, 1 if not, 5 if there was none."""
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(prog="python -m bench.by_file", description=__doc__.splitlines()[0])
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="test files, or folders of them")
    parser.add_argument("--at-once", type=int, default=2, help="processes (2)")
    options = parser.parse_args(argv[:cut])
    files = [f for path in options.paths for f in (path.glob("test_*.py") if path.is_dir() else [path])]
    files.sort(key=lambda file: -file.stat().st_size if file.exists() else 0)  # the longest last would be waited for
    start, statuses, total = time.monotonic(), [], collections.Counter()
    with concurrent.futures.ThreadPoolExecutor(max(1, options.at_once)) as pool:
        for status, counts in pool.map(lambda file: run(file, argv[cut + 1 :]), files):
            statuses.append(status)
            total += counts
    words = ", ".join(f"{number} {word}" for word, number in sorted(total.items())) or "0 passed"
    print(f"==== {words} in {time.monotonic() - start:.2f}s, {len(files)} files ====")
    if any(status not in (0, NO_TESTS) for status in statuses):
        return 1
    return 0 if 0 in statuses else NO_TESTS


if __name__ == "__main__":
    sys.exit(main())
