"""The parts of `tests/endure.py`: `python endurance.py PART,PART ENGINE DEVICE SECONDS STEPS [rehearse]`.

A part is a function that prepares and returns a `Work`. All of its kinds of steps run once before anything is counted.
So whatever is kept for a size is there by then, and nothing may grow afterwards. STEPS is T of the longest sequence. A
line of JSON says what came of a part.
"""

import functools
import gc
import itertools
import json
import multiprocessing
import os
import random
import resource
import signal
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import fusedlstm
from fusedlstm.plan import tuned
from fusedlstm.plan.problem import Problem
from support import assert_accurate, error

HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
INPUT, STEPS_A_TRAINING = 5, 3
# In the texts of torch and Python; "primitive" is all that oneDNN says, in torch.nn.LSTM too.
ABOUT_MEMORY = ("memory", "alloc", "new thread", "primitive")
LEAST_LIMIT = 1 << 16  # what the process may take beyond what it has, in bytes


class Place(NamedTuple):
    """Where a part runs, how long its longest sequence is, and whether all sizes are tiny."""

    engine: str
    device: str
    steps: int
    rehearse: bool = False

    @property
    def interpreted(self) -> bool:
        return self.engine == "triton" and self.device == "cpu"

    @property
    def few(self) -> tuple["Kind", ...]:
        """One kind for each way of the torch engine, with its masks."""
        return (KINDS[0], KINDS[10]) if self.rehearse else (KINDS[0], KINDS[1], KINDS[5], KINDS[10], KINDS[11])


class Work(NamedTuple):
    """A step with its number, which raises an error if a result is wrong. All that counts differs in the first `kinds`.

    `told` says at the end what else is known.
    """

    step: Callable[[int], None]
    kinds: int
    told: Callable[[], str] = lambda: ""


class Held(NamedTuple):
    """What a process holds."""

    memory_mib: int  # resident, and allocated on the device
    tensors: int
    handles: int
    threads: int
    caches: int  # entries

    @classmethod
    def now(cls) -> "Held":
        time.sleep(0.1)  # a thread that has been joined takes a moment to go
        for _ in range(3):
            gc.collect()
        resident = int(_lines("statm")[0].split()[1]) * resource.getpagesize()
        allocated = torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0
        tensors = sum(issubclass(type(x), Tensor) for x in gc.get_objects())
        handles, threads = (len(os.listdir(f"/proc/self/{folder}")) for folder in ("fd", "task"))
        return cls((resident + allocated) >> 20, tensors, handles, threads, _cached())


def _lines(name: str) -> list[str]:
    with open(f"/proc/self/{name}") as file:
        return file.read().splitlines()


def _cached() -> int:
    """The entries of every cache of the package: of functions, of modules, and of compiled kernels."""
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] == "fusedlstm"]
    values = {id(x): x for module in modules for name, x in vars(module).items() if not name.startswith("__")}.values()
    found = sum(len(x) for x in values if isinstance(x, (dict, set)))
    found += sum(x.cache_info().currsize for x in values if hasattr(x, "cache_info"))
    return found + sum(len(x._runs) for x in gc.get_objects() if type(x).__name__ == "Bound")


class Kind(NamedTuple):
    """A layer and the sizes of its calls, T apart."""

    layer: str = "LSTM"
    hidden: int = 12
    batch: int = 3
    dtype: torch.dtype = torch.float32
    rows: str = "dense"  # or "lengths", "resets", "packed"
    options: dict[str, Any] = {}  # noqa: RUF012 - never changed
    lengths: Sequence[int] = range(2, 41)  # T is one of them; one step is another kernel

    def module(self, place: Place, backend: str = "") -> fusedlstm.Recurrent:
        layer = getattr(fusedlstm, self.layer)
        made = layer(INPUT, self.hidden, **self.options, backend=backend or place.engine)
        return made.to(place.device, self.dtype)

    def call(self, place: Place, T: int, random: random.Random) -> tuple[Tensor, dict[str, Tensor]]:
        """The input of a call, and its other arguments."""
        generator = torch.Generator().manual_seed(random.getrandbits(32))
        x = torch.randn(T, self.batch, INPUT, generator=generator).to(self.dtype)
        lengths = torch.randint(1, T + 1, (self.batch,), generator=generator)
        lengths[0], lengths[-1] = T, 1  # a packed batch of equal lengths is a dense one
        resets = torch.rand(T, self.batch, generator=generator) < 0.2
        more = {"lengths": lengths, "packed": lengths, "resets": resets.to(place.device)}
        return x.to(place.device), {self.rows: more[self.rows]} if self.rows in more else {}


