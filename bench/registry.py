"""Who is measured. A provider builds a runnable LSTM that holds the given weights; torch is imported only then.

To add one: write a function under `@provider("name")`, here or in a file given to `--plugin`.
"""

import dataclasses
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass

from bench.shapes import Shape

BASELINE = "torch"
AGAIN = "torch-again"


@dataclass(frozen=True)
class Layer:
    """A built provider.

    forward: input [T, B, I] -> output [T, B, D * H], with h_0 = c_0 = 0; packed for a shape with lengths, cut by
        `resets_of` for a shape with resets.
    parameters: every leaf whose gradient a training step computes.
    train: switches between training and inference.
    """

    forward: Callable
    parameters: list
    train: Callable[[bool], object] = lambda mode: None


def _serves_all(shape: Shape, dtype: str, device: str) -> str | None:
    return None


def _dense(serves=_serves_all):
    """The same, for providers that know neither packed input nor projections nor resets."""

    def dense(shape, dtype, device):
        for needed, what in ((shape.lengths, "packed input"), (shape.proj, "projection"), (shape.resets, "resets")):
            if needed:
                return f"no {what}"
        return serves(shape, dtype, device)

    return dense


@dataclass(frozen=True)
class Provider:
    """build(shape, dtype, device, weights) -> Layer; `weights` is the state_dict of the baseline."""

    name: str
    build: Callable[[Shape, str, str, dict], Layer]
    requires: tuple[str, ...] = ()  # modules that must be importable
    serves: Callable[[Shape, str, str], str | None] = _serves_all  # the reason why a case is left out, or None
    slow: bool = False  # timed last, with the baseline alone beside it

    def missing(self) -> str | None:
        """One line that says which module is missing, or None."""
        for module in self.requires:
            if importlib.util.find_spec(module) is None:
                return f"{self.name}: not measured, module {module!r} is not installed"
        return None


PROVIDERS: dict[str, Provider] = {}


def provider(name: str, **kwargs):
    """Register the decorated build function under `name`."""

    def register(build):
        PROVIDERS[name] = Provider(name, build, **kwargs)
        return build

    return register


def load_plugin(path: str) -> None:
    """Run a Python file that registers more providers."""
    spec = importlib.util.spec_from_file_location("bench_plugin", path)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def resets_of(shape: Shape, device: str):
    """Where the sequences of a shape are cut, [T, B] bool: the same every time."""
    import torch

    return (torch.rand(shape.T, shape.B, generator=torch.Generator().manual_seed(0)) < shape.resets).to(device)


def _module(cls, shape: Shape, dtype: str, device: str, weights: dict, **kwargs) -> Layer:
    import torch

    lstm = cls(
        shape.I,
        shape.H,
        shape.layers,
        bidirectional=shape.bidirectional,
        proj_size=shape.proj,
        device=device,
        dtype=getattr(torch, dtype),
        **kwargs,
    )
    if weights:
        lstm.load_state_dict(weights)
    return Layer(lambda x, **masks: lstm(x, **masks)[0], list(lstm.parameters()), lstm.train)


def baseline_weights(shape: Shape, dtype: str, device: str) -> dict:
    """The state_dict that all providers share: `torch.nn.LSTM`'s own initial values, seed 0."""
    import torch

    torch.manual_seed(0)
    lstm = torch.nn.LSTM(
        shape.I, shape.H, shape.layers, bidirectional=shape.bidirectional, proj_size=shape.proj, dtype=torch.float32
    )
    return {name: w.to(device, getattr(torch, dtype)) for name, w in lstm.state_dict().items()}


@provider("fusedlstm")
def _fusedlstm(shape, dtype, device, weights, **kwargs):
    import fusedlstm

    layer = _module(fusedlstm.LSTM, shape, dtype, device, weights, **kwargs)
    if not shape.resets:
        return layer
    resets = resets_of(shape, device)
    return dataclasses.replace(layer, forward=lambda x: layer.forward(x, resets=resets[: len(x)]))


