"""A wrong call as a value, and what must come of it: an error that names the argument.

    Bad("hx", "one state more", "GRU", "torch")

is a right call of a GRU, except for its argument `hx`. A crash, a result, and an error of another type or without the
name of the argument are faults. `python -m fuzz bad` runs such calls in a process that may die (`__main__.py`).
"""

import dataclasses
import math
import random
import re
import resource
import sys
import time
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fusedlstm
from fuzz.cases import FORMS
from fuzz.equations import STATES
from fuzz.processes import Told, calling, say

ERRORS = (TypeError, ValueError, RuntimeError, IndexError)
# What stands for the name of an argument in torch's texts.
ALIASES = {
    "input": "input|data|[Ss]equence|packed|batch_sizes",
    "packed": "input|data|batch_sizes|indices",
    "hx": "hx|hidden|state",
    "device": "device|Device",
    "dtype": "dtype|type",
    "weight_ih": "weight|parameter tensor",  # also of the error of an input that has not its dtype or device
    # Of numbers that no tensor has.
    "hidden_size": "hidden_size|Storage size|argument 'size'|negative dimension|allocate memory",
    "input_size": "input_size|Storage size|argument 'size'|negative dimension|allocate memory",
}
T, B, I, H = 3, 2, 3, 4
MOST_BYTES = 32 << 30  # of addresses


@dataclasses.dataclass(frozen=True)
class Bad:
    argument: str
    value: str
    member: str = "LSTM"
    backend: str = "auto"
    is_cell: bool = False
    form: str = "dense"
    layers: int = 1
    bidirectional: bool = False

    def __repr__(self) -> str:
        more = [f"{f.name}={v!r}" for f in dataclasses.fields(self)[4:] if (v := getattr(self, f.name)) != f.default]
        first = [repr(getattr(self, f.name)) for f in dataclasses.fields(self)[:4]]
        return f"Bad({', '.join([*first, *more])})"


# Wrong values.

NO_TENSORS: dict[str, Callable] = {
    "a text": lambda: "text",
    "a number": lambda: 1.5,
    "a list": lambda: [[1.0, 2.0]],
    "a dict": lambda: {},
    "an object": lambda: object(),
    "a class": lambda: torch.Tensor,
    "an array": lambda: np.ones((T, B, I), np.float32),
    "a function": lambda: torch.ones,
}


def _tensors_like(right: Callable) -> dict[str, Callable]:
    """Tensors that are not what `right` makes of a call."""
    return {
        "double": lambda call: right(call).double(),
        "half": lambda call: right(call).half(),
        "int64": lambda call: right(call).long(),
        "bool": lambda call: right(call).bool(),
        "complex": lambda call: right(call).to(torch.complex64),
        "float8": lambda call: right(call).to(torch.float8_e4m3fn),
        "0-D": lambda call: torch.tensor(1.0),
        "four axes more": lambda call: right(call)[(None,) * 4],
        "a feature more": lambda call: _wider(right(call), -1),
        "no features": lambda call: right(call)[..., :0],
        "nothing": lambda call: torch.empty(0),
        "on meta": lambda call: right(call).to("meta"),
        "sparse": lambda call: right(call).to_sparse(),
        "quantized": lambda call: torch.quantize_per_tensor(right(call), 0.1, 0, torch.quint8),
        "nested": lambda call: torch.nested.nested_tensor([torch.ones(2, I), torch.ones(1, I)], layout=torch.jagged),
        "nested strided": lambda call: torch.nested.nested_tensor([torch.ones(2, I), torch.ones(1, I)]),
        "oneDNN's": lambda call: right(call).to_mkldnn(),
    }


def _wider(x, dim: int):
    return torch.cat([x, x.narrow(dim, 0, 1)], dim)


def _of_any(values: dict[str, Callable]) -> dict[str, Callable]:
    """Values that do not depend on the call, as functions of it."""
    return {name: (lambda call, make=make: make()) for name, make in values.items()}


