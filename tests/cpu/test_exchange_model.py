"""All executions of the exchange's model, and of broken ones; and the memory under it, by litmus tests.

`tests/kernels/test_exchange_model.py` shows that the model does what the kernels do.
"""

from pathlib import Path

import pytest

import exchange_model
from exchange_model import ALL, CASES, TRITONS, Kernel, search
from grids import WHOLE
from memory_model import ABSENT, Op, Search, Violation

ROOT = Path(__file__).resolve().parents[2]


def test_no_execution_of_the_kernels_lacks_a_property():
    """No deadlock, no stale read, no early pass, nothing overwritten, all published; the table says of how many."""
    assert exchange_model.table() in (ROOT / "docs" / "design.md").read_text()


@pytest.mark.parametrize("name", CASES)
def test_what_is_done_at_once_hides_nothing(name):
    """Every order of all operations, except in `make test-whole` of what would take minutes."""
    case = CASES[name]
    if WHOLE or len(case.programs) == 2 or case.protocol == "data":
        search(case, at_once=False)


def relaxed(name: str):
    def broken(self, *arguments):
        getattr(Kernel, name)(self, *arguments)
        self.ops[:] = [op._replace(sem="relaxed") if op.does == name else op for op in self.ops]

    return broken


def without_barrier(whose: str):
    def broken(self, of):
        if of != whose:
            Kernel.barrier(self, of)

    return broken


def waits(more: int):
    return lambda self, counter, target, each: Kernel.wait(self, counter, target + more, each)


def polls(**options):
    return lambda self, places: Kernel.poll(self, places, **options)


def takes_what_is_there(self, places):
    for thread in ALL:
        self.ops.append(Op("load", (thread,), places[thread::2], tuple(self.row(p) for p in places[thread::2])))


def tags_thread_by_thread(self, places, values):
    half = len(places) // 2
    for thread, part in zip(ALL, (slice(half), slice(half, None)), strict=True):
        self.ops.append(Op("poll tags", (thread,), places[part], values[part]))


def takes_the_words(self, places, values):
    for thread in ALL:
        self.ops.append(Op("load", (thread,), places[thread::2], values[thread::2]))


def tags_apart(self, places, values):
    """The second number's word has no tag: it is there if the first one's is."""
    self.ops.append(Op("poll tags", ALL, places[1::2], values[1::2]))
    takes_the_words(self, places[::2], values[::2])


def arrive_without_telling(self, counter):
    self.barrier("debug_barrier")


def arrive_twice(self, counter):
    Kernel.arrive(self, counter)
    self.ops[-1] = self.ops[-1]._replace(values=(2,))


def arrive_before_the_stores(self, layer, tile, step, counter):
    begin = len(self.ops)
    Kernel.publish(self, layer, tile, step, counter)
    self.ops[begin:] = self.ops[begin + 2 :] + self.ops[begin : begin + 2]


def store_the_pattern(self, place):
    return ABSENT if self.row(place)[0] == "nan" else self.row(place)


def all_but_the_last(self, layer, tile, step, counter):
    if step + 1 < self.case.steps[tile]:
        Kernel.publish(self, layer, tile, step, counter)


def below_too_early(self, counter, target, each):
    Kernel.wait(self, counter, target - (counter[-2] < self.layer) * self.case.group, each)


def fills_all_but(kind: str):
    def filled(self):
        stays = [place for place in self.initial() if place[0] == kind and place[3:4] != (-1,)]
        return {place: value for place, value in Kernel.filled(self).items() if place not in stays}

    return {"filled": filled}


def zeros(self):
    return {place: "zero" if value == ABSENT else value for place, value in Kernel.initial(self).items()}


