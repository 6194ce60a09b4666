"""kernels/barrier.py: groups whose programs run truly side by side, and barriers that are broken on purpose.

Interpreted, the programs of a launch run under a scheduler whose order a seed determines, or as processes. On a GPU the
first test runs compiled, and the rest is skipped: there the hardware schedules.
"""

import contextlib
import os
import signal

import pytest
import torch
import triton
import triton.language as tl

from fusedlstm import launch, reference
from fusedlstm.kernels import barrier
from support import assert_accurate, cast, recurrence_inputs, tiled, without_padding

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="needs the interpreter: run without a GPU")

T, B, H, D = 4, 20, 40, 2  # per direction: two batch tiles, three programs a group


def run_both(inputs):
    """Forward and backward; (result, exact) of every tensor."""
    options = {"directions": D, "precision": "ieee"}
    fwd, bwd = (tiled(pass_, B, H, "fp32", block_k=64, **options) for pass_ in ("fwd", "bwd"))
    ours = launch.recurrence_fwd("lstm", **inputs, save_gates=True, save_states=True, plan=fwd)
    exact_inputs = cast(inputs, torch.float64)
    exact = reference.recurrence_fwd("lstm", **exact_inputs)
    generator = torch.Generator().manual_seed(2)
    grads = [torch.randn(ours[k].shape, generator=generator).to(ours[k].device) for k in (0, 4, 1, 2)]
    states = {k: v for k, v in inputs.items() if k != "preact_x"}
    saved = dict(zip(("output", "gates", "c_seq"), (ours[0], *ours[3:]), strict=True))
    ours_bwd = launch.recurrence_bwd("lstm", *_shared(grads), **states, **_shared(saved), plan=bwd)
    exact_states = {k: v for k, v in exact_inputs.items() if k != "preact_x"}
    exact_saved = dict(zip(saved, (exact[0], *exact[3:]), strict=True))
    exact_bwd = reference.recurrence_bwd("lstm", *cast(grads, torch.float64), **exact_states, **exact_saved)
    pairs = list(zip([*ours, *ours_bwd], [*exact, *exact_bwd], strict=True))
    pairs[3] = tuple(without_padding(gates, inputs["layout"]) for gates in pairs[3])
    return pairs


def _shared(tree):
    """Move tensors to memory that forked processes share."""
    for x in tree.values() if isinstance(tree, dict) else tree:
        for tensor in x if isinstance(x, (list, tuple)) else [x]:
            if tensor is not None and not tensor.is_cuda:
                tensor.share_memory_()
    return tree


def assert_right(pairs):
    for k, (ours, exact) in enumerate(pairs):
        assert_accurate(f"tensor {k}", ours, exact.float(), exact)


def inputs(device="cpu"):
    return _shared(recurrence_inputs(T, B, H, D, torch.float32, device))


def test_groups_under_the_default_schedule(device):
    assert_right(run_both(inputs(device)))


@interpreted
@pytest.mark.parametrize("seed", range(4))
def test_groups_under_seeded_schedules(seed):
    """The baton moves at every load and store."""
    from fusedlstm import interpreter

    with interpreter.side_by_side(seed, yield_on_memory=True):
        assert_right(run_both(inputs()))


@interpreted
@pytest.mark.parametrize("seed", range(4))
def test_groups_that_end_at_different_steps(seed):
    """Packed: the first batch tile has four steps, the second two, and both directions begin and end apart."""
    from fusedlstm import interpreter

    lengths = [4] * 3 + [3] * 10 + [2] * 5 + [1] * 2
    assert len(lengths) == B
    packed = _shared(recurrence_inputs(0, 0, H, D, torch.float32, packed=lengths))
    with interpreter.side_by_side(seed, yield_on_memory=True):
        assert_right(run_both(packed))


@interpreted
@pytest.mark.parametrize("resets", [0.0, 0.3])
@pytest.mark.parametrize("seed", range(4))
def test_groups_of_ragged_batches(seed, resets):
    """The first batch tile ends before T, the second at its third step, and a sequence has none at all."""
    from fusedlstm import interpreter

    lengths = [2, 3, 0, 4, 1] * 3 + [3, 0, 1, 2, 2]
    ragged = _shared(recurrence_inputs(5, 0, H, D, torch.float32, lengths=lengths, resets=resets))
    with interpreter.side_by_side(seed, yield_on_memory=True):
        assert_right(run_both(ragged))


