"""ATen's LSTM: oneDNN on a CPU, cuDNN on a GPU. The embedded default without a GPU."""

import torch
from torch import Tensor


def lstm(
    input: Tensor,  # [T, B, I], or [B, T, I] with batch_first
    hx: tuple[Tensor, Tensor],  # each [L * D, B, H]
    weights: list[Tensor],
    bias: bool,
    num_layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """A whole stack in one ATen call."""
    return torch._VF.lstm(input, hx, weights, bias, num_layers, dropout, training, bidirectional, batch_first)


def lstm_cell(
    input: Tensor,  # [B, I]
    hx: tuple[Tensor, Tensor],  # each [B, H]
    weight_ih: Tensor,  # [4H, I]
    weight_hh: Tensor,  # [4H, H]
    bias_ih: Tensor | None,  # [4H]
    bias_hh: Tensor | None,  # [4H]
) -> tuple[Tensor, Tensor]:
    """One step."""
    return torch._VF.lstm_cell(input, hx, weight_ih, weight_hh, bias_ih, bias_hh)
