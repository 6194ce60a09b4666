"""Calls in a process that may die, and the process that reads what became of them."""

import contextlib
import dataclasses
import faulthandler
import json
import os
import signal
import subprocess
import sys
from collections import Counter

SECONDS_OF_A_CALL = 600  # on a busy machine; interpreted, a call takes a second on an idle one


def say(*words: str) -> None:
    """To the process that reads: at once, for this one may die."""
    sys.stdout.write(json.dumps(words) + "\n")
    sys.stdout.flush()


@contextlib.contextmanager
def calling(call: str, backend: str, member: str):
    """Around a call: it is written down before it is made, and one that never ends ends the process."""
    say("call", call, f"{backend}, {member}")
    faulthandler.dump_traceback_later(SECONDS_OF_A_CALL, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


@dataclasses.dataclass
class Told:
    """How many calls were made of each engine and member, and the faulty ones, with what is wrong."""

    made: Counter = dataclasses.field(default_factory=Counter)
    faults: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def follow(self, module: str, arguments: tuple, interpret: bool) -> None:
        """Run `python -m module` to its end."""
        command = [sys.executable, "-W", "ignore", "-m", module, *map(str, arguments)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": str(int(interpret))}
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
        )
        call = None
        for line in process.stdout:
            kind, call, what = json.loads(line)
            if kind == "call":
                self.made[what] += 1
            else:
                self.faults.append((call, what))
        errors = process.stderr.read()
        code = process.wait()
        if code and call is None:
            raise RuntimeError(f"{' '.join(command)} did not begin:\n{errors}")
        if code:
            at = max(
                0, errors.find("Timeout")
            )  # its stack begins with the last call; that of an exception ends with it
            how = signal.Signals(-code).name if code < 0 else errors[at : at + 800] if at else errors.strip()[-800:]
            self.faults.append((call, f"the process ends: {how}"))
