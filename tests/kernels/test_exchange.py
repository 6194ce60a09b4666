"""kernels/exchange.py: groups whose programs really run side by side, by both protocols, and broken exchanges.

Interpreted, the programs of a launch run under a scheduler whose order a seed determines, or as processes. On a GPU the
first tests run compiled, and the rest is skipped: there the hardware schedules.
"""

import contextlib
import os
import signal

import pytest
import torch
import triton
import triton.language as tl

from fusedlstm.cells import Grads
from fusedlstm.engines import bound, launch
from fusedlstm.kernels import exchange, recurrence_fwd
from groups import B, D, H, assert_right, dense, is_caught, run_both, shared
from support import DTYPES, recurrence, recurrence_inputs, tiled

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="needs the interpreter: run without a GPU")
by_protocol = pytest.mark.parametrize("protocol", ["counter", "data"])


@by_protocol
def test_groups_under_the_default_schedule(device, protocol):
    assert_right(run_both(dense(device), protocol))


@interpreted
def test_an_interpreted_launch_runs_side_by_side_wherever_its_tensors_are():
    """One program after another, a group would wait for ever."""
    from fusedlstm.engines import interpreter

    for device in ("cpu", "cuda:0"):
        assert not interpreter.active()
        with bound.on(torch.device(device)):
            assert interpreter.active()


@interpreted
@by_protocol
@pytest.mark.parametrize("seed", range(3))
def test_groups_under_seeded_schedules(seed, protocol):
    """The baton moves at every load and store."""
    from fusedlstm.engines import interpreter

    with interpreter.side_by_side(seed, yield_on_memory=True):
        assert_right(run_both(dense(), protocol))


@interpreted
@by_protocol
@pytest.mark.parametrize("seed", range(2))
def test_groups_that_end_at_different_steps(seed, protocol):
    """Packed: the first batch tile has four steps, the second two, and both directions begin and end apart."""
    from fusedlstm.engines import interpreter

    lengths = [4] * 3 + [3] * 10 + [2] * 5 + [1] * 2
    assert len(lengths) == B
    packed = shared(recurrence_inputs(0, 0, H, D, torch.float32, packed=lengths))
    with interpreter.side_by_side(seed, yield_on_memory=True):
        assert_right(run_both(packed, protocol))


@interpreted
@by_protocol
@pytest.mark.parametrize(("seed", "resets"), [(0, 0.0), (1, 0.3)])
def test_groups_of_ragged_batches(seed, resets, protocol):
    """The first batch tile ends before T, the second at its third step, and a sequence has none at all."""
    from fusedlstm.engines import interpreter

    lengths = [2, 3, 0, 4, 1] * 3 + [3, 0, 1, 2, 2]
    ragged = shared(recurrence_inputs(5, 0, H, D, torch.float32, lengths=lengths, resets=resets))
    with interpreter.side_by_side(seed, yield_on_memory=True):
        assert_right(run_both(ragged, protocol))


@interpreted
@by_protocol
@pytest.mark.parametrize("tiles", [{}, {"split": 2}], ids=["resident", "split"])
def test_heads_are_groups_of_their_own(protocol, tiles):
    """Two heads of two programs a group each."""
    from fusedlstm.engines import interpreter

    inputs = shared(recurrence_inputs(3, B, H, D, torch.float32, heads=2))
    with interpreter.side_by_side(0, yield_on_memory=True):
        assert_right(run_both(inputs, protocol, heads=2, **tiles))


@contextlib.contextmanager
def as_processes(limit_s=60):
    """Run each program in a forked process, for at most `limit_s` of computing. Atomics work across the processes."""
    from triton.runtime import interpreter as stock

    from fusedlstm.engines import interpreter

    def run_programs(fn, args, programs):
        children = []
        for program in programs:
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    signal.setitimer(signal.ITIMER_PROF, limit_s)
                    stock.interpreter_builder.set_grid_idx(*program)
                    fn(**args)
                    code = 0
                finally:
                    os._exit(code)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if any(codes):
            raise interpreter.Deadlock(f"exit codes {codes}; {-signal.SIGPROF} is a wait without end")

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
@by_protocol
def test_groups_as_processes(shared_memory, protocol):
    prepared = dense()
    with as_processes():
        assert_right(run_both(prepared, protocol))