SIZES = {
    "None": None,
    "a text": "3",
    "a fraction": 2.5,
    "a whole float": 2.0,
    "NaN": float("nan"),
    "infinite": float("inf"),
    "zero": 0,
    "negative": -1,
    "2^31": 2**31,
    "2^62": 2**62,
    "2^63": 2**63,
    "2^70": 2**70,
    "-2^63": -(2**63),
    "a list": [3],
    "a tensor": torch.tensor([1, 2]),
    "complex": 3j,
}
RATES = {
    "a text": "0.5",
    "None": None,
    "NaN": float("nan"),
    "infinite": float("inf"),
    "negative": -0.1,
    "above one": 1.1,
    "2^70": 2**70,
    "10^400": 10**400,
    "complex": 0.5j,
    "a dict": {},
    "True": True,
    "a tensor": torch.tensor([0.1, 0.2, 0.3]),
}
FLAGS = {"a text": "yes", "None": None, "a number": 1, "a list": [True]}
CONSTRUCTOR: dict[str, dict[str, Any]] = {
    "input_size": {k: v for k, v in SIZES.items() if k != "2^31"},
    "hidden_size": SIZES,
    "num_layers": {k: v for k, v in SIZES.items() if not k.startswith("2^")},
    "bias": FLAGS,
    "batch_first": FLAGS,
    "dropout": RATES,
    "bidirectional": {"a text": "yes", "None": None, "a list": [True], "a number": 1},
    "proj_size": {k: v for k, v in SIZES.items() if k != "zero"},
    "device": {"a text": "nowhere", "a number": -3, "a list": ["cpu"], "a float": 1.5, "an object": object()},
    "dtype": {"a text": "float32", "an integer": torch.int64, "bool": torch.bool, "a number": 3},
    "backend": {"a text": "cuda", "None": None, "a number": 1, "a list": ["torch"], "a dict": {}},
    "grad_clip": {
        "a text": "1",
        "NaN": float("nan"),
        "zero": 0,
        "negative": -1.0,
        "minus infinity": -float("inf"),
        "10^400": 10**400,
        "complex": 1j,
        "True": True,
        "a list": [1.0],
        "a tensor": torch.ones(2),
    },
    "save": {"a text": "all", "None": None, "a number": 1, "a list": ["gates"], "a dict": {}},
    "num_heads": {**SIZES, "no divisor": 3, "more than units": 8, "True": True},
    "init": {"a text": "orthogonal", "a number": 1, "a list of numbers": [1], "a dict": {}, "a set": {1}},
    "zoneout": {
        **RATES,
        "three": (0.1, 0.1, 0.1),
        "none": (),
        "a pair of texts": ("0", "0"),
        "NaN in a pair": (0, float("nan")),
    },
    "candidate_dropout": {**RATES, "a pair": (0.1, 0.1)},
    "recurrent_dropout": {**RATES, "a pair": (0.1, 0.1)},
    "weight_dropout": {**RATES, "a pair": (0.1, 0.1)},
    "nonlinearity": {"a text": "sine", "None": None, "a number": 1, "a list": ["tanh"], "a dict": {}},
}
OF_CELLS = ("input_size", "hidden_size", "bias", "device", "dtype", "backend", "num_heads", "init", "nonlinearity")


def _input(call) -> Any:
    """What is right."""
    shapes = {"dense": (T, B, I), "batch_first": (B, T, I), "unbatched": (T, I)}
    if call.is_cell:
        return torch.ones((I,) if call.form == "unbatched" else (B, I))
    return torch.ones(shapes.get(call.form, (B + T, I)))  # the data of a packed batch


INPUT = _of_any(NO_TENSORS | {"None": lambda: None}) | _tensors_like(_input)
INPUT |= {
    "no steps": lambda call: torch.ones({"dense": (0, B, I), "batch_first": (B, 0, I)}.get(call.form, (0, I))),
    "complex double": lambda call: _input(call).to(torch.complex128),
    "two inputs": lambda call: (_input(call), _input(call)),
}


def _hx(call) -> list:
    rows = () if call.is_cell else (call.layers * (1 + call.bidirectional),)
    batch = () if call.form == "unbatched" else (B,)
    return [torch.ones(*rows, *batch, H) for _ in range(STATES[call.member])]


def _given(states: list) -> Any:
    return states[0] if len(states) == 1 else tuple(states)


def _one_state(k: int, change: Callable) -> Callable:
    """The right states, of which the first or the last is changed."""

    def make(call):
        states = _hx(call)
        states[k] = change(SimpleNamespace(right=states[k]))
        return _given(states)

    return make