# torch keeps the code of a half-precision product for each number of rows, 240 KiB, so there are few.
FEW_LENGTHS = (2, 3, 5, 12)
KINDS = (
    Kind(),
    Kind("GRU", batch=17),
    Kind("RNN", hidden=7, options={"bidirectional": True}),
    Kind("LSTM", batch=1, hidden=20, options={"num_layers": 2}),
    Kind("LSTM", rows="packed", options={"bidirectional": True}),
    Kind("LSTM", rows="lengths", batch=5, options={"save": "states"}),
    Kind("LSTM", options={"proj_size": 5}),
    Kind("LSTM", dtype=torch.bfloat16, lengths=FEW_LENGTHS),
    Kind("GRU", dtype=torch.float16, lengths=FEW_LENGTHS, options={"num_heads": 2}),
    Kind("GRU", rows="resets", options={"save": "states", "num_layers": 2}),
    Kind("RNN", rows="packed", batch=4, options={"grad_clip": 0.01}),
    Kind("PeepholeLSTM", rows="lengths"),
    Kind("PeepholeLSTM", batch=18, options={"save": "states"}),
    Kind("CoupledLSTM", dtype=torch.bfloat16, lengths=FEW_LENGTHS, options={"bidirectional": True}),
    # Its gradients grow with T, and every error with them; the more so where few units share a norm.
    Kind("LayerNormLSTM", hidden=24, lengths=range(2, 5)),
    Kind("LayerNormGRU", hidden=24, rows="lengths"),
    Kind("SLSTM", options={"num_heads": 2}),
    Kind("LSTM", options={"zoneout": 0.1, "recurrent_dropout": 0.2}),
    Kind("GRU", rows="lengths", options={"weight_dropout": 0.3}),
)


def results(kind: Kind, module, x: Tensor, more: dict, seed: int = 0) -> dict[str, Tensor]:
    """Output, final states and all gradients of a call, by name."""
    torch.manual_seed(seed)
    for p in module.parameters():
        p.grad = None
    x = x.detach().requires_grad_()
    if kind.rows == "packed":
        packed = pack_padded_sequence(x, more["packed"], enforce_sorted=False)
        output, states = module(packed)
        output = output.data
    else:
        output, states = module(x, **more)
    states = states if isinstance(states, tuple) else (states,)
    # A gradient for everything; means, so that a sum of many steps fits into half precision.
    (output.square().mean() + sum(s.mean() for s in states)).backward()
    found = {"output": output, **{f"state {k}": s for k, s in enumerate(states)}, "grad_input": x.grad}
    found |= {f"grad {name}": p.grad for name, p in module.named_parameters()}
    return {name: value.detach() for name, value in found.items()}


def train(kind: Kind, place: Place, seed: int) -> list[float]:
    """The losses of a short training, the same for the same seed."""
    chance, losses = random.Random(seed), []
    module = kind.module(place)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
    for k in range(STEPS_A_TRAINING):
        x, more = kind.call(place, 2 + k, chance)
        output = results(kind, module, x, more)["output"]
        optimiser.step()
        losses.append(output.double().square().mean().item())
    return losses


# The parts.

GROSS = 100


