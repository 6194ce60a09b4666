"""What a CPU wants: no thread woken for small work, and passes over all rows in blocks that fit its cache.

A step is short, and every product and operation of it may be shared out among threads. Threads that wait actively (OpenMP's
default) are there within a microsecond or two; those that sleep (`OMP_WAIT_POLICY=passive`, as on machines that are shared) come after
fifty or more. Then small work is done sooner by the calling thread alone. `nn.LSTM` itself, time of two threads over
time of one, T 64, forward and backward (sketches, two AVX2 cores):

| B, H | operations of a step's recurrent product | threads that sleep | that spin |
|---|---|---|---|
| 1, 64 | 2^15 | 9.4 | 1.25 |
| 4, 64 | 2^17 | 7.2 | 1.21 |
| 16, 64 | 2^19 | 5.2 | 0.93 |
| 16, 128 | 2^21 | 2.4 | 0.73 |
| 64, 128 | 2^23 | 1.5 | 0.64 |
| 64, 256 | 2^25 | 0.8 | 0.61 |

Where threads spin nothing is changed: what could be won there torch spends on the change, which forgets oneDNN's primitives.
The number of threads changes no result but by rounding, and the choice is one of shapes and environment: the same every time.
"""

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd import forward_ad

THREADS_SLEEP = os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive"  # OpenMP reads it when torch is imported
LARGEST_STEP = 1 << 24  # operations of its product
LEAST_CALL = 1 << 16  # operations of all its steps; of smaller ones torch shares nothing out
ROWS = 512  # of a block


def is_small(operations: int) -> bool:
    """Whether work of steps of so many operations is done sooner by one thread."""
    return THREADS_SLEEP and operations <= LARGEST_STEP and not torch.compiler.is_compiling() and _is_openmp()


@contextlib.contextmanager
def alone_if_small(operations: int) -> Iterator[None]:
    """Inside, work runs in the calling thread alone if its steps, of so many operations each, are small."""
    threads = torch.get_num_threads() if is_small(operations) else 1
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)  # with OpenMP of this thread, and of those that use torch for the first time meanwhile
    _inside.threads = threads
    try:
        yield
    finally:
        _inside.threads = None
        torch.set_num_threads(threads)


def run(steps: int, operations: int, call: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """call(*tensors), differentiable operations of ATen, in the calling thread alone if its steps are small; its backward too."""
    # A checkpoint calls again from inside of our backward, and must go the way of the first time.
    threads = _inside.threads or torch.get_num_threads()
    gains = threads > 1 and is_small(operations) and steps * operations >= LEAST_CALL
    if not gains or tensors[0].device.type != "cpu" or _is_transformed(tensors):
        return call(*tensors)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return Alone.apply(operations, call, *tensors)
    with alone_if_small(operations):
        return call(*tensors)


class _Inside(threading.local):
    """Of a thread that works alone: how many there are outside."""

    threads: int | None = None


_inside = _Inside()


class Alone(torch.autograd.Function):
    """The forward records a graph of its own, which the backward runs: neither is a matter of the threads outside.

    The first backward frees that graph, as autograd does. A second one, and one whose gradients are to be differentiable,
    call again, with the same random numbers.
    """

    @staticmethod
    def forward(ctx, operations, call, *tensors):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.operations, ctx.call, ctx.random = operations, call, torch.get_rng_state()
        with alone_if_small(operations):
            ctx.recorded = _recorded(call, tensors)
        return tuple(y.detach() for y in ctx.recorded[1])

    @staticmethod
    def backward(ctx, *grads):
        create_graph, recorded, ctx.recorded = torch.is_grad_enabled(), ctx.recorded, None
        with alone_if_small(ctx.operations):
            if create_graph or recorded is None:
                with torch.random.fork_rng([]), torch.autocast("cpu", enabled=False):
                    torch.set_rng_state(ctx.random)
                    tensors = ctx.saved_tensors
                    recorded = (tensors, ctx.call(*tensors)) if create_graph else _recorded(ctx.call, tensors)
            inputs, results = recorded
            pairs = [(y, g) for y, g in zip(results, grads, strict=True) if g is not None]
            needs = ctx.needs_input_grad[2:]
            wanted = [x for x, need in zip(inputs, needs, strict=True) if need]
            of_results = ([y for y, _ in pairs], wanted, [g for _, g in pairs])
            found = iter(torch.autograd.grad(*of_results, create_graph=create_graph, allow_unused=True))
        return None, None, *(next(found) if need else None for need in needs)


def _recorded(call, tensors: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Leaves in place of the tensors, and the results: a graph of its own."""
    with torch.enable_grad():
        leaves = tuple(x.detach().requires_grad_(x.requires_grad) for x in tensors)
        return leaves, call(*leaves)


def _is_transformed(tensors: tuple[Tensor, ...]) -> bool:
    """Whether something looks on that must see ATen's operations themselves."""
    return (
        torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or any(type(x) not in (Tensor, torch.nn.Parameter) for x in tensors)
        or any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)
    )


@functools.cache
def _is_openmp() -> bool:
    """Other pools of threads keep their size."""
    return "ATen parallel backend: OpenMP" in torch.__config__.parallel_info()


def row_blocks(rows: int, device: torch.device) -> list[slice]:
    """Blocks of rows; one on a GPU, whose passes want to be long, and in a graph, which is for any number of rows."""
    if device.type != "cpu" or torch.compiler.is_compiling():
        return [slice(0, rows)]
    return [slice(begin, begin + ROWS) for begin in range(0, max(rows, 1), ROWS)]
