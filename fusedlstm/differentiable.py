"""Gradients that can be differentiated again, for the backward of our functions under `create_graph=True`."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def gradients(
    call: Callable[..., Sequence[Tensor]],
    tensors: Sequence[Tensor | None],
    needs: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Those of call(*tensors) by the tensors that are needed, from those of its results; by autograd, which can go on from them.

    `call` gets views: what a tensor was made from is another function's affair, and would be counted twice where one of the
    tensors was made from another.
    """
    with torch.enable_grad():
        views = [x if x is None else x.view_as(x) for x in tensors]
        pairs = [(y, g) for y, g in zip(call(*views), grads, strict=True) if g is not None]
        found = iter(
            torch.autograd.grad(
                [y for y, _ in pairs],
                [x for x, need in zip(views, needs, strict=True) if need],
                [g for _, g in pairs],
                create_graph=True,
                allow_unused=True,
            )
        )
    return [next(found) if need else None for need in needs]
