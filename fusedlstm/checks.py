"""Every error that a user can cause. Texts and types are torch.nn's where it has one."""

import importlib
import numbers

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fusedlstm import engines


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
    return float(value)


def save(value: str) -> str:
    if value not in ("gates", "states"):
        raise ValueError(f"save: expected gates or states, got {value!r}")
    return value


def num_heads(value: int, hidden_size: int, proj_size: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"num_heads: expected an integer, got {type(value).__name__}")
    if value < 1 or hidden_size % value:
        raise ValueError(f"num_heads: expected a positive divisor of hidden_size ({hidden_size}), got {value}")
    if value > 1 and proj_size:
        raise ValueError(
            f"num_heads: expected 1 with proj_size={proj_size}, which mixes the units of all heads, got {value}"
        )
    return int(value)


def instance(name: str, value, cls: type) -> None:
    if not isinstance(value, cls):
        raise TypeError(f"{name}: expected a {cls.__name__}, got {type(value).__name__}")


def module(model) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    return model


def _same_device_and_dtype(
    input: Tensor, hx: tuple[Tensor, Tensor], weight: Tensor, names: tuple[str, str], dtypes: bool
) -> None:
    for name, state in zip(names, hx, strict=True):
        if state.device != input.device:
            raise RuntimeError(
                f"Input and hidden tensors are not at the same device, found input tensor at {input.device} "
                f"and {name} at {state.device}"
            )
        if dtypes and state.dtype != input.dtype:
            raise ValueError(f"{name}: expected the dtype of input ({input.dtype}), got {state.dtype}")
    if weight.device != input.device:
        raise RuntimeError(
            f"Input and parameter tensors are not at the same device, found input tensor at {input.device} "
            f"and parameter tensor at {weight.device}"
        )


def _two_states(hx) -> None:
    if isinstance(hx, Tensor) or len(hx) != 2:
        came = "a tensor" if isinstance(hx, Tensor) else f"{len(hx)}"
        raise RuntimeError(f"lstm expects two hidden states, got {came}")
    for name, state in zip(("hx[0]", "hx[1]"), hx, strict=True):
        if not isinstance(state, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(state).__name__}")


def lstm_input(module, input: Tensor | PackedSequence, hx) -> None:
    """Check what `LSTM.forward` was given, before anything is reshaped."""
    packed = isinstance(input, PackedSequence)
    if packed:
        batch, input = input.batch_sizes[0], _packed_data(input)
    elif input.dim() not in (2, 3):
        raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
    autocast = torch._C._is_any_autocast_enabled()
    weight = module._flat_weights[0]
    if input.dtype != weight.dtype and not autocast:
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
            _same_device_and_dtype(input, (), weight, (), False)
        return
    _two_states(hx)
    h_dim, c_dim = hx[0].dim(), hx[1].dim()
    if batched and (h_dim != 3 or c_dim != 3):
        raise RuntimeError(
            f"For batched 3-D input, hx and cx should also be 3-D but got ({h_dim}-D, {c_dim}-D) tensors"
        )
    if not batched and (h_dim != 2 or c_dim != 2):
        raise RuntimeError(
            f"For unbatched 2-D input, hx and cx should also be 2-D but got ({h_dim}-D, {c_dim}-D) tensors"
        )
    rows = module.num_layers * (2 if module.bidirectional else 1)
    for k, (state, width) in enumerate(
        zip(hx, (module.proj_size or module.hidden_size, module.hidden_size), strict=True)
    ):
        # torch.nn checks after it has added the batch axis, and prints the sizes with it.
        size, expected = tuple(state.shape) if batched else (state.size(0), 1, state.size(1)), (rows, int(batch), width)
        if size != expected:
            raise RuntimeError(f"Expected hidden[{k}] size {expected}, got {list(size)}")
    _same_device_and_dtype(input, hx, weight, ("hx[0]", "hx[1]"), dtypes=not autocast)


def _packed_data(input: PackedSequence) -> Tensor:
    """The data of a packed sequence, when it is one that makes sense; torch.nn looks at none of this."""
    data, batch_sizes = input.data, input.batch_sizes
    if batch_sizes.device.type != "cpu":
        raise RuntimeError(f"batch_sizes tensor should be on CPU, but got it on {batch_sizes.device}")
    if data.dim() != 2:
        raise ValueError(f"input.data: expected 2D, [sum of lengths, input_size], got {data.dim()}D")
    if not torch.compiler.is_compiling() and (steps := int(batch_sizes.sum())) != len(data):
        raise ValueError(
            f"input: expected as many rows of data as batch_sizes say ({steps}), got {len(data)}; was a length given to "
            "pack_padded_sequence larger than its input is long?"
        )
    return data


