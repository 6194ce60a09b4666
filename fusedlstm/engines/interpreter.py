"""Repairs of Triton's interpreter for these kernels: correct bfloat16, and programs that run side by side.

They are used if `TRITON_INTERPRET=1` was set before triton was imported. Triton's own interpreter (3.6 to 3.9) does
four things that are wrong or slow for us, without an error:

- bfloat16: `tl.dot` multiplies bit patterns, and a cast from float32 truncates. `repair_bfloat16` corrects both. Other
  arithmetic on bfloat16 stays wrong, so the kernels compute in float32.
- Every call of a device function prepares Triton's language again, a millisecond each, and a reduction by a function of
  ours calls it once for each element. `repair_speed` prepares once for a launch and reduces in halves, which makes a
  launch two to five times as fast.
- Programs run one after another, so a program that waits for another never ends. `side_by_side` runs each in a thread
  and passes a baton between them, in a schedule that a seed determines. It detects deadlocks.
- Two threads that launch at once take each other's program numbers. `repair_launches` lets one launch at a time.
"""

import contextlib
import functools
import inspect
import os
import random
import threading
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter as stock
from triton.runtime.errors import InterpreterError

_stock_call = stock.GridExecutor.__call__


class Deadlock(RuntimeError):
    """Every program of a launch waits, and none can continue."""


def repair_speed() -> None:
    """Prepare Triton's language once for a launch, and reduce in halves."""

    @functools.cache
    def languages(function) -> list:
        values = function.__globals__.values()
        return [value for value in values if inspect.ismodule(value) and value in (tl, tl.core)]

    def call(self, *args, **kwargs):
        # A prepared language has functions of the interpreter in the place of builtins.
        if any(tl.core.is_builtin(language.load) for language in languages(self.fn)):
            stock._patch_lang(self.fn)
        function = self.rewrite()
        try:
            return function(*args, **kwargs)
        except Exception as error:
            raise InterpreterError(repr(error)) from error

    def generic_reduce(self, tensors):
        if self.axis is None or self.keep_dims or len(tensors) > 1:
            return stock_reduce(self, tensors)
        (x,) = tensors
        values = np.moveaxis(x.handle.data, self.axis, 0)
        while len(values) > 1:
            half = len(values) // 2
            halves = (self.to_tensor(part, x.dtype) for part in (values[:half], values[half:]))
            values = self.combine_fn.fn(*halves).handle.data
        return [self.to_tensor(values[0], x.dtype)]

    stock_reduce, stock_dtype, dtypes = stock.ReduceOps.generic_reduce, stock._get_np_dtype, {}

    def get_np_dtype(dtype):
        name = dtype.scalar.name
        if name not in dtypes:
            dtypes[name] = stock_dtype(dtype.scalar)
        return dtypes[name]

    stock.InterpretedFunction.__call__ = call
    stock.ReduceOps.generic_reduce = generic_reduce
    stock._get_np_dtype = get_np_dtype


def repair_bfloat16() -> None:
    """Make `tl.dot` exact for bfloat16, and round float32 to bfloat16 to the nearest even value."""
    if getattr(stock, "_fusedlstm_repaired", False):
        return
    stock._fusedlstm_repaired = True
    stock_convert = stock._convert_float

    def as_float32(handle):
        if handle.dtype.scalar == tl.bfloat16:
            return (handle.data.astype(np.uint32) << 16).view(np.float32)
        return handle.data.astype(np.float32)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        product = np.matmul(as_float32(a), as_float32(b))
        return stock.TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)

    def convert_float(data, input_dtype, output_dtype, rounding_mode):
        if input_dtype == tl.float32 and output_dtype == tl.bfloat16:
            bits = np.ascontiguousarray(data).view(np.uint32)
            rounded = ((bits + ((bits >> 16) & 1) + np.uint32(0x7FFF)) >> 16).astype(np.uint16)
            rounded[np.isnan(data)] = 0x7FC0
            return rounded.reshape(data.shape)
        if input_dtype == tl.bfloat16 and output_dtype == tl.float32:
            return (data.astype(np.uint32) << 16).reshape(data.shape)
        return stock_convert(data, input_dtype, output_dtype, rounding_mode)

    stock.InterpreterBuilder.create_dot = create_dot
    stock._convert_float = convert_float
    if hasattr(stock.InterpreterBuilder, "get_cache_policy"):
        _repair_memory()


