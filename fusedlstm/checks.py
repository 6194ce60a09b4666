"""The errors that a user can cause. If torch.nn has an error for it, its type and text are the same."""

import importlib
import itertools
import numbers
import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fusedlstm import cells, engines, products, transforms
from fusedlstm.engines import onnx
from fusedlstm.noise import Rates

# Whether values on a device are checked, which waits for the device.
DEBUG = os.environ.get("FUSEDLSTM_DEBUG") == "1"


def backend(value: str) -> str:
    if value not in engines.BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(engines.BACKENDS)}, got {value!r}")
    return value


def grad_clip(value: float | None) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"grad_clip: expected a number or None, got {type(value).__name__}")
    if not value > 0:
        raise ValueError(f"grad_clip: expected a number above 0, got {value}")
    return _float("grad_clip", value)


def _float(name: str, value: numbers.Real) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name}: expected a number that a float can hold, got a larger one") from None


def save(value: str) -> str:
    if value not in ("gates", "states"):
        raise ValueError(f"save: expected gates or states, got {value!r}")
    return value


def num_heads(value: int, hidden_size: int, proj_size: int = 0, cell: str | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"num_heads: expected an integer, got {type(value).__name__}")
    if value < 1 or hidden_size % value:
        raise ValueError(f"num_heads: expected a positive divisor of hidden_size ({hidden_size}), got {value}")
    if value > 1 and proj_size:
        raise ValueError(
            f"num_heads: expected 1 with proj_size={proj_size}, which mixes the units of all heads, got {value}"
        )
    if value > 1 and cell is not None and cells.CELLS[cell].norms:
        raise ValueError(f"num_heads: expected 1 of {cell}, whose norms mix the units of all heads, got {value}")
    return int(value)


def rates(cell: str, zoneout, candidate, recurrent, weight, proj_size: int = 0) -> Rates:
    """The probabilities for `fusedlstm.noise`, from the arguments of a layer."""
    both = zoneout if isinstance(zoneout, (tuple, list)) else (zoneout, zoneout)
    if len(both) != 2:
        raise ValueError(f"zoneout: expected a probability or two, of h and of the other states, got {len(both)}")
    found = {"zoneout": both[0], "zoneout of the states beside h": both[1], "candidate_dropout": candidate}
    found |= {"recurrent_dropout": recurrent, "weight_dropout": weight}
    for name, rate in found.items():
        if isinstance(rate, bool) or not isinstance(rate, numbers.Real) or not 0 <= _float(name, rate) <= 1:
            raise ValueError(f"{name}: expected a probability in [0, 1], got {rate!r}")
    equations = cells.CELLS[cell].equations
    if any(both) and equations.update is None and equations.step_backward is not None:
        raise ValueError(
            f"zoneout: expected 0 for the cell {cell!r}, whose state does not follow from its gates, got {zoneout}"
        )
    if any(found.values()) and proj_size:
        raise ValueError(f"zoneout and dropouts of a step: expected 0 with proj_size={proj_size}, got {found}")
    return Rates(*map(float, found.values()))


def nonlinearity(value: str) -> str:
    if value not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity '{value}'. Select from 'tanh' or 'relu'.")
    return value


def cell_of_nonlinearity(value: str) -> str:
    """The name of the cell of an RNNCell. Its error differs from that of an RNN."""
    if value not in ("tanh", "relu"):
        raise RuntimeError(f"Unknown nonlinearity: {value}")
    return f"rnn_{value}"


def cell(value: str) -> str:
    if value not in cells.CELLS:
        raise ValueError(f"cell: expected one of {', '.join(cells.CELLS)}, got {value!r}")
    return value


def wanted_states(cell: str, cell_states: bool, all_states: bool) -> None:
    if cell_states and not cells.CELLS[cell].num_cell_states:
        raise ValueError(f"return_cell_states: expected False, for {cell} has no state beside h, which is the output")
    if cell_states and all_states:
        raise ValueError("return_cell_states: expected False with return_states, which has these states too, got True")


def padding_side(value: str, lengths: Tensor | None) -> str:
    if value not in ("right", "left"):
        raise ValueError(f"padding_side: expected right or left, got {value!r}")
    if value == "left" and lengths is None:
        raise ValueError("padding_side: expected right without lengths, which say where the padding is, got 'left'")
    return value


def init(value) -> tuple:
    """The functions that change a module's initial values."""
    found = (value,) if callable(value) else () if value is None else value
    if not isinstance(found, list | tuple) or not all(map(callable, found)):
        raise TypeError(f"init: expected a function of the module, several, or None, got {value!r}")
    return tuple(found)


