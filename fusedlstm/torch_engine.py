"""ATen's LSTM: oneDNN on a CPU, cuDNN on a GPU. The embedded default without a GPU."""

import functools

import torch
from torch import Tensor

from fusedlstm.torch_loop import DTYPES as LOOP_DTYPES

CUDNN_STEPS = 65535  # cuDNN takes no more


# Packed sequences on a CPU: below as many steps between two ends, on average, `torch_loop` is faster than oneDNN with a
# call for every run of steps that the same sequences have.
RUN_OF_TRAINING, RUN_OF_INFERENCE = 8, 4
# A single step on a CPU: up to as many sequences ATen's cells are faster than oneDNN without gradients, and always with.
STEP_OF_INFERENCE = 8


def compute_dtype(device: torch.device, dtype: torch.dtype, dense: bool) -> torch.dtype:
    """The dtype in which to compute on a device: float32 for half precision that a CPU has only slow code for."""
    if device.type == "cpu" and dtype in (torch.float16, torch.bfloat16):
        return dtype if dtype == torch.bfloat16 and dense and _onednn_has_bfloat16() else torch.float32
    return dtype


def schedule(input: Tensor, batch_sizes: Tensor | None, batch_first: bool, proj_size: int) -> str:
    """How a stack runs: "stack", ATen takes it whole; "runs", ATen takes runs of steps; "step", ATen's cells take its only
    step; "loop", `torch_loop` takes it.

    On a CPU oneDNN is slow with a single step, and ATen with packed sequences of different lengths.
    """
    if batch_sizes is None:
        steps, batch = input.size(1 if batch_first else 0), input.size(0 if batch_first else 1)
        if input.is_cuda:
            return "runs" if steps > CUDNN_STEPS else "stack"
        few = batch <= STEP_OF_INFERENCE or torch.is_grad_enabled()
        return "step" if steps == 1 and few and proj_size == 0 and input.device.type == "cpu" else "stack"
    if input.device.type != "cpu" or proj_size > 0 or input.dtype not in LOOP_DTYPES:
        return "stack"
    if (
        input.dtype != torch.float32 or torch.compiler.is_compiling()
    ):  # oneDNN has no float64; no graph for some lengths
        return "loop"
    shortest = RUN_OF_TRAINING if torch.is_grad_enabled() else RUN_OF_INFERENCE
    return "runs" if len(batch_sizes) >= shortest * len(torch.unique_consecutive(batch_sizes)) else "loop"


