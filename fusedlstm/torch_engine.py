"""ATen's LSTM: oneDNN on a CPU, cuDNN on a GPU. The embedded default without a GPU."""

import functools

import torch
from torch import Tensor

from fusedlstm.torch_loop import DTYPES as LOOP_DTYPES

CUDNN_STEPS = 65535  # cuDNN takes no more


def compute_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which to compute on a device: float32 for half precision that a CPU has only slow code for."""
    if device.type == "cpu" and (dtype == torch.float16 or (dtype == torch.bfloat16 and not _onednn_has_bfloat16())):
        return torch.float32
    return dtype


def prefers_loop(input: Tensor, batch_sizes: Tensor | None, proj_size: int) -> bool:
    """Whether `torch_loop` serves a call faster: packed sequences of different lengths on a CPU."""
    return batch_sizes is not None and input.device.type == "cpu" and proj_size == 0 and input.dtype in LOOP_DTYPES


def lstm(
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
    """A whole stack in one ATen call."""
    dropout = dropout if training else 0.0
    if input.is_cuda:
        hx = (hx[0].contiguous(), hx[1].contiguous())
        training = training or torch.is_grad_enabled()  # cuDNN keeps what backward needs only in training mode
        steps = input.size(1 if batch_first else 0)
        if batch_sizes is None and steps > CUDNN_STEPS:
            return _lstm_in_stretches(
                input, hx, weights, bias, num_layers, dropout, training, bidirectional, batch_first
            )
    if batch_sizes is not None:
        return torch._VF.lstm(input, batch_sizes, hx, weights, bias, num_layers, dropout, training, bidirectional)
    return torch._VF.lstm(input, hx, weights, bias, num_layers, dropout, training, bidirectional, batch_first)


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


def _lstm_in_stretches(
    input: Tensor,  # [T, B, I], or [B, T, I] with batch_first
    hx: tuple[Tensor, Tensor],
    weights: list[Tensor],
    bias: bool,
    num_layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, in stretches of steps that carry the state on, a layer and a direction after another."""
    x = input.transpose(0, 1) if batch_first else input
    directions = 2 if bidirectional else 1
    count = len(weights) // (num_layers * directions)
    h_n, c_n = [], []
    for layer in range(num_layers):
        if layer > 0 and dropout > 0:
            x = torch.nn.functional.dropout(x, dropout)
        outputs = []
        for row in range(layer * directions, (layer + 1) * directions):
            reverse = row % directions == 1
            own = weights[row * count : (row + 1) * count]
            state = tuple(s[row : row + 1].contiguous() for s in hx)
            pieces = []
            for stretch in (x.flip(0) if reverse else x).split(CUDNN_STEPS):
                output, *state = torch._VF.lstm(stretch, tuple(state), own, bias, 1, 0.0, training, False, False)
                pieces.append(output)
            output = torch.cat(pieces)
            outputs.append(output.flip(0) if reverse else output)
            h_n.append(state[0])
            c_n.append(state[1])
        x = torch.cat(outputs, -1)
    return x.transpose(0, 1) if batch_first else x, torch.cat(h_n), torch.cat(c_n)


@functools.cache
def _onednn_has_bfloat16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
