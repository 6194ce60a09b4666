"""`fusedlstm.tune`: measure on your own GPU what the planner and the choice of an engine only predict.

Nothing here runs inside of a forward or a backward. You call `tune` once for a module and a typical input. Later calls
of the same sizes find the choice, in this process and in others (`fusedlstm.plan.tuned`).
"""

import contextlib
import functools
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fusedlstm import checks, engines, functional, products, timing
from fusedlstm.base import Recurrent, State, as_states
from fusedlstm.cells import CELLS
from fusedlstm.plan import PlanError, candidates, tuned
from fusedlstm.plan.problem import Problem
from fusedlstm.plan.tuned import Call

Timer = Callable[[dict[str, Callable[[], None]], float], dict[str, float]]
TRIED = 3  # plans of every exchange protocol, the predicted best


class Measured(NamedTuple):
    """One choice that :func:`tune` made.

    Attributes:
        what: A Problem if a plan was chosen for a loop, or a Call if an engine was chosen for a module.
        chosen: The fastest plan or engine.
        predicted: The plan or engine that would run without the measurement.
        ms: For everything that was tried, the milliseconds of a forward, or of a forward and a backward, of the whole
            module.
    """

    what: Problem | Call
    chosen: str
    predicted: str
    ms: dict[str, float]


def tune(
    module: Recurrent,
    input: Tensor | PackedSequence,  # as for the module's forward
    hx: State | None = None,
    *,
    lengths: Tensor | None = None,  # [B]
    resets: Tensor | None = None,  # [T, B], [B, T] or [T]
    seconds: float = 20.0,
    timer: Timer | None = None,
) -> list[Measured]:
    """Measure the plans that are predicted to be best, and the kernels beside cuDNN, and store the faster choices.

    The choices apply to every module whose calls have these sizes, dtype, directions, layout and precision, on the same
    GPU with the same driver and versions. T and the values of the tensors do not matter. Whether layers share a launch
    is not tuned. The module, its gradients and the random state stay as they are. Hooks do not run.

    Args:
        module: A layer of this package, in the mode in which it will run. Training is measured too if a parameter
            requires a gradient. In training mode the forward is timed with everything that it saves for the backward.
        input, hx, lengths, resets: The arguments of one call, as in `Recurrent.forward`, on the GPU.
        seconds: The time to measure for, in seconds. Compiling the plans takes extra time.
        timer: A function that takes named functions and a number of seconds, and returns the milliseconds of each
            function. If it is not given, device events in interleaved rounds are used, or the clock of the host if the
            kernels are interpreted.

    Returns:
        A list with everything that was measured and chosen. The choices are also stored in the file
        `fusedlstm.plan.tuned.path()`.

    Raises:
        RuntimeError: There is no GPU, the input is not on it, the kernels cannot serve the call, or another version
            wrote the file of choices.
        TypeError, ValueError: An argument is wrong. For `input`, `hx`, `lengths` and `resets` the errors are those of
            the module.
    """
    checks.instance("module", module, Recurrent)
    if not 0 < seconds < float("inf"):
        raise ValueError(f"seconds: expected a positive number, got {seconds}")
    data = input.data if isinstance(input, PackedSequence) else input
    checks.instance("input", data, Tensor)
    masked = lengths is not None or resets is not None
    dtype = functional._result_dtype(data, products.autocasts(data))
    sizes = (module.cell, module.hidden_size, 1 + bool(module.bidirectional))
    if reason := engines.why_not_triton(data.device, dtype, *sizes, heads=module.num_heads):
        raise RuntimeError(f"tune measures the kernels where they run, and cannot here: {reason}")
    from fusedlstm.engines import launch

    index = data.device.index if data.device.type == "cuda" else None
    timer = timer or functools.partial(_medians, device=data.device)
    tuned.check()  # before any time is spent
    run = _Run(module, input, hx, lengths, resets)
    # What comes first chooses the plans of the forward, which in training also saves.
    modes = [True, False] if module.training else [False, True]
    modes = modes if any(p.requires_grad for p in module.parameters()) else [False]
    limits = launch.device_limits(index)
    plans: dict[Problem, object] = {}  # chosen so far
    found, choices = [], {}
    around = torch.cuda.device(index) if index is not None else contextlib.nullcontext()
    with around, torch.random.fork_rng([] if index is None else [index]), _trial(plans) as asked:
        for training in modes:
            run("triton", training)
            new = [problem for problem in asked if problem not in plans]
            for problem in new:
                tried = _tried(problem, limits)
                calls = {name: _with(plans, problem, p, run, training) for name, p in tried.items()}
                ms = _timed(calls, timer, seconds / 2 / len(modes) / len(new))
                best = min(ms, key=ms.get)
                plans[problem] = tried[best]
                fields = {name: getattr(tried[best], name) for name in tuned.FIELDS}
                choices[problem] = {"plan": fields, "ms": ms}
                found.append(Measured(problem, best, _name(candidates(problem._replace(device_limits=limits))[0]), ms))
            call = run.call(dtype, masked, training)
            if call is not None:
                names = {name: lambda name=name, training=training: run(name, training) for name in ("triton", "torch")}
                ms = _timed(names, timer, seconds / 2 / len(modes))
                if len(ms) == 2:
                    choices[call] = {"ms": ms}
                    found.append(Measured(call, min(ms, key=ms.get), engines.predicted(call, index)[0], ms))
    tuned.store(index, choices)
    return found


