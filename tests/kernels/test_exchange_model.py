"""The model of the exchange does what the kernels do: the same operations at the same places, in the same order.

`tests/cpu/test_exchange_model.py` goes through all executions of the model. The operations of a program are the same in
every execution, so here a few schedules do.
"""

import dataclasses

import numpy as np
import pytest
import torch

from exchange_model import Case, Kernel
from fusedlstm.cells import Grads
from fusedlstm.engines import launch
from fusedlstm.kernels import exchange
from fusedlstm.noise import Noise
from support import recurrence, recurrence_inputs, stack_inputs, tiled

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs the interpreter: run without a GPU")

BLOCK = 16  # sequences of a batch tile, and units of a program
CASES = {
    "counter": Case("counter", steps=(3,)),
    "data": Case("data", steps=(3,)),
    "three programs": Case("counter", group=3),
    "tiles walked, one ends early": Case("counter", steps=(1, 3)),
    "tiles walked, one has no step": Case("data", steps=(2, 0)),
    "wave": Case("counter", layers=2, steps=(3,)),
    "wave, tiles walked": Case("data", layers=2, steps=(2, 1)),
    "norms": Case("data", norms=2, steps=(2, 1)),
    "norms, zoneout": Case("data", norms=2, zoneout=True),
    "norms by counter": Case("counter", norms=2),
    "norms on AMD": Case("counter", norms=2, acquires=True),
    "one norm": Case("data", norms=1, steps=(2, 1)),
    "one norm, zoneout": Case("counter", norms=1, zoneout=True),
    "one norm on AMD": Case("counter", norms=1, acquires=True),
}


