"""Block-diagonal heads: n groups of hidden units that see only their own h.

With n heads of DH = H / n units, unit u is of head u // DH. A recurrent weight [G * H, DH] has a row for every gate and
unit, in the order of a dense one, and a column for every unit of the row's own head. So n follows from the shapes, and one
head is the dense weight.
"""

import torch
from torch import Tensor

from fusedlstm.precision import add_product, product


def recurrent(h: Tensor, weight_hh: Tensor) -> Tensor:
    """h_{t-1} U^T, [B, G * H], of h [B, H] and weight_hh [G * H, DH]; differentiable."""
    DH = weight_hh.size(1)
    n = h.size(-1) // DH
    if n == 1:
        return h @ weight_hh.t()
    by_head = weight_hh.unflatten(0, (-1, n, DH))  # [G, n, DH, DH]
    return torch.einsum("bnk,gnuk->bgnu", h.unflatten(-1, (n, DH)), by_head).flatten(1)


def add_recurrent(
    preact: Tensor,  # [R, G * H]
    h: Tensor,  # [R, H], the states before
    weight_hh: Tensor,  # [G * H, DH]
) -> None:
    """preact += h U^T, in place, all rows at once. No gradient flows through it."""
    (R, H), DH = h.shape, weight_hh.size(1)
    if H == DH:
        add_product(preact, h, weight_hh.t())
        return
    G, n = len(weight_hh) // H, H // DH
    by_head = weight_hh.unflatten(0, (G, n, DH)).permute(1, 3, 0, 2).flatten(2)  # [n, DH, G*DH]
    added = product(h.view(R, n, DH).transpose(0, 1), by_head)  # [n, R, G*DH]
    preact.view(R, G, n, DH).add_(added.unflatten(2, (G, DH)).permute(1, 2, 0, 3))


def recurrent_backward(dpreact: Tensor, weight_hh: Tensor, hidden: int) -> Tensor:
    """dpreact_t U, [B, H], of dpreact [B, G * H] and weight_hh [G * H, DH]; differentiable."""
    DH = weight_hh.size(1)
    if hidden == DH:
        return dpreact @ weight_hh
    by_gate_and_head = dpreact.unflatten(1, (-1, DH)).transpose(0, 1) @ weight_hh.unflatten(0, (-1, DH))  # [G*n, B, DH]
    return by_gate_and_head.unflatten(0, (-1, hidden // DH)).sum(0).transpose(0, 1).flatten(1)


def weight_gradient(
    dpreact: Tensor,  # [R, G * H]
    h: Tensor,  # [R, H], the states before
    num_heads: int,
    total: Tensor | None = None,  # [G * H, DH]
) -> Tensor:
    """total + sum over rows of dpreact^T h within heads, [G * H, DH]; in place where there is a total."""
    if num_heads == 1:
        return add_product(total, dpreact.t(), h)
    DH = h.size(1) // num_heads
    h = h.unflatten(1, (num_heads, DH)).transpose(0, 1)  # [n, R, DH]
    by_gate = dpreact.unflatten(1, (-1, num_heads, DH)).permute(1, 2, 3, 0)  # [G, n, DH, R]
    grad = torch.cat([product(gate, h).flatten(0, 1) for gate in by_gate])
    return grad if total is None else total.add_(grad)


def dense_weight(weight_hh: Tensor, hidden_size: int) -> Tensor:
    """The recurrent weight of a dense layer that computes the same: [G * H, DH] -> [G * H, H], zero between heads.

    Example::

        lstm, dense = fusedlstm.LSTM(10, 20, num_heads=4), torch.nn.LSTM(10, 20)
        weights = lstm.state_dict()
        weights["weight_hh_l0"] = fusedlstm.heads.dense_weight(weights["weight_hh_l0"], 20)
        dense.load_state_dict(weights)
    """
    rows, DH = weight_hh.shape
    head = torch.arange(hidden_size, device=weight_hh.device) // DH  # of every unit
    same_head = (head.unsqueeze(1) == head).repeat(rows // hidden_size, 1)  # [G * H, H]
    return weight_hh.repeat(1, hidden_size // DH).masked_fill(~same_head, 0)