class _Run:
    """One call of a module, forward or forward and backward, on copies of its inputs."""

    def __init__(self, module, input, hx, lengths, resets) -> None:
        self.module, self.lengths, self.resets = module, lengths, resets
        with torch.inference_mode(False):
            self.batch_sizes = input.batch_sizes if isinstance(input, PackedSequence) else None
            self.input, self.data = input, (input if self.batch_sizes is None else input.data).detach().clone()
            self.hx = None if hx is None else tuple(x.detach().clone() for x in as_states(hx))
        self.grads = None

    def __call__(self, backend: str, training: bool) -> None:
        module, before = self.module, self.module.backend
        module.backend = backend
        try:
            with torch.set_grad_enabled(training), torch.inference_mode(False):
                data = self.data.detach().requires_grad_(training)  # as of every layer above another
                input = data if self.batch_sizes is None else self.input._replace(data=data)
                hx = self.hx if self.hx is None or len(self.hx) > 1 else self.hx[0]
                # forward, and not a call: hooks are the user's.
                output, states = module.forward(input, hx, lengths=self.lengths, resets=self.resets)
                if training:
                    self._backward(data, [output if self.batch_sizes is None else output.data, *as_states(states)])
        finally:
            module.backend = before

    def call(self, dtype: torch.dtype, masked: bool, training: bool) -> Call | None:
        """What an engine is chosen for; None if there is no choice, or one that would pass for that of other calls.

        Lengths, resets, clipped gradients and dropouts inside of steps ATen has not, `save="states"` asks for memory,
        and one step is another kernel.
        """
        module, data = self.module, self.data
        if masked or any(module.rates) or module.save != "gates" or (training and module.grad_clip is not None):
            return None
        if self.batch_sizes is not None:
            steps, batch = len(self.batch_sizes), int(self.batch_sizes[0])
        elif data.dim() == 2:
            steps, batch = len(data), 1
        else:
            batch, steps = data.shape[:2] if module.batch_first else data.shape[1::-1]
        if steps == 1:
            return None
        states = (data.new_empty(module.num_layers, batch, module.hidden_size),)  # of which only the shape is asked
        sizes = (self.batch_sizes, masked, module.num_layers, 1 + bool(module.bidirectional), module.proj_size)
        with torch.set_grad_enabled(training):
            return functional.tuned_call(CELLS[module.cell], data, states, module._flat_weights, dtype, *sizes)

    def _backward(self, data, results) -> None:
        wanted = [data, *(p for p in self.module.parameters() if p.requires_grad)]
        if self.grads is None:
            self.grads = [torch.randn_like(x) for x in results]
        torch.autograd.grad(results, wanted, self.grads, allow_unused=True)


@contextlib.contextmanager
def _trial(plans: dict):
    """Inside of this context, loops run with `plans`. It yields a dict whose keys are the problems, in their order."""
    from fusedlstm.engines import launch

    if launch.trial is not None:
        raise RuntimeError("tune: another tune is under way in this process")
    asked: dict[Problem, None] = {}

    def trial(problem: Problem):
        asked[problem] = None
        return plans.get(problem)

    launch.trial = trial
    try:
        yield asked
    finally:
        launch.trial = None


def _tried(problem: Problem, limits) -> dict[str, object]:
    """The plans with the least predicted time for every exchange protocol, and the best with a launch per step."""
    found = {}
    for protocol in ("counter", "data"):
        try:
            ranked = candidates(problem._replace(device_limits=limits, protocol=protocol))
        except PlanError:  # what is streamed is not exchanged by data
            continue
        for p in ranked[:TRIED] + [p for p in ranked[TRIED:] if p.schedule == "stepped"]:
            found.setdefault(_name(p), p)
    return found


def _name(p) -> str:
    tiles = f"{p.block_b}x{p.block_h}x{p.block_k}{'T' if p.transposed else ''}"
    return " ".join([p.schedule, tiles, f"{p.num_warps} warps", *([] if p.local else [p.protocol])])


def _with(plans: dict, problem: Problem, p, run: _Run, training: bool) -> Callable[[], None]:
    def call() -> None:
        plans[problem] = p
        try:
            run("triton", training)
        finally:
            del plans[problem]

    return call


def _timed(calls: dict[str, Callable], timer: Timer, seconds: float) -> dict[str, float]:
    """The milliseconds of the calls that run without an error. The first run of each compiles its kernels.

    Raises:
        RuntimeError: None of them runs. Its cause is the last error.
    """
    able, last = {}, None
    for name, call in calls.items():
        try:
            call()
        except Exception as error:  # a plan too large for this compiler, a dtype that this cuDNN has not
            last = error
        else:
            able[name] = call
    if not able:
        raise RuntimeError(f"tune: none of {', '.join(calls)} runs: {type(last).__name__}: {last}") from last
    return timer(able, seconds)


def _medians(calls: dict[str, Callable], seconds: float, device: torch.device) -> dict[str, float]:
    samples = timing.take(calls, seconds, device)
    return {name: statistics.median(values) for name, values in samples.ms.items()}