HX = _of_any(NO_TENSORS) | {
    "an empty tuple": lambda call: (),
    "one state more": lambda call: (*_hx(call), _hx(call)[0]),
    "one state less": lambda call: tuple(_hx(call)[:-1]),
    "a tuple in a tuple": lambda call: (tuple(_hx(call)),),
    "a tuple of one or a tensor": lambda call: (_hx(call)[0],) if STATES[call.member] == 1 else _hx(call)[0],
    "a dict of states": lambda call: dict(zip("hcnm", _hx(call), strict=False)),
    "an iterator": lambda call: iter(_hx(call)),
}
for _place in (0, -1):
    for _name, _change in _tensors_like(lambda call: call.right).items():
        HX[f"{_name}, state {_place}"] = _one_state(_place, _change)
    for _name, _make in (NO_TENSORS | {"None": lambda: None}).items():
        HX[f"{_name}, state {_place}"] = _one_state(_place, lambda call, make=_make: make())
    HX[f"a row more, state {_place}"] = _one_state(_place, lambda call: _wider(call.right, 0))
    HX[f"an axis less, state {_place}"] = _one_state(_place, lambda call: call.right[0])


def _lengths(call) -> torch.Tensor:
    return torch.full((1 if call.form == "unbatched" else B,), T)


LENGTHS = _of_any({k: v for k, v in NO_TENSORS.items() if k != "an array"}) | {
    "an array of floats": lambda call: np.full(len(_lengths(call)), 1.0),
    "an array of texts": lambda call: np.full(len(_lengths(call)), "1"),
    "a list of floats": lambda call: [1.0] * len(_lengths(call)),
    "a list of NaN": lambda call: [float("nan")] * len(_lengths(call)),
    "a list of texts": lambda call: ["1"] * len(_lengths(call)),
    "a list of None": lambda call: [None] * len(_lengths(call)),
    "a list of lists": lambda call: [[1], [1, 2]],
    "a huge list": lambda call: [2**70] * len(_lengths(call)),
    "an empty list": lambda call: [],
    "float": lambda call: _lengths(call).float(),
    "bool": lambda call: _lengths(call).bool(),
    "complex": lambda call: _lengths(call).to(torch.complex64),
    "negative": lambda call: -_lengths(call),
    "the least": lambda call: torch.full_like(_lengths(call), -(2**63)),
    "too large": lambda call: _lengths(call) + 1,
    "the largest": lambda call: torch.full_like(_lengths(call), 2**63 - 1),
    "2^32": lambda call: torch.full_like(_lengths(call), 2**32 + 1),
    "one more": lambda call: torch.full((len(_lengths(call)) + 1,), T),
    "0-D": lambda call: torch.tensor(T) if call.form != "unbatched" else torch.tensor(T + 1),
    "2-D": lambda call: torch.full((2, B), T),
    "nothing": lambda call: torch.empty(0, dtype=torch.int64),
    "on meta": lambda call: _lengths(call).to("meta"),
    "sparse": lambda call: _lengths(call).to_sparse(),
    "uint16": lambda call: _lengths(call).to(torch.uint16),
    "quantized": lambda call: torch.quantize_per_tensor(_lengths(call).float(), 0.1, 0, torch.quint8),
}


def _resets(call) -> torch.Tensor:
    return torch.zeros(_input(call).shape[:-1], dtype=torch.bool)


RESETS = _of_any(NO_TENSORS) | {
    "complex": lambda call: _resets(call).to(torch.complex64),
    "a step more": lambda call: _wider(_resets(call), 0),
    "a sequence more": lambda call: _wider(_resets(call), -1),
    "an axis more": lambda call: _resets(call).unsqueeze(-1),
    "0-D": lambda call: torch.tensor(True),
    "nothing": lambda call: torch.empty(0, dtype=torch.bool),
    "on meta": lambda call: _resets(call).to("meta"),
    "sparse": lambda call: _resets(call).to_sparse(),
    "packed or not": lambda call: _resets(call) if call.form.startswith("packed") else _pack(call, _resets),
    "of other lengths": lambda call: PackedSequence(torch.zeros(2, dtype=torch.bool), torch.tensor([2])),
    "nested": lambda call: torch.nested.nested_tensor([torch.ones(2), torch.ones(1)], layout=torch.jagged),
}


