"""fusedlstm/engines/interpreter.py: launches of several threads, and launches that are interrupted."""

import threading

import pytest
import torch
from triton.runtime import interpreter as stock

from groups import assert_right, dense, run_both

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs the interpreter: run without a GPU")


def test_threads_may_launch_at_once():
    """The interpreter keeps the number of the program that runs in one place."""
    wrong, inputs = [], dense()

    def body():
        try:
            for _ in range(2):
                assert_right(run_both(inputs, "counter"))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=body) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_interrupt_ends_all_programs(monkeypatch):
    """Otherwise they run on beside the next launch, and change the number of its program.

    An interrupt comes to the thread that launches, which runs a program too. Real signals are sent by `make endure`.
    """
    count, before, store = 0, threading.active_count(), stock.InterpreterBuilder.create_masked_store
    launches = threading.current_thread()

    def interrupting(self, *args, **kwargs):
        nonlocal count
        count += threading.current_thread() is launches
        if count == 2:
            count += 1
            raise KeyboardInterrupt
        return store(self, *args, **kwargs)

    monkeypatch.setattr(stock.InterpreterBuilder, "create_masked_store", interrupting)
    with pytest.raises(KeyboardInterrupt):
        run_both(dense(), "counter")
    assert threading.active_count() == before
    assert_right(run_both(dense(), "counter"))


def test_a_launch_without_threads_ends_those_it_has(monkeypatch):
    start, before, count = threading.Thread.start, threading.active_count(), 0

    def refused(self):
        nonlocal count
        count += 1
        if count == 3:
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", refused)
    with pytest.raises(RuntimeError, match="new thread"):
        run_both(dense(), "counter")
    assert threading.active_count() == before
    assert_right(run_both(dense(), "counter"))
