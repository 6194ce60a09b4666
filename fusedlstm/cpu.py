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

Where threads spin nothing is changed: there is little to be won.
The number of threads changes no result but by rounding, and the choice is one of shapes and environment: the same every time.
"""

import contextlib
import ctypes
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fusedlstm import differentiable

THREADS_SLEEP = os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive"  # OpenMP reads it when torch is imported
LARGEST_STEP = 1 << 24  # operations of its product
LEAST_CALL = 1 << 16  # operations of all its steps; of smaller ones torch shares nothing out
ROWS = 512  # of a block


def is_small(operations: int) -> bool:
    """Whether work of steps of so many operations is done sooner by one thread."""
    return THREADS_SLEEP and operations <= LARGEST_STEP and not torch.compiler.is_compiling() and _pools() is not None


@contextlib.contextmanager
def alone_if_small(operations: int) -> Iterator[None]:
    """Inside, work runs in the calling thread alone if its steps, of so many operations each, are small."""
    threads = torch.get_num_threads() if is_small(operations) else 1
    if threads == 1:
        yield
        return
    openmp, mkl = _pools()
    openmp(1)
    of_mkl = mkl(1)
    try:
        yield
    finally:
        openmp(threads)
        mkl(of_mkl)


class Pools(NamedTuple):
    """Functions that set how many threads OpenMP and MKL take for the calling thread; MKL's returns how many it was, 0 for all.

    `torch.set_num_threads` calls both, but notes the number for the whole process as well: a thread that uses torch for the first time
    meanwhile would keep it for good. And it forgets oneDNN's primitives.
    """

    openmp: Callable[[int], None]
    mkl: Callable[[int], int]


@functools.cache
def _pools() -> Pools | None:
    """Those of the libraries that torch has loaded; None where it has another OpenMP, or none."""
    folder = Path(torch.__file__).parent / "lib"
    libraries = [*folder.glob("libgomp*.so*")]
    if "ATen parallel backend: OpenMP" not in torch.__config__.parallel_info() or len(libraries) != 1:
        return None
    openmp = ctypes.CDLL(str(libraries[0])).omp_set_num_threads
    mkl = getattr(ctypes.CDLL(str(folder / "libtorch_cpu.so")), "MKL_Set_Num_Threads_Local", None)
    if mkl is None and torch.backends.mkl.is_available():
        return None
    return Pools(openmp, mkl or (lambda threads: 0))


def run(steps: int, operations: int, call: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """call(*tensors), differentiable operations of ATen, in the calling thread alone if its steps are small; its backward too."""
    if not is_small(operations) or steps * operations < LEAST_CALL or torch.get_num_threads() == 1 or _is_seen(tensors):
        return call(*tensors)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return Alone.apply(operations, call, *tensors)
    with alone_if_small(operations):
        return call(*tensors)


class Alone(torch.autograd.Function):
    """The forward records a graph of its own, which the backward runs: neither is a matter of the threads outside.

    The graph lives as long as one of autograd's would. Where gradients are to be differentiable, the backward calls again,
    with the same random numbers.
    """

    @staticmethod
    def forward(ctx, operations, call, *tensors):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.operations, ctx.call, ctx.random = operations, call, torch.get_rng_state()
        with alone_if_small(operations), torch.enable_grad():
            leaves = tuple(x.detach().requires_grad_(x.requires_grad) for x in tensors)
            ctx.recorded = leaves, call(*leaves)
        return tuple(y.detach() for y in ctx.recorded[1])

    @staticmethod
    def backward(ctx, *grads):
        needs, tensors = ctx.needs_input_grad[2:], ctx.saved_tensors  # an error if it is used twice unannounced
        if torch.is_grad_enabled():  # create_graph=True
            with torch.random.fork_rng([]), torch.autocast("cpu", enabled=False), alone_if_small(ctx.operations):
                torch.set_rng_state(ctx.random)
                return None, None, *differentiable.gradients(ctx.call, tensors, needs, grads)
        keeps = torch._C._autograd._get_current_graph_task_keep_graph()
        recorded, ctx.recorded = ctx.recorded, ctx.recorded if keeps else None
        with alone_if_small(ctx.operations):
            return None, None, *differentiable.of_graph(*recorded, needs, grads, retain_graph=keeps)


def _is_seen(tensors: tuple[Tensor, ...]) -> bool:
    """Whether something must see ATen's operations themselves, or what each of them keeps, or keeps nothing."""
    return (
        tensors[0].device.type != "cpu"
        or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None  # checkpoints, among others
        or torch.jit.is_tracing()
        or differentiable.transformed()
        or any(type(x) not in (Tensor, torch.nn.Parameter) or x.is_inference() for x in tensors)
        or differentiable.has_tangents(tensors)
    )


def row_blocks(rows: int, device: torch.device) -> list[slice]:
    """Blocks of rows; one on a GPU, whose passes want to be long, and in a graph, which is for any number of rows."""
    if device.type != "cpu" or torch.compiler.is_compiling():
        return [slice(0, rows)]
    return [slice(begin, begin + ROWS) for begin in range(0, max(rows, 1), ROWS)]
