"""Every execution of a few small programs that share memory as on a GPU, by an exhaustive search.

A program is a thread block. Its threads are lists of operations (`Op`) without branches; some operations the threads of
a program do together, as at a barrier of all threads. A search goes through every order in which the operations of all
threads can happen, and through every value that a load may return.

The memory is that of the PTX model, by views. A place keeps every value that was ever stored there, in order. A thread
knows for each place how new a value it must see at least, its view; a load may return that one or any newer one. So a
store can become visible late, to each thread at another time, and stores can become visible in any order. A barrier of
a program's threads joins their views. A release leaves the view of its thread with the value that it stores, and an
acquire that reads this value joins it to its own thread's. What is added to a counter keeps the views that others have
released there. A word is stored and loaded as a whole. A load never returns what its own thread stores later, nor what
depends on that: every store of the kernels needs what was loaded before it.

Left out is what changes nothing: polls that fail, and of the values that a load may return all but the oldest, since
it must be the right one and restricts the least what is read later.
"""

import itertools
from collections import defaultdict
from typing import NamedTuple

ABSENT = "absent"  # the pattern that stands in a buffer before anything is stored


class Op(NamedTuple):
    """An operation; what its words mean depends on what it `does`.

    | does | meaning |
    |---|---|
    | "store" | store `values` at `places` |
    | "load" | load `places`; a value that is not the wanted one of `values` is stale |
    | "poll" | load until no place is ABSENT or has a NaN; or until a "look" finds no ABSENT, then load once more |
    | "look" | what a "poll" that was ended by a look does in addition |
    | "poll tags" | load until every word has the tag of the wanted one, its first element |
    | "arrive" | add `values[0]` to a counter |
    | "wait" | load a counter until it is `values[0]`; every program must have arrived there `each` times |
    | "barrier" | of the threads |
    | "launch" | the end of a launch; memory is filled with `values` before the next one |
    """

    does: str
    threads: tuple[int, ...]  # of the program; they do it together
    places: tuple = ()
    values: tuple = ()
    sem: str = "relaxed"  # of "arrive" and "wait": "release", "acquire"
    each: int = 0  # of "wait": arrivals in this launch, of every program that arrives there
    looks: bool = True  # of "poll": whether a NaN can be accepted

    def share(self, thread: int) -> list[tuple]:
        """(place, wanted value) of what one of the threads loads."""
        n, k = len(self.threads), self.threads.index(thread)
        return list(zip(self.places[k::n], self.values[k::n], strict=True))


class Violation(Exception):
    """A property that an execution does not have: its name, where, and the operations `before`."""

    def __init__(self, name: str, where: str) -> None:
        self.name, self.where, self.before = name, where, []

    def __str__(self) -> str:
        return "\n".join([*self.before, f"{self.name}: {self.where}"])


class State(NamedTuple):
    memory: tuple  # of every place: its (value, released view) in order
    at: tuple[int, ...]  # of every thread: its next operation
    views: tuple[int, ...]  # of every thread: bit k of a place is set if it must see the k-th store there


def is_nan(value) -> bool:
    """ABSENT is one too."""
    return value == ABSENT or value[0] == "nan"