@contextlib.contextmanager
def as_processes(limit_s=60):
    """One forked process a program; the interpreter's atomics are atomic across them."""
    from triton.runtime import interpreter as stock

    from fusedlstm import interpreter

    def run_programs(fn, args, programs):
        children = []
        for program in programs:
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    signal.alarm(limit_s)
                    stock.interpreter_builder.set_grid_idx(*program)
                    fn(**args)
                    code = 0
                finally:
                    os._exit(code)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if any(codes):
            raise interpreter.Deadlock(f"exit codes {codes}; {-signal.SIGALRM} is a wait without end")

    call, atomic = stock.GridExecutor.__call__, stock.InterpreterBuilder.create_atomic_rmw

    def yielding(self, *args):
        result = atomic(self, *args)
        os.sched_yield()  # there are more programs than cores
        return result

    stock.GridExecutor.__call__ = interpreter.replace_grid(run_programs)
    stock.InterpreterBuilder.create_atomic_rmw = yielding
    try:
        yield
    finally:
        stock.GridExecutor.__call__, stock.InterpreterBuilder.create_atomic_rmw = call, atomic


@pytest.fixture
def shared_memory(monkeypatch):
    """Every tensor that a launch makes can be seen by its processes."""

    def sharing(make):
        return lambda *args, **kwargs: make(*args, **kwargs).share_memory_()

    for name in ("empty", "empty_like", "zeros"):
        monkeypatch.setattr(torch, name, sharing(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", sharing(torch.Tensor.new_empty))


@interpreted
def test_groups_as_processes(shared_memory):
    prepared = inputs()
    with as_processes():
        assert_right(run_both(prepared))


@triton.jit
def wait_for_nobody(counter_ptr, target, SPIN_LIMIT: tl.constexpr):
    tl.atomic_add(counter_ptr, 0)


@triton.jit
def wait_for_one_too_few(counter_ptr, target, SPIN_LIMIT: tl.constexpr):
    while tl.atomic_add(counter_ptr, 0) < target - 1:
        pass


@triton.jit
def wait_for_one_too_many(counter_ptr, target, SPIN_LIMIT: tl.constexpr):
    while tl.atomic_add(counter_ptr, 0) < target + 1:
        pass


@triton.jit
def arrive_without_telling(counter_ptr):
    tl.debug_barrier()


@triton.jit
def arrive_twice(counter_ptr):
    tl.atomic_add(counter_ptr, 2)


BROKEN = {
    "no wait": ("wait", wait_for_nobody),
    "target too low": ("wait", wait_for_one_too_few),
    "target too high": ("wait", wait_for_one_too_many),
    "no arrival": ("arrive", arrive_without_telling),
    "double arrival": ("arrive", arrive_twice),
}


@interpreted
@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_barrier_is_caught(monkeypatch, fault):
    """Negative control: of four seeds with memory yields at least one shows wrong numbers or a deadlock."""
    from fusedlstm import interpreter

    monkeypatch.setattr(barrier, *BROKEN[fault])
    caught = 0
    for seed in range(4):
        try:
            with interpreter.side_by_side(seed, yield_on_memory=True, patience=20):
                assert_right(run_both(inputs()))
        except (AssertionError, interpreter.Deadlock):
            caught += 1
    assert caught > 0


@interpreted
def test_a_wait_without_end_is_an_error(monkeypatch):
    """The bound of the wait itself, before the scheduler loses its patience."""
    from fusedlstm import interpreter
    from fusedlstm import plan as planning

    monkeypatch.setattr(planning, "SPIN_LIMIT", 8)
    monkeypatch.setattr(barrier, "arrive", arrive_without_telling)
    with (
        pytest.raises(AssertionError, match="never arrived"),
        interpreter.side_by_side(patience=1000),
    ):
        run_both(inputs())
