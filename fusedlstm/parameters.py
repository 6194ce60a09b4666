"""The parameters of one layer and direction, as a cell takes them: weight_ih, weight_hh (, bias_ih, bias_hh), vectors."""

import torch
from torch import Tensor

from fusedlstm import cells, norms


def has_bias(cell: str, parameters: list[Tensor]) -> bool:
    return len(parameters) - len(cells.CELLS[cell].vectors) == 4


def input_bias(cell: str, parameters: list[Tensor]) -> Tensor | None:
    """What is added to the input product, [G*H]; None: nothing."""
    if not has_bias(cell, parameters):
        return None
    return parameters[2] if cells.CELLS[cell].bias_in_step else parameters[2] + parameters[3]


def normed(
    cell: str,
    products: Tensor,  # [..., D, G*H]
    per_direction: list[list[Tensor]],
) -> Tensor:
    """Input products of a cell with norms as preactivations, their biases added."""
    first = -len(cells.CELLS[cell].vectors)
    biases = [input_bias(cell, p) for p in per_direction]
    return norms.of_input_product(products, [p[first] for p in per_direction], biases)


def vectors_gradients(cell: str, gradient: Tensor) -> list[Tensor]:
    """Gradients [V, H] of what `vectors` takes, as those of the parameters: all of a cell's, or with norms all but the first."""
    of = cells.CELLS[cell]
    if not of.norms:
        return list(gradient.unbind(0))
    G = of.num_gates
    return [gradient[:G].flatten(), *gradient[G:].unbind(0)]


def vectors(cell: str, per_direction: list[list[Tensor]]) -> Tensor | None:
    """What a step takes beside the preactivations, [D, V, H]; None: nothing."""
    of = cells.CELLS[cell]
    if not of.num_vectors:
        return None
    return stacked([_vectors(of, has_bias(cell, p), p) for p in per_direction])


def _vectors(of: cells.Cell, bias: bool, parameters: list[Tensor]) -> Tensor:
    """[V, H]"""
    weight_hh = parameters[1]
    own = list(parameters[len(parameters) - len(of.vectors) :])[
        of.norms :
    ]  # the first gain belongs to the input product
    if of.bias_in_step:
        own = [parameters[3] if bias else weight_hh.new_zeros(len(weight_hh)), *own]
    return joined(own).view(of.num_vectors, len(weight_hh) // of.num_gates)


def joined(tensors: list[Tensor], dim: int = 0) -> Tensor:
    """One tensor of several; of one, itself."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def stacked(tensors: list[Tensor]) -> Tensor:
    """The same along a new first axis; of one, a view."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)
