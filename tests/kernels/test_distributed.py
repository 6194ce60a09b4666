"""The kernels in two processes: DDP and FSDP2 train as one process does. tests/cpu/test_distributed.py has the rest."""

import pytest
import torch

import distributed_tasks as tasks
from processes import COUNT, Processes
from support import assert_accurate

pytestmark = pytest.mark.skipif(
    0 < torch.cuda.device_count() < COUNT,
    reason="NCCL takes one GPU per process, and where there is one nothing runs on a CPU",
)
CASE = tasks.Case(lengths=True, steps=3, backend="triton")


@pytest.fixture(scope="module")
def two():
    with Processes() as started:
        yield started


@pytest.mark.parametrize("train", [tasks.replicated, tasks.sharded_weights], ids=["DDP", "FSDP2"])
def test_two_processes_train_as_one(two, train):
    beside = CASE._replace(backend="torch")
    same_dtype, exact = tasks.alone(beside), tasks.alone(beside, torch.float64)
    for found in two.run(train, CASE):
        for name, expected in exact.items():
            assert_accurate(name, found[name], same_dtype[name], expected)
