"""Measures cases in a process of its own, so that a crash, a hang or a poisoned GPU context costs one provider of one
case and not the run. Talks to `bench.run` through a pipe, in tuples whose first item names the event.
"""

import os
import traceback
from dataclasses import dataclass

from bench import environment, registry, timing
from bench.shapes import BY_ID, Shape

# Only what is grossly wrong is refused here; how exact the results are is a matter of the tests.
WRONG_ABOVE = 0.1
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}


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
    plugin: str | None = None


class _Dead(Exception):
    """The GPU context cannot be used any more."""


def _setup(settings: Settings) -> None:
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


def _by_loop(case: Case, shape: Shape, device: str, weights: dict, x, grad_output):
    """What is right where the baseline is not: a loop over cells."""
    loop = registry.PROVIDERS["cell-loop"].build(shape, case.dtype, device, weights)
    return _call(loop, shape, case.mode, x, grad_output)()


def _peak_mib(call) -> float:
    """Peak memory of one call above what was there before it: inputs and weights."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


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


def measure(case: Case, settings: Settings, send) -> None:
    """Build, check and time the providers of a case; sends its rows."""
    import torch

    shape, device = BY_ID[case.shape], settings.device
    gpu = device != "cpu"
    dtype = getattr(torch, case.dtype)
    weights = registry.baseline_weights(shape, case.dtype, device)
    x = _input(shape, shape.T, device, dtype)
    rows = _tensor(x).shape[:-1]
    grad_output = torch.randn(*rows, shape.directions * (shape.proj or shape.H), device=device, dtype=dtype)

    calls, peaks, reference = {}, {}, None
    for name in case.providers:
        send("at", name)
        provider = registry.PROVIDERS[name]
        try:
            if reason := provider.missing() or provider.serves(shape, case.dtype, device):
                send("skipped", name, reason)
                continue
            call = _call(provider.build(shape, case.dtype, device, weights), shape, case.mode, x, grad_output)
            result = call()
            runs_without_resets = shape.resets and name in (registry.BASELINE, registry.AGAIN)
            if name == registry.BASELINE:
                reference = _by_loop(case, shape, device, weights, x, grad_output) if runs_without_resets else result
            elif not runs_without_resets and reference is not None:
                error = _error(result, reference)
                if error > WRONG_ABOVE:
                    text = f"wrong result: relative error {error:.2g} against {registry.BASELINE}"
                    send("failed", name, text, "")
                    continue
            del result
            if gpu:
                peaks[name] = _peak_mib(call)
            calls[name] = call
        except Exception as error:
            send(
                "failed",
                name,
                f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}",
                traceback.format_exc(),
            )
            _check_alive(settings)
    checked = "" if reference is not None else " unchecked"
    del reference
    if not calls or (not case.write_baseline and len(calls) == 1):
        return

    send("at", "timing")
    budget_s = settings.seconds_per_case * len(calls) / 3
    suffix = (
        f" tf32={int(case.dtype == 'float32')}"
        if gpu
        else f" threads={settings.threads} wait={os.environ.get('OMP_WAIT_POLICY', 'default')}"
    )
    timed = [("", (timing.time_gpu if gpu else timing.time_cpu)(calls, budget_s))]
    if gpu and min(map(timing.statistics.median, timed[0][1].ms.values())) < timing.GRAPH_BELOW_MS:
        try:
            timed.append(("_graph", timing.time_gpu_graph(calls, budget_s)))
        except Exception as error:
            send("note", f"{case}: no graph replay, {type(error).__name__}: {str(error).splitlines()[0][:120]}")
            _check_alive(settings)
    for kind, samples in timed:
        protocol = samples.protocol + suffix + checked
        for name in samples.ms:
            if name == registry.BASELINE and not case.write_baseline:
                continue
            row = (case, shape, name)
            latency = timing.percentiles(samples.ms[name])
            send("row", _row(*row, f"latency{kind}", "ms", latency, protocol, device))
            if name != registry.BASELINE and registry.BASELINE in samples.ms:
                ratio = timing.percentiles(timing.ratios(samples, registry.BASELINE, name))
                send("row", _row(*row, f"speedup{kind}", "x", ratio, protocol, device))
            if not kind and name in peaks:
                send("row", _row(*row, "peak_memory", "MiB", (peaks[name],) * 3, protocol, device))


def roofs(settings: Settings, dtypes: list[str], send) -> None:
    """Rates that nothing here can exceed: a large matrix product per dtype, and a large copy (read plus written)."""
    import torch

    gpu = settings.device != "cpu"
    timer = timing.time_gpu if gpu else timing.time_cpu
    n, megabytes = (8192, 2048) if gpu else (1024, 128)
    shape = Shape("", 0, n, n, n, layers=0)
    calls, scale = {}, {}
    for dtype in dtypes:
        a, b = (torch.randn(n, n, device=settings.device, dtype=getattr(torch, dtype)) for _ in range(2))
        calls[dtype] = lambda a=a, b=b: a @ b
        scale[dtype] = ("matmul", "TFLOP/s", 2 * n**3 / 1e9)
    source = torch.randn(megabytes * 2**18, device=settings.device)
    target = torch.empty_like(source)
    calls["copy"] = lambda: target.copy_(source)
    scale["copy"] = ("copy", "GB/s", 2 * source.numel() * 4 / 1e6)
    samples = timer(calls, 1.0 if gpu else 0.6)
    for name, (metric, unit, amount) in scale.items():
        rates = timing.percentiles([amount / ms for ms in samples.ms[name]])
        case = Case("roof", "float32" if name == "copy" else name, "roof", ())
        row = _row(case, shape, "torch", metric, unit, rates, samples.protocol, settings.device)
        send("row", {**row, "op": "roof", "shape": metric, "T": 0, "layers": 0, "directions": 0})


def main(connection, cases: list[Case], roof_dtypes: list[str], settings: Settings) -> None:
    """Entry of the worker process."""

    def send(*event) -> None:
        connection.send(event)

    try:
        _setup(settings)
        send("ready", environment.facts(settings.device))
        if roof_dtypes:
            send("case", None)
            roofs(settings, roof_dtypes, send)
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


def warm(cases: list[tuple[str, str]], settings: Settings) -> None:
    """Compile the kernels of (shape, dtype) pairs into Triton's cache; lengths do not matter to them."""
    import torch

    _setup(settings)
    for shape_id, dtype in cases:
        shape = BY_ID[shape_id]
        try:
            layer = registry.PROVIDERS["fusedlstm"].build(shape, dtype, settings.device, {})
            x = _input(shape, min(shape.T, 2), settings.device, getattr(torch, dtype))
            output = _tensor(layer.forward(x))
            output.sum().backward()
            with torch.no_grad():
                layer.train(False)
                layer.forward(x)
            torch.cuda.synchronize()
        except Exception:  # the run itself meets it again and reports it
            traceback.print_exc()
