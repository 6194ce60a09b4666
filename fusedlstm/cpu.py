"""What a CPU wants: no thread woken for small work, and passes over all rows in blocks that fit its cache.

A step of a loop is short, and has a product and some operations, each of which may wake other threads. Threads that wait actively
are there at once; those that sleep (`OMP_WAIT_POLICY=passive`, as on machines that are shared) come after a hundred
microseconds or so. Then small work is done sooner by the calling thread alone. Two threads, T 128, B 32, H 128, forward and
backward, sketches: 1.7 times as fast for the peephole LSTM, 2.7 for the vanilla RNN; at 32 million operations a step there is
nothing to gain. What the loops are beside others: `python -m bench.loops`.

The number of threads changes no result but by rounding, and the choice is one of shapes and environment: the same every time.
"""

import contextlib
import functools
import os
from collections.abc import Iterator

import torch

LARGEST_STEP = 1 << 24  # operations of its product
THREADS_SLEEP = os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive"  # OpenMP reads it when torch is imported
ROWS = 512  # of a block


@contextlib.contextmanager
def alone_if_small(operations: int = 0) -> Iterator[None]:
    """Inside, work runs in the calling thread alone if it is small; `operations` of a product."""
    if torch.compiler.is_compiling() or not THREADS_SLEEP or operations > LARGEST_STEP or not _is_openmp():
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # with OpenMP of this thread, and of those that use torch for the first time meanwhile
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@functools.cache
def _is_openmp() -> bool:
    """Other pools of threads keep their size."""
    return "ATen parallel backend: OpenMP" in torch.__config__.parallel_info()


def row_blocks(rows: int, device: torch.device) -> list[slice]:
    """Blocks of rows; one on a GPU, whose passes want to be long, and in a graph, which is for any number of rows."""
    if device.type != "cpu" or torch.compiler.is_compiling():
        return [slice(0, rows)]
    return [slice(begin, begin + ROWS) for begin in range(0, max(rows, 1), ROWS)]
