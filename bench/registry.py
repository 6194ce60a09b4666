"""The providers: the implementations that are measured. A provider builds an LSTM that has the given weights.

torch is imported only when a provider is built. To add one, write a function under `@provider("name")`, here or in a
file that you pass as `--plugin`.
"""

import dataclasses
import functools
import importlib.util
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

from bench.shapes import MODES, Shape

BASELINE = "torch"
AGAIN = "torch-again"
CUDNN_STEPS = 65535  # torch.nn.LSTM on a GPU fails beyond


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


FEATURES = ("projection", "heads", "resets", "packed input")  # of `Shape.needs`


@dataclass(frozen=True)
class Provider:
    """build(shape, dtype, device, weights) -> Layer; `weights` is the state_dict of the baseline."""

    name: str
    build: Callable[[Shape, str, str, dict], Layer]
    requires: tuple[str, ...] = ()  # modules that must be importable
    features: tuple[str, ...] = ()  # some of FEATURES: what it knows beyond a dense stack
    modes: tuple[str, ...] = MODES
    serves: Callable[[Shape, str, str], str | None] = _serves_all  # the reason why a case is left out, or None
    differs: Callable[[Shape, str, str, str], str | None] = lambda *case: None  # as `serves`, asked with the mode too
    slow: bool = False  # timed last, with the baseline alone beside it

    def missing(self) -> str | None:
        """One line that says which module is missing, or None."""
        for module in self.requires:
            if importlib.util.find_spec(module) is None:
                return f"{self.name}: not measured, module {module!r} is not installed"
        return None

    def why_not(self, shape: Shape, dtype: str, device: str, mode: str) -> str | None:
        """Why this case is left out, or None."""
        if missing := self.missing():
            return missing
        if mode not in self.modes:
            return f"only {', '.join(self.modes)}"
        for need in shape.needs:
            if need not in self.features:
                return f"no {need}"
        shape = shape.one_layer if shape.alternating else shape
        return self.serves(shape, dtype, device) or self.differs(shape, dtype, device, mode)

    def layer(self, shape: Shape, dtype: str, device: str, weights: dict) -> Layer:
        """Build it for any shape; one that alternates is a stack of single layers with flips between them."""
        if not shape.alternating:
            return self.build(shape, dtype, device, weights)
        layers = []
        for k, inputs in enumerate(shape.layer_inputs):
            own = {name.replace(f"_l{k}", "_l0"): w for name, w in weights.items() if name.endswith(f"_l{k}")}
            layers.append(self.build(dataclasses.replace(shape.one_layer, I=inputs), dtype, device, own))

        def forward(x):
            for k, layer in enumerate(layers):
                x = layer.forward(x.flip(0)).flip(0) if k % 2 else layer.forward(x)
            return x

        def train(mode):
            for layer in layers:
                layer.train(mode)

        return Layer(forward, [p for layer in layers for p in layer.parameters], train)


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

    return {name: w.to(device, getattr(torch, dtype)) for name, w in _initial_values(shape).items()}


@functools.lru_cache(maxsize=1)  # the cases of a shape come one after another, and large weights take a second
def _initial_values(shape: Shape) -> dict:
    import torch

    torch.manual_seed(0)
    return torch.nn.LSTM(
        shape.I, shape.H, shape.layers, bidirectional=shape.bidirectional, proj_size=shape.proj, dtype=torch.float32
    ).state_dict()