@provider("torch")
def _torch(shape, dtype, device, weights):
    import torch

    return _module(torch.nn.LSTM, shape, dtype, device, weights)


# The baseline once more: how far two timings of the same code lie apart is the noise of a case.
PROVIDERS[AGAIN] = Provider(AGAIN, PROVIDERS["torch"].build)


def _where_auto_differs(shape, dtype, device):
    if device == "cpu":
        return "needs a GPU"
    import torch

    from fusedlstm import engines

    if engines.choose("auto", torch.device(device), getattr(torch, dtype)) == "triton":
        return "same as fusedlstm, whose auto is triton here"
    return None


@provider("fusedlstm-triton", serves=_where_auto_differs)
def _fusedlstm_triton(shape, dtype, device, weights):
    return _fusedlstm(shape, dtype, device, weights, backend="triton")


def _where_memory_is_claimed(shape, dtype, device):
    if not device.startswith("cuda"):
        return "ATen decides what it keeps"
    return None if shape.id in ("L1", "F1") else "memory is measured at L1 and F1"


@provider("fusedlstm-states", serves=_where_memory_is_claimed)
def _fusedlstm_states(shape, dtype, device, weights):
    """Its peak_memory, beside that of `torch.nn.LSTM`, is what `fusedlstm.memory` foretells, with the gradients."""
    return _fusedlstm(shape, dtype, device, weights, save="states")


def _cell_loop(shape, dtype, device, weights, compiled):
    import torch

    cells = []
    for layer, inputs in enumerate(shape.layer_inputs):
        for suffix in ("", "_reverse")[: shape.directions]:
            cell = torch.nn.LSTMCell(inputs, shape.H, device=device, dtype=getattr(torch, dtype))
            names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            cell.load_state_dict({name: weights[f"{name}_l{layer}{suffix}"] for name in names})
            cells.append(cell)
    # The step is compiled and not the loop: an unrolled graph of T steps takes minutes to compile.
    if compiled:
        torch._dynamo.reset()  # every case builds new cells, and Dynamo counts them all against its limit
    steps = [torch.compile(cell, dynamic=False) if compiled else cell for cell in cells]
    keep = (~resets_of(shape, device)).to(getattr(torch, dtype)).unsqueeze(-1)  # [T, B, 1]

    def forward(x):
        for layer in range(shape.layers):
            outputs = []
            for direction in range(shape.directions):
                step = steps[layer * shape.directions + direction]
                h = c = x.new_zeros(x.size(1), shape.H)
                order = range(len(x)) if direction == 0 else range(len(x) - 1, -1, -1)
                hs = []
                for t in order:
                    if shape.resets and 0 < t + direction < len(x):
                        h, c = h * keep[t + direction], c * keep[t + direction]
                    h, c = step(x[t], (h, c))
                    hs.append(h)
                outputs.append(torch.stack(hs if direction == 0 else hs[::-1]))
            x = outputs[0] if shape.directions == 1 else torch.cat(outputs, -1)
        return x

    return Layer(forward, [p for cell in cells for p in cell.parameters()])


def _loop_serves(shape, dtype, device):
    if shape.resets:
        return None
    return _dense()(shape, dtype, device) or (None if shape.T <= 1024 else "a Python loop of more than 1024 steps")


def _compiled_serves(shape, dtype, device):
    # A compilation takes tens of seconds; one shape of each set tells enough.
    return None if shape.id in ("C1", "M1") else "compiled for C1 and M1 only"


@provider("cell-loop", slow=True, serves=_loop_serves)
def _cell_loop_eager(shape, dtype, device, weights):
    return _cell_loop(shape, dtype, device, weights, compiled=False)


@provider("cell-loop-compiled", slow=True, serves=_dense(_compiled_serves))
def _cell_loop_compiled(shape, dtype, device, weights):
    return _cell_loop(shape, dtype, device, weights, compiled=True)


def _one_layer_on_gpu(shape, dtype, device):
    if device == "cpu":
        return "needs a GPU"
    return None if shape.layers == 1 and not shape.bidirectional else "one layer, one direction only"