def recurrent(module) -> cells.Cell:
    """The cell of one of our layers or cells."""
    found = getattr(module, "cell", None)
    if not isinstance(module, nn.RNNBase | nn.RNNCellBase) or found is None:
        raise TypeError(f"module: expected a layer or a cell of fusedlstm, got {type(module).__name__}")
    return cells.CELLS[found]


def keeping_gates(module, known) -> list[str]:
    """The gates that decide what the state keeps, in the order of `known`."""
    of = recurrent(module)
    if not (found := [name for name in known if name in of.gates]):
        raise ValueError(f"module: expected a cell with a gate that keeps the state, got {of.name}, which has none")
    return found


def biases(module) -> list[tuple[Tensor, Tensor]]:
    """bias_ih and bias_hh of every layer and direction."""
    named = dict(module.named_parameters(recurse=False))
    found = [(bias, named[name.replace("_ih", "_hh")]) for name, bias in named.items() if name.startswith("bias_ih")]
    if not found:
        raise ValueError("module: expected one with biases, got one without")
    return found


def longest(value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"longest: expected a number of steps, got {type(value).__name__}")
    if value < 2:
        raise ValueError(f"longest: expected at least 2 steps, got {value}")


def unchanged(name: str, before: object, value: object) -> None:
    """Check that an attribute that is fixed at construction does not change."""
    if value != before:
        raise AttributeError(f"{name}: expected {before!r}, as the module was built, got {value!r}")


def instance(name: str, value, cls: type) -> None:
    if not isinstance(value, cls):
        raise TypeError(f"{name}: expected a {cls.__name__}, got {type(value).__name__}")


def dense(name: str, value) -> None:
    """Check that a value is a tensor with strides: not a sparse or a nested one, nor one of oneDNN."""
    instance(name, value, Tensor)
    if value.layout is not torch.strided or value.is_nested:
        kind = f"a nested one ({value.layout})" if value.is_nested else str(value.layout)
        raise ValueError(f"{name}: expected a dense tensor, got {kind}")


def module(model) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    return model


def _cell_of(module) -> cells.Cell:
    """The cell of one of our modules, or of one of torch's layers, which have a mode."""
    return cells.CELLS[getattr(module, "cell", None) or module.mode.lower()]


def _name(module, of: cells.Cell, suffix: str = "") -> str:
    """The name that torch uses in its errors."""
    # torch has no name for the other layers, so these get the name of their class.
    return of.aten.split("_")[0].upper() + suffix if of.aten else type(module).__name__


def _names(states) -> list[str]:
    return ["hx"] if len(states) == 1 else [f"hx[{k}]" for k in range(len(states))]


def _same_device_and_dtype(input: Tensor, states: list[Tensor], weight: Tensor, dtypes: bool) -> None:
    for name, state in zip(_names(states), states, strict=True):
        if state.device != input.device:
            raise RuntimeError(
                f"Input and hidden tensors are not at the same device, found input tensor at {input.device} "
                f"and {name if len(states) > 1 else 'hidden tensor'} at {state.device}"
            )
        if dtypes and state.dtype != input.dtype:
            raise ValueError(f"{name}: expected the dtype of input ({input.dtype}), got {state.dtype}")
    if weight.device != input.device:
        raise RuntimeError(
            f"Input and parameter tensors are not at the same device, found input tensor at {input.device} "
            f"and parameter tensor at {weight.device}"
        )


def _given_states(of: cells.Cell, hx) -> list[Tensor]:
    """The states in `hx`, if their number is that of the cell. If h is the only state, `hx` is a tensor."""
    if len(of.states) == 1:
        dense("hx", hx)
        return [hx]
    if not isinstance(hx, Tensor | tuple | list):
        raise TypeError(f"hx: expected a tuple of {len(of.states)} Tensors, got {type(hx).__name__}")
    if isinstance(hx, Tensor) or len(hx) != len(of.states):
        came = "a tensor" if isinstance(hx, Tensor) else f"{len(hx)}"
        if of.aten is not None:
            raise RuntimeError(f"{of.aten} expects two hidden states, got {came}")
        raise RuntimeError(f"hx: expected the {len(of.states)} states {', '.join(of.states)}, got {came}")
    for name, state in zip(_names(hx), hx, strict=True):
        dense(name, state)
    return list(hx)