def blocks(weight_hh, heads: int):
    """The blocks on the diagonal of a recurrent weight [4H, H]: [4H, H / heads], rows in the same order."""
    if heads == 1:
        return weight_hh
    H = weight_hh.size(1)
    split = weight_hh.reshape(4, heads, H // heads, heads, H // heads)
    return split.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).reshape(4 * H, H // heads)


def block_diagonal(weights: dict, heads: int) -> dict:
    """The same state_dict with zeros outside of those blocks."""
    import torch

    def cut(w):
        head = torch.arange(w.size(1), device=w.device) // (w.size(1) // heads)
        return w * (head.repeat(4).unsqueeze(1) == head)

    return {name: cut(w) if "weight_hh" in name else w for name, w in weights.items()}


@functools.cache
def takes(argument: str) -> bool:
    """Whether `fusedlstm.LSTM` has an argument of this name."""
    import fusedlstm

    return argument in inspect.signature(fusedlstm.Recurrent.__init__).parameters


def _serves_ours(shape, dtype, device):
    return "fusedlstm.LSTM has no num_heads" if shape.heads > 1 and not takes("num_heads") else None


def _on_gpu(device: str) -> bool:
    return device.split(":")[0] == "cuda"


@provider("fusedlstm", features=FEATURES, serves=_serves_ours)
def _fusedlstm(shape, dtype, device, weights, **kwargs):
    """On a GPU the kernels: by itself it could take cuDNN, and that would be measured against itself."""
    import fusedlstm

    if _on_gpu(device):
        kwargs.setdefault("backend", "triton")
    if shape.heads > 1:
        kwargs["num_heads"] = shape.heads
        weights = {name: blocks(w, shape.heads) if "weight_hh" in name else w for name, w in weights.items()}
    layer = _module(fusedlstm.LSTM, shape, dtype, device, weights, **kwargs)
    if not shape.resets:
        return layer
    resets = resets_of(shape, device)
    return dataclasses.replace(layer, forward=lambda x: layer.forward(x, resets=resets[: len(x)]))


@provider("torch", features=FEATURES)
def _torch(shape, dtype, device, weights):
    """Without resets, and dense where a shape has heads: it has neither."""
    import torch

    return _module(torch.nn.LSTM, shape, dtype, device, weights)


# The baseline once more: how far two timings of the same code lie apart is the noise of a case.
PROVIDERS[AGAIN] = dataclasses.replace(PROVIDERS[BASELINE], name=AGAIN)


def _serves_kernels(shape, dtype, device):
    from fusedlstm import engines

    if device == "cpu" and not engines.interpreting():
        return "needs a GPU, or TRITON_INTERPRET=1"
    return _serves_ours(shape, dtype, device)


def _where_auto_is_torch(shape, dtype, device, mode):
    import torch

    from fusedlstm import engines
    from fusedlstm.engines import aten, launch
    from fusedlstm.plan import tuned

    if not _on_gpu(device):
        return "needs a GPU: elsewhere it is fusedlstm"
    if shape.heads > 1 or shape.resets or shape.T > aten.CUDNN_STEPS:
        return "same as fusedlstm: no other engine serves"
    index = torch.device(device).index
    call = tuned.Call(
        cell="lstm",
        batch=shape.B,
        input_size=shape.I,
        hidden=shape.H,
        proj_size=shape.proj,
        layers=shape.layers,
        directions=shape.directions,
        dtype=launch.DTYPES[getattr(torch, dtype)],
        precision="tf32",  # see `worker.setup`
        layout="packed" if shape.lengths else "dense",
        training=mode != "infer",
    )
    engine, why = engines.fastest(call, torch.cuda.current_device() if index is None else index)
    return None if engine == "torch" else f"same as fusedlstm: auto is triton, {why}"


@provider("fusedlstm-auto", features=FEATURES, serves=_serves_ours, differs=_where_auto_is_torch)
def _fusedlstm_auto(shape, dtype, device, weights):
    """What a user gets who names no engine, where that is cuDNN."""
    return _fusedlstm(shape, dtype, device, weights, backend="auto")


def _where_interpreted(shape, dtype, device):
    return "same as fusedlstm on a GPU" if _on_gpu(device) else _serves_kernels(shape, dtype, device)


@provider("fusedlstm-triton", features=FEATURES, serves=_where_interpreted)
def _fusedlstm_triton(shape, dtype, device, weights):
    return _fusedlstm(shape, dtype, device, weights, backend="triton")


def _serves_recomputed(shape, dtype, device):
    return _serves_kernels(shape, dtype, device) if takes("save") else "fusedlstm.LSTM has no save"


@provider("fusedlstm-states", features=FEATURES, modes=("fwdbwd",), serves=_serves_recomputed)
def _fusedlstm_states(shape, dtype, device, weights):
    """The gates recomputed in the backward: less memory."""
    return _fusedlstm(shape, dtype, device, weights, backend="triton", save="states")


def _serves_stretches(shape, dtype, device):
    return None if device != "cpu" and shape.T > CUDNN_STEPS else f"only beyond {CUDNN_STEPS} steps, on a GPU"


@provider("cudnn-stretches", serves=_serves_stretches)
def _cudnn_stretches(shape, dtype, device, weights):
    """cuDNN by stretches of the steps that it takes."""
    return _fusedlstm(shape, dtype, device, weights, backend="torch")


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
    return None if shape.T <= 1024 else "a Python loop of more than 1024 steps"


def _compiled_serves(shape, dtype, device):
    # A compilation takes tens of seconds; one shape of each set tells enough.
    return None if shape.id in ("C1", "M1") else "compiled for C1 and M1 only"


@provider("cell-loop", slow=True, features=("resets",), serves=_loop_serves)
def _cell_loop_eager(shape, dtype, device, weights):
    return _cell_loop(shape, dtype, device, weights, compiled=False)


@provider("cell-loop-compiled", slow=True, serves=_compiled_serves)
def _cell_loop_compiled(shape, dtype, device, weights):
    return _cell_loop(shape, dtype, device, weights, compiled=True)


def _one_layer_on_gpu(shape, dtype, device):
    if device == "cpu":
        return "needs a GPU"
    return None if shape.layers == 1 and not shape.bidirectional else "one layer, one direction only"


def _leaves(weights: dict, heads: int = 1) -> list:
    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    own = {**weights, "weight_hh_l0": blocks(weights["weight_hh_l0"], heads)}
    return [own[name].detach().clone().requires_grad_() for name in names]


def _flashrnn(backend):
    """FlashRNN takes the input product ready-made; here it is added, as in every other row."""

    def build(shape, dtype, device, weights):
        from flashrnn import flashrnn
        from torch.nn.functional import linear

        weight_ih, weight_hh, bias_ih, bias_hh = leaves = _leaves(weights, shape.heads)

        def forward(x):
            preact_x = linear(x, weight_ih).transpose(0, 1)  # [B, T, 4H]
            per_head = (4, shape.heads, shape.H // shape.heads)
            gates = preact_x.reshape(shape.B, shape.T, *per_head)
            recurrent = weight_hh.reshape(*per_head, shape.H // shape.heads)
            bias = (bias_ih + bias_hh).reshape(per_head)
            states, _ = flashrnn(gates, recurrent, bias, function="lstm", backend=backend, dtype=dtype)
            return states[0].reshape(shape.B, shape.T, shape.H).transpose(0, 1)

        return Layer(forward, leaves)

    return build


for _backend in ("cuda_fused", "triton_fused"):
    _known = {"requires": ("flashrnn",), "features": ("heads",), "serves": _one_layer_on_gpu}
    provider(f"flashrnn-{_backend}", **_known)(_flashrnn(_backend))


def _haste_serves(shape, dtype, device):
    return "float32 only" if dtype != "float32" else _one_layer_on_gpu(shape, dtype, device)


@provider("haste", requires=("haste_pytorch",), serves=_haste_serves)
def _haste(shape, dtype, device, weights):
    import haste_pytorch

    lstm = haste_pytorch.LSTM(shape.I, shape.H).to(device)
    lstm.from_native_weights(*[weights[f"{n}_l0"] for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")])
    return Layer(lambda x: lstm(x)[0], list(lstm.parameters()), lstm.train)


def _fastlstm_serves(shape, dtype, device):
    if device == "cpu":
        return "needs a GPU"
    return "one direction only" if shape.bidirectional else None


@provider("fastlstm", requires=("fastlstm", "flashrnn"), serves=_fastlstm_serves)
def _fastlstm(shape, dtype, device, weights):
    import torch
    from fastlstm.lstm import FastLSTM

    lstm = FastLSTM(shape.I, shape.H, num_layers=shape.layers, device=device).to(getattr(torch, dtype))
    lstm.load_state_dict(weights)
    return Layer(lambda x: lstm(x)[0], list(lstm.parameters()), lstm.train)


@provider("torchrl", requires=("torchrl",), serves=_haste_serves)
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
