"""Draw calls for some minutes, right ones and wrong ones, and print how many there were and which are faulty.

`python -m fuzz 60` takes an hour: three parts of four for right calls, and the rest for wrong ones. Half of the
processes interpret the kernels. A faulty call is printed as a line for `found.py`.
"""

import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from fuzz import bad, cases

ENGINES = {"cpu": ("auto", "torch", "reference"), "kernels": ("triton",)}


def main(minutes: str = "10", number: str = "") -> int:
    seconds, number = 60 * float(minutes), int(number or random.randrange(10**6))
    print(f"seed {number}, until {time.strftime('%X', time.localtime(time.time() + seconds))}", flush=True)
    faulty = False
    with ThreadPoolExecutor() as pool:
        for what, share in (("right", 0.75), ("wrong", 0.25)):
            running = {kind: pool.submit(_told, what, kind, number, share * seconds) for kind in ENGINES}
            for future in running.values():
                told = future.result()
                for name, count in sorted(told.made.items()):
                    print(f"{count:8} {what} calls: {name}")
                faulty = faulty or bool(told.faults)
                for call, why in told.faults:
                    print(f"    {call},\n        # {why}")
                print(flush=True)
    return int(faulty)


def _told(what: str, kind: str, number: int, seconds: float):
    if what == "right":
        return cases.run(kind, number, seconds)
    return bad.run(str(number), ENGINES[kind], 10**9, seconds, interpret=kind == "kernels")


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
