"""kernels/barrier.py: barriers that are broken on purpose. Whole ones run in test_exchange.py."""

import pytest
import torch
import triton
import triton.language as tl

from fusedlstm.kernels import barrier
from groups import assert_right, dense, is_caught, run_both

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="needs the interpreter: run without a GPU")


@triton.jit
def wait_for_nobody(counter_ptr, target, EXCHANGE: tl.constexpr):
    tl.atomic_add(counter_ptr, 0)


@triton.jit
def wait_for_one_too_few(counter_ptr, target, EXCHANGE: tl.constexpr):
    while tl.atomic_add(counter_ptr, 0) < target - 1:
        pass


@triton.jit
def wait_for_one_too_many(counter_ptr, target, EXCHANGE: tl.constexpr):
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

    monkeypatch.setattr(barrier, *BROKEN[fault])
    assert is_caught(lambda: assert_right(run_both(dense())))


@interpreted
def test_a_wait_without_end_is_an_error(monkeypatch):
    """The bound of the wait itself, before the scheduler loses its patience."""
    from fusedlstm import plan as planning
    from fusedlstm.engines import interpreter

    monkeypatch.setattr(planning, "SPIN_LIMIT", 8)
    monkeypatch.setattr(barrier, "arrive", arrive_without_telling)
    with (
        pytest.raises(AssertionError, match="never arrived"),
        interpreter.side_by_side(patience=1000),
    ):
        run_both(dense())