def _repair_memory() -> None:
    """Repairs for Triton 3.9, which refuses masks of integers, and drops the cache modifier of a load."""
    builder = stock.InterpreterBuilder

    def with_mask_at(place, operation):
        def masked(self, *args, **kwargs):
            args = list(args)
            args[place] = stock.TensorHandle(args[place].data.astype(bool), tl.int1)
            return operation(self, *args, **kwargs)

        return masked

    builder.create_masked_load = with_mask_at(1, builder.create_masked_load)
    builder.create_masked_store = with_mask_at(2, builder.create_masked_store)
    # `_poll` finds the modifier among the arguments of a load, as in 3.6 and 3.7.
    modifiers = {"cg": ir.CACHE_MODIFIER.CG}
    builder.get_cache_policy = lambda self, cache_modifier, eviction_policy: modifiers.get(cache_modifier)


class _Schedule(NamedTuple):
    """How the programs of a launch take turns: the arguments of `side_by_side`."""

    seed: int | None = None
    yield_on_memory: bool = False
    patience: int = 200


class _Scheduler:
    """One baton for all programs of a launch. The program that holds it runs."""

    def __init__(self, programs: list[tuple[int, int, int]], schedule: _Schedule) -> None:
        self.programs = programs
        self.running = set(range(len(programs)))
        self.baton = [threading.Semaphore(0) for _ in programs]
        self.random = None if schedule.seed is None else random.Random(schedule.seed)
        self.yield_on_memory, self.patience = schedule.yield_on_memory, schedule.patience
        self.idle = 0
        self.error: BaseException | None = None

    def _next(self, me: int) -> int:
        waiting = sorted(self.running)
        if self.random:
            return self.random.choice(waiting)
        return next((k for k in waiting if k > me), waiting[0])

    def _take(self, me: int) -> None:
        self.baton[me].acquire()
        if self.error:
            raise self.error
        stock.interpreter_builder.set_grid_idx(*self.programs[me])

    def switch(self, me: int, progress: bool) -> None:
        """Pass the baton on, and wait until it comes back."""
        if self.error:
            raise self.error
        self.idle = 0 if progress else self.idle + 1
        if self.idle > self.patience * len(self.running):
            raise Deadlock(f"no progress in {self.idle} polls; waiting programs: {sorted(self.running)}")
        other = self._next(me)
        if other != me:
            self.baton[other].release()
            self._take(me)

    def stop(self, error: BaseException) -> None:
        """End every program at its next poll."""
        self.error = self.error or error
        for baton in self.baton:
            baton.release()

    def run(self, me: int, body) -> None:
        try:
            self._take(me)
            body()
        except BaseException as error:
            while isinstance(error, InterpreterError) and error.__cause__:
                error = error.__cause__  # the stock interpreter wraps what a nested function raises
            self.error = self.error or error
        self.running.discard(me)
        self.idle = 0
        if self.error:
            self.stop(self.error)
        elif self.running:
            self.baton[self._next(me)].release()


_local = threading.local()  # the schedule of this thread's launches; the scheduler and number of the program it runs
operations: dict[str, Callable] = {}  # of the interpreter, beneath those after which the baton is passed on
_one_launch = threading.Lock()  # the interpreter keeps the number of its program in one place


def _renew_lock() -> None:
    """In a forked process, for one in which another thread launched at that moment."""
    global _one_launch
    _one_launch = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


@functools.cache
def repair_launches() -> None:
    """Launch one kernel at a time, side by side where that is asked for, by any number of threads.

    This is done once and for all threads. A replacement that ended with a launch would end in the middle of another.
    """
    for name in ("create_atomic_rmw", "create_masked_load", "create_masked_store"):
        operations[name] = getattr(stock.InterpreterBuilder, name)
        setattr(stock.InterpreterBuilder, name, _yielding(name))

    def call(self, *args, **kwargs):
        with _one_launch:
            return (replace_grid(_run_side_by_side) if active() else _stock_call)(self, *args, **kwargs)

    stock.GridExecutor.__call__ = call