class Search:
    """All executions.

    Args:
        programs: Of each program its operations, in the order of every thread that takes part.
        initial: What stands at each place in the beginning.
        final: What must stand there in the end.
        threads: Of each program.
        coherent: Whether a load that polls sees at some time what others stored. If not, only after an acquire.
        at_once: Whether what others cannot disturb is done as soon as it can be, which leaves fewer states: a store,
            as whoever loads may still see an older value; a barrier; and a load of what is stored once in a launch.
    """

    def __init__(self, programs, initial, final, threads=2, coherent=True, at_once=True):
        self.final, self.coherent, self.at_once = final, coherent, at_once
        self.of = [(p, j) for p in range(len(programs)) for j in range(threads)]
        self.ops = [[op for op in programs[p] if j in op.threads] for p, j in self.of]
        self.number = {place: k for k, place in enumerate(initial)}
        self.begin = tuple(((value, 0),) for value in initial.values())
        stores = dict.fromkeys(initial, 0)  # a view has a bit for each
        self.wanted = defaultdict(list)  # who loads this value at this place, and when
        self.arrivals = defaultdict(lambda: defaultdict(list))  # at this counter in this launch, by thread
        for t, ops in enumerate(self.ops):
            for n, op in enumerate(ops):
                # What threads do together is stored once.
                if op.does in ("store", "arrive") or (op.does == "launch" and t == 0):
                    stores |= {place: stores[place] + 1 for place in op.places}
                if op.does == "arrive":
                    self.arrivals[op.places[0], self._launches(t, n)][t].append(n)
                if op.does in ("load", "poll", "poll tags"):
                    for place, value in op.share(self.of[t][1]):
                        self.wanted[self.number[place], value].append((t, n))
        self.first = [0, *itertools.accumulate(stores.values())]
        self.counters = sorted({self.number[place] for place, _ in self.arrivals})

    def _launches(self, t: int, n: int) -> int:
        """How many launches have ended before operation n of a thread."""
        return sum(op.does == "launch" for op in self.ops[t][:n])

    def run(self, expected: str | None = None) -> int:
        """The number of states.

        Args:
            expected: The name of a property of which a violation is looked for, past those of others.

        Raises:
            Violation: The first that is found.
        """
        begin = State(self.begin, (0,) * len(self.ops), (0,) * len(self.ops))
        found, left = {self._key(begin): None}, [begin]
        while left:
            state = left.pop()
            key = self._key(state)
            for by, new in self._after(state):
                if isinstance(new, State):
                    if (after := self._key(new)) not in found:
                        found[after] = key, by
                        left.append(new)
                elif expected in (None, new.name):
                    while found[key]:
                        key, (program, op) = found[key]
                        new.before.insert(0, f"program {program}: {op.does} {op.places} {op.values}")
                    raise new
        return len(found)

    def _key(self, state: State):
        """What tells states apart: of the memory only counters, for every other place has one thread that stores."""
        return state.at, state.views, tuple(state.memory[k] for k in self.counters)

    def _after(self, state: State) -> list[tuple[tuple | None, "State | Violation"]]:
        """Every next operation with its program, and the state after it or what is wrong."""
        found, left = [], [t for t, ops in enumerate(self.ops) if state.at[t] < len(ops)]
        ready = {t: self.ops[t][state.at[t]] for t in left}
        for t in left:
            op, (program, j) = ready[t], self.of[t]
            if op.does == "launch":
                group = range(len(self.ops))
                together = all(t in ready and ready[t].does == "launch" for t in group)
            else:
                group = [t - j + other for other in op.threads]
                together = all(ready.get(other) is op for other in group)
            if t != group[0] or not together:
                continue
            try:
                new = getattr(self, "_" + op.does.replace(" ", "_"))(state, op, group)
            except Violation as violation:
                new = [violation]
            after = [((program, op), one) for one in new]
            if after and self.at_once and op.does in ("store", "barrier", "load"):
                return after
            found += after
        if not found:
            found = [(None, violation) for violation in self._at_the_end(state, ready)]
        return found

    def _at_the_end(self, state: State, ready: dict[int, Op]):
        """What is wrong where nothing goes on."""
        if ready:
            yield Violation("deadlock", "; ".join(f"program {self.of[t][0]}: {op}" for t, op in ready.items()))
        for place, value in self.final.items() if not ready else ():
            if (there := state.memory[self.number[place]][-1][0]) != value:
                yield Violation("not published", f"{place} has {there}, not {value}")

    def _seen(self, view: int, k: int) -> int:
        """How many stores of place k a view has at least."""
        return (view >> self.first[k] & (1 << self.first[k + 1] - self.first[k]) - 1).bit_count()

    def _up_to(self, k: int, count: int) -> int:
        """The view of the first stores of place k."""
        return ((1 << count) - 1) << self.first[k]

    def _readable(self, state: State, t: int, place) -> tuple[int, int, tuple]:
        """The number of a place, how many stores of it the thread has seen, and what it may load there."""
        k = self.number[place]
        seen = self._seen(state.views[t], k)
        return k, seen, state.memory[k][seen:]

    @staticmethod
    def _moved(state: State, group, views: dict[int, int], memory=None, by: int = 1) -> State:
        """The threads of the group go on, with new views."""
        at = tuple(k + by * (t in group) for t, k in enumerate(state.at))
        return State(memory or state.memory, at, tuple(views.get(t, v) for t, v in enumerate(state.views)))

    def _joined(self, state: State, group, more: int = 0) -> dict[int, int]:
        for t in group:
            more |= state.views[t]
        return dict.fromkeys(group, more)

    def _barrier(self, state, op, group):
        return [self._moved(state, group, self._joined(state, group))]

    def _store(self, state, op, group):
        (t,), memory, view = group, list(state.memory), state.views[group[0]]
        for place, value in zip(op.places, op.values, strict=True):
            k = self.number[place]
            if any(state.at[other] <= n for other, n in self.wanted[k, memory[k][-1][0]]):
                raise Violation("overwritten", f"{value} at {place}, where {memory[k][-1][0]} is still to be read")
            memory[k] = (*memory[k], (value, 0))
            view |= self._up_to(k, len(memory[k]) - 1)
        return [self._moved(state, group, {t: view}, tuple(memory))]

    def _arrive(self, state, op, group):
        (t,), (place,), memory = group, op.places, list(state.memory)
        k = self.number[place]
        value, released = memory[k][-1]
        view = state.views[t] | self._up_to(k, len(memory[k]))
        if op.sem == "release":
            released |= view
        memory[k] = (*memory[k], (value + op.values[0], released))
        return [self._moved(state, group, {t: view}, tuple(memory))]

    def _wait(self, state, op, group):
        (t,) = group
        k, seen, readable = self._readable(state, t, op.places[0])
        for n, (value, released) in enumerate(readable):
            if value >= op.values[0]:
                for other, arrivals in self.arrivals[op.places[0], self._launches(t, state.at[t])].items():
                    if sum(arrival < state.at[other] for arrival in arrivals) < op.each:
                        late = f"program {self.of[other][0]} has not come"
                        raise Violation("early pass", f"{op.places[0]} is {value}, but {late}")
                view = state.views[t] | self._up_to(k, seen + n)
                return [self._moved(state, group, {t: view | released if op.sem == "acquire" else view})]
        return []

    def _load(self, state, op, group):
        for t in group:
            for place, wanted in op.share(self.of[t][1]):
                for value, _ in self._readable(state, t, place)[2]:
                    if value != wanted:
                        raise Violation("stale read", f"{value} at {place}, where {wanted} is needed")
        return [self._moved(state, group, self._joined(state, group))]

    def _polled(self, state, op, group, arrived, looks: bool = False):
        """The view of the threads after loads of values that have all `arrived`; None if one cannot be there yet."""
        more, stale = 0, []
        for n, t in enumerate(group):
            # A look has the words of other threads.
            share = op.share(self.of[group[n - looks]][1])
            for place, wanted in share:
                k, seen, readable = self._readable(state, t, place)
                there = [m for m, (value, _) in enumerate(readable) if arrived(value, wanted)]
                if not there or (there[0] > 0 and not self.coherent):
                    return None
                if not looks and readable[there[0]][0] != wanted:
                    stale.append(f"{readable[there[0]][0]} at {place}, where {wanted} is needed")
                more |= self._up_to(k, seen + there[0])
        if stale:
            raise Violation("stale read", stale[0])
        return self._joined(state, group, more)

    def _poll(self, state, op, group):
        found = []
        if views := self._polled(state, op, group, lambda value, wanted: not is_nan(value)):
            found.append(self._moved(state, group, views, by=2))  # without the look
        if op.looks and (views := self._polled(state, op, group, lambda value, wanted: value != ABSENT, looks=True)):
            found.append(self._moved(state, group, views))
        return found

    def _look(self, state, op, group):
        return self._load(state, op, group)

    def _poll_tags(self, state, op, group):
        views = self._polled(state, op, group, lambda value, wanted: value[0] == wanted[0])
        return [self._moved(state, group, views)] if views else []

    def _launch(self, state, op, group):
        memory = list(state.memory)
        for place, value in zip(op.places, op.values, strict=True):
            memory[self.number[place]] += ((value, 0),)
        everything = 0
        for k, stored in enumerate(memory):
            everything |= self._up_to(k, len(stored) - 1)
        return [self._moved(state, group, dict.fromkeys(group, everything), tuple(memory))]
