"""How a stack is made of recurrences: layers, directions, dropout between layers, batch_first, autocast."""

import torch
from torch import Tensor
from torch.nn.functional import dropout as dropout_fn

from fusedlstm import engines, torch_engine


def lstm(
    input: Tensor,  # [T, B, I], or [B, T, I] with batch_first
    hx: tuple[Tensor, Tensor],  # each [L * D, B, H]
    weights: list[Tensor],  # per layer and direction: weight_ih, weight_hh (, bias_ih, bias_hh)
    *,
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a stack of LSTM layers over a sequence; differentiable in every tensor argument.

    Args:
        input: any strides.
        hx: h and c before step 0.
        weights: in the order of `torch.nn.LSTM._flat_weights`; rows in gate order i, f, g, o.
        dropout: probability of zeroing an element of every layer's output but the last, if `training`.
        backend: see `fusedlstm.engines`.

    Returns:
        output [T, B, D * H] (or [B, T, D * H]), h_n and c_n [L * D, B, H].
    """
    device_type = input.device.type
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(device_type):
        # Cast here, once and to the dtype that was asked for: ATen's own rules are float16 whatever was asked on CUDA,
        # and an error on a CPU without bfloat16 instructions.
        dtype = torch.get_autocast_dtype(device_type)
        input, hx, weights = input.to(dtype), tuple(s.to(dtype) for s in hx), [w.to(dtype) for w in weights]
        with torch.autocast(device_type, enabled=False):
            return lstm(
                input,
                hx,
                weights,
                bias=bias,
                num_layers=num_layers,
                dropout=dropout,
                training=training,
                bidirectional=bidirectional,
                batch_first=batch_first,
                backend=backend,
            )
    directions = 2 if bidirectional else 1
    engine = engines.choose(backend, input.device, input.dtype, "lstm", hx[0].size(-1), directions)
    if engine == "torch":
        return torch_engine.lstm(input, hx, weights, bias, num_layers, dropout, training, bidirectional, batch_first)

    from fusedlstm import recurrence  # imports triton, which the torch engine does without

    per_direction = 4 if bias else 2
    x = input.transpose(0, 1) if batch_first else input
    h_n, c_n = [], []
    for layer in range(num_layers):
        if layer > 0 and dropout > 0 and training:
            x = dropout_fn(x, dropout)
        first = layer * directions
        parameters = [weights[k * per_direction : (k + 1) * per_direction] for k in range(first, first + directions)]
        x, (h, c) = recurrence.layer(
            "lstm", x, tuple(s[first : first + directions] for s in hx), parameters, engine=engine
        )
        h_n.append(h)
        c_n.append(c)
    output = x.transpose(0, 1) if batch_first else x
    if num_layers == 1:
        return output, h_n[0], c_n[0]
    return output, torch.cat(h_n), torch.cat(c_n)


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
    """Run one LSTM step; differentiable in every tensor argument. Returns h and c, each [B, H]."""
    if engines.choose(backend, input.device, input.dtype, "lstm", hx[0].size(-1)) == "torch":
        return torch_engine.lstm_cell(input, hx, weight_ih, weight_hh, bias_ih, bias_hh)
    weights = [weight_ih, weight_hh] if bias_ih is None else [weight_ih, weight_hh, bias_ih, bias_hh]
    _, h, c = lstm(
        input.unsqueeze(0),
        (hx[0].unsqueeze(0), hx[1].unsqueeze(0)),
        weights,
        bias=bias_ih is not None,
        backend=backend,
    )
    return h.squeeze(0), c.squeeze(0)