def _leaves(weights: dict) -> list:
    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    return [weights[name].detach().clone().requires_grad_() for name in names]


def _flashrnn(backend):
    """FlashRNN takes the input product ready-made; here it is added, as in every other row."""

    def build(shape, dtype, device, weights):
        from flashrnn import flashrnn
        from torch.nn.functional import linear

        weight_ih, weight_hh, bias_ih, bias_hh = leaves = _leaves(weights)

        def forward(x):
            preact_x = linear(x, weight_ih).transpose(0, 1)  # [B, T, 4H]
            gates = preact_x.reshape(shape.B, shape.T, 4, shape.heads, shape.H // shape.heads)
            recurrent = weight_hh.reshape(4, 1, shape.H, shape.H)
            bias = (bias_ih + bias_hh).reshape(4, 1, shape.H)
            states, _ = flashrnn(gates, recurrent, bias, function="lstm", backend=backend, dtype=dtype)
            return states[0].reshape(shape.B, shape.T, shape.H).transpose(0, 1)

        return Layer(forward, leaves)

    return build


for _backend in ("cuda_fused", "triton_fused"):
    provider(f"flashrnn-{_backend}", requires=("flashrnn",), serves=_dense(_one_layer_on_gpu))(_flashrnn(_backend))


def _haste_serves(shape, dtype, device):
    return "float32 only" if dtype != "float32" else _one_layer_on_gpu(shape, dtype, device)


@provider("haste", requires=("haste_pytorch",), serves=_dense(_haste_serves))
def _haste(shape, dtype, device, weights):
    import haste_pytorch

    lstm = haste_pytorch.LSTM(shape.I, shape.H).to(device)
    lstm.from_native_weights(*[weights[f"{n}_l0"] for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")])
    return Layer(lambda x: lstm(x)[0], list(lstm.parameters()), lstm.train)


def _fastlstm_serves(shape, dtype, device):
    if device == "cpu":
        return "needs a GPU"
    return "one direction only" if shape.bidirectional else None


@provider("fastlstm", requires=("fastlstm", "flashrnn"), serves=_dense(_fastlstm_serves))
def _fastlstm(shape, dtype, device, weights):
    import torch
    from fastlstm.lstm import FastLSTM

    lstm = FastLSTM(shape.I, shape.H, num_layers=shape.layers, device=device).to(getattr(torch, dtype))
    lstm.load_state_dict(weights)
    return Layer(lambda x: lstm(x)[0], list(lstm.parameters()), lstm.train)


@provider("torchrl", requires=("torchrl",), serves=_dense(_haste_serves))
def _torchrl(shape, dtype, device, weights):
    import torch
    from torchrl.modules.tensordict_module._rnn_triton import lstm_triton

    leaves = _leaves(weights)
    state = torch.zeros(shape.B, shape.T, shape.H, device=device)
    is_init = torch.zeros(shape.B, shape.T, dtype=torch.bool, device=device)

    def forward(x):
        x = x.transpose(0, 1).contiguous()
        return lstm_triton(x, state, state, *leaves, is_init, input_precision="tf32")[0].transpose(0, 1)

    return Layer(forward, leaves)


def select(names: list[str] | None) -> list[Provider]:
    """Providers by name, or all; the baseline always, and first.

    Raises:
        KeyError: no provider of that name; the text lists those there are.
    """
    for name in names or ():
        if name not in PROVIDERS:
            raise KeyError(f"provider {name!r}: expected one of {', '.join(PROVIDERS)}")
    chosen = [p for name, p in PROVIDERS.items() if not names or name in names]
    baseline = PROVIDERS[BASELINE]
    return [baseline, *[p for p in chosen if p is not baseline]]


def relative_error(value, reference) -> float:
    """||value - reference|| / ||reference|| in float64; infinite if anything is not finite."""
    difference = (value.double() - reference.double()).norm().item()
    error = difference / max(reference.double().norm().item(), 1e-300)
    return error if math.isfinite(error) else math.inf