def both_ways(inputs, dtype, **tiles):
    """Every tensor by either protocol, forward and backward: pairs that must agree to the last bit."""
    results = []
    _, B, H = inputs.state.hx.shape
    for protocol in ("counter", "data"):
        fwd, bwd = (tiled(pass_, B, H, dtype, protocol=protocol, **tiles) for pass_ in ("fwd", "bwd"))
        saved = launch.recurrence_fwd(recurrence(), *inputs, plan=fwd)
        grads = Grads(saved.output, None, saved.h_n, saved.c_n)
        results.append((*saved, *launch.recurrence_bwd(recurrence(), grads, saved, *inputs[1:], plan=bwd)))
    return list(zip(*results, strict=True))


@pytest.mark.parametrize(
    "tiles",
    [
        {"transposed": True, "groups": 1},
        {"block_b": 32, "block_h": 32, "block_k": 64},
    ],
    ids=["transposed, tiles walked", "wide"],
)
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_the_protocols_agree(device, dtype, tiles):
    inputs = recurrence_inputs(3, 20, 40, 1, DTYPES[dtype], device)
    for by_counter, by_data in both_ways(inputs, dtype, precision="ieee", **tiles):
        assert torch.equal(by_data, by_counter) and by_data.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_passes(device, dtype):
    """By data, a NaN of the user's own, even of the pattern that stands for absent, is no reason to wait."""
    inputs = recurrence_inputs(3, 20, 40, 1, DTYPES[dtype], device)
    bits = torch.int32 if dtype == "fp32" else torch.int16
    for x in (inputs.state.hx[0, 3], inputs.state.cx[0, 0, 5], inputs.preact_x[0, 1, 7]):
        x.view(bits).fill_(-1)
    for by_counter, by_data in both_ways(inputs, dtype, precision="ieee"):
        torch.testing.assert_close(by_data, by_counter, rtol=0, atol=0, equal_nan=True)
        assert by_data.isnan().any() and not by_data.isnan().all()


@triton.jit
def take_what_is_there(x, COUNT):
    return 0


@triton.jit
def publish_nothing(ptr, offs, mask, stride, tiles, COUNT, counter_ptr, EXCHANGE):
    tl.debug_barrier()


@interpreted
@pytest.mark.parametrize("fault", ["takes what is there", "nothing is filled", "nothing is stored"])
def test_a_broken_exchange_is_caught(monkeypatch, fault):
    """Negative control, as for the barrier."""
    if fault == "takes what is there":
        monkeypatch.setattr(exchange, "_has_nan", take_what_is_there)
    elif fault == "nothing is filled":
        monkeypatch.setattr(launch, "_exchanged", lambda x, plan: x.zero_())
    else:
        monkeypatch.setattr(recurrence_fwd, "publish", publish_nothing)
    assert is_caught(lambda: assert_right(run_both(dense(), "data")))


@interpreted
def test_a_wait_without_end_is_an_error(monkeypatch):
    """The bound of the wait itself, before the scheduler loses its patience."""
    from fusedlstm import plan as planning
    from fusedlstm.engines import interpreter

    monkeypatch.setattr(planning, "ATTEMPT_LIMIT", 8)
    monkeypatch.setattr(recurrence_fwd, "publish", publish_nothing)
    with pytest.raises(AssertionError, match="never arrived"), interpreter.side_by_side(patience=1000):
        run_both(dense(), "data")


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


BARRIERS = {
    "no wait": ("wait", wait_for_nobody),
    "target too low": ("wait", wait_for_one_too_few),
    "target too high": ("wait", wait_for_one_too_many),
    "no arrival": ("arrive", arrive_without_telling),
    "double arrival": ("arrive", arrive_twice),
}


@interpreted
@pytest.mark.parametrize("fault", BARRIERS)
def test_a_broken_barrier_is_caught(monkeypatch, fault):
    """Negative control: of four seeds with memory yields at least one shows wrong numbers or a deadlock."""

    monkeypatch.setattr(exchange, *BARRIERS[fault])
    assert is_caught(lambda: assert_right(run_both(dense())))


@interpreted
def test_a_barrier_without_end_is_an_error(monkeypatch):
    """The bound of the wait itself, before the scheduler loses its patience."""
    from fusedlstm import plan as planning
    from fusedlstm.engines import interpreter

    monkeypatch.setattr(planning, "SPIN_LIMIT", 8)
    monkeypatch.setattr(exchange, "arrive", arrive_without_telling)
    with pytest.raises(AssertionError, match="never arrived"), interpreter.side_by_side(patience=1000):
        run_both(dense())
