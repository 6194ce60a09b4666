"""Weights of other libraries, both ways: Keras, Flax, equinox, haste, xLSTM and FlashRNN.

The functions take and return arrays, so none of these libraries has to be installed. One table says for each kind of
layer which arrays it has, how their axes lie, and which gates they hold in which order. docs/migrate.md tells what
agrees and what does not.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedlstm import checks
from fusedlstm.base import Recurrent
from fusedlstm.cells import CELLS
from fusedlstm.conversion import dense_weight
from fusedlstm.modules import GRU, LSTM, RNN, SLSTM, LayerNormGRU, LayerNormLSTM, ResetBeforeGRU

Block = tuple[str, str]  # a parameter of ours and a gate; the gate of a vector [H] is ""
Arrays = dict[str, Tensor]


class _Array(NamedTuple):
    """An array of another library, as the blocks of our parameters that it holds, each [H, K] or [H].

    The axes are words of letters. A word is an axis, which runs over its letters, the last one fastest:
    p is the parameter, g the gate, n the head, u the unit of a head, and k the column, which is an input or a previous
    unit. Dense recurrent weights have one head. A letter that is absent has size 1.
    """

    name: str  # a dot enters a dict
    axes: tuple[str, ...]
    blocks: tuple[Block, ...]
    parameters: int  # the size of p

    @property
    def is_bias(self) -> bool:
        return all(parameter in ("bias_ih", "bias_hh") for parameter, _ in self.blocks)

    def holds(self, parameter: str) -> bool:
        return self.blocks[0][0] == parameter


class _Kind(NamedTuple):
    """A kind of layer.

    Args:
        cls: Our class with its equations.
        arrays: Its weights.
        optional_bias: Whether it may have no biases.
        relu: Whether it may have the rectifier in the place of tanh.
        listed: Whether its weights are a list and not a dict.
        preactivations: Whether it takes the preactivations of the input, so that `weight_ih` may be absent.
        reset_before: The kind of the same name that has the reset gate before the product.
    """

    cls: type[Recurrent]
    arrays: tuple[_Array, ...]
    optional_bias: bool = False
    relu: bool = False
    listed: bool = False
    preactivations: bool = False
    reset_before: "_Kind | None" = None

    def recurrent(self) -> _Array:
        return next(a for a in self.arrays if a.holds("weight_hh"))

    @property
    def has_heads(self) -> bool:
        return "n" in self.recurrent().axes


def _array(name: str, axes: str, *parts: str) -> _Array:
    """`parts` are parameters with their gates in order, "weight_ih:ifgo", or the name of a vector."""
    blocks = []
    for part in parts:
        parameter, _, gates = part.partition(":")
        blocks += [(parameter, gate) for gate in gates or ("",)]
    return _Array(name, tuple(axes.split()), tuple(blocks), len(parts) if "p" in axes else 1)


def _kernels(gates: str, *others: _Array) -> tuple[_Array, ...]:
    kernel = _array("kernel", "k gnu", f"weight_ih:{gates}")
    return (kernel, _array("recurrent_kernel", "k gnu", f"weight_hh:{gates}"), *others)


def _bias(gates: str) -> _Array:
    return _array("bias", "gnu", f"bias_ih:{gates}")


def _linen(gates: str, biases: str) -> tuple[_Array, ...]:
    """An array for each side and gate, such as `hf.kernel`. `biases` names those with a bias."""
    kernels = [_array(f"{s}{g}.kernel", "k gnu", f"weight_{s}h:{g}") for s in "ih" for g in gates]
    return (*kernels, *(_array(f"{name}.bias", "gnu", f"bias_{name[0]}h:{name[1]}") for name in biases.split()))


def _nnx(gates: str, biased: str) -> tuple[_Array, ...]:
    dense = [_array(f"dense_{s}.kernel", "k gnu", f"weight_{s}h:{gates}") for s in "ih"]
    return (*dense, _array(f"dense_{biased}.bias", "gnu", f"bias_{biased}h:{gates}"))


def _preactivations(cls: type[Recurrent], form: tuple[str, ...], inputs: str, gates: str, *biases: str) -> _Kind:
    """Of a library whose layer takes the input's preactivations. `weight_ih` is that of a linear layer before it.

    `form` has the names and axes of the recurrent weight and of the bias.
    """
    R, axes_R, b, axes_b = form
    recurrent, bias = _array(R, axes_R, f"weight_hh:{gates}"), _array(b, axes_b, *biases)
    return _Kind(cls, (recurrent, bias, _array("weight_ih", "gnu k", f"weight_ih:{inputs}")), preactivations=True)


_LINEN_LSTM = _Kind(LSTM, _linen("ifgo", "hi hf hg ho"))
_XLSTM = ("_recurrent_kernel_", "n gu k", "_bias_", "gnu")
_XLSTM_CUDA = ("_recurrent_kernel_", "n k gu", "_bias_", "ngu")
_FLASHRNN = ("R", "g n u k", "b", "g n u")
KINDS = {
    "keras.LSTM": _Kind(LSTM, _kernels("ifgo", _bias("ifgo")), optional_bias=True, listed=True),
    "keras.GRU": _Kind(
        GRU,
        _kernels("zrn", _array("bias", "p gnu", "bias_ih:zrn", "bias_hh:zrn")),
        optional_bias=True,
        listed=True,
        reset_before=_Kind(ResetBeforeGRU, _kernels("zrn", _bias("zrn")), optional_bias=True, listed=True),
    ),
    "keras.SimpleRNN": _Kind(RNN, _kernels("h", _bias("h")), optional_bias=True, relu=True, listed=True),
    "flax.linen.LSTMCell": _LINEN_LSTM,
    "flax.linen.OptimizedLSTMCell": _LINEN_LSTM,
    "flax.linen.GRUCell": _Kind(GRU, _linen("rzn", "ir iz in hn")),
    "flax.linen.SimpleCell": _Kind(
        RNN,
        (
            _array("i.kernel", "k gnu", "weight_ih:h"),
            _array("h.kernel", "k gnu", "weight_hh:h"),
            _array("i.bias", "gnu", "bias_ih:h"),
        ),
        relu=True,
    ),
    "flax.nnx.OptimizedLSTMCell": _Kind(LSTM, _nnx("ifgo", "h")),
    "flax.nnx.GRUCell": _Kind(GRU, _nnx("rzn", "i")),
    "flax.nnx.SimpleCell": _Kind(RNN, _nnx("h", "i"), relu=True),
    "equinox.LSTMCell": _Kind(
        LSTM,
        (
            _array("weight_ih", "gnu k", "weight_ih:ifgo"),
            _array("weight_hh", "gnu k", "weight_hh:ifgo"),
            _bias("ifgo"),
        ),
        optional_bias=True,
    ),
    "equinox.GRUCell": _Kind(
        GRU,
        (
            _array("weight_ih", "gnu k", "weight_ih:rzn"),
            _array("weight_hh", "gnu k", "weight_hh:rzn"),
            _bias("rzn"),
            _array("bias_n", "nu", "bias_hh:n"),
        ),
        optional_bias=True,
    ),
    "haste.LSTM": _Kind(LSTM, _kernels("igfo", _bias("igfo"))),
    "haste.GRU": _Kind(GRU, _kernels("zrn", _bias("zrn"), _array("recurrent_bias", "gnu", "bias_hh:zrn"))),
    "haste.IndRNN": _Kind(
        RNN,
        (
            _array("kernel", "k gnu", "weight_ih:h"),
            _array("recurrent_scale", "n", "weight_hh:h"),
            _bias("h"),
        ),
    ),
    "haste.LayerNormLSTM": _Kind(
        LayerNormLSTM,
        _kernels(
            "igfo",
            _bias("igfo"),
            _array("gamma", "p gnu", "gain_ih:igfo", "gain_hh:igfo"),
            _array("gamma_h", "nu", "gain_c"),
            _array("beta_h", "nu", "bias_c"),
        ),
    ),
    "haste.LayerNormGRU": _Kind(
        LayerNormGRU,
        _kernels(
            "zrn",
            _bias("zrn"),
            _array("recurrent_bias", "gnu", "bias_hh:zrn"),
            _array("gamma", "p gnu", "gain_ih:zrn", "gain_hh:zrn"),
        ),
    ),
    "xlstm.lstm": _preactivations(LSTM, _XLSTM, "ifgo", "ifgo", "bias_ih:ifgo"),
    "xlstm.slstm": _preactivations(SLSTM, _XLSTM, "ifgo", "ifgo", "bias_ih:ifgo"),
    "xlstm.lstm_cuda": _preactivations(LSTM, _XLSTM_CUDA, "ifgo", "ifgo", "bias_ih:ifgo"),
    "xlstm.slstm_cuda": _preactivations(SLSTM, _XLSTM_CUDA, "ifgo", "ifgo", "bias_ih:ifgo"),
    "flashrnn.lstm": _preactivations(LSTM, _FLASHRNN, "ifgo", "ifgo", "bias_ih:ifgo"),
    "flashrnn.gru": _preactivations(GRU, _FLASHRNN, "rzn", "nrz", "bias_hh:n", "bias_ih:rzn"),
    "flashrnn.elman": _preactivations(RNN, _FLASHRNN, "h", "h", "bias_ih:h"),
}
# Kinds that a user may look for.
_ABSENT = {
    "haste.LayerNormIndRNN": "no layer here has an IndRNN with norms",
    "flax.linen.MGUCell": "no layer here has its equations",
    "flashrnn.slstm": "it keeps n at 1 or more after every step, and SLSTM does not",
}
# Arguments of Keras: the value that agrees with our layers, and what else there is.
_KERAS: dict[str, tuple[Any, str]] = {
    "recurrent_activation": ("sigmoid", "the gates of our layers have no other"),
    "recurrent_dropout": (0, "Keras has other masks than recurrent_dropout= here; the weights do not depend on it"),
    "dropout": (0, "no layer here drops the input with one mask for all steps; the weights do not depend on it"),
    "go_backwards": (False, "flip the input"),
    "merge_mode": ("concat", "a bidirectional layer here joins both outputs"),
}


def load(
    kind: str,
    *layers: Mapping[str, Any] | Sequence[Any],
    configs: Sequence[Mapping[str, Any]] = (),
    **options: Any,
) -> Recurrent:
    """Build a module with the weights of one or several layers of another library.

    Example::

        H, I = 20, 10  # of a layer keras.layers.LSTM(20), whose get_weights() has these shapes
        arrays = [torch.randn(I, 4 * H).numpy(), torch.randn(H, 4 * H).numpy(), torch.zeros(4 * H).numpy()]
        lstm = fusedlstm.weights.load("keras.LSTM", arrays, batch_first=True)

    Args:
        kind: The library and the class of the layers, such as "keras.LSTM" or "flax.linen.GRUCell". docs/migrate.md
            lists all of them.
        layers: The weights of each layer, the first layer first. Several become one stack. For Keras they are the list
            `layer.get_weights()`, of a `Bidirectional` too. For the other libraries they are a dict by name, and a
            bidirectional layer is a pair of dicts, forward and backward. Dicts may be nested. The arrays are of NumPy,
            JAX or torch. Entries that are None or no arrays are ignored.
        configs: `layer.get_config()` of the layers of Keras, in any number. They are checked, because weights do not
            tell about activations and masks. A GRU with `reset_after=False` becomes a `ResetBeforeGRU`. Its bias tells
            this too. Without biases only the configuration does.
        options: More arguments for the constructor of the module, such as `batch_first` or `nonlinearity`. The sizes
            and `bias`, `bidirectional` and `num_heads` follow from the weights.

    Returns:
        The module, on the CPU, in the dtype of the weights, unless the options have others. xLSTM and FlashRNN take the
        preactivations [G * H] of the input. The module takes the same: its `weight_ih_l0` is the identity, unless there
        is an entry `weight_ih` [G * H, I], the weight of a linear layer before it, with our order of gates.

    Raises:
        ValueError: There is no such kind, an array is missing, unknown or of another shape, or a layer of this package
            does not compute the same. The text names the array or the argument, what was expected and what came.
        TypeError: The weights of a layer are no list or no dict.
    """
    of = _kind(kind)
    for number, config in enumerate(configs):
        _check_config(f"configs[{number}]", config, options.get("nonlinearity", "tanh"))
    if not layers:
        raise ValueError("layers: expected the weights of one layer or more, got none")
    if of.reset_before and _resets_before(layers, configs):
        of = of.reset_before
    stack = [_directions(of, f"layers[{number}]", layer) for number, layer in enumerate(layers)]
    named = [direction for layer in stack for direction in layer.items()]
    has_bias = _check_names(of, named)
    name, first = named[0]
    heads, DH = _heads(of, name, first)
    directions, H = len(stack[0]), heads * DH
    module = of.cls(
        _input_size(of, name, first, heads, DH),
        H,
        len(stack),
        bias=has_bias,
        bidirectional=directions == 2,
        num_heads=heads,
        **{"device": "cpu", "dtype": first[of.recurrent().name].dtype, **options},
    )
    for number, layer in enumerate(stack):
        if len(layer) != directions:
            raise ValueError(f"layers[{number}]: expected {directions} direction(s) as in layers[0], got {len(layer)}")
        for suffix, (name, arrays) in zip(("", "_reverse"), layer.items(), strict=False):
            _fill(of, module, f"{number}{suffix}", name, arrays)
    return module


def dump(kind: str, module: Recurrent) -> list[Any]:
    """Return the weights of a module as those of another library. This is the reverse of :func:`load`.

    Example::

        (arrays,) = fusedlstm.weights.dump("keras.LSTM", lstm)
        kernel, recurrent_kernel, bias = arrays  # for keras.layers.LSTM(20).set_weights

    Args:
        kind: The library and the class of the layers, as in :func:`load`.
        module: A module of a class that :func:`load` returns for this kind. A library without heads gets the weights
            of the dense layer, as :func:`fusedlstm.dense_weight` makes them.

    Returns:
        The weights of each layer, as :func:`load` takes them, in arrays of NumPy. They are copies. bfloat16 becomes
        float32. Where the other library has one bias, it is the sum of both. Zoneout, dropouts and other options are
        not weights, so they are left out.

    Raises:
        ValueError: There is no such kind, or the other library does not compute the same.
        TypeError: `module` is not of the class of this kind.
    """
    of = _kind(kind)
    if of.reset_before and isinstance(module, of.reset_before.cls):
        of = of.reset_before
    checks.instance("module", module, of.cls)
    if module.proj_size:
        raise ValueError(f"proj_size: expected 0 for {kind}, which has no projection, got {module.proj_size}")
    if not of.relu and module.cell == "rnn_relu":
        raise ValueError(f"nonlinearity: expected 'tanh' for {kind}, got 'relu'")
    if of.has_heads and "k" not in "".join(of.recurrent().axes) and module.num_heads != module.hidden_size:
        expected = f"hidden_size ({module.hidden_size})"
        raise ValueError(f"num_heads: expected {expected} for {kind}, got {module.num_heads}")
    suffixes = ("", "_reverse")[: 2 if module.bidirectional else 1]
    found = [[_arrays(kind, of, module, f"{k}{suffix}") for suffix in suffixes] for k in range(module.num_layers)]
    if of.listed:
        return [[array for arrays in layer for array in arrays.values()] for layer in found]
    nested = [tuple(map(_nested, layer)) for layer in found]
    return [layer if module.bidirectional else layer[0] for layer in nested]


def _kind(kind: str) -> _Kind:
    if kind in KINDS:
        return KINDS[kind]
    why = f": {_ABSENT[kind]}" if kind in _ABSENT else ""
    raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}{why}")


def _check_config(name: str, config: Mapping[str, Any], nonlinearity: str) -> None:
    if "layer" in config:  # of a Bidirectional, whose backward layer goes backwards
        _check_config(name, {"merge_mode": config.get("merge_mode")}, nonlinearity)
        _check_config(f"{name}['layer']", config["layer"]["config"], nonlinearity)
        backward = config.get("backward_layer") or config["layer"]
        _check_config(f"{name}['backward_layer']", {**backward["config"], "go_backwards": False}, nonlinearity)
    agrees = {**_KERAS, "activation": (nonlinearity, "our layers have tanh, and RNN also nonlinearity='relu'")}
    for argument, (expected, why) in agrees.items():
        if config.get(argument, expected) != expected:
            came = config[argument]
            raise ValueError(f"{name}: expected {argument} to be {expected!r}, got {came!r}: {why}")


def _resets_before(layers: Sequence[Any], configs: Sequence[Mapping[str, Any]]) -> bool:
    """Whether GRUs of Keras have the reset gate before the product: by a configuration, or by a bias [3H]."""
    inner = [config["layer"]["config"] if "layer" in config else config for config in configs]
    arrays = [array for layer in layers if isinstance(layer, (list, tuple)) for array in layer[2:3]]
    return any(not c.get("reset_after", True) for c in inner) or any(
        len(getattr(a, "shape", (0, 0))) == 1 for a in arrays
    )


def _directions(of: _Kind, name: str, layer: Any) -> dict[str, Arrays]:
    """The arrays of each direction, by the name that it has in errors."""
    if of.listed:
        if isinstance(layer, (Mapping, str)) or not isinstance(layer, Sequence):
            raise TypeError(f"{name}: expected a list of arrays, got {type(layer).__name__}")
        names = [a.name for a in of.arrays]
        parts: dict[str, Any] = {name: layer}
        if len(layer) in (4, 6):
            half = len(layer) // 2
            parts = {f"{name}, forward": layer[:half], f"{name}, backward": layer[half:]}
        elif len(layer) not in (2, 3):
            raise ValueError(f"{name}: expected {', '.join(names)}, or twice these, got {len(layer)} array(s)")
        for array in layer:
            if not hasattr(array, "__array__"):
                raise TypeError(f"{name}: expected a list of arrays, got one with {type(array).__name__}")
        return {key: {n: _tensor(x) for n, x in zip(names, part, strict=False)} for key, part in parts.items()}
    if isinstance(layer, (tuple, list)) and len(layer) == 2:
        parts = {f"{name}, forward": layer[0], f"{name}, backward": layer[1]}
    else:
        parts = {name: layer}
    for key, part in parts.items():
        if not isinstance(part, Mapping):
            raise TypeError(f"{key}: expected a dict of arrays, or a pair of these, got {type(part).__name__}")
    return {key: dict(_leaves(part)) for key, part in parts.items()}


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        elif hasattr(value, "__array__"):
            yield f"{prefix}{key}", _tensor(value)


def _nested(arrays: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *path, last = name.split(".")
        branch = tree
        for part in path:
            branch = branch.setdefault(part, {})
        branch[last] = array
    return tree


def _tensor(array: Any) -> Tensor:
    if isinstance(array, Tensor):
        return array.detach().cpu()
    array = array.__array__()
    if str(array.dtype) == "bfloat16":  # of the package ml_dtypes, which torch does not know
        return torch.from_numpy(array.astype("float32")).bfloat16()
    return torch.from_numpy(array.copy())


def _check_names(of: _Kind, named: list[tuple[str, Arrays]]) -> bool:
    """Check that every direction has the arrays of its kind. Returns whether there are biases."""
    has_bias = not of.optional_bias or any(a.is_bias and a.name in named[0][1] for a in of.arrays)
    wanted = [a.name for a in of.arrays if has_bias or not a.is_bias]
    optional = {"weight_ih"} if of.preactivations else set()
    for name, arrays in named:
        if {*wanted} - optional != {*arrays} - optional:
            raise ValueError(f"{name}: expected the arrays {', '.join(wanted)}, got {', '.join(arrays) or 'none'}")
    return has_bias


def _heads(of: _Kind, name: str, arrays: Arrays) -> tuple[int, int]:
    """The number of heads and the units of each, from the recurrent weight."""
    recurrent = of.recurrent()
    shape = arrays[recurrent.name].shape
    if len(shape) != len(recurrent.axes):
        expected = f"{len(recurrent.axes)} axes"
        raise ValueError(f"{name}, {recurrent.name}: expected {expected}, got shape {list(shape)}")
    sizes = dict(zip(recurrent.axes, shape, strict=True))
    return sizes.get("n", 1), sizes.get("k", 1)


def _input_size(of: _Kind, name: str, arrays: Arrays, heads: int, DH: int) -> int:
    array = next(a for a in of.arrays if a.holds("weight_ih"))
    if array.name not in arrays:
        return len(array.blocks) * heads * DH
    shape = arrays[array.name].shape
    if len(shape) != 2:
        raise ValueError(f"{name}, {array.name}: expected 2 axes, got shape {list(shape)}")
    return shape[array.axes.index("k")]


def _sizes(of: _Kind, array: _Array, module: Recurrent, layer: str) -> dict[str, int]:
    """The size of each letter of the axes."""
    heads = module.num_heads if of.has_heads else 1
    columns = 1
    if array.holds("weight_ih"):
        columns = getattr(module, f"weight_ih_l{layer}").size(1)
    elif array.holds("weight_hh"):
        columns = module.hidden_size // heads
    gates = len(array.blocks) // array.parameters
    return {"p": array.parameters, "g": gates, "n": heads, "u": module.hidden_size // heads, "k": columns}


def _fill(of: _Kind, module: Recurrent, layer: str, name: str, arrays: Arrays) -> None:
    """Copy the arrays of one direction into the parameters of a module. `layer` ends their names."""
    blocks: dict[Block, Tensor] = {}
    for array in of.arrays:
        if array.name not in arrays:
            continue
        sizes, x = _sizes(of, array, module, layer), arrays[array.name]
        expected = [math.prod(sizes[letter] for letter in word) for word in array.axes]
        if list(x.shape) != expected:
            raise ValueError(f"{name}, {array.name}: expected shape {expected}, got {list(x.shape)}")
        letters = _letters(array)
        x = x.reshape([sizes[letter] for letter in letters]).permute([letters.index(letter) for letter in "pgnuk"])
        blocks |= dict(zip(array.blocks, x.reshape(len(array.blocks), module.hidden_size, -1), strict=True))
    gates = CELLS[module.cell].gates
    with torch.no_grad():
        for key in _parameters(module, layer):
            parameter = getattr(module, f"{key}_l{layer}")
            if key == "weight_ih" and (key, gates[0]) not in blocks:
                if (rows := len(parameter)) != parameter.size(1):
                    raise ValueError(f"{name}: expected weight_ih with shape {list(parameter.shape)}, got none")
                blocks[key, ""] = torch.eye(rows, device="cpu")
            none = torch.zeros(module.hidden_size, 1, device="cpu")  # of a bias that the other library does not have
            parts = [blocks[key, ""]] if (key, "") in blocks else [blocks.get((key, g), none) for g in gates]
            parameter.copy_(torch.cat(parts).reshape(parameter.shape))


def _letters(array: _Array) -> str:
    """The letters of the axes in their order. Those that are absent come last."""
    given = "".join(array.axes)
    return given + "".join(letter for letter in "pgnuk" if letter not in given)


def _parameters(module: Recurrent, layer: str) -> list[str]:
    end = f"_l{layer}"
    return [name.removesuffix(end) for name in module._flat_weights_names if name.endswith(end)]


def _arrays(kind: str, of: _Kind, module: Recurrent, layer: str) -> dict[str, Any]:
    """The arrays of one direction of a module."""
    gates = CELLS[module.cell].gates
    taken = {block for array in of.arrays for block in array.blocks}
    blocks: dict[Block, Tensor] = {}
    for key in _parameters(module, layer):
        value = getattr(module, f"{key}_l{layer}").detach().cpu()
        if key == "weight_hh" and not of.has_heads:
            value = dense_weight(value, module.hidden_size)
        names = ("",) if (key, "") in taken else gates
        blocks |= dict(zip([(key, name) for name in names], value.chunk(len(names)), strict=True))
    if not module.bias and not of.optional_bias:
        zeros = torch.zeros_like(blocks["weight_ih", gates[0]][:, 0])
        blocks |= {block: zeros for block in taken if block[0] in ("bias_ih", "bias_hh")}
    for block in blocks.keys() - taken:
        _add_to_other(kind, module, blocks, block)
    found = {}
    for array in of.arrays:
        if array.is_bias and not module.bias and of.optional_bias:
            continue
        sizes, letters = _sizes(of, array, module, layer), _letters(array)
        x = torch.stack([blocks[block] for block in array.blocks]).reshape([sizes[letter] for letter in "pgnuk"])
        x = x.permute(["pgnuk".index(letter) for letter in letters])
        x = x.reshape([math.prod(sizes[letter] for letter in word) for word in array.axes])
        found[array.name] = (x.float() if x.dtype == torch.bfloat16 else x).numpy().copy()
    return found


def _add_to_other(kind: str, module: Recurrent, blocks: dict[Block, Tensor], block: Block) -> None:
    """Add a bias that the other library does not have to the one that it has."""
    key, gate = block
    if not CELLS[module.cell].bias_in_step or gate != "n":
        other = ("bias_ih" if key == "bias_hh" else "bias_hh", gate)
        blocks[other] = blocks[other] + blocks[block]
    elif blocks[block].any():  # r multiplies it, so it is no part of the other
        raise ValueError(f"{key}: expected zeros in the rows of n for {kind}, which has no such bias, got others")
