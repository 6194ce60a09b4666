"""Measure cases in a process of its own. It talks to `bench.run` through a pipe.

So a crash, a hang or a broken GPU context costs one provider of one case, and not the run. The messages are tuples
whose first item names the event.
"""

import itertools
import math
import os
import traceback
from dataclasses import dataclass

from bench import environment, expected, registry
from bench.shapes import BY_ID, Shape
from fusedlstm import timing

# Only grossly wrong results are refused here. The tests check the precision.
WRONG_ABOVE = 0.1
MIB = 2**20
COLD_BYTES = 128 * MIB  # inputs that are used in turn are this large together: twice the L2 of any GPU here
MOST_INPUTS = 8


@dataclass(frozen=True)
class Case:
    """What is timed side by side: one shape, dtype and mode, several providers (the baseline first)."""

    shape: str
    dtype: str
    mode: str
    providers: tuple[str, ...]
    write_baseline: bool = True

    def __str__(self) -> str:
        return f"{self.shape} {self.dtype} {self.mode}"

    def without(self, provider: str) -> "Case":
        left = tuple(name for name in self.providers if name != provider)
        return Case(self.shape, self.dtype, self.mode, left, self.write_baseline)


@dataclass(frozen=True)
class Settings:
    device: str
    threads: int
    seconds_per_case: float
    min_rounds: int = timing.MIN_ROUNDS
    plugin: str | None = None


class _Dead(Exception):
    """The GPU context cannot be used any more."""


def setup(settings: Settings) -> None:
    import torch

    if settings.plugin:
        registry.load_plugin(settings.plugin)
    torch.set_num_threads(settings.threads)
    if settings.device != "cpu":
        # torch.nn.LSTM multiplies float32 as TF32 by default; the input product of the others shall do the same.
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True


def _check_alive(settings: Settings) -> None:
    if settings.device == "cpu":
        return
    import torch

    try:
        torch.cuda.synchronize()
        torch.ones(8, device=settings.device).sum().item()
    except Exception as error:
        raise _Dead from error


def _call(layer: registry.Layer, shape: Shape, mode: str, x, grad_output):
    """A function without arguments that does the work of `mode` once and returns (output, gradients)."""
    import torch

    if mode == "infer":
        layer.train(False)

        def infer():
            with torch.no_grad():
                return _tensor(layer.forward(x)), ()

        return infer
    layer.train(True)
    if shape.lengths:
        x = x._replace(data=x.data.detach().requires_grad_())
        leaves = [x.data, *layer.parameters]
    else:
        x = x.detach().requires_grad_()
        leaves = [x, *layer.parameters]
    if mode == "fwd":
        return lambda: (_tensor(layer.forward(x)), ())

    def fwdbwd():
        output = _tensor(layer.forward(x))
        return output, torch.autograd.grad(output, leaves, grad_output)

    return fwdbwd


def _tensor(output):
    return output if hasattr(output, "dim") else output.data  # packed


def _input(shape: Shape, T: int, device: str, dtype):
    """Random input of `shape` with at most T steps, packed if it has lengths."""
    import torch

    x = torch.randn(T, shape.B, shape.I, device=device, dtype=dtype)
    if not shape.lengths:
        return x
    lengths = torch.tensor(shape.row_lengths).clamp(max=T)
    if T < shape.T:
        lengths[-1] = 1  # equal lengths would be served as a dense batch
    return torch.nn.utils.rnn.pack_padded_sequence(x, lengths)


def _inputs(shape: Shape, device: str, dtype):
    """Random input, and a random gradient of the output."""
    import torch

    x = _input(shape, shape.T, device, dtype)
    size = (*_tensor(x).shape[:-1], shape.directions * (shape.proj or shape.H))
    return x, torch.randn(size, device=device, dtype=dtype)


def case_call(provider: registry.Provider, case: Case, shape: Shape, device: str, weights: dict, dtype):
    """A function that does the work of a case once."""
    return _call(provider.layer(shape, case.dtype, device, weights), shape, case.mode, *_inputs(shape, device, dtype))


def input_sets(shape: Shape, itemsize: int) -> int:
    """How many sets of inputs take turns, so that none is in the L2 when its turn comes.

    What a recurrence itself reads again and again is there all the same; a single step rotates its weights too.
    """
    size = shape.T * shape.B * (shape.I + shape.directions * (shape.proj or shape.H)) * itemsize
    if shape.T == 1:
        size += 4 * shape.H * (shape.I + shape.H) * itemsize
    return max(1, min(MOST_INPUTS, math.ceil(COLD_BYTES / size)))