def lengths_and_resets(
    input: Tensor | PackedSequence, lengths, resets, batch_first: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Check the `lengths` and `resets` of a sequence that was checked before; returns them as tensors.

    Values are looked at on a CPU only: on a GPU that would wait for it, and the kernel itself asserts them.
    """
    packed = isinstance(input, PackedSequence)
    if packed and lengths is not None:
        raise ValueError("lengths: expected None with a PackedSequence, which has its own")
    if packed and resets is not None:
        if not isinstance(resets, PackedSequence):
            raise TypeError(f"resets: expected a PackedSequence like input, got {type(resets).__name__}")
        text = "resets: expected the lengths and the order of input, got others"
        orders = resets.sorted_indices, input.sorted_indices
        if not torch.equal(resets.batch_sizes, input.batch_sizes) or (orders[0] is None) != (orders[1] is None):
            raise ValueError(text)
        if orders[0] is not orders[1]:
            same = orders[0].to(orders[1].device) == orders[1]
            if same.is_cuda:
                torch._assert_async(same.all(), text)
            elif not same.all():
                raise ValueError(text)
        resets = resets.data
    steps, *batch = leading = input.data.shape[:1] if packed else input.shape[:-1]
    if batch and batch_first:
        steps, batch = batch[0], [steps]
    if resets is not None:
        instance("resets", resets, Tensor)
        if resets.dtype != torch.bool:
            raise ValueError(f"resets: expected torch.bool, got {resets.dtype}")
        if resets.shape != leading:
            raise ValueError(f"resets: expected shape {list(leading)}, got {list(resets.shape)}")
    if lengths is not None:
        lengths = sequence_lengths(lengths, steps, batch)
    return lengths, resets


def sequence_lengths(lengths, steps: int, batch: list[int], *, on_any_device: bool = False) -> Tensor:
    """Check the lengths of a padded batch; returns them as a tensor [B].

    `on_any_device`: look at their values wherever they are; else on a CPU only.
    """
    if not isinstance(lengths, Tensor):
        try:
            lengths = torch.as_tensor(lengths)
            lengths = lengths if lengths.numel() else lengths.long()  # of an empty list
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"lengths: expected a Tensor of integers, got {type(lengths).__name__}") from None
    if lengths.dtype not in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        raise ValueError(f"lengths: expected integers, got {lengths.dtype}")
    if list(lengths.shape) != batch and (batch or lengths.numel() != 1):
        raise ValueError(f"lengths: expected shape {batch}, got {list(lengths.shape)}")
    look = (on_any_device or lengths.device.type == "cpu") and not torch.compiler.is_compiling()
    if look and lengths.numel():
        shortest, longest = (int(x) for x in lengths.aminmax())
        if shortest < 0 or longest > steps:
            raise ValueError(f"lengths: expected 0 to {steps}, got {shortest if shortest < 0 else longest}")
    return lengths.reshape(-1)


def lstm_cell_input(module, input: Tensor, hx) -> None:
    """Check what `LSTMCell.forward` was given, before anything is reshaped."""
    if input.dim() not in (1, 2):
        raise ValueError(f"LSTMCell: Expected input to be 1D or 2D, got {input.dim()}D instead")
    if input.size(-1) != module.input_size:
        raise RuntimeError(f"input has inconsistent input_size: got {input.size(-1)} expected {module.input_size}")
    autocast = torch._C._is_any_autocast_enabled()
    if hx is None:
        _dtype_of_cell(module, input, autocast)
        if module.weight_ih.device != input.device:
            _same_device_and_dtype(input, (), module.weight_ih, (), False)
        return
    _two_states(hx)
    for k, state in enumerate(hx):
        if state.dim() not in (1, 2):
            raise ValueError(f"LSTMCell: Expected hx[{k}] to be 1D or 2D, got {state.dim()}D instead")
        if state.dim() != input.dim():
            raise RuntimeError(
                f"LSTMCell: Expected hx[{k}] to be {input.dim()}D like input, got {state.dim()}D instead"
            )
        if input.dim() == 2 and state.size(0) != input.size(0):
            raise RuntimeError(f"Input batch size {input.size(0)} doesn't match hidden{k} batch size {state.size(0)}")
        if state.size(-1) != module.hidden_size:
            raise RuntimeError(
                f"hidden{k} has inconsistent hidden_size: got {state.size(-1)}, expected {module.hidden_size}"
            )
    _dtype_of_cell(module, input, autocast)
    _same_device_and_dtype(input, hx, module.weight_ih, ("hx[0]", "hx[1]"), dtypes=not autocast)


def _dtype_of_cell(module, input: Tensor, autocast: bool) -> None:
    if input.dtype != module.weight_ih.dtype and not autocast:
        raise ValueError(f"input: expected the dtype of the weights ({module.weight_ih.dtype}), got {input.dtype}")


def traced(module, input, layer: int, direction: int) -> None:
    """Check what `gate_trace` was asked for."""
    if not isinstance(input, Tensor):
        raise TypeError(f"input: expected a Tensor, got {type(input).__name__}")
    if not isinstance(module, nn.RNNBase) or module.mode != "LSTM":
        raise TypeError(f"module: expected a fusedlstm.LSTM or a torch.nn.LSTM, got {type(module).__name__}")
    directions = 2 if module.bidirectional else 1
    if not 0 <= layer < module.num_layers:
        raise ValueError(f"layer: expected 0 to {module.num_layers - 1}, got {layer}")
    if not 0 <= direction < directions:
        raise ValueError(f"direction: expected 0 to {directions - 1}, got {direction}")


def needs(library: str, extra: str):
    """Import and return a library that only an extra installs."""
    try:
        return importlib.import_module(library)
    except ModuleNotFoundError as error:
        package = library.partition(".")[0]
        if error.name != package:
            raise
        pip = {"sklearn": "scikit-learn"}.get(package, package)
        raise ModuleNotFoundError(f'{pip} is not installed: pip install "fusedlstm[{extra}]"', name=package) from None
