"""How many threads the steps of a loop on a CPU are shared out to.

A step is short, and has a product and some operations, each of which may wake other threads. Threads that wait actively are there
at once; those that sleep (`OMP_WAIT_POLICY=passive`, as on machines that are shared) come after a hundred microseconds or so.
Then a small step is done sooner by the calling thread alone. Two threads, T 128, B 32, H 128, forward and backward: 1.7 times
as fast for the peephole LSTM, 2.7 for the vanilla RNN; at 32 million operations a step there is nothing to gain.

The number of threads changes no result but by rounding, and the choice is one of shapes and environment: the same every time.
"""

import contextlib
import functools
import os
from collections.abc import Iterator

import torch

LARGEST_STEP = 1 << 24  # operations of its product
THREADS_SLEEP = os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive"  # OpenMP reads it when torch is imported


@contextlib.contextmanager
def of_steps(operations: int) -> Iterator[None]:
    """Inside, small steps run in the calling thread alone; `operations` are those of a step's product."""
    threads = torch.get_num_threads()
    if not (THREADS_SLEEP and operations <= LARGEST_STEP and threads > 1 and _is_openmp()):
        yield
        return
    torch.set_num_threads(1)  # with OpenMP of this thread, and of those that use torch for the first time meanwhile
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@functools.cache
def _is_openmp() -> bool:
    """Other pools of threads keep their size."""
    return "ATen parallel backend: OpenMP" in torch.__config__.parallel_info()