def _exact(case: Case, shape: Shape, device: str, weights: dict, x, grad_output):
    """What is right where `torch.nn.LSTM` computes something else, or nothing; None where its own result is right."""
    if shape.resets:
        name = "cell-loop"
    elif shape.heads > 1:
        name, weights = registry.BASELINE, registry.block_diagonal(weights, shape.heads)
    elif device != "cpu" and shape.T > registry.CUDNN_STEPS:
        name = "cudnn-stretches"
    else:
        return None
    layer = registry.PROVIDERS[name].layer(shape, case.dtype, device, weights)
    output, grads = _call(layer, shape, case.mode, x, grad_output)()
    recurrent = [False, *["weight_hh" in name for name in weights]]  # of the gradients, input first
    return output, [registry.blocks(g, shape.heads) if r else g for g, r in zip(grads, recurrent, strict=bool(grads))]


def memory_mib(call, forward=None) -> dict[str, float]:
    """Peak of one call above what was there before it (inputs and weights), and what a forward keeps beside its output.

    A training step keeps that until its backward: for `torch.nn.LSTM`, cuDNN's reserve.
    """
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    found = {"peak_memory": torch.cuda.max_memory_allocated() - before}
    if forward is not None:
        before = torch.cuda.memory_allocated()
        output, _ = forward()
        torch.cuda.synchronize()
        found["kept_memory"] = torch.cuda.memory_allocated() - before - output.numel() * output.element_size()
    return {metric: size / MIB for metric, size in found.items()}


def _error(result, reference) -> float:
    """Largest relative error of the output and of every gradient that the baseline has in the same shape."""
    pairs = [(result[0], reference[0]), *zip(result[1], reference[1], strict=False)]
    return max(registry.relative_error(a.detach(), b.detach()) for a, b in pairs if a.shape == b.shape)


def _row(case: Case, shape: Shape, provider: str, metric: str, unit: str, values, protocol: str, device: str) -> dict:
    p50, p20, p80 = (f"{value:.5g}" for value in values)
    return {
        "op": "lstm",
        "provider": provider,
        "mode": case.mode,
        "shape": shape.id,
        "T": shape.T,
        "B": shape.B,
        "I": shape.I,
        "H": shape.H,
        "layers": shape.layers,
        "directions": shape.directions,
        "dtype": case.dtype,
        "metric": metric,
        "unit": unit,
        "p50": p50,
        "p20": p20,
        "p80": p80,
        **environment.facts(device),
        "date": environment.today(),
        "protocol": protocol,
    }


class _Candidate:
    """One provider of a case: built, and called with one set of inputs after another."""

    def __init__(self, provider: registry.Provider, case: Case, shape: Shape, device: str, weights: dict, inputs: list):
        def layer():
            return provider.layer(shape, case.dtype, device, weights)

        one = layer()
        layers = [one, *[layer() if shape.T == 1 else one for _ in inputs[1:]]]
        calls = [_call(own, shape, case.mode, *given) for own, given in zip(layers, inputs, strict=True)]
        self.first = calls[0]
        self.forward = _call(one, shape, "fwd", *inputs[0]) if case.mode == "fwdbwd" else None
        turns = itertools.cycle(calls)
        self.call = lambda: next(turns)()


