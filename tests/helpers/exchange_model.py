"""The exchange of the kernels as a model: what `kernels/exchange.py` and `kernels/norms.py` do, for `memory_model`.

`python tests/helpers/exchange_model.py` prints the table of docs/design.md.

A method has the name of the function that it stands for. The two threads of a program stand for its warps: each stores
one word of the program's tile, and loads what others have stored with another thread. A value says of which launch and
step it is.
"""

import itertools
from dataclasses import dataclass

from memory_model import ABSENT, Op, Search

ALL = (0, 1)  # the threads of a program
TRITONS = "that Triton adds"


@dataclass(frozen=True)
class Case:
    """What a launch is: its sizes and its protocol."""

    protocol: str  # "counter" or "data"
    pass_: str = "fwd"
    group: int = 2
    steps: tuple[int, ...] = (2,)  # of every batch tile that the group walks
    layers: int = 1  # of a wave
    norms: int = 0  # of a step: of the recurrent product, and of c'
    zoneout: bool = False  # with norms
    acquires: bool = False  # as on AMD
    nan: bool = False  # whether the first program's tiles hold NaN
    launches: int = 1  # with the same buffers

    @property
    def exchanges(self) -> int:
        """Of sums, within a step. With zoneout the backward needs those of c' again."""
        return self.norms + (self.norms > 1 and self.zoneout and self.pass_ == "bwd")

    @property
    def programs(self) -> list[tuple[int, int]]:
        """The layer of every program, and its number in the group."""
        return [(layer, k) for layer in range(self.layers) for k in range(self.group)]


