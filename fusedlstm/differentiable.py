"""What our ops and backwards owe to the transforms of torch: gradients of gradients, many at once, forward-mode derivatives.

| a call under | is served by |
|---|---|
| a backward with `create_graph=True` or `is_grads_batched=True`, `torch.func.grad` | the specification (`wanted`, `gradients`) |
| `torch.vmap` | the same op or function, once for every sample (`by_sample`) |
| forward-mode AD, where a tensor has a tangent | the specification, forward already (`has_tangents`) |
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad


def gradients(
    call: Callable[..., Sequence[Tensor]],
    tensors: Sequence[Tensor | None],
    needs: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Those of call(*tensors) by the tensors that are needed, from those of its results; autograd can go on from them.

    What a tensor was made from is another function's affair, even where that is one of the tensors too.
    """

    def of_wanted(*wanted: Tensor) -> tuple[Tensor, ...]:
        given = iter(wanted)
        results = call(*(next(given) if need else x for x, need in zip(tensors, needs, strict=True)))
        return tuple(y for y, g in zip(results, grads, strict=True) if g is not None)

    _, backward = torch.func.vjp(of_wanted, *(x for x, need in zip(tensors, needs, strict=True) if need))
    found = iter(backward(tuple(g for g in grads if g is not None)))
    return [next(found) if need else None for need in needs]


def wanted(grads: Sequence[Tensor | None]) -> bool:
    """Whether what a backward makes of `grads` is to be differentiable, or `grads` are such as our ops do not take.

    That is with `create_graph=True`; where they have tangents; and where many come at once (`is_grads_batched=True`, for
    which torch uses the elder vmap, that takes no rule from outside and that no public function tells of).
    """
    if torch.is_grad_enabled() or has_tangents(grads):
        return True
    if torch.compiler.is_compiling():
        return False
    return any(g is not None and torch._C._functorch.is_legacy_batchedtensor(g) for g in grads)


def of_graph(
    inputs: Sequence[Tensor | None],
    results: Sequence[Tensor],
    needs: Sequence[bool],
    grads: Sequence[Tensor | None],
    **options: bool,
) -> list[Tensor | None]:
    """Of a graph that is there, those of the inputs that are needed, None for the others; `options` of `torch.autograd.grad`."""
    pairs = [(y, g) for y, g in zip(results, grads, strict=True) if g is not None]
    wanted = [x for x, need in zip(inputs, needs, strict=True) if need]
    found = iter(
        torch.autograd.grad([y for y, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True, **options)
    )
    return [next(found) if need else None for need in needs]


def has_tangents(tensors: Sequence[Tensor | None]) -> bool:
    """Whether forward-mode AD follows one of the tensors: our ops would drop its tangent without a word."""
    given = [x for x in tensors if x is not None]
    # Where no level of forward-mode AD is open, a tensor is its own primal: one look in place of one a tensor.
    if not given or forward_ad.unpack_dual(given[0]).primal is given[0]:
        return False
    return any(forward_ad.unpack_dual(x).tangent is not None for x in given)


def op(name: str, mutates_args: tuple[str, ...] = ()) -> Callable:
    """`torch.library.custom_op` of a function, with what all of ours have in common under transforms.

    Raises:
        NotImplementedError: when called, in forward-mode AD, where torch drops the tangents of an op that does not require grad.
    """

    def of_function(function: Callable):
        @functools.wraps(function)
        def checked(*arguments):
            if has_tangents([x for a in arguments for x in (a if isinstance(a, list) else [a]) if isinstance(x, Tensor)]):
                raise NotImplementedError(
                    f"{name}: expected tensors without tangents, got one of forward-mode AD, which compiled graphs of fusedlstm do not "
                    "serve; take the derivative inside of the graph, call the module without torch.compile, or use reverse mode"
                )
            return function(*arguments)

        made = torch.library.custom_op(name, checked, mutates_args=mutates_args)
        made.register_vmap(functools.partial(by_sample, made))
        return made

    return of_function


def by_sample(call: Callable, info, in_dims, *arguments):
    """A rule of vmap for `call`, an op or the `apply` of a function of autograd: one call for every sample.

    So the samples' numbers are those of single calls, and no kernel has to know of one more axis.
    """
    found = [call(*_sample(arguments, in_dims, k)) for k in range(info.batch_size)]
    if found[0] is None:
        return None, None
    if isinstance(found[0], Tensor):
        return torch.stack(found), 0
    return tuple(torch.stack(results) for results in zip(*found, strict=True)), (0,) * len(found[0])


def _sample(x, dim, k: int):
    """The k-th sample of a tensor that has samples along `dim`, or of such within tuples and lists."""
    if isinstance(x, tuple | list):
        dims = dim if isinstance(dim, tuple | list) else [dim] * len(x)
        return [_sample(y, d, k) for y, d in zip(x, dims, strict=True)]
    return x if dim is None else x.select(dim, k)