def _pack(call, make: Callable) -> PackedSequence:
    """The lengths are T and T - 1; in any order, the longer one is the second."""
    any_order = call.form == FORMS[-1]
    lengths = torch.tensor([T - 1, T] if any_order else [T, T - 1])
    like = pack_padded_sequence(torch.ones(T, B, 1), lengths, enforce_sorted=not any_order)
    return PackedSequence(make(call), *like[1:])


def _with(**fields: Callable) -> Callable:
    """A packed batch of which some fields are replaced, after construction, which would refuse some values."""

    def make(call):
        right = _pack(call, _input)
        return right._replace(**{name: value(getattr(right, name), call) for name, value in fields.items()})

    return make


def _any(value: Any) -> Callable:
    return lambda right, call: value


PACKED = {
    "data in 3-D": _with(data=lambda x, call: x.unsqueeze(1)),
    "data in 1-D": _with(data=lambda x, call: x[:, 0]),
    "a row more": _with(data=lambda x, call: _wider(x, 0)),
    "a row less": _with(data=lambda x, call: x[1:]),
    "no rows": _with(data=lambda x, call: x[:0]),
    "a feature more": _with(data=lambda x, call: _wider(x, -1)),
    "no data": _with(data=_any(None)),
    "a text as data": _with(data=_any("text")),
    "double data": _with(data=lambda x, call: x.double()),
    "data on meta": _with(data=lambda x, call: x.to("meta")),
    "sparse data": _with(data=lambda x, call: x.to_sparse()),
    "negative order": _with(sorted_indices=_any(torch.tensor([0, -1])), unsorted_indices=_any(torch.tensor([0, 1]))),
    "one order": _with(sorted_indices=_any(None), unsorted_indices=_any(torch.tensor([1, 0]))),
    "other order": _with(sorted_indices=_any(torch.tensor([1, 0])), unsorted_indices=_any(None)),
    "orders that differ": _with(sorted_indices=_any(torch.tensor([1, 0])), unsorted_indices=_any(torch.tensor([0, 1]))),
}
for _name, _sizes in {
    "None": None,
    "a text": "21",
    "a list": [2, 2, 1],
    "a number": 5,
    "0-D": torch.tensor(5),
    "2-D": torch.tensor([[2, 2, 1]]),
    "float": torch.tensor([2.0, 2.0, 1.0]),
    "NaN": torch.tensor([2.0, float("nan"), 1.0]),
    "bool": torch.tensor([True, True, True]),
    "int32": torch.tensor([2, 2, 1], dtype=torch.int32),
    "complex": torch.tensor([2, 2, 1], dtype=torch.complex64),
    "nothing": torch.empty(0, dtype=torch.int64),
    "negative": torch.tensor([6, -1]),
    "zero": torch.tensor([2, 2, 1, 0]),
    "growing": torch.tensor([1, 2, 2]),
    "too many": torch.tensor([2, 2, 2]),
    "too few": torch.tensor([2, 2]),
    "huge": torch.tensor([2**62, 2**62, 2**62]),
    "wrapping": torch.tensor([2**62, 2**62, 2**62, 2**62, 5]),
    "the least": torch.tensor([-(2**63), 2**62, 2**62, 5]),
    "meta": torch.tensor([2, 2, 1], device="meta"),
    "sparse": torch.tensor([2, 2, 1]).to_sparse(),
}.items():
    PACKED[f"batch_sizes: {_name}"] = _with(batch_sizes=_any(_sizes))
for _name, _order in {
    "a text": "01",
    "a list": [0, 1],
    "float": torch.tensor([0.0, 1.0]),
    "bool": torch.tensor([False, True]),
    "short": torch.tensor([0]),
    "long": torch.tensor([0, 1, 2]),
    "twice": torch.tensor([1, 1]),
    "beyond": torch.tensor([0, 2]),
    "huge": torch.tensor([0, 2**62]),
    "the least": torch.tensor([0, -(2**63)]),
    "2-D": torch.tensor([[0, 1]]),
    "meta": torch.tensor([0, 1], device="meta"),
    "sparse": torch.tensor([0, 1]).to_sparse(),
}.items():
    for _field in ("sorted_indices", "unsorted_indices"):
        PACKED[f"{_field}: {_name}"] = _with(**{_field: _any(_order)})

