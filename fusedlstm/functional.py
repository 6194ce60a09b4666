"""How a stack is made of recurrences: layers, directions, dropout, projections, packing, batch_first, autocast."""

import contextlib

import torch
from torch import Tensor
from torch.nn.functional import dropout as dropout_fn

from fusedlstm import engines, recurrence, reference, torch_engine
from fusedlstm.packing import Packing
from fusedlstm.precision import product


def lstm(
    input: Tensor,  # [T, B, I], or [B, T, I] with batch_first, or packed [R, I] with batch_sizes
    hx: tuple[Tensor, Tensor],  # [L * D, B, P] and [L * D, B, H]
    weights: list[Tensor],  # per layer and direction: weight_ih, weight_hh (, bias_ih, bias_hh) (, weight_hr)
    *,
    batch_sizes: Tensor | None = None,  # [T] int64 on the CPU
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    proj_size: int = 0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a stack of LSTM layers over a sequence; differentiable in every tensor argument.

    Args:
        input: any strides.
        hx: h and c before the first step.
        weights: in the order of `torch.nn.LSTM._flat_weights`; rows in gate order i, f, g, o.
        batch_sizes: how many sequences have a step t, as in a PackedSequence; `input`, `hx` and the results are then in
            its sorted order, and `batch_first` is ignored.
        dropout: probability of zeroing an element of every layer's output but the last, if `training`.
        proj_size: P, the size of a projected h; 0 is none, and P is then H.
        backend: see `fusedlstm.engines`.

    Returns:
        output [T, B, D * P] (or [B, T, D * P], or [R, D * P]), h_n [L * D, B, P] and c_n [L * D, B, H], in the dtype of
        `input`, under autocast in that of autocast.

    Precision: products in the dtype of the results; on a CPU float16, and bfloat16 where the CPU has no instructions
        for it, are computed in float32.
    """
    dtype = _result_dtype(input)
    directions = 2 if bidirectional else 1
    engine = engines.choose(backend, input.device, dtype, "lstm", hx[1].size(-1), directions)
    equal_lengths = batch_sizes is not None and _equal_lengths(batch_sizes)
    if equal_lengths:
        input, batch_sizes = input.unflatten(0, (len(batch_sizes), -1)), None
    if engine == "torch":
        compute_dtype = torch_engine.compute_dtype(input.device, dtype, dense=batch_sizes is None)
    else:
        compute_dtype = dtype
    if compute_dtype != input.dtype or _autocasts(input):  # else all of them have it
        input, hx, weights = _cast((input, hx, weights), compute_dtype)
    batch_first = batch_first and batch_sizes is None and not equal_lengths
    schedule = "loop"
    if engine == "torch":
        schedule = torch_engine.schedule(input, batch_sizes, batch_first, hx[1].size(-1), proj_size)
    with _autocast_off(input):
        if schedule != "loop":
            output, h_n, c_n = torch_engine.lstm(
                schedule,
                input,
                batch_sizes,
                hx,
                weights,
                bias,
                num_layers,
                dropout,
                training,
                bidirectional,
                batch_first,
            )
        else:
            packing = None if batch_sizes is None else Packing.of(batch_sizes, hx[0].size(1), input.device)
            x = input.transpose(0, 1) if batch_first else input
            output, h_n, c_n = _layers(
                engine, x, packing, hx, weights, num_layers, directions, dropout if training else 0.0, proj_size > 0
            )
            output = output.transpose(0, 1) if batch_first else output
    if equal_lengths:
        output = output.flatten(0, 1)
    return (output, h_n, c_n) if compute_dtype == dtype else _cast((output, h_n, c_n), dtype)


def lstm_cell(
    input: Tensor,  # [B, I]
    hx: tuple[Tensor, Tensor],  # each [B, H]
    weight_ih: Tensor,  # [4H, I]
    weight_hh: Tensor,  # [4H, H]
    bias_ih: Tensor | None = None,  # [4H]
    bias_hh: Tensor | None = None,  # [4H]
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run one LSTM step; differentiable in every tensor argument. Returns h and c, each [B, H]. Dtypes as in `lstm`."""
    dtype = _result_dtype(input)
    weights = [weight_ih, weight_hh] if bias_ih is None else [weight_ih, weight_hh, bias_ih, bias_hh]
    if engines.choose(backend, input.device, dtype, "lstm", hx[0].size(-1)) == "torch":
        compute_dtype = torch_engine.compute_dtype(input.device, dtype, dense=False)
        input, hx, weights = _cast((input, hx, weights), compute_dtype)
        with _autocast_off(input):
            return _cast(torch_engine.lstm_cell(input, hx, *weights), dtype)
    _, h, c = lstm(
        input.unsqueeze(0),
        (hx[0].unsqueeze(0), hx[1].unsqueeze(0)),
        weights,
        bias=bias_ih is not None,
        backend=backend,
    )
    return h.squeeze(0), c.squeeze(0)


def _layers(
    engine: str,
    x: Tensor,  # [T, B, I] or packed [R, I]
    packing: Packing | None,
    hx: tuple[Tensor, Tensor],  # [L * D, B, P] and [L * D, B, H]
    weights: list[Tensor],
    num_layers: int,
    directions: int,
    dropout: float,
    projected: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    count = len(weights) // (num_layers * directions)
    parameters = [weights[k : k + count] for k in range(0, len(weights), count)]  # per layer and direction
    layer = _reference_layer if engine == "reference" else _projected_layer if projected else recurrence.layer
    h_n, c_n = [], []
    for k in range(num_layers):
        if k > 0 and dropout > 0:
            x = dropout_fn(x, dropout)
        rows = slice(k * directions, (k + 1) * directions)
        x, (h, c) = layer("lstm", x, (hx[0][rows], hx[1][rows]), parameters[rows], engine, packing)
        h_n.append(h)
        c_n.append(c)
    if num_layers == 1:
        return x, h_n[0], c_n[0]
    return x, torch.cat(h_n), torch.cat(c_n)


def _projected_layer(
    cell: str,
    x: Tensor,  # [T, B, I] or packed [R, I]
    state: tuple[Tensor, Tensor],  # [D, B, P] and [D, B, H]
    parameters: list[
        list[Tensor]
    ],  # per direction: weight_ih, weight_hh [4H, P] (, bias_ih, bias_hh), weight_hr [P, H]
    engine: str,
    packing: Packing | None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """h_t = weight_hr y_t of a recurrence over y, whose recurrent weight is weight_hh weight_hr.

    So the loop has one product and one wait a step, as without a projection, and the projection is one product of all
    steps after it. h_0 is no projection of anything: its part of the first preactivation is added by itself.
    """
    weight_hr = [p[-1] for p in parameters]
    over_y = [[p[0], product(p[1], p[-1]), *p[2:-1]] for p in parameters]
    preact_0 = torch.stack([product(h, p[1].t()) for h, p in zip(state[0], parameters, strict=True)])
    no_y = torch.zeros_like(state[1])
    y, (y_n, c_n) = recurrence.layer(cell, x, (no_y, state[1]), over_y, engine, packing, preact_0)
    by_direction = zip(y.chunk(len(parameters), -1), weight_hr, strict=True)
    output = torch.cat([product(y_d.flatten(0, -2), w.t()) for y_d, w in by_direction], -1)
    h_n = torch.stack([product(y_d, w.t()) for y_d, w in zip(y_n, weight_hr, strict=True)])
    return output.unflatten(0, y.shape[:-1]), (h_n, c_n)


def _reference_layer(cell, x, state, parameters, engine, packing):
    """The specification, projection and all; plain autograd differentiates it."""
    first_row = None if packing is None else packing.first_row
    weight_hr = [p[-1] for p in parameters] if len(parameters[0]) % 2 else None
    parameters = [p[: len(p) // 2 * 2] for p in parameters]
    output, h_n, c_n = reference.layer(cell, x, state[0], state[1].unsqueeze(0), parameters, first_row, weight_hr)
    return output, (h_n, c_n.squeeze(0))


def _result_dtype(input: Tensor) -> torch.dtype:
    """The dtype of the results: that of the input, or of autocast where it is on, which leaves float64 alone."""
    if _autocasts(input) and input.dtype != torch.float64:
        return torch.get_autocast_dtype(input.device.type)
    return input.dtype


def _autocasts(input: Tensor) -> bool:
    return torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(input.device.type)


def _autocast_off(input: Tensor):
    # What is to be cast is cast: ATen's own rules for LSTMs differ from device to device, and from dtype to dtype.
    return torch.autocast(input.device.type, enabled=False) if _autocasts(input) else contextlib.nullcontext()


def _cast(tree, dtype: torch.dtype):
    """Tensors in nested tuples and lists, in `dtype`."""
    if isinstance(tree, Tensor):
        return tree if tree.dtype == dtype else tree.to(dtype)
    return type(tree)([_cast(x, dtype) for x in tree])


def _equal_lengths(batch_sizes: Tensor) -> bool:
    # A graph is for any lengths, so a compiler may not ask.
    return not torch.compiler.is_compiling() and bool(batch_sizes[0] == batch_sizes[-1])