# What is wrong, in which case, the functions that are broken, and the property that some execution lacks.
FAULTS = {
    "no wait": ("counter", {"wait": lambda self, counter, target, each: self.barrier(TRITONS)}, "stale read"),
    "target too low": ("counter", {"wait": waits(-1)}, "early pass"),
    "target too high": ("counter", {"wait": waits(1)}, "deadlock"),
    "no release": ("counter", {"arrive": relaxed("arrive")}, "stale read"),
    "no acquire": ("counter", {"wait": relaxed("wait")}, "stale read"),
    "no barrier before the release": ("counter", {"barrier": without_barrier("debug_barrier")}, "stale read"),
    "no barrier after the acquire": ("counter", {"barrier": without_barrier(TRITONS)}, "stale read"),
    "no arrival": ("counter", {"arrive": arrive_without_telling}, "deadlock"),
    "double arrival": ("counter", {"arrive": arrive_twice}, "early pass"),
    "arrival before the stores": ("counter", {"publish": arrive_before_the_stores}, "stale read"),
    "nothing is stored": ("data", {"publish": lambda self, *arguments: None}, "deadlock"),
    "the last step is not stored": ("counter", {"publish": all_but_the_last}, "not published"),
    "one counter for all tiles": (
        "counter, tiles walked",
        {"counter": lambda self, layer, tile: ("counter", layer, 0)},
        "stale read",
    ),
    "counters not cleared": ("counter, buffers used again", fills_all_but("counter"), "early pass"),
    "wave: a step too early": ("counter, wave of tiles walked", {"wait": below_too_early}, "early pass"),
    "takes what is there": ("data", {"poll": takes_what_is_there}, "stale read"),
    "filled with zeros": ("data", {"initial": zeros}, "stale read"),
    "not filled again": ("data, buffers used again", fills_all_but("row"), "stale read"),
    "one buffer for all tiles": (
        "data, tiles walked",
        {"rows": lambda self, layer, tile, *more: Kernel.rows(self, layer, 0, *more)},
        "overwritten",
    ),
    "a NaN is waited for": ("data, NaN", {"poll": polls(looks=False)}, "deadlock"),
    "a NaN of the pattern is stored": ("data, NaN", {"bits": store_the_pattern}, "deadlock"),
    "norms: one slot": (
        "norms",
        {"slots": lambda self, tile, k, number: Kernel.slots(self, tile, 0, number)},
        "overwritten",
    ),
    "norms: the threads go on one by one": (
        "norms, backward of zoneout",
        {"poll_tags": tags_thread_by_thread},
        "overwritten",
    ),
    "norms: a number without its tag": ("norms", {"poll_tags": tags_apart}, "stale read"),
    "norms: takes what is there": ("norms", {"poll_tags": takes_the_words}, "stale read"),
    "norms: slots of all tiles": (
        "norms, tiles walked",
        {"slots": lambda self, tile, k, number: Kernel.slots(self, 0, k, number)},
        "stale read",
    ),
    "norms: slots not cleared": ("norms, buffers used again", fills_all_but("slot"), "stale read"),
    "norms: nothing is acquired on AMD": ("norms on AMD", {"wait": relaxed("wait")}, "deadlock"),
}


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("name", FAULTS)
def test_a_broken_exchange_is_caught(name, at_once):
    case, functions, lacks = FAULTS[name]
    if at_once or "wave" not in case or WHOLE:
        with pytest.raises(Violation) as caught:
            search(CASES[case], type("Broken", (Kernel,), functions), expected=lacks, at_once=at_once)
        assert caught.value.name == lacks


@pytest.mark.parametrize("name", ["data", "norms"])
def test_polls_of_data_need_a_memory_that_shows_what_is_stored(name):
    """So on AMD there is the counter, and norms acquire."""
    with pytest.raises(Violation, match="^deadlock|\ndeadlock"):
        search(CASES[name], coherent=False)


def stores(place):
    return Op("store", (0,), (place,), (NEW,))


def loads(place):
    return Op("load", (0,), (place,), (NEW,))


def polled(place):
    return Op("poll tags", (0,), (place,), (NEW,))


def adds(place, sem="release"):
    return Op("arrive", (0,), (place,), (1,), sem)


def awaits(place, arrivals=1, sem="acquire"):
    return Op("wait", (0,), (place,), (arrivals,), sem)


# Programs of one thread each, and whether the last load can be stale in the PTX model.
NEW = (1, "new")
LITMUS = {
    "a message by release and acquire": ([[stores("x"), adds("f")], [awaits("f"), loads("x")]], False),
    "a message without release": ([[stores("x"), adds("f", "relaxed")], [awaits("f"), loads("x")]], True),
    "a message without acquire": ([[stores("x"), adds("f")], [awaits("f", sem="relaxed"), loads("x")]], True),
    "a message by words": ([[stores("x"), stores("y")], [polled("y"), loads("x")]], True),
    "a word is not older than before": ([[stores("x")], [polled("x"), loads("x")]], False),
    "a message that is passed on": (
        [[stores("x"), adds("f")], [awaits("f"), adds("g")], [awaits("g"), loads("x")]],
        False,
    ),
    "a message that is passed on without acquire": (
        [[stores("x"), adds("f")], [awaits("f", sem="relaxed"), adds("g")], [awaits("g"), loads("x")]],
        True,
    ),
    "what is seen is passed on": ([[stores("x")], [polled("x"), adds("g")], [awaits("g"), loads("x")]], False),
    "a release that others add to": (
        [[stores("x"), adds("f")], [awaits("f"), adds("f", "relaxed")], [awaits("f", 2), loads("x")]],
        False,
    ),
    "an arrival of somebody else": (
        [[stores("x"), adds("f")], [adds("f")], [awaits("f"), loads("x")]],
        True,
    ),
}


@pytest.mark.parametrize("name", LITMUS)
def test_the_memory_is_that_of_ptx(name):
    programs, can_be_stale = LITMUS[name]
    initial = {"x": (0, "old"), "y": (0, "old"), "f": 0, "g": 0}
    for at_once in (True, False):
        run = Search(programs, initial, {}, threads=1, at_once=at_once).run
        if can_be_stale:
            with pytest.raises(Violation, match="stale read"):
                run("stale read")
        else:
            run()
