"""The samples of `torch.vmap` in the arguments of an op: as more sequences of one call, or as more of its units.

An op has one call for all samples if they fit into its axes, and one call for every sample otherwise.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Axes(NamedTuple):
    """Where the samples of `torch.vmap` go in the arguments of an op and in its results.

    To be sequences: the axis of sequences. To be units: the number of blocks of units in the last axis; it is negative
    if they are in the first one. None says that a tensor can hold no samples. A list of tensors has a tuple of these,
    or one that is for all.
    """

    arguments: dict[str, Any]
    results: tuple[int, ...]


def together(call: Callable, as_sequences: Axes | None, as_units: Callable, info, in_dims, *given):
    """The results of an op for all samples, and where the samples are in them.

    | what differs between the samples | what the op gets |
    |---|---|
    | inputs, states, lengths or resets | a batch of samples * B sequences |
    | parameters too, as in an ensemble of models | a layer of samples * H units, of which every sample has its heads |
    | anything else, or there is noise inside of the steps | a call for every sample |

    Norms are over all units of a layer, so the models of an ensemble with norms have a call each.
    """
    names, size = inspect.signature(call).parameters, info.batch_size
    dims = dict(zip(names, in_dims, strict=False))
    arguments = {name: _samples_first(x, dims[name]) for name, x in zip(names, given, strict=False)}
    alike = not arguments.get("rates")
    move: Callable[..., Tensor]
    back: Callable[..., Tensor]
    is_packed = "tables" in arguments and arguments["tables"][1] is not None
    if alike and as_sequences is not None and not is_packed and _have_room(dims, as_sequences):
        move, back, axes = _as_sequences, _from_sequences, as_sequences
    elif alike and (axes := as_units(arguments, size)) is not None and _have_room(dims, axes):
        move, back = _as_units, _from_units
    else:
        return _by_sample(call, info, in_dims, *given)
    for name, axis in axes.arguments.items():
        arguments[name] = _each(functools.partial(move, size), arguments[name], dims[name], axis)
    results = zip(call(*arguments.values()), axes.results, strict=True)
    # What was not asked for is empty and has no axes. Of the others every sample is without gaps, as an op makes it.
    found = [(x, None) if x.shape == (0,) else (back(size, x, axis).contiguous(), 0) for x, axis in results]
    return tuple(zip(*found, strict=True))


def _by_sample(call: Callable, info, in_dims, *arguments):
    """A rule of vmap for an op. It makes one call per sample."""
    found = [call(*_sample(arguments, in_dims, k)) for k in range(info.batch_size)]
    if isinstance(found[0], Tensor):
        return torch.stack(found), 0
    return tuple(torch.stack(results) for results in zip(*found, strict=True)), (0,) * len(found[0])


def _sample(x, dim, k: int):
    """The k-th sample of a tensor that has samples along `dim`, or of tensors in tuples and lists."""
    if isinstance(x, tuple | list):
        dims = dim if isinstance(dim, tuple | list) else [dim] * len(x)
        found = [_sample(y, d, k) for y, d in zip(x, dims, strict=True)]
        return type(x)(*found) if hasattr(x, "_fields") else found
    return x if dim is None else x.select(dim, k)


def _have_room(dims: dict[str, Any], axes: Axes) -> bool:
    """Whether all tensors that have samples can hold them."""

    def one(dim, axis) -> bool:
        if isinstance(dim, tuple | list):
            return all(map(one, dim, axis if isinstance(axis, tuple) else [axis] * len(dim)))
        return dim is None or axis is not None

    return all(one(dim, axes.arguments.get(name)) for name, dim in dims.items())


def _each(move: Callable, x, dim, axis):
    """`move` of a tensor, or of every tensor of a list; without gaps, as ops take them."""
    if isinstance(x, tuple | list):
        dims = dim if isinstance(dim, tuple | list) else [dim] * len(x)
        axes = axis if isinstance(axis, tuple) else [axis] * len(x)
        return [_each(move, *own) for own in zip(x, dims, axes, strict=True)]
    if x is None or axis is None:
        return x
    return move(x, dim is not None, axis).contiguous()


def _samples_first(x, dim):
    """A tensor, or a list of tensors, with samples on the first axis if they have any."""
    if isinstance(x, tuple | list):
        dims = dim if isinstance(dim, tuple | list) else [dim] * len(x)
        return [_samples_first(*own) for own in zip(x, dims, strict=True)]
    return x if dim is None else x.movedim(dim, 0)


def _as_sequences(size: int, x: Tensor, has_samples: bool, axis: int) -> Tensor:
    """[..., size * B, ...] of [size, ..., B, ...], or of what all samples share."""
    x = x.movedim(0, axis) if has_samples else x.unsqueeze(axis).expand(*x.shape[:axis], size, *x.shape[axis:])
    return x.flatten(axis, axis + 1)


def _from_sequences(size: int, x: Tensor, axis: int) -> Tensor:
    """And back."""
    return x.unflatten(axis, (size, x.size(axis) // size)).movedim(axis, 0)


def _as_units(size: int, x: Tensor, has_samples: bool, blocks: int) -> Tensor:
    """[..., blocks * size * H] of [size, ..., blocks * H], or of what all samples share; likewise in the first axis."""
    x = x if has_samples else x.expand(size, *x.shape)
    if blocks < 0:
        return x.unflatten(1, (-blocks, x.size(1) // -blocks)).transpose(0, 1).flatten(0, 2)
    return x.unflatten(-1, (blocks, x.size(-1) // blocks)).movedim(0, -2).flatten(-3)


def _from_units(size: int, x: Tensor, blocks: int) -> Tensor:
    """And back."""
    return x.unflatten(-1, (blocks, size, x.size(-1) // (blocks * size))).movedim(-2, 0).flatten(-2)