def parameters(weights: list[Tensor], shapes: tuple[tuple[int, ...], ...], names: Sequence[str]) -> None:
    """Check the parameters of a layer or a cell, which a user may have replaced.

    With other shapes the number of heads would be another one, and the kernels would read beside them.
    """
    first = weights[0]
    dtype, device = first.dtype, first.device
    for weight, shape in zip(weights, shapes, strict=True):  # a loop, for every call waits for it
        if weight.shape != shape or weight.dtype is not dtype or weight.device != device:
            break
    else:
        return
    same_dtype = products.autocasts(first)
    for name, weight, shape in zip(names, weights, shapes, strict=True):
        if weight.shape != shape:
            raise ValueError(f"{name}: expected shape {list(shape)}, got {list(weight.shape)}")
        if weight.device != first.device:
            raise RuntimeError(f"{name}: expected the device of {names[0]} ({first.device}), got {weight.device}")
        if weight.dtype != first.dtype and not same_dtype:
            raise ValueError(f"{name}: expected the dtype of {names[0]} ({first.dtype}), got {weight.dtype}")


def sequence(module, input: Tensor | PackedSequence, hx, weight: Tensor) -> None:
    """Check the input and the states of `Recurrent.forward`, before anything is reshaped.

    `weight` is one of the parameters of the module.
    """
    of, packed = _cell_of(module), isinstance(input, PackedSequence)
    if isinstance(input, PackedSequence):
        if onnx.exporting():
            raise RuntimeError(
                "input: expected a padded tensor with lengths= in torch.onnx.export, got a PackedSequence, "
                "which ONNX does not have"
            )
        data = _packed_data(input)
        batch, input = int(input.batch_sizes[0]), data
    else:
        dense("input", input)
        if input.dim() not in (2, 3):
            tensor = "tensor " if _name(module, of) == "RNN" else ""
            raise ValueError(f"{_name(module, of)}: Expected input to be 2D or 3D, got {input.dim()}D {tensor}instead")
    if input.dtype != weight.dtype and not products.autocasts(input):
        raise ValueError(
            f"RNN input dtype ({input.dtype}) does not match weight dtype ({weight.dtype}). "
            f"Convert input: input.to({weight.dtype}), or convert model: model.to({input.dtype})"
        )
    if input.size(-1) != module.input_size:
        raise RuntimeError(
            f"input.size(-1) must be equal to input_size. Expected {module.input_size}, got {input.size(-1)}"
        )
    batched = packed or input.dim() == 3
    if not packed:
        steps, batch = input.shape[:2] if batched else (input.size(0), 1)
        if batched and module.batch_first:
            steps, batch = batch, steps
        if steps == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if hx is None:
        if weight.device != input.device:
            _same_device_and_dtype(input, [], weight, False)
        return
    states = _given_states(of, hx)
    alone = len(states) == 1
    dims, expected_dim = [s.dim() for s in states], 3 if batched else 2
    if any(d != expected_dim for d in dims) and not (packed and alone):  # for that one torch names the size
        kind = "batched 3-D" if batched else "unbatched 2-D"
        came = f"{dims[0]}-D tensor" if alone else f"({', '.join(f'{d}-D' for d in dims)}) tensors"
        raise RuntimeError(
            f"For {kind} input, {'hx' if alone else 'hx and cx'} should also be {expected_dim}-D but got {came}"
        )
    rows = module.num_layers * (2 if module.bidirectional else 1)
    if torch.jit.is_tracing():  # where sizes are tensors; elsewhere int would fix the size of a graph for any batch
        batch = int(batch)
    for k, state in enumerate(states):
        width = (module.proj_size or module.hidden_size) if k == 0 else module.hidden_size
        # torch.nn checks after it has added the batch axis, and prints the sizes with it.
        size, expected = tuple(state.shape) if batched else (state.size(0), 1, state.size(1)), (rows, batch, width)
        if size != expected:
            raise RuntimeError(f"Expected hidden{' ' if alone else f'[{k}] '}size {expected}, got {list(size)}")
    _same_device_and_dtype(input, states, weight, dtypes=not products.autocasts(input))


def _packed_data(input: PackedSequence) -> Tensor:
    """The data of a packed sequence, if it is consistent. For an LSTM torch.nn checks none of this."""
    data, batch_sizes = input.data, input.batch_sizes
    dense("input.data", data)
    dense("input.batch_sizes", batch_sizes)
    if batch_sizes.device.type != "cpu":
        raise RuntimeError(f"batch_sizes tensor should be on CPU, but got it on {batch_sizes.device}")
    if data.dim() != 2:
        raise RuntimeError(f"input must have 2 dimensions, got {data.dim()}")
    if batch_sizes.dtype != torch.int64 or batch_sizes.dim() != 1 or not len(batch_sizes):
        raise ValueError(
            "input: expected batch_sizes of one dimension and dtype torch.int64 with at least one step, "
            f"got {batch_sizes.dim()}D, {batch_sizes.dtype} and {batch_sizes.numel()} element(s)"
        )
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return data
    sizes = batch_sizes.tolist()
    if sizes[-1] < 1 or any(later > earlier for earlier, later in itertools.pairwise(sizes)):
        raise ValueError(f"input: expected batch_sizes that never grow and are at least 1, got {_shortened(sizes)}")
    if (steps := sum(sizes)) != len(data):
        raise ValueError(
            f"input: expected as many rows of data as batch_sizes say ({steps}), got {len(data)}; "
            "was a length given to pack_padded_sequence larger than its input is long?"
        )
    _order(input, sizes[0])
    return data