def lstm(
    schedule: str,
    input: Tensor,  # [T, B, I], or [B, T, I] with batch_first, or packed [R, I]
    batch_sizes: Tensor | None,  # [T] on the CPU if packed
    hx: tuple[Tensor, Tensor],  # each [L * D, B, P] and [L * D, B, H]
    weights: list[Tensor],
    bias: bool,
    num_layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """A stack by ATen; `schedule` is "stack", "runs" or "step"."""
    options = (bias, num_layers, dropout if training else 0.0)
    if input.is_cuda:
        hx = (hx[0].contiguous(), hx[1].contiguous())
        training = training or torch.is_grad_enabled()  # cuDNN keeps what backward needs only in training mode
    if schedule == "stack":
        if batch_sizes is not None:
            return torch._VF.lstm(input, batch_sizes, hx, weights, *options, training, bidirectional)
        return torch._VF.lstm(input, hx, weights, *options, training, bidirectional, batch_first)
    if schedule == "step":
        output, h_n, c_n = _lstm_step(input.squeeze(1 if batch_first else 0), hx, weights, *options, bidirectional)
        return output.unsqueeze(1 if batch_first else 0), h_n, c_n
    if batch_sizes is not None:
        return _lstm_by_runs(input, _runs_of_sequences(batch_sizes), hx, weights, *options, training, bidirectional)
    x = input.transpose(0, 1) if batch_first else input
    T, B, _ = x.shape
    runs = [(t * B, min(CUDNN_STEPS, T - t), B) for t in range(0, T, CUDNN_STEPS)]
    output, h_n, c_n = _lstm_by_runs(x.reshape(T * B, -1), runs, hx, weights, *options, training, bidirectional)
    output = output.unflatten(0, (T, B))
    return output.transpose(0, 1) if batch_first else output, h_n, c_n


def lstm_cell(
    input: Tensor,  # [B, I]
    hx: tuple[Tensor, Tensor],  # each [B, H]
    weight_ih: Tensor,  # [4H, I]
    weight_hh: Tensor,  # [4H, H]
    bias_ih: Tensor | None = None,  # [4H]
    bias_hh: Tensor | None = None,  # [4H]
) -> tuple[Tensor, Tensor]:
    """One step."""
    return torch._VF.lstm_cell(input, hx, weight_ih, weight_hh, bias_ih, bias_hh)


def _lstm_step(
    x: Tensor,  # [B, I]
    hx: tuple[Tensor, Tensor],  # each [L * D, B, H]
    weights: list[Tensor],
    bias: bool,
    num_layers: int,
    dropout: float,
    bidirectional: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of a stack, a cell for every layer and direction."""
    directions = 2 if bidirectional else 1
    count = 4 if bias else 2
    h_n, c_n = [], []
    for k in range(num_layers * directions):
        if k % directions == 0 and k > 0:
            x = h_n[-1] if directions == 1 else torch.cat(h_n[-directions:], -1)
            x = torch.nn.functional.dropout(x, dropout) if dropout > 0 else x
        h, c = torch._VF.lstm_cell(x, (hx[0][k], hx[1][k]), *weights[k * count : (k + 1) * count])
        h_n.append(h)
        c_n.append(c)
    output = h_n[-1] if directions == 1 else torch.cat(h_n[-directions:], -1)
    return output, torch.stack(h_n), torch.stack(c_n)


def _lstm_by_runs(
    rows: Tensor,  # [R, I]
    runs: list[tuple[int, int, int]],
    hx: tuple[Tensor, Tensor],  # each [L * D, B, H]
    weights: list[Tensor],
    bias: bool,
    num_layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """A stack, one dense call for every run, layer and direction; a run's final state is the next one's initial state.

    `runs`: first row, number of steps and number of sequences (the first ones) of every run, in order of time.
    """
    directions = 2 if bidirectional else 1
    count = len(weights) // (num_layers * directions)
    h_n, c_n = [], []
    for layer in range(num_layers):
        if layer > 0 and dropout > 0:
            rows = torch.nn.functional.dropout(rows, dropout)
        outputs = []
        for k in range(layer * directions, (layer + 1) * directions):
            reverse = k % directions == 1
            h, c = hx[0][k : k + 1], hx[1][k : k + 1]
            pieces = []
            for first, steps, n in reversed(runs) if reverse else runs:
                x = rows[first : first + steps * n].view(steps, n, -1)
                output, h_run, c_run = torch._VF.lstm(
                    x.flip(0) if reverse else x,
                    (h[:, :n].contiguous(), c[:, :n].contiguous()),
                    weights[k * count : (k + 1) * count],
                    bias,
                    1,
                    0.0,
                    training,
                    False,
                    False,
                )
                h, c = torch.cat([h_run, h[:, n:]], 1), torch.cat([c_run, c[:, n:]], 1)
                pieces.append((output.flip(0) if reverse else output).flatten(0, 1))
            outputs.append(torch.cat(pieces[::-1] if reverse else pieces))
            h_n.append(h)
            c_n.append(c)
        rows = torch.cat(outputs, -1)
    return rows, torch.cat(h_n), torch.cat(c_n)


def _runs_of_sequences(batch_sizes: Tensor) -> list[tuple[int, int, int]]:
    """Stretches of steps that the same sequences have: first row, number of steps, number of sequences."""
    sizes, counts = torch.unique_consecutive(batch_sizes, return_counts=True)
    first = torch.cumsum(sizes * counts, 0) - sizes * counts
    return list(zip(first.tolist(), counts.tolist(), sizes.tolist(), strict=True))


@functools.cache
def _onednn_has_bfloat16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