class Kernel:
    """What one program does: its operations, in their order."""

    def __init__(self, case: Case, layer: int, program: int) -> None:
        self.case, self.layer, self.program = case, layer, program
        self.ops: list[Op] = []
        for launch in range(case.launches):
            self.launch = launch
            if launch:
                filled = self.filled()
                self.ops.append(Op("launch", ALL, tuple(filled), tuple(filled.values())))
            (self.recurrence_fwd if case.pass_ == "fwd" else self.recurrence_bwd)()

    # Places.

    def counter(self, layer: int, tile: int):
        return "counter", layer, tile

    def rows(self, layer: int, tile: int, step: int | None, thread: int) -> list:
        """The words of all programs of a step that one thread stores; step -1 is the initial state, None is no step."""
        return [("row", layer, tile, step, k, thread) for k in range(self.case.group) if step is not None]

    def slots(self, tile: int, k: int, number: int) -> list:
        """Where the words of all programs for exchange k lie."""
        return [("slot", self.layer, tile, k % 2, number, program) for program in range(self.case.group)]

    # Values.

    def row(self, place, launch: int | None = None):
        """What a reader of a word needs."""
        _, layer, tile, step, k, _ = place
        kind = "nan" if self.case.nan and k == 0 and step >= 0 else "h"
        return kind, self.launch if launch is None else launch, layer, tile, step

    def bits(self, place):
        """What `publish` stores: a NaN of the pattern ABSENT as another NaN."""
        return self.row(place)

    def word(self, tile: int, k: int):
        """What goes through a slot for exchange k: a tag, and of what it is."""
        return k + 1, self.launch, tile

    def all_rows(self, first: int) -> list:
        """The words of all steps of all tiles, from a step on."""
        return [
            place
            for layer in range(self.case.layers)
            for tile, steps in enumerate(self.case.steps)
            for step in range(first, steps)
            for thread in ALL
            for place in self.rows(layer, tile, step, thread)
        ]

    def initial(self) -> dict:
        """What stands everywhere in the beginning."""
        case, begin = self.case, ABSENT if self.case.protocol == "data" else "nothing"
        places = {place: begin if place[3] >= 0 else self.row(place, 0) for place in self.all_rows(-1)}
        tiles = [(layer, tile) for layer in range(case.layers) for tile in range(len(case.steps))]
        for counter in [self.counter(*tile) for tile in tiles]:
            places |= {counter: 0, ("norms", *counter): 0}
        slots = itertools.product(tiles, range(2), ALL, range(case.group))
        return places | {("slot", *tile, *slot): (0, 0) for tile, *slot in slots}

    def filled(self) -> dict:
        """What the host fills before another launch."""
        filled = {place: value for place, value in self.initial().items() if place[0] != "row"}
        if self.case.protocol == "data":
            filled |= dict.fromkeys(self.all_rows(0), ABSENT)
        return filled | {place: self.row(place) for place in self.all_rows(-1) if place[3] < 0}

    def final(self) -> dict:
        """What must stand there in the end: every row, and in the counters every arrival."""
        case, launch = self.case, self.case.launches - 1
        final = {place: self.row(place, launch) for place in self.all_rows(0)}
        if case.protocol == "counter":
            for layer, (tile, steps) in itertools.product(range(case.layers), enumerate(case.steps)):
                final[self.counter(layer, tile)] = case.group * (steps + (case.pass_ == "bwd"))
        return final

    # kernels/exchange.py

    def barrier(self, whose: str) -> None:
        self.ops.append(Op("barrier", ALL, values=(whose,)))

    def arrive(self, counter) -> None:
        self.barrier("debug_barrier")
        self.ops.append(Op("arrive", (0,), (counter,), (1,), "release"))

    def wait(self, counter, target: int, each: int) -> None:
        """`each` is what the target means: arrivals of every program."""
        self.ops.append(Op("wait", (0,), (counter,), (target,), "acquire", each))
        self.barrier(TRITONS)

    def publish(self, layer: int, tile: int, step: int | None, counter) -> None:
        for thread in ALL:
            places = tuple(self.rows(layer, tile, step, thread)[self.program :][:1])
            self.ops.append(Op("store", (thread,), places, tuple(self.bits(place) for place in places)))
        if self.case.protocol == "counter":
            self.arrive(counter)

    def awaited_product(self, layer: int, tile: int, step: int | None, counter, target: int) -> None:
        words = [self.rows(layer, tile, step, 1 - thread) for thread in ALL]
        if self.case.protocol == "counter":
            self.wait(counter, target, target // self.case.group)
            for thread, places in zip(ALL, words, strict=True):
                self.ops.append(Op("load", (thread,), tuple(places), tuple(self.row(place) for place in places)))
        else:
            self.poll(tuple(place for pair in zip(*words, strict=True) for place in pair))

    def poll(self, places: tuple, **options) -> None:
        values = tuple(self.row(place) for place in places)
        self.ops.append(Op("poll", ALL, places, values, **options))
        self.ops.append(Op("look", ALL, places, values))

    # kernels/norms.py

    def of_group(self, tile: int, k: int) -> None:
        words = [self.slots(tile, k, number) for number in ALL]
        for thread, places in zip(ALL, words, strict=True):
            self.ops.append(Op("store", (thread,), (places[self.program],), (self.word(tile, k),)))
        if self.case.acquires:
            counter = ("norms", *self.counter(self.layer, tile))
            self.arrive(counter)
            self.wait(counter, self.case.group * (k + 1), k + 1)
        places = tuple(place for pair in zip(*words[::-1], strict=True) for place in pair)
        self.poll_tags(places, (self.word(tile, k),) * len(places))

    def poll_tags(self, places: tuple, values: tuple) -> None:
        self.ops.append(Op("poll tags", ALL, places, values))

    # kernels/recurrence_fwd.py, kernels/recurrence_bwd.py

    def recurrence_fwd(self) -> None:
        group, layer, norms = self.case.group, self.layer, self.case.norms
        for tile, steps in enumerate(self.case.steps):
            counter = self.counter(layer, tile)
            for step in range(steps):
                self.awaited_product(layer, tile, step - 1, counter, group * step)
                if norms > 0:
                    self.of_group(tile, norms * step)
                if layer > 0:
                    self.awaited_product(layer - 1, tile, step, self.counter(layer - 1, tile), group * (step + 1))
                if norms > 1:
                    self.of_group(tile, norms * step + 1)
                self.publish(layer, tile, step, counter)

    def recurrence_bwd(self) -> None:
        """Steps count from the last one; an iteration more than there are steps stores nothing."""
        group, layer, exchanges = self.case.group, self.layer, self.case.exchanges
        for tile, steps in enumerate(self.case.steps):
            counter, above = self.counter(layer, tile), self.counter(layer + 1, tile)
            for step in range(steps + 1):
                own = step if step < steps else None
                self.awaited_product(layer, tile, step - 1 if step else None, counter, group * step)
                if layer + 1 < self.case.layers:
                    self.awaited_product(layer + 1, tile, own, above, group * min(step + 1, steps))
                for at in range(exchanges):
                    self.of_group(tile, exchanges * step + at)
                self.publish(layer, tile, own, counter)

    def told(self) -> list[tuple]:
        """The operations as they look from outside: of whole tiles, and without barriers that Triton adds."""
        found = []
        for op in self.ops:
            place = op.places[0] if op.places else ()
            if op.does == "barrier":
                event = op.values
            elif op.does in ("arrive", "wait"):
                event = (op.does, *place, op.values[0], op.sem)
            else:
                event = ("store" if op.does == "store" else "load", *place[:4])
                if place[:1] == ("slot",):
                    event += (op.values[0][0],)
            if event not in ((TRITONS,), ("store",), ("load",), *found[-1:]):
                found.append(event)
        return found


CASES = {
    "counter": Case("counter", steps=(4,)),
    "counter, three programs": Case("counter", group=3, steps=(3,)),
    "counter, backward": Case("counter", "bwd", group=3, steps=(2,)),
    "counter, tiles walked": Case("counter", steps=(1, 3, 0, 2)),
    "counter, tiles walked backward": Case("counter", "bwd", steps=(1, 0, 2)),
    "counter, wave of tiles walked": Case("counter", layers=2, steps=(1, 2)),
    "counter, wave backward": Case("counter", "bwd", layers=2, steps=(2,)),
    "counter, buffers used again": Case("counter", steps=(1, 2), launches=2),
    "data": Case("data", steps=(4,)),
    "data, three programs": Case("data", group=3, steps=(4,)),
    "data, backward": Case("data", "bwd", group=3, steps=(3,)),
    "data, tiles walked": Case("data", steps=(1, 3, 0, 2)),
    "data, wave of tiles walked": Case("data", layers=2, steps=(1, 2)),
    "data, wave backward": Case("data", "bwd", layers=2, steps=(2,)),
    "data, NaN": Case("data", group=3, steps=(3,), nan=True),
    "data, buffers used again": Case("data", steps=(1, 2), launches=2),
    "norms": Case("data", group=3, steps=(3,), norms=2),
    "norms, backward": Case("data", "bwd", group=3, steps=(2,), norms=2),
    "norms, backward of zoneout": Case("data", "bwd", steps=(2,), norms=2, zoneout=True),
    "norms, tiles walked": Case("data", steps=(1, 0, 3), norms=2),
    "norms, buffers used again": Case("data", steps=(1, 2), norms=2, launches=2),
    "norms, counter": Case("counter", steps=(3,), norms=2),
    "norms on AMD": Case("counter", steps=(2,), norms=2, acquires=True),
    "norms on AMD, backward": Case("counter", "bwd", norms=2, acquires=True),
    "one norm": Case("data", group=3, steps=(3,), norms=1),
    "one norm, backward": Case("data", "bwd", group=3, steps=(2,), norms=1),
    "one norm, backward of zoneout": Case("data", "bwd", steps=(2,), norms=1, zoneout=True),
    "one norm, tiles walked": Case("data", steps=(1, 0, 3), norms=1),
    "one norm, counter": Case("counter", steps=(3,), norms=1),
    "one norm on AMD": Case("counter", steps=(2,), norms=1, acquires=True),
    "one norm on AMD, backward": Case("counter", "bwd", norms=1, acquires=True),
}


def search(case: Case, kernel=Kernel, expected: str | None = None, **options) -> int:
    """Go through all executions of a case by `kernel`, and return the number of states; see `Search`."""
    kernels = [kernel(case, *place) for place in case.programs]
    options.setdefault("coherent", not case.acquires)
    return Search([k.ops for k in kernels], kernels[0].initial(), kernels[0].final(), **options).run(expected)


def table() -> str:
    """The cases in Markdown, searched."""
    lines = ["| model | programs | steps of each tile | states |", "|---|---:|---:|---:|"]
    for name, case in CASES.items():
        steps = ", ".join(map(str, case.steps))
        lines.append(f"| {name} | {len(case.programs)} | {steps} | {search(case):,} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())  # noqa: T201