def _order(input: PackedSequence, batch: int) -> None:
    """Check that both orders of a packed sequence are given or none, and that one is the reverse of the other."""
    orders = {name: getattr(input, name) for name in ("sorted_indices", "unsorted_indices")}
    if all(order is None for order in orders.values()):
        return
    for name, order in orders.items():
        dense(f"input.{name}", order)
        if order.dtype != torch.int64 or list(order.shape) != [batch]:
            raise ValueError(
                f"input: expected {name} with shape {[batch]} and dtype torch.int64, "
                f"got {list(order.shape)} and {order.dtype}"
            )
        if order.device != input.data.device:
            raise ValueError(f"input: expected {name} on {input.data.device} like its data, got it on {order.device}")
    if all(map(_may_look, orders.values())):
        there, back = (order.tolist() for order in orders.values())
        for name, order in zip(orders, (there, back), strict=True):
            if sorted(order) != [*range(batch)]:
                raise ValueError(f"input: expected {name} to be a permutation of 0 to {batch - 1}, got other values")
        if any(back[k] != place for place, k in enumerate(there)):
            raise ValueError("input: expected unsorted_indices to reverse sorted_indices, got another permutation")


def _shortened(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:8]))}, ...] ({len(values)} values)"


def with_jagged_input(input: Tensor, lengths, resets, return_states: bool) -> None:
    if input.layout != torch.jagged or isinstance(input.shape[1], int):
        raise ValueError(
            "input: expected a dense tensor, or a nested one [B, *, I] with layout=torch.jagged, got a nested one with "
            f"{input.layout if input.layout != torch.jagged else 'another ragged axis'}"
        )
    for name, value in (("lengths", lengths), ("resets", resets), ("return_states", return_states or None)):
        if value is not None:
            expected = "False" if name == "return_states" else "None"
            raise ValueError(
                f"{name}: expected {expected} with a nested tensor as input, got {type(value).__name__}; "
                "fusedlstm.sequences.padded_from_jagged makes a padded batch and its lengths"
            )


