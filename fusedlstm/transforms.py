"""How our ops and functions behave under the transforms of torch.

These are gradients of gradients, many gradients at once, and forward-mode derivatives.

| under | a call is served by |
|---|---|
| `create_graph=True`, `is_grads_batched=True`, `torch.func.grad` | the specification (`wanted`, `gradients`) |
| forward-mode AD | the specification, already forward (`has_tangents`); `tangents` where a transform hides them |
| `torch.vmap` | the same op, once for every sample (`by_sample`); never ATen, which has no rules for layers |
| forward-mode AD of a compiled graph without gradients | nobody: an error (`op`) |

`grad_clip` clips gradients, which no derivative knows of: second derivatives clip the parts of a gradient that come by
different ways each by itself, and tangents are not clipped.
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

    def of_needed(*needed: Tensor) -> tuple[Tensor, ...]:
        results = call(*_filled(tensors, needs, needed))
        return tuple(y for y, g in zip(results, grads, strict=True) if g is not None)

    _, backward = torch.func.vjp(of_needed, *(x for x, need in zip(tensors, needs, strict=True) if need))
    found = backward(tuple(g for g in grads if g is not None))
    return _filled([None] * len(needs), needs, found)


def tangents(
    call: Callable[..., Sequence[Tensor]], tensors: Sequence[Tensor | None], given: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """Those of the results of call(*tensors), from those of the tensors, of which one at least has one.

    By reverse mode twice, since forward mode does not nest: u -> J^T u is linear, and its transpose is J.
    """
    has = [t is not None for t in given]
    moved = [x for x, own in zip(tensors, has, strict=True) if own]
    results, backward = torch.func.vjp(lambda *moved: tuple(call(*_filled(tensors, has, moved))), *moved)
    _, forward = torch.func.vjp(lambda *u: backward(u), *(torch.zeros_like(y) for y in results))
    return forward(tuple(t for t in given if t is not None))


def _filled(values: Sequence, where: Sequence[bool], others: Sequence) -> list:
    """`values`, with the others in their places."""
    given = iter(others)
    return [next(given) if there else x for x, there in zip(values, where, strict=True)]


def wanted(grads: Sequence[Tensor | None]) -> bool:
    """Whether what a backward makes of `grads` is to be differentiable, or `grads` are such as our ops do not take.

    That is with `create_graph=True`; where they have tangents; and where many come at once.
    """
    return torch.is_grad_enabled() or has_tangents(grads) or any(g is not None and many_at_once(g) for g in grads)


def many_at_once(grad: Tensor) -> bool:
    """Whether it is many gradients: `is_grads_batched=True` uses the elder vmap, which takes no rules from outside.

    No public function of torch tells.
    """
    return not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(grad)


def transformed() -> bool:
    """Whether a transform of `torch.func` runs. It hides what is behind a tensor: samples, gradients or tangents.

    No public function of torch tells.
    """
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def followed(tensors: Sequence[Tensor]) -> bool:
    """Whether autograd follows one of the tensors, or may do so behind a transform."""
    return torch.is_grad_enabled() and (any(x.requires_grad for x in tensors) or transformed())


def of_graph(
    inputs: Sequence[Tensor | None],
    results: Sequence[Tensor],
    needs: Sequence[bool],
    grads: Sequence[Tensor | None],
    **options: bool,
) -> list[Tensor | None]:
    """The gradients of the inputs that are needed, from a graph that exists, and None for the others.

    `options` are those of `torch.autograd.grad`.
    """
    pairs = [(y, g) for y, g in zip(results, grads, strict=True) if g is not None]
    wanted = [x for x, need in zip(inputs, needs, strict=True) if need]
    found = iter(
        torch.autograd.grad([y for y, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True, **options)
    )
    return [next(found) if need else None for need in needs]


def has_tangents(tensors: Sequence[Tensor | None]) -> bool:
    """Whether forward-mode AD follows one of the tensors: our ops would drop its tangent without a word."""
    try:
        for x in tensors:
            if x is not None:
                primal, tangent = forward_ad.unpack_dual(x)
                if primal is x:  # as of every tensor where no level of forward-mode AD is open: one look is enough
                    return False
                if tangent is not None:
                    return True
        return False
    except RuntimeError:
        # What cannot be unpacked may have one: so in the graphs of a compiler, below autograd. But samples of vmap
        # cannot be either, and what is behind them is the affair of `tangents`.
        return not transformed()


def apply(function: type[torch.autograd.Function], *arguments):
    """`function.apply`, with `function.tangents` as its `jvp`, except under a compiler: Dynamo refuses a `jvp`."""
    return (function if torch.compiler.is_compiling() else _with_jvp(function)).apply(*arguments)


@functools.cache
def _with_jvp(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    return type(
        function.__name__, (function,), {"jvp": staticmethod(function.tangents), "__module__": function.__module__}
    )


def op(name: str, mutates_args: tuple[str, ...] = ()) -> Callable:
    """`torch.library.custom_op` of a function, with what all of ours have in common under transforms.

    Raises:
        NotImplementedError: when called, in forward-mode AD, where torch drops the tangents of an op that does not
            require grad.
    """

    def check(arguments) -> None:
        if has_tangents([x for a in arguments for x in (a if isinstance(a, list) else [a]) if isinstance(x, Tensor)]):
            raise NotImplementedError(
                f"{name}: expected tensors without tangents, got a level of forward-mode AD, "
                "which is not served in a compiled graph, nor under torch.vmap without gradients; "
                "take the derivative inside of the graph, "
                "call the module without torch.compile and torch.no_grad, or use reverse mode"
            )

    def of_function(function: Callable):
        @functools.wraps(function)
        def checked(*arguments):
            check(arguments)
            return function(*arguments)

        def of_sample(*arguments):
            check(arguments)  # an op under torch.func.jvp no longer sees what it drops
            return made(*arguments)

        made = torch.library.custom_op(name, checked, mutates_args=mutates_args)
        if not mutates_args:  # what all samples share cannot be changed for each
            made.register_vmap(functools.partial(by_sample, of_sample))
        return made

    return of_function


def by_sample(call: Callable, info, in_dims, *arguments):
    """A rule of vmap for `call`, an op or the `apply` of a function of autograd: one call for every sample.

    So the samples' numbers are those of single calls, and no kernel has to know of one more axis.
    """
    found = [call(*_sample(arguments, in_dims, k)) for k in range(info.batch_size)]
    if isinstance(found[0], Tensor):
        return torch.stack(found), 0
    return tuple(torch.stack(results) for results in zip(*found, strict=True)), (0,) * len(found[0])


def _sample(x, dim, k: int):
    """The k-th sample of a tensor that has samples along `dim`, or of such within tuples and lists."""
    if isinstance(x, tuple | list):
        dims = dim if isinstance(dim, tuple | list) else [dim] * len(x)
        found = [_sample(y, d, k) for y, d in zip(x, dims, strict=True)]
        return type(x)(*found) if hasattr(x, "_fields") else found
    return x if dim is None else x.select(dim, k)


def not_captured(name: str, device: torch.device, came: str) -> None:
    """That no CUDA graph is being captured, where the work on `device` needs what only the host can do.

    Raises:
        RuntimeError: one is; `came` says what needs the host.
    """
    if device.type == "cuda" and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{name}: expected what needs no host while a CUDA graph is captured, got {came}; "
            "a padded batch whose lengths and resets are on the device can be captured with backend='triton'"
        )