def shapes(place: Place) -> Work:
    """Training at changing T, of all layers at once; some or all steps are compared with float64.

    The accuracy rule holds for the median step of a kind. A single step may be ill-conditioned, as some of a
    `LayerNormLSTM` are: it multiplies one rounding error, ours or torch's, so the ratio of both is chance. No step may
    be off by more than `GROSS` times the limit.
    """
    chance = random.Random(0)
    kinds = place.few if place.rehearse else KINDS
    modules = [kind.module(place) for kind in kinds]
    optimisers = [torch.optim.SGD(module.parameters(), lr=0.02) for module in modules]
    rivals = [[kind.module(place, "reference").to(dtype) for dtype in (kind.dtype, torch.float64)] for kind in kinds]
    most, rounds = (3, 2) if place.rehearse else (5, 4) if place.interpreted else (40, 39)
    compared_every = 1 if place.interpreted else 4  # of the interpreted rounds there are few
    compared: dict[tuple[int, str], list[tuple[float, float]]] = {}  # of a kind and a name: errors, ours and torch's

    def step(k: int) -> None:
        i, n = k % len(kinds), k // len(kinds)
        kind, module = kinds[i], modules[i]
        T = kind.lengths[n % len(kind.lengths)] if n < rounds else chance.choice(kind.lengths)
        x, more = kind.call(place, min(T, most), chance)
        ours = results(kind, module, x, more, k)
        wrong = [name for name, value in ours.items() if not value.isfinite().all()]
        assert not wrong, f"{kind}, T {len(x)}: not finite: {', '.join(wrong)}"
        if n % compared_every == 0:
            same, exact = (_copied(kind, module, rival, x, more, k) for rival in rivals[i])
            for name, value in ours.items():
                errors = error(value, exact[name]), error(same[name], exact[name])
                compared.setdefault((i, name), []).append(errors)
        optimisers[i].step()

    def told() -> str:
        for (i, name), errors in compared.items():
            ours, of_torch = zip(*errors, strict=True)
            limit = 2 * statistics.median(of_torch) + 2 * torch.finfo(kinds[i].dtype).eps
            median, worst = statistics.median(ours), max(ours)
            assert median <= limit, f"{kinds[i]}, {name}: median error {median:.2e}, limit {limit:.2e}"
            assert worst <= GROSS * limit, f"{kinds[i]}, {name}: error {worst:.2e}, limit {GROSS * limit:.2e}"
        return f"{len(compared)} tensors compared"

    return Work(step, rounds * len(kinds), told)


def _copied(kind: Kind, module, rival, x: Tensor, more: dict, seed: int) -> dict[str, Tensor]:
    rival.load_state_dict(module.state_dict())
    return results(kind, rival, x.to(next(rival.parameters()).dtype), more, seed)


def threads(place: Place) -> Work:
    """Trainings in four threads, and one module that four threads call at once: what one thread computes alone."""
    few = place.few
    alone = [train(kind, place, seed) for seed, kind in enumerate(few)]
    shared = [kind.module(place).requires_grad_(False) for kind in few]
    chance = random.Random(0)
    calls = [kind.call(place, 4, chance) for kind in few]

    def forward(i: int) -> Tensor:
        x, more = calls[i]
        packed = few[i].rows == "packed"
        input = pack_padded_sequence(x, more["packed"], enforce_sorted=False) if packed else x
        output, _ = shared[i](input, **({} if packed else more))
        return output.data if packed else output

    expected = [forward(i) for i in range(len(few))]

    def step(k: int) -> None:
        def body(n: int) -> None:
            i, together = (k + n) % len(few), k % len(few)
            found[n] = train(few[i], place, i) == alone[i] and torch.equal(forward(together), expected[together])

        found: list[bool | None] = [None] * 4
        running = [threading.Thread(target=body, args=(n,)) for n in range(4)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        assert found == [True] * 4, f"threads: expected the numbers of one thread, got {found}"

    return Work(step, len(few))


def _send(connection, kind: int, place: Place) -> None:
    _set_up()
    connection.send(train(place.few[kind], place, kind))
    connection.close()


class _Loaded(torch.utils.data.Dataset):
    """What a worker of a DataLoader computes with a module of its parent."""

    def __init__(self, place: Place) -> None:
        self.module = KINDS[0].module(place).requires_grad_(False)
        self.x, _ = KINDS[0].call(place, 4, random.Random(1))

    def __len__(self) -> int:
        return 4

    def __getitem__(self, k: int) -> Tensor:
        return self.module(self.x + k)[0]


def processes(place: Place) -> Work:
    """Processes that are forked and spawned, and the workers of a DataLoader: what this process computes."""
    few = place.few
    expected = [train(kind, place, seed) for seed, kind in enumerate(few)]
    data = _Loaded(place)
    computed = torch.stack([data[k] for k in range(len(data))])
    may_fork = place.device == "cpu"  # a process that has used a GPU may not
    every = 1 if not may_fork else 40  # a new interpreter imports torch, which takes seconds

    def step(k: int) -> None:
        if k % every == every - 1:
            started(k, "spawn")
        elif k % 3 == 2:
            loader = torch.utils.data.DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context="fork")
            found = torch.cat([*loader])
            assert torch.equal(found, computed), "DataLoader: expected the numbers of this process, got others"
        else:
            started(k, "fork")

    def started(k: int, method: str) -> None:
        context = multiprocessing.get_context(method)
        receiver, sender = context.Pipe(duplex=False)
        i = k % len(few)
        process = context.Process(target=_send, args=(sender, i, place))
        process.start()
        sender.close()
        with receiver:
            found = receiver.recv()
        process.join()
        process.close()
        assert found == expected[i], f"{method}: expected {expected[i]}, got {found}"

    return Work(step, 3 if place.rehearse else max(every, 3))


