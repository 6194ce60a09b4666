"""How our ops and functions behave under the transforms of torch.

These are gradients of gradients, many gradients at once, and forward-mode derivatives.

| transform | what serves the call |
|---|---|
| `create_graph=True`, `torch.func.grad` | our ops; the specification for the gradients of gradients (`gradients`) |
| `is_grads_batched=True` | the specification (`cannot_take`) |
| forward-mode AD | the specification, in the forward too (`has_tangents`); `tangents` if a transform hides them |
| `torch.vmap` | one op for all samples (`samples.together`); never ATen, which has no rules for layers |
| any of these inside of a compiled graph | the specification (`loses_rules`); our ops for `vmap` without gradients |
| forward-mode AD of a compiled graph without gradients | nothing: this is an error (`op`) |

`grad_clip` is a part of the backward, as a function of the gradients that enter it: its derivative is 1 within the
limits and 0 outside of them. So the derivative of a clipped gradient is exact, and tangents are not clipped. One thing
autograd cannot tell apart: what a second derivative sends back into a layer from the layers above is for that layer a
gradient like any other, and is clipped.
"""

import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fusedlstm import samples
from fusedlstm.samples import Axes

Function = TypeVar("Function", bound=Callable[..., Any])


def constant(function: Function) -> Function:
    """Mark a function whose result is a constant for a compiler.

    `torch.compiler.assume_constant_result` does just this, but it imports Dynamo, which takes as long as torch itself.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def gradients(
    call: Callable[..., Sequence[Tensor]],
    tensors: Sequence[Tensor | None],
    needs: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients of the tensors that are needed, from those of the results of call(*tensors).

    Autograd can differentiate them again. They do not flow on to what a tensor was computed from, even if that is one
    of the tensors too.
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
    """The tangents of the results of call(*tensors), from those of the tensors. At least one tensor must have one.

    This uses reverse mode twice, because forward mode does not nest. u -> J^T u is linear, and its transpose is J.
    """
    has = [t is not None for t in given]
    moved = [x for x, own in zip(tensors, has, strict=True) if own]
    results, backward = torch.func.vjp(lambda *moved: tuple(call(*_filled(tensors, has, moved))), *moved)
    _, forward = torch.func.vjp(lambda *u: backward(u), *(torch.zeros_like(y) for y in results))
    return forward(tuple(t for t in given if t is not None))


def _filled(values: Sequence, where: Sequence[bool], others: Sequence) -> list:
    """`values`, with `others` in the places that `where` marks."""
    given = iter(others)
    return [next(given) if there else x for x, there in zip(values, where, strict=True)]


def cannot_take(grads: Sequence[Tensor | None]) -> bool:
    """Whether our ops cannot take `grads`: they have tangents, or there are many gradients at once."""
    return has_tangents(grads) or any(g is not None and many_at_once(g) for g in grads)


def many_at_once(grad: Tensor) -> bool:
    """Whether `grad` holds many gradients: `is_grads_batched=True` uses the older vmap, which takes no custom rules.

    No public function of torch says so.
    """
    return not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(grad)


def takes_tangents(x: Tensor) -> bool:
    """Whether a level of forward-mode AD is open, so that any tensor may have a tangent. `x` may be any tensor."""
    try:
        return forward_ad.unpack_dual(x).primal is not x
    except RuntimeError:  # it cannot be unpacked, see `has_tangents`
        return True


def transformed() -> bool:
    """Whether a transform of `torch.func` runs. It hides what is behind a tensor: samples, gradients or tangents.

    No public function of torch says so.
    """
    return torch._C._are_functorch_transforms_active()


def loses_rules() -> bool:
    """Whether a compiler traces a transform of `torch.func` that may ask for gradients.

    torch then loses the rules of custom ops and of `torch.autograd.Function`. It raises errors, or `torch.func.jacrev`
    gives wrong numbers without an error.
    """
    return torch.compiler.is_compiling() and transformed() and torch.is_grad_enabled()


def wants_grad_samples(weights: Iterable[Tensor | None]) -> bool:
    """Whether the weights are those of torch's `call_for_per_sample_grads`, of which few functions can be called."""
    return any(type(w) is not nn.Parameter and hasattr(type(w), "handled_functions") for w in weights)


def followed(tensors: Sequence[Tensor]) -> bool:
    """Whether autograd records one of the tensors, or may do so behind a transform."""
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
    """Whether one of the tensors has a tangent of forward-mode AD. Our ops would drop it silently."""
    try:
        for x in tensors:
            if x is not None:
                primal, tangent = forward_ad.unpack_dual(x)
                if primal is x:  # so no level of forward-mode AD is open, and no other tensor has a tangent
                    return False
                if tangent is not None:
                    return True
        return False
    except RuntimeError:
        # A tensor that cannot be unpacked may have one. This happens below autograd in the graphs of a compiler.
        # Samples of vmap cannot be unpacked either, and `tangents` handles what is behind them.
        return not transformed()