PARAMETERS = {
    "a row more": lambda p: _wider(p, 0),
    "a row less": lambda p: p[1:],
    "one row": lambda p: p[:1],
    "a column more": lambda p: _wider(p, -1),
    "a column less": lambda p: p[..., :-1],
    "one column": lambda p: p[..., :1],
    "an axis more": lambda p: p.unsqueeze(0),
    "0-D": lambda p: p.flatten()[0],
    "nothing": lambda p: p[:0],
    "double": lambda p: p.double(),
    "half": lambda p: p.half(),
    "complex": lambda p: p.to(torch.complex64),
    "on meta": lambda p: p.to("meta"),
}
NAMES = {
    "LSTM": ("weight_ih", "weight_hh", "bias_ih", "bias_hh"),
    "PeepholeLSTM": ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_ci", "weight_cf", "weight_co"),
    "LayerNormLSTM": ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "gain_ih", "gain_hh", "gain_c", "bias_c"),
    "LayerNormGRU": ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "gain_ih", "gain_hh"),
}
VALUES: dict[str, dict[str, Any]] = {
    "input": INPUT,
    "packed": PACKED,
    "hx": HX,
    "lengths": LENGTHS,
    "resets": RESETS,
    "grad_clip of a call": dict(CONSTRUCTOR["grad_clip"].items()),
    "padding_side of a call": {"a text": "middle", "None": None, "a number": 1, "a list": ["left"], "without": "left"},
    "return_cell_states": {"of a member without": True},
    **{f"{name} of the constructor": values for name, values in CONSTRUCTOR.items()},
    **{f"{name} set later": CONSTRUCTOR[name] for name in ("backend", "save", "grad_clip", "init", "num_heads")},
    **dict.fromkeys(sorted({name for names in NAMES.values() for name in names}), PARAMETERS),
}


# Which calls there are.


def drawn(seed: str, backends: tuple[str, ...]) -> Bad:
    rng = random.Random(seed)
    while True:
        argument = rng.choice([*["input", "packed", "hx", "lengths", "resets"] * 8, *VALUES])
        found = Bad(
            argument,
            rng.choice([*VALUES[argument]]),
            rng.choice([*STATES]),
            rng.choice(backends),
            rng.random() < 0.2,
            rng.choice(FORMS),
            rng.choice((1, 1, 2)),
            rng.random() < 0.3,
        )
        if found.is_cell:
            found = dataclasses.replace(found, form=rng.choice(("dense", "unbatched")), layers=1, bidirectional=False)
        if argument == "packed" and not found.form.startswith("packed"):
            found = dataclasses.replace(found, form=rng.choice(FORMS[-2:]))
        if _is_wrong(found):
            return found


def _is_wrong(bad: Bad) -> bool:
    """Whether there is such a call, and the value is wrong in it."""
    argument, value, packed = bad.argument, bad.value, bad.form.startswith("packed")
    name, _, place = argument.partition(" of ")
    layer_only = ("packed", "lengths", "resets", "return_cell_states", "grad_clip of a call", "padding_side of a call")
    if bad.is_cell and (argument in layer_only or (place == "the constructor" and name not in OF_CELLS)):
        return False
    if argument in ("save set later", "grad_clip set later") and bad.is_cell:
        return False
    if argument == "return_cell_states":
        return STATES[bad.member] == 1
    if argument == "nonlinearity of the constructor":
        return bad.member.startswith("RNN")
    if argument == "proj_size of the constructor":
        return bad.member == "LSTM"
    if argument in PARAMETERS_OF_ALL:
        vector = argument[:4] in ("bias", "gain") or argument[:8] == "weight_c"
        return argument in NAMES.get(bad.member, NAMES["LSTM"]) and not (vector and "column" in value)
    if argument == "resets" and value == "a sequence more":
        return bad.form in ("dense", "batch_first")
    if argument == "hx" and (value == "one state less" or value.startswith("None")):
        return STATES[bad.member] > 1
    if argument == "num_heads set later":
        return value not in ("True", "a tensor")
    return _differs(bad, packed)


PARAMETERS_OF_ALL = {name for names in NAMES.values() for name in names}


def _differs(bad: Bad, packed: bool) -> bool:
    """Whether a value differs from the right one. Some do in some forms only."""
    if bad.argument == "input" and packed:
        return bad.value in NO_TENSORS and bad.value != "an array"
    if bad.argument == "input" and bad.value == "nested":  # a jagged batch, which a layer takes
        return False
    if bad.argument == "packed" and bad.value == "other order":
        return False
    return not (bad.argument in ("input", "hx") and bad.is_cell and bad.value == "no steps")