def measure(case: Case, settings: Settings, send) -> None:
    """Build, check and time the providers of a case; sends its rows."""
    import torch

    shape, device = BY_ID[case.shape], settings.device
    gpu = device != "cpu"
    dtype = getattr(torch, case.dtype)
    weights = registry.baseline_weights(shape, case.dtype, device)
    inputs = [_inputs(shape, device, dtype) for _ in range(input_sets(shape, dtype.itemsize) if gpu else 1)]

    def failed(name, error):
        text = str(error).splitlines()[0][:200] if str(error) else ""
        send("failed", name, f"{type(error).__name__}: {text}", traceback.format_exc())
        _check_alive(settings)

    calls, memory, reference = {}, {}, None
    try:
        reference = _exact(case, shape, device, weights, *inputs[0])
    except Exception as error:
        failed("reference", error)
    other = reference is not None  # the baseline computes something else
    for name in case.providers:
        send("at", name)
        provider = registry.PROVIDERS[name]
        try:
            if reason := provider.why_not(shape, case.dtype, device, case.mode):
                send("skipped", name, reason)
                continue
            built = _Candidate(provider, case, shape, device, weights, inputs)
            result = built.first()
            if name == registry.BASELINE and not other:
                reference = result
            elif reference is not None and not (other and name in (registry.BASELINE, registry.AGAIN)):
                error = _error(result, reference)
                if error > WRONG_ABOVE:
                    text = f"wrong result: relative error {error:.2g} against {registry.BASELINE}"
                    send("failed", name, text, "")
                    continue
            del result
            if gpu:
                memory[name] = memory_mib(built.first, built.forward)
            calls[name] = built.call
        except Exception as error:
            failed(name, error)
    checked = "" if reference is not None else " unchecked"
    del reference
    if not calls or (not case.write_baseline and len(calls) == 1):
        return

    send("at", "timing")
    budget_s = settings.seconds_per_case * len(calls) / 3
    suffix = (
        f" tf32={int(case.dtype == 'float32')} inputs={len(inputs)}"
        if gpu
        else f" {environment.threads(settings.threads)}"
    )

    def write(name, metric, unit, values, protocol):
        if name != registry.BASELINE or case.write_baseline:
            send("row", _row(case, shape, name, metric, unit, values, protocol, device))

    def write_times(kind, samples):
        for name in samples.ms:
            protocol = samples.protocol + suffix + checked + _differs(shape, name)
            write(name, f"latency{kind}", "ms", timing.percentiles(samples.ms[name]), protocol)
            if name != registry.BASELINE and registry.BASELINE in samples.ms:
                ratio = timing.percentiles(timing.ratios(samples, registry.BASELINE, name))
                write(name, f"speedup{kind}", "x", ratio, protocol)

    if gpu:
        timed = timing.time_gpu(calls, budget_s)
    else:
        timed = timing.time_cpu(calls, budget_s, settings.min_rounds)
    write_times("", timed)
    for name, found in memory.items():
        for metric, mib in found.items():
            write(name, metric, "MiB", (mib,) * 3, "torch.cuda.memory_allocated" + _differs(shape, name))
    for name in calls:
        if name.startswith("fusedlstm") and (told := expected.predicted(shape, case.dtype, case.mode, device, name)):
            write(name, "predicted", "ms", (told[0],) * 3, told[1])
    longest = timing.GRAPH_INFER_BELOW_MS if case.mode == "infer" else timing.GRAPH_BELOW_MS
    if gpu and min(map(timing.statistics.median, timed.ms.values())) < longest:
        send("at", "graph")
        try:
            replayed, refused = timing.time_gpu_graph(calls, budget_s, len(inputs))
            write_times("_graph", replayed)
            for name, reason in refused.items():
                send("note", f"{case} {name}: no graph replay, {reason}")
        except Exception as error:
            send("note", f"{case}: no graph replay, {type(error).__name__}: {str(error).splitlines()[0][:120]}")
        _check_alive(settings)


def _differs(shape: Shape, name: str) -> str:
    """What the baseline does not do in a case."""
    if name not in (registry.BASELINE, registry.AGAIN):
        return ""
    return " without resets" * (shape.resets > 0) + " dense, without heads" * (shape.heads > 1)


def main(connection, cases: list[Case], settings: Settings) -> None:
    """Entry of the worker process."""

    def send(*event) -> None:
        connection.send(event)

    try:
        setup(settings)
        send("ready", environment.facts(settings.device))
        for case in cases:
            send("case", case)
            try:
                measure(case, settings, send)
            except _Dead:
                raise
            except Exception as error:
                send("failed", "case", f"{type(error).__name__}: {str(error)[:200]}", traceback.format_exc())
                _check_alive(settings)
            send("done", case)
        send(
            "end",
        )
    except _Dead:
        os._exit(70)  # a poisoned context may hang at an orderly exit


def warm(cases: list[Case], settings: Settings) -> None:
    """Compile our kernels of these cases into Triton's cache; lengths do not matter to them."""
    import torch

    setup(settings)
    for case in cases:
        shape = BY_ID[case.shape]
        for name in case.providers:
            provider = registry.PROVIDERS[name]
            if (
                not name.startswith("fusedlstm")
                or name == "fusedlstm-auto"
                or provider.why_not(shape, case.dtype, settings.device, case.mode)
            ):
                continue
            try:
                layer = provider.layer(shape, case.dtype, settings.device, {})
                x = _input(shape, min(shape.T, 2), settings.device, getattr(torch, case.dtype))
                layer.train(case.mode != "infer")
                with torch.set_grad_enabled(case.mode != "infer"):
                    output = _tensor(layer.forward(x))
                if case.mode == "fwdbwd":
                    output.sum().backward()
                torch.cuda.synchronize()
            except Exception:  # the run itself meets it again and reports it
                traceback.print_exc()