def interrupts(place: Place) -> Work:
    """An interrupt at a random moment of a forward or backward; the next call has the bits of one that had none."""
    few = place.few
    chance, caught = random.Random(0), itertools.count()
    modules = [kind.module(place) for kind in few]
    calls = [kind.call(place, 5, chance) for kind in few]
    expected = [results(kind, *of) for kind, *of in zip(few, modules, *zip(*calls, strict=True), strict=True)]
    seconds = [0.0] * len(few)

    def step(k: int) -> None:
        i = k % len(few)
        if seconds[i] and _interrupted(lambda: results(few[i], modules[i], *calls[i]), chance.uniform(0, seconds[i])):
            next(caught)
        begin = time.perf_counter()
        found = results(few[i], modules[i], *calls[i])
        seconds[i] = time.perf_counter() - begin
        differ = [name for name, value in found.items() if not torch.equal(value, expected[i][name])]
        assert not differ, f"{few[i]} after an interrupt: {', '.join(differ)}"

    return Work(step, 2 * len(few), lambda: f"{next(caught)} interrupts")


def _interrupted(call: Callable[[], object], after: float) -> bool:
    """Call, and after a time interrupt it as Ctrl-C does; whether the interrupt came before its end."""
    came = False

    def interrupt(number, frame):
        nonlocal came
        came = True
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, max(after, 1e-6))
        call()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        pass
    except Exception:  # of numpy, which makes a TypeError of an interrupt inside of a conversion
        if not came:
            raise
    return came


def tuning(place: Place) -> Work:
    """Choices that are stored while an interrupt comes: the file has all that were stored, and nothing lies beside."""
    chance, kept, caught = random.Random(0), {}, itertools.count()
    problem = Problem("lstm", 1, 64, "bf16", 1, "fwd")
    folder = tuned.path().parent
    seconds = 0.0

    def step(k: int) -> None:
        nonlocal seconds
        begin = time.perf_counter()
        key = problem._replace(batch=k % 64)
        after = chance.uniform(0, seconds) if k % 4 else 60.0
        if _interrupted(lambda: tuned.store(None, {key: {"ms": {"a": k}}}), after):
            next(caught)
        else:
            kept[tuned.words(key)] = k
            seconds = time.perf_counter() - begin
        tuned.forget()
        choices = tuned.everything()[tuned.words(tuned.place(None))]
        found = {name: choice["ms"].get("a", -1) for name, choice in choices.items()}
        lost = {name for name, at in kept.items() if found.get(name, -1) < at}
        assert not lost, f"tuning.json: {lost} were stored and are not there"
        beside = {path.name for path in folder.iterdir()} - {"tuning.json", "tuning.lock"}
        assert not beside, f"beside tuning.json: {beside}"

    return Work(step, 64, lambda: f"{next(caught)} interrupts")


def _with_little(place: Place, more: int, call: Callable[[], object]) -> None:
    """Call while the process, or the device, may take `more` bytes and no more."""
    if place.device == "cpu":
        usual = resource.getrlimit(resource.RLIMIT_AS)
        taken = int(_lines("statm")[0].split()[0]) * resource.getpagesize()
        little, lift = (taken + more, usual[1]), functools.partial(resource.setrlimit, resource.RLIMIT_AS, usual)
        try:  # no context manager: to leave one needs memory
            resource.setrlimit(resource.RLIMIT_AS, little)
            call()
        finally:
            lift()
        return
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + more) / total))
    try:
        call()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def memory(place: Place) -> Work:
    """Too little memory, from none to nearly enough: an error that says so, and the bits of before afterwards."""
    few = place.few
    chance, refused = random.Random(0), itertools.count()
    # Interpreted, one program: CPython waits for ever for a thread that has no memory to begin.
    large = [kind._replace(batch=16, hidden=16) for kind in few]
    T = 40 if place.interpreted else 500
    modules = [kind.module(place) for kind in large]
    calls = [kind.call(place, T, chance) for kind in large]
    expected = [results(kind, *of) for kind, *of in zip(large, modules, *zip(*calls, strict=True), strict=True)]
    most = T * 16 * 16 * 4 * 20  # twenty tensors like the output

    def step(k: int) -> None:
        i = k % len(large)
        more = LEAST_LIMIT if k < len(large) else int(LEAST_LIMIT * (most / LEAST_LIMIT) ** chance.random())
        try:
            _with_little(place, more, functools.partial(results, large[i], modules[i], *calls[i]))
        except (MemoryError, RuntimeError) as error:
            text = f"{type(error).__name__}: {error}"
            known = isinstance(error, MemoryError) or any(word in text for word in ABOUT_MEMORY)
            assert known, f"{large[i]} with {more} bytes: expected an error about memory, got {text}"
            next(refused)
        found = results(large[i], modules[i], *calls[i])
        differ = [name for name, value in found.items() if not torch.equal(value, expected[i][name])]
        assert not differ, f"{large[i]} after an error: {', '.join(differ)}"

    def told() -> str:
        count = next(refused)
        assert count, "memory: expected an error, got none"
        return f"{count} errors"

    return Work(step, len(large), told)