def _yielding(name: str):
    """An operation of the interpreter after which the baton may be passed on."""

    def yielding(self, *args, **kwargs):
        result = operations[name](self, *args, **kwargs)
        scheduler = getattr(_local, "scheduler", None)
        if scheduler is not None:
            polls, progress = _poll(name, args, result)
            if polls or scheduler.yield_on_memory or name == "create_atomic_rmw":
                scheduler.switch(_local.program, progress)
        return result

    return yielding


def _poll(name: str, args, result) -> tuple[bool, bool]:
    """Whether an operation waits for another program, and whether it saw something new, which others always do."""
    if name == "create_atomic_rmw":
        pointers, polls = args[1], not (args[2].data != 0).any()  # adding zero
    elif name == "create_masked_load" and args[3] == ir.CACHE_MODIFIER.CG:
        bits = np.ascontiguousarray(result.data).view(f"i{result.data.itemsize}")
        # Either what `kernels.exchange` calls absent, or words with tags, of which only the kernel can say whether
        # they have arrived.
        pointers, polls = args[0], bits.itemsize == 8 or bool((bits == -1).any())
    else:
        return False, True
    if not polls:
        return False, True
    address, seen = pointers.data.flat[0], result.data.tobytes()
    progress = _local.seen.get(address) != seen
    _local.seen[address] = seen
    return True, progress


def replace_grid(run_programs):
    """A `GridExecutor.__call__` that passes the kernel, its arguments and its program ids to `run_programs`."""

    def __call__(self, *args, **kwargs):
        names = inspect.getfullargspec(self.fn).args
        kwargs = {name: value for name, value in kwargs.items() if name in names}
        args_host, kwargs_host = self._init_args_hst(args, kwargs)
        patched = stock._patch_lang(self.fn)
        try:
            bound = inspect.getcallargs(self.fn, *args_host, **kwargs_host)
            bound = {k: v if k in self.constexprs else stock._implicit_cvt(v) for k, v in bound.items()}
            grid = self.grid(bound) if callable(self.grid) else self.grid
            grid = (*grid, 1, 1)[:3]
            stock.interpreter_builder.set_grid_dim(*grid)
            run_programs(self.fn, bound, list(np.ndindex(*grid)))
        finally:
            patched.restore()
        self._restore_args_dev(args, args_host, kwargs, kwargs_host)

    return __call__


def _run_side_by_side(fn, args, programs) -> None:
    """Run the first program in this thread, and each other one in a thread of its own."""
    scheduler = _Scheduler(programs, _local.schedule)

    def body(me):
        _local.scheduler, _local.program, _local.seen = scheduler, me, {}
        try:
            scheduler.run(me, lambda: fn(**args))
        finally:
            _local.scheduler = None

    threads = [threading.Thread(target=body, args=(k,), daemon=True) for k in range(1, len(programs))]
    options = stock.interpreter_builder.options
    try:
        stock.interpreter_builder.options = stock.InterpreterOptions(debug=True, sanitize_overflow=False)
        for thread in threads:
            thread.start()
        scheduler.baton[scheduler._next(-1)].release()
        body(0)
        for thread in threads:
            thread.join()
    except BaseException as error:  # an interrupt, or no more threads: no program may run on beside the next launch
        scheduler.stop(error)
        for thread in threads:
            if thread.is_alive():
                thread.join()
        raise
    finally:
        stock.interpreter_builder.options = options
    if scheduler.error:
        raise scheduler.error


def active() -> bool:
    """Whether this thread's launches run under a scheduler."""
    return getattr(_local, "schedule", None) is not None


@contextlib.contextmanager
def side_by_side(seed: int | None = None, yield_on_memory: bool = False, patience: int = 200):
    """Run the programs of every launch of this thread concurrently, in a schedule that `seed` determines.

    Args:
        seed: The seed of the schedule. None is round robin.
        yield_on_memory: Whether to pass the baton on at every load and store too, and not only at atomics and at loads
            of values that have not arrived. Only this catches an exchange that does not wait.
        patience: The number of polls per program without progress after which the launch is a deadlock.

    Raises:
        Deadlock: All programs wait.
    """
    repair_launches()
    _local.schedule = _Schedule(seed, yield_on_memory, patience)
    try:
        yield
    finally:
        _local.schedule = None
