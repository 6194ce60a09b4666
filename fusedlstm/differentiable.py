"""Gradients by autograd inside of a backward of ours: of a graph that is there, or such as can be differentiated again."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def gradients(
    call: Callable[..., Sequence[Tensor]],
    tensors: Sequence[Tensor | None],
    needs: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Those of call(*tensors) by the tensors that are needed, from those of its results; autograd can go on from them.

    `call` gets views: what a tensor was made from is another function's affair, and would be counted twice where one of the
    tensors was made from another.
    """
    with torch.enable_grad():
        views = [x if x is None else x.view_as(x) for x in tensors]
        return of_graph(views, call(*views), needs, grads, create_graph=True)


def of_graph(
    inputs: Sequence[Tensor | None],
    results: Sequence[Tensor],
    needs: Sequence[bool],
    grads: Sequence[Tensor | None],
    **options: bool,
) -> list[Tensor | None]:
    """Those of the inputs that are needed, None for the others; `options` of `torch.autograd.grad`."""
    pairs = [(y, g) for y, g in zip(results, grads, strict=True) if g is not None]
    wanted = [x for x, need in zip(inputs, needs, strict=True) if need]
    found = iter(
        torch.autograd.grad([y for y, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True, **options)
    )
    return [next(found) if need else None for need in needs]