def lengths_and_resets(
    input: Tensor | PackedSequence, lengths, resets, batch_first: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Check the `lengths` and `resets` of a sequence that was checked before. Returns them as tensors.

    Values on the host are checked. Values on a device are checked only with `FUSEDLSTM_DEBUG=1`, because that waits for
    the device. Otherwise a length below 0 counts as 0 there, and one above T as T.
    """
    if isinstance(input, PackedSequence):
        if lengths is not None:
            raise ValueError("lengths: expected None with a PackedSequence, which has its own")
        if resets is not None:
            resets = _packed_resets(input, resets)
    steps, *batch = leading = input.data.shape[:1] if isinstance(input, PackedSequence) else input.shape[:-1]
    if batch and batch_first:
        steps, batch = batch[0], [steps]
    if resets is not None:
        dense("resets", resets)
        if resets.is_complex():
            raise ValueError(f"resets: expected torch.bool, or numbers of which 0 is false, got {resets.dtype}")
        if resets.shape != leading:
            raise ValueError(f"resets: expected shape {list(leading)}, got {list(resets.shape)}")
        resets = resets if resets.dtype == torch.bool else resets != 0  # dones are often floats
    if lengths is not None:
        lengths = sequence_lengths(lengths, steps, batch)
    data = input.data if isinstance(input, PackedSequence) else input
    for name, table in (("lengths", lengths), ("resets", resets)):
        if table is not None and table.is_meta and not data.is_meta:
            raise ValueError(f"{name}: expected a tensor with values, for input on {data.device}, got one on meta")
    return lengths, resets


def _packed_resets(input: PackedSequence, resets: PackedSequence) -> Tensor:
    """The data of packed resets, if they have the lengths and the order of `input`."""
    if not isinstance(resets, PackedSequence):
        raise TypeError(f"resets: expected a PackedSequence like input, got {type(resets).__name__}")
    a, b = resets.sorted_indices, input.sorted_indices
    same = torch.equal(resets.batch_sizes, input.batch_sizes) and (a is None) == (b is None)
    if same and a is not None and b is not None and a is not b and _may_look(a) and _may_look(b):
        same = torch.equal(a.to(b.device), b)
    if not same:
        raise ValueError("resets: expected the lengths and the order of input, got others")
    return resets.data


def _may_look(x: Tensor) -> bool:
    """Whether the values of a tensor may be read: on the host, or on a device with `FUSEDLSTM_DEBUG=1`."""
    return not torch.compiler.is_compiling() and (x.device.type == "cpu" or (DEBUG and not x.is_meta))


def sequence_lengths(lengths, steps: int, batch: list[int], *, on_any_device: bool = False) -> Tensor:
    """Check the lengths of a padded batch. Returns them as a tensor [B].

    With `on_any_device` their values are checked wherever they are. Otherwise `_may_look` decides.
    """
    if not isinstance(lengths, Tensor):
        try:
            lengths = torch.as_tensor(lengths, device="cpu")  # whatever the default is: they are on the host
            lengths = lengths if lengths.numel() else lengths.long()  # of an empty list
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"lengths: expected a Tensor of integers, got {type(lengths).__name__}") from None
    dense("lengths", lengths)
    if lengths.dtype not in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        raise ValueError(f"lengths: expected integers, got {lengths.dtype}")
    if list(lengths.shape) != batch and (batch or lengths.numel() != 1):
        raise ValueError(f"lengths: expected shape {batch}, got {list(lengths.shape)}")
    may_look = _may_look(lengths) or (on_any_device and not torch.compiler.is_compiling())
    if may_look and lengths.numel() and not transforms.transformed():  # samples of torch.vmap cannot be read
        shortest, longest = (int(x) for x in lengths.aminmax())
        if shortest < 0 or longest > steps:
            raise ValueError(f"lengths: expected 0 to {steps}, got {shortest if shortest < 0 else longest}")
    return lengths.reshape(-1)


def step(module, input: Tensor, hx) -> None:
    """Check the input and the states of `RecurrentCell.forward`, before anything is reshaped."""
    of = _cell_of(module)
    name = _name(module, of, "Cell")
    dense("input", input)
    if input.dim() not in (1, 2):
        raise ValueError(f"{name}: Expected input to be 1D or 2D, got {input.dim()}D instead")
    states = [] if hx is None else _given_states(of, hx)
    for label, state in zip(["hidden"] if len(states) == 1 else _names(states), states, strict=True):
        if state.dim() not in (1, 2):
            raise ValueError(f"{name}: Expected {label} to be 1D or 2D, got {state.dim()}D instead")
        if state.dim() != input.dim():
            raise RuntimeError(f"{name}: Expected {label} to be {input.dim()}D like input, got {state.dim()}D instead")
    if input.size(-1) != module.input_size:
        raise RuntimeError(f"input has inconsistent input_size: got {input.size(-1)} expected {module.input_size}")
    for k, state in enumerate(states):
        if input.dim() == 2 and state.size(0) != input.size(0):
            raise RuntimeError(f"Input batch size {input.size(0)} doesn't match hidden{k} batch size {state.size(0)}")
        if state.size(-1) != module.hidden_size:
            raise RuntimeError(
                f"hidden{k} has inconsistent hidden_size: got {state.size(-1)}, expected {module.hidden_size}"
            )
    autocast = products.autocasts(input)
    _dtype_of_cell(module, input, autocast)
    _same_device_and_dtype(input, states, module.weight_ih, dtypes=not autocast)


def _dtype_of_cell(module, input: Tensor, autocast: bool) -> None:
    if input.dtype != module.weight_ih.dtype and not autocast:
        raise ValueError(f"input: expected the dtype of the weights ({module.weight_ih.dtype}), got {input.dtype}")


def place(module, layer: int, direction: int) -> None:
    """Check the numbers of a layer and a direction."""
    for name, value, count in (("layer", layer, module.num_layers), ("direction", direction, module._directions)):
        if not 0 <= value < count:
            raise ValueError(f"{name}: expected 0 to {count - 1}, got {value}")


def at_least_one(name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected a whole number, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")


def needs(library: str, extra: str):
    """Import and return a library that an extra installs."""
    try:
        return importlib.import_module(library)
    except ModuleNotFoundError as error:
        package = library.partition(".")[0]
        if error.name != package:
            raise
        pip = {"sklearn": "scikit-learn"}.get(package, package)
        text = f'{pip} is not installed: pip install ".[{extra}]" in a checkout of fusedlstm'
        raise ModuleNotFoundError(text, name=package) from None