def apply(function: type[torch.autograd.Function], *arguments, name: str = ""):
    """`function.apply`, with `function.tangents` as its `jvp`, except under a compiler: Dynamo refuses a `jvp`.

    A profiler shows the forward by `name`, and the backward by `name` and "Backward".
    """
    return (function if torch.compiler.is_compiling() else _with_jvp(function, name)).apply(*arguments)


@functools.cache
def _with_jvp(function: type[torch.autograd.Function], name: str) -> type[torch.autograd.Function]:
    own = {"jvp": staticmethod(function.tangents), "__module__": function.__module__}
    return type(name or function.__name__, (function,), own)


OURS = torch.library.Library("fusedlstm", "FRAGMENT")  # as long as this object lives, so do the ops

FUNCTIONS: dict[Any, Callable] = {}  # what each op does


def op(
    name: str,
    backward: Callable | None = None,
    keep: Callable | None = None,
    mutates_args: tuple[str, ...] = (),
    as_sequences: Axes | None = None,
    as_units: Callable[[dict[str, Any], int], Axes | None] = lambda arguments, samples: None,
) -> Callable:
    """A custom op of a function, with the rules for transforms that all of our ops have.

    `define` and `impl` of `torch.library` make it, unless it changes an argument. So a call takes less time than one of
    `torch.library.custom_op`, and the first one does not import Dynamo, which takes as long as to import torch.

    Args:
        name: The name of the op, in the namespace "fusedlstm".
        backward, keep: Its gradient, as in `torch.library.register_autograd`. Without one, a backward is an error.
        mutates_args: The names of the arguments that it changes.
        as_sequences: Where samples go if they become sequences. None says that they cannot.
        as_units: From the arguments, with samples on their first axes, and the number of samples: where samples go if
            they become units. None says that they cannot.

    Raises:
        NotImplementedError: The op was called in forward-mode AD. torch would drop the tangents of an op that does not
            require grad.
    """

    def check(arguments) -> None:
        if has_tangents([x for a in arguments for x in (a if isinstance(a, list) else [a]) if isinstance(x, Tensor)]):
            raise NotImplementedError(
                f"{OURS.ns}::{name}: expected tensors without tangents, got a level of forward-mode AD, "
                "which is not served in a compiled graph, nor under torch.vmap without gradients; "
                "take the derivative inside of the graph, "
                "call the module without torch.compile and torch.no_grad, or use reverse mode"
            )

    def no_backward(ctx, *grads):
        raise RuntimeError(
            f"{OURS.ns}::{name}: expected tensors without requires_grad, as the op has no gradient, got a backward; "
            "call the module, whose gradients are around its ops"
        )

    def of_function(function: Callable):
        @functools.wraps(function)
        def checked(*arguments):
            check(arguments)
            return function(*arguments)

        @functools.wraps(function)
        def of_sample(*arguments):
            check(arguments)  # an op under torch.func.jvp no longer sees what it drops
            return made(*arguments)

        if mutates_args:  # what all samples share cannot be changed for each, nor differentiated
            torch.library.custom_op(f"{OURS.ns}::{name}", checked, mutates_args=mutates_args)
        else:
            schema = torch.library.infer_schema(function, mutates_args=())
            OURS.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
            OURS.impl(name, _hidden_from_dynamo(checked), "CompositeExplicitAutograd")
        made = getattr(getattr(torch.ops, OURS.ns), name).default
        if not mutates_args:
            rule = functools.partial(samples.together, of_sample, as_sequences, as_units)
            torch.library.register_vmap(made, rule, lib=OURS)
            torch.library.register_autograd(made, backward or no_backward, setup_context=keep, lib=OURS)
        FUNCTIONS[made] = checked
        return made

    return of_function


def _hidden_from_dynamo(function: Callable) -> Callable:
    """`torch.compiler.disable` of a function, without importing Dynamo.

    Dynamo does not look into an op while it traces the caller. But it looks at every function that a frame calls which
    it did not trace, and so at that of an op.
    """
    disabled = None

    @functools.wraps(function)
    def run(*arguments):
        nonlocal disabled
        if "torch._dynamo" not in sys.modules:
            return function(*arguments)
        if disabled is None:
            disabled = torch.compiler.disable(function)
        return disabled(*arguments)

    return run


def not_traced(
    name: str, expected: str = "a dense batch", came: str = "lengths, which the trace would keep as they are now"
) -> None:
    """Check that `torch.jit.trace` does not run. A trace keeps lengths for ever, and knows no lists of our ops.

    Raises:
        RuntimeError: A trace is being made.
    """
    if torch.jit.is_tracing():
        raise RuntimeError(
            f"{name}: expected {expected} in torch.jit.trace, got {came}; trace a dense or packed batch of an LSTM, "
            "GRU or RNN with the options of torch.nn, or use torch.compile or torch.export"
        )


def not_captured(name: str, device: torch.device, came: str) -> None:
    """Check that no CUDA graph is being captured. The caller needs the host for work on `device`.

    Raises:
        RuntimeError: A graph is being captured. `came` says what needs the host.
    """
    if device.type == "cuda" and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{name}: expected what needs no host while a CUDA graph is captured, got {came}; "
            "a padded batch whose lengths and resets are on the device can be captured with backend='triton'"
        )