def long(place: Place) -> Work:
    """A long sequence whole and in chunks that hand their state over, beside torch's layer."""
    T, chunks = place.steps, 8
    kinds = [Kind("LSTM", 8, 2), Kind("GRU", 8, 2), Kind("GRU", 8, 2, options={"save": "states"})]
    # On a GPU so large that rows times columns do not fit into 31 bits.
    kinds = kinds if place.device == "cpu" else [kind._replace(hidden=384, batch=16) for kind in kinds]

    def run(module, x: Tensor, parts: int) -> dict[str, Tensor]:
        x = x.detach().requires_grad_()
        module.zero_grad()
        outputs, state = [], None
        for part in x.chunk(parts):
            output, state = module(part, state)
            outputs.append(output)
        output, h_n = torch.cat(outputs), state[0] if isinstance(state, tuple) else state
        (output.square().mean() + h_n.mean()).backward()
        found = {"output": output, "h_n": h_n, "grad_input": x.grad, "last steps": output[-100:]}
        found |= {f"grad {name}": p.grad for name, p in module.named_parameters()}
        return {name: value.detach().cpu() for name, value in found.items()}

    def step(k: int) -> None:
        kind = kinds[k % len(kinds)]
        module = kind.module(place)
        x, _ = kind.call(place, T, random.Random(k))
        rivals = []
        for dtype in (torch.float32, torch.float64):
            rival = getattr(torch.nn, kind.layer)(INPUT, kind.hidden)
            rival.load_state_dict(module.state_dict())
            # cuDNN takes no more than 65535 steps.
            rivals.append(run(rival.to(place.device, dtype), x.to(dtype), 1 if place.device == "cpu" else chunks))
        same, exact = rivals
        for parts in (1, chunks):
            for name, value in run(module, x, parts).items():
                assert_accurate(f"{kind}, T {T} in {parts} part(s): {name}", value, same[name], exact[name])

    return Work(step, len(kinds))


PARTS = {part.__name__: part for part in (shapes, threads, processes, interrupts, tuning, memory, long)}


def outcome(part: str, place: Place, seconds: float) -> dict[str, Any]:
    """Run a part for a time, but at least every kind of its steps once."""
    begin, count, wrong, told, before = time.monotonic(), 0, None, "", None
    stored = tuned.store(None, {Problem("gru", 1, 64, "bf16", 1, "fwd"): {"ms": {}}})
    content = stored.read_bytes()
    try:
        work = PARTS[part](place)
        while count < work.kinds or time.monotonic() < begin + seconds:
            if count == work.kinds:
                before = Held.now()
            work.step(count)
            count += 1
        before, told = before or Held.now(), work.told()
        assert part == "tuning" or stored.read_bytes() == content, f"{stored.name} has changed"
    except Exception as error:  # whatever it is, the table says it
        traceback.print_exc()
        wrong = f"{type(error).__name__}: {error}"
    return {"part": part, "count": count, "before": before, "after": Held.now(), "told": told, "wrong": wrong}


def _set_up() -> None:
    """Of every process that is not forked: settings that change the last bits."""
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # float32 is compared with float64


def main() -> None:
    parts, engine, device, seconds, steps, *rehearse = sys.argv[1:]
    _set_up()
    gc.freeze()  # what is imported by now is not looked through at every count
    for part in parts.split(","):
        found = outcome(part, Place(engine, device, int(steps), bool(rehearse)), float(seconds))
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
