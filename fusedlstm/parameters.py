"""The parameters of one layer and direction, as a cell takes them: weight_ih, weight_hh (, bias_ih, bias_hh), vectors."""

import torch
from torch import Tensor

from fusedlstm import cells


def has_bias(cell: str, parameters: list[Tensor]) -> bool:
    return len(parameters) - len(cells.CELLS[cell].vectors) == 4


def input_bias(cell: str, parameters: list[Tensor]) -> Tensor | None:
    """What is added to the input product, [G*H]; None: nothing."""
    if not has_bias(cell, parameters):
        return None
    return parameters[2] if cells.CELLS[cell].bias_in_step else parameters[2] + parameters[3]


def vectors(cell: str, per_direction: list[list[Tensor]]) -> Tensor | None:
    """What a step takes beside the preactivations, [D, V, H]; None: nothing."""
    of = cells.CELLS[cell]
    if not of.num_vectors:
        return None
    return torch.stack([_vectors(of, has_bias(cell, p), p) for p in per_direction])


def _vectors(of: cells.Cell, bias: bool, parameters: list[Tensor]) -> Tensor:
    """[V, H]"""
    weight_hh = parameters[1]
    own = list(parameters[len(parameters) - len(of.vectors) :])
    if of.bias_in_step:
        bias_hh = parameters[3] if bias else weight_hh.new_zeros(len(weight_hh))
        own = [*bias_hh.chunk(of.num_gates), *own]
    return torch.stack(own)