# What must come of them.


def outcome(bad: Bad) -> str | None:
    """What is wrong with what comes of a call, or None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = _call(bad, fusedlstm)
    except Exception as error:
        # A fixed attribute is as one that cannot be set.
        allowed = AttributeError if bad.argument == "num_heads set later" else ERRORS
        name = bad.argument.partition(" of ")[0].partition(" set ")[0]
        text = str(error)
        named = isinstance(error, allowed) and re.search(ALIASES.get(name, name), text)
        return None if named or _torchs(bad) == _told(error) else f"{type(error).__name__}: {text[:200]}"
    if bad.argument.endswith(" of the constructor") and _torchs(bad) is None:
        return None  # as in torch.nn, which takes what counts as true or false
    return f"a result: {type(result).__name__}"


def _torchs(bad: Bad) -> tuple[type, str] | None:
    """The error of torch.nn, or None."""
    if bad.member.partition(" ")[0] not in ("LSTM", "GRU", "RNN"):
        bad = dataclasses.replace(bad, member="LSTM")
    try:
        _call(bad, nn)
    except Exception as error:
        return _told(error)
    return None


def _told(error: Exception) -> tuple[type, str]:
    """What an error says, but for the numbers: other members have more gates."""
    return type(error), re.sub(r"\d+", "#", str(error))


def _call(bad: Bad, library) -> Any:
    argument, _, place = bad.argument.partition(" of ")
    options = {"input_size": I, "hidden_size": H}
    name, _, nonlinearity = bad.member.partition(" ")
    options |= {"nonlinearity": nonlinearity} if nonlinearity else {}
    if not bad.is_cell:
        options |= {
            "num_layers": bad.layers,
            "bidirectional": bad.bidirectional,
            "batch_first": bad.form == "batch_first",
        }
    if library is fusedlstm:
        options |= {"backend": bad.backend}
    if place == "the constructor":
        options[argument] = VALUES[bad.argument][bad.value]
    module = getattr(library, name + ("Cell" if bad.is_cell else ""))(**options)
    if place == "the constructor":
        return module
    values = VALUES[bad.argument]
    if bad.argument.endswith(" set later"):
        setattr(module, bad.argument.partition(" ")[0], values[bad.value])
        return module
    if bad.argument in PARAMETERS_OF_ALL:
        own = bad.argument + ("" if bad.is_cell else "_l0")
        setattr(module, own, nn.Parameter(values[bad.value](getattr(module, own).detach())))
    make = values[bad.value] if bad.argument in ("input", "packed", "hx", "lengths", "resets") else None
    x = make(bad) if bad.argument in ("input", "packed") else None
    if bad.argument not in ("input", "packed"):
        x = _pack(bad, _input) if bad.form.startswith("packed") else _input(bad)
    hx = make(bad) if bad.argument == "hx" else None
    more = {bad.argument: make(bad)} if bad.argument in ("lengths", "resets") else {}
    if place == "a call":
        more = {argument: values[bad.value]}
    if bad.argument == "return_cell_states":
        more = {"return_cell_states": True}
    return module(x, hx, **more)


# In a process that may die.


def run(seed: str, backends: tuple[str, ...], count: int, seconds: float = math.inf, interpret: bool = False) -> Told:
    """Make wrong calls in other processes. If one dies, the next begins with the call after."""
    told, end = Told(), time.monotonic() + seconds
    while (first := sum(told.made.values())) < count and time.monotonic() < end:
        arguments = (seed, ",".join(backends), first, count, end)
        told.follow("fuzz.bad", arguments, interpret)
    return told


def _child(seed: str, backends: str, first: str, count: str, end: str) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))  # sizes are huge on purpose
    for k in range(int(first), int(count)):
        if time.monotonic() > float(end):
            return
        bad = drawn(f"{seed} {k}", tuple(backends.split(",")))
        with calling(repr(bad), bad.backend, bad.member):
            what = outcome(bad)
        if what:
            say("fault", repr(bad), what)


if __name__ == "__main__":
    torch.set_num_threads(1)
    _child(*sys.argv[1:])