class Recorder:
    """What every program of an interpreted launch does with the memory that they share, in the words of the model."""

    def __init__(self, case: Case, pass_: str, arguments: dict, programs: list) -> None:
        self.case, self.pass_, self.programs = case, pass_, programs
        self.told = {program: [] for program in programs}
        self.batch = len(case.steps) * BLOCK
        names = ("output_ptr" if pass_ == "fwd" else "grad_preact_ptr", "hx_ptr", "arrived_ptr", "sums_ptr")
        self.rows, self.hx, self.counters, self.sums = (int(arguments[name].handle.data.flat[0]) for name in names)
        hidden = case.group * BLOCK
        self.row_bytes = 4 * hidden * (1 if pass_ == "fwd" else arguments["KEPT"])
        self.hx_bytes = 4 * hidden

    def tell(self, *event) -> None:
        from fusedlstm.engines import interpreter

        told = self.told[self.programs[interpreter._local.program]]
        if event not in told[-1:]:
            told.append(event)

    def memory(self, does: str, pointers, mask, words) -> None:
        """A store, or a load past the first-level cache."""
        there = mask.data.astype(bool)
        address = pointers.data[there].astype(np.int64)
        rows = np.unique((address - self.rows) // self.row_bytes)
        inside = (rows >= 0) & (rows < self.case.layers * max(self.case.steps) * self.batch)
        if words.dtype.itemsize == 8:
            self.slot(does, np.unique((address - self.sums) // 8), np.unique(words[there] >> 32))
        elif does == "load" and len(rows) and not inside.any():  # the state before the first step
            (tile,) = {*((address - self.hx) // self.hx_bytes // BLOCK).tolist()}
            self.tell(does, "row", *divmod(tile, len(self.case.steps)), -1)
        elif len(rows) and inside.all():
            steps, batch = max(self.case.steps), self.batch
            ((layer, t, tile),) = {
                (r // (steps * batch), r // batch % steps, r % batch // BLOCK) for r in rows.tolist()
            }
            step = t if self.pass_ == "fwd" else self.case.steps[tile] - 1 - t
            if does == "load" or t < self.case.steps[tile]:  # the rest is padding
                self.tell(does, "row", layer, tile, step)

    def slot(self, does: str, words, tags) -> None:
        """The 64-bit words of a group are [2 slots, 2 numbers, BLOCK rows, BLOCK programs]."""
        (place,) = {*(words // (2 * BLOCK * BLOCK)).tolist()}
        group, parity = divmod(place, 2)
        # A poll has passed if all tags are the same: the program's own word has the one that it waits for.
        if len(tags) == 1:
            self.tell(does, "slot", *divmod(group, len(self.case.steps)), parity, *tags.tolist())

    def counter(self, address: int) -> tuple:
        """32 words a group, of which two are counters."""
        group, word = divmod((address - self.counters) // 4, 32)
        assert word in (0, 16)
        return (*(["norms"] if word else []), "counter", *divmod(group, len(self.case.steps)))


def number(x) -> int:
    """What a function of a kernel is given: a number, a constant or a tensor."""
    return int(x.handle.data.flat[0]) if hasattr(x, "handle") else int(getattr(x, "value", x))


@pytest.fixture
def recorders(monkeypatch):
    """A `Recorder` of every launch of a loop; `recorders.case` is set before."""
    from triton._C.libtriton import ir
    from triton.runtime import interpreter as stock

    from fusedlstm.engines import interpreter

    class Recorders(list):
        case: Case

    found, builder, below = Recorders(), stock.InterpreterBuilder, interpreter.operations
    load, store, atomic = (below[f"create_{name}"] for name in ("masked_load", "masked_store", "atomic_rmw"))
    replace_grid, wait, semantics = interpreter.replace_grid, exchange.wait, {}

    def recorded_grid(run_programs):
        def run(fn, arguments, programs):
            if "arrived_ptr" in arguments:
                found.append(
                    Recorder(found.case, "bwd" if "grad_preact_ptr" in arguments else "fwd", arguments, programs)
                )
            run_programs(fn, arguments, programs)

        return replace_grid(run)

    def recorded_load(self, pointers, mask, other, modifier, *more):
        result = load(self, pointers, mask, other, modifier, *more)
        if modifier == ir.CACHE_MODIFIER.CG:
            found[-1].memory("load", pointers, mask, result.data)
        return result

    def recorded_store(self, pointers, value, mask, *more):
        found[-1].memory("store", pointers, mask, value.data)
        return store(self, pointers, value, mask, *more)

    def recorded_atomic(self, operation, pointer, value, mask, sem, scope):
        assert scope == ir.MEM_SYNC_SCOPE.GPU
        name = str(sem).split(".")[-1].lower()
        if (added := number_of(value)) == 0:
            semantics[interpreter._local.program] = name
        else:
            found[-1].tell("arrive", *found[-1].counter(number_of(pointer)), added, name)
        return atomic(self, operation, pointer, value, mask, sem, scope)

    def recorded_wait(counter_ptr, target, EXCHANGE):
        wait(counter_ptr, target, EXCHANGE)
        place = found[-1].counter(number(counter_ptr))
        found[-1].tell("wait", *place, number(target), semantics.pop(interpreter._local.program))

    def number_of(handle) -> int:
        return int(handle.data.flat[0])

    monkeypatch.setattr(interpreter, "replace_grid", recorded_grid)
    monkeypatch.setitem(below, "create_masked_load", recorded_load)
    monkeypatch.setitem(below, "create_masked_store", recorded_store)
    monkeypatch.setitem(below, "create_atomic_rmw", recorded_atomic)
    monkeypatch.setattr(builder, "create_barrier", lambda self: found[-1].tell("debug_barrier"))
    monkeypatch.setattr(exchange, "wait", recorded_wait)
    return found


def run_both(case: Case) -> None:
    """Forward and backward of a case, one walker of all its tiles in a group."""
    cell, H, T = ("lstm", "layernorm_gru", "layernorm")[case.norms], BLOCK * case.group, max(case.steps)
    lengths = [steps for steps in case.steps for _ in range(BLOCK)]
    layout = {"lengths": lengths if len({*case.steps}) > 1 else None, "cell": cell}
    make = stack_inputs if case.layers > 1 else recurrence_inputs
    inputs = make(T, len(lengths), H, case.layers, torch.float32, "cpu", **layout)
    if case.zoneout:
        inputs = inputs._replace(batch=inputs.batch._replace(noise=Noise(None, (0.3, 0.4, 0.0, 0.0))))
    options = {"cell": cell, "directions": case.layers, "stack": case.layers > 1, "protocol": case.protocol}
    fwd, bwd = (tiled(pass_, len(lengths), H, "fp32", groups=1, **options) for pass_ in ("fwd", "bwd"))
    if case.acquires:
        fwd, bwd = (dataclasses.replace(plan, arch="gfx942") for plan in (fwd, bwd))
    saved = launch.recurrence_fwd(recurrence(cell), *inputs, plan=fwd)
    last = slice(-1, None)
    grads = Grads(saved.output[last].squeeze(0) if case.layers > 1 else saved.output, None, saved.h_n, saved.c_n)
    launch.recurrence_bwd(recurrence(cell), grads, saved, *inputs[1:], plan=bwd)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", CASES)
def test_the_kernels_do_what_the_model_does(recorders, name, seed):
    from fusedlstm.engines import interpreter

    case = recorders.case = CASES[name]
    with interpreter.side_by_side(seed, yield_on_memory=True):
        run_both(case)
    assert [recorder.pass_ for recorder in recorders] == ["fwd", "bwd"]
    for recorder in recorders:
        expected = dataclasses.replace(case, pass_=recorder.pass_)
        assert len(recorder.told) == len(case.programs)
        for (k, _, layer), told in recorder.told.items():
            assert told == Kernel(expected, layer, k).told(), f"{recorder.pass_}, layer {layer}, program {k}"
