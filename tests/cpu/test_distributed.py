"""Two processes compute what one computes on the joined batch: data parallel, sharded, from a checkpoint, head by head.

With two GPUs each process has one, and NCCL. Else both are on the CPU, with gloo.
"""

import re

import pytest
import torch

import distributed_tasks as tasks
import fusedlstm
from distributed_tasks import Case
from processes import Processes
from support import assert_accurate

NAMES = ("LSTM", "GRU", "PeepholeLSTM", "LayerNormLSTM", "SLSTM")


@pytest.fixture(scope="module")
def two():
    with Processes() as started:
        yield started


def assert_all_accurate(found: list[dict], same_dtype: dict, exact: dict) -> None:
    """In every process, by the accuracy rule; and all processes have the same bits."""
    for own in found:
        assert own.keys() == exact.keys()
        for name, expected in exact.items():
            assert torch.equal(own[name], found[0][name]), name
            assert_accurate(name, own[name], same_dtype[name], expected)


def assert_as_alone(case: Case, found: list[dict]) -> None:
    before = tasks.weights(tasks.net(case))
    still = [name for name, w in before.items() if torch.equal(w, found[0][name]) and "spare" not in name]
    assert not still, f"did not train: {still}"
    assert_all_accurate(found, tasks.alone(case), tasks.alone(case, torch.float64))


every_layer = pytest.mark.parametrize("name", NAMES)
every_length = pytest.mark.parametrize("lengths", [False, True], ids=["dense", "lengths"])


@every_layer
@every_length
def test_data_parallel(two, name, lengths):
    case = Case(name, lengths)
    assert_as_alone(case, two.run(tasks.replicated, case))


def test_data_parallel_with_a_layer_that_no_call_uses(two):
    case = Case(spare=True)
    found = two.run(tasks.replicated, case)
    assert_as_alone(case, found)
    spare = tasks.net(case).spare.state_dict()
    assert spare and all(torch.equal(found[0][f"spare.{name}"], w) for name, w in spare.items())


def test_data_parallel_with_accumulated_gradients(two):
    case = Case("GRU", lengths=True)
    assert_as_alone(case, two.run(tasks.accumulated, case))


def test_data_parallel_compiled(two):
    case = Case("PeepholeLSTM", steps=2)
    assert_as_alone(case, two.run(tasks.replicated, case, True))


@pytest.mark.parametrize(("name", "lengths"), [("LSTM", False), *((name, True) for name in NAMES)])
def test_sharded(two, name, lengths):
    case = Case(name, lengths, layers=1 + (name == "LSTM"))
    assert_as_alone(case, two.run(tasks.sharded_weights, case))


@every_layer
def test_sharded_in_bfloat16(two, name):
    """Beside torch's layer under the same policy, or for the layers that torch lacks, ours alone in bfloat16."""
    case = Case(name)
    if name in ("LSTM", "GRU"):
        same_dtype = two.run(tasks.sharded_gradients, case._replace(of_torch=True))[0]
    else:
        same_dtype = tasks.alone_gradients(case, torch.bfloat16)
    exact = tasks.alone_gradients(case, torch.float64)
    rounded = {k: g.to(torch.bfloat16) for k, g in same_dtype.items()}
    assert_all_accurate(two.run(tasks.sharded_gradients, case), rounded, exact)


@pytest.mark.parametrize("name", ["LSTM", "LayerNormLSTM"])
def test_checkpoint_of_two_processes_is_loaded_by_one(two, name, tmp_path):
    """With the optimiser, so that training goes on as it would have."""
    case = Case(name, momentum=0.9, steps=3)
    (before, after), _ = two.run(tasks.saved, case, str(tmp_path))
    found, resumed = tasks.loaded(case, str(tmp_path))
    assert found.keys() == before.keys() and all(torch.equal(found[k], w) for k, w in before.items())
    assert_as_alone(case._replace(steps=8), [after])
    assert_as_alone(case._replace(steps=8), [resumed])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("LSTM", {"bidirectional": True, "grad_clip": 0.5}),
        ("GRU", {"bias": False}),
        ("PeepholeLSTM", {"save": "states"}),
        ("SLSTM", {}),
    ],
)
def test_heads_are_shared(two, name, options):
    """Results and the gradients of input, state and parameters; the forward and backward exchange what they must."""
    for error, limit in two.run(tasks.heads_apart, name, options):
        assert error <= limit


def test_shared_heads_are_saved_whole(two, tmp_path):
    two.run(tasks.heads_saved, str(tmp_path))
    layer = fusedlstm.PeepholeLSTM(tasks.I, 12, num_heads=4)
    torch.distributed.checkpoint.load(
        {name: p.unflatten(0, (-1, 12)) for name, p in layer.state_dict().items()},
        checkpoint_id=str(tmp_path),
        no_dist=True,
    )
    expected = tasks.layer_with_heads().state_dict()
    assert all(torch.equal(layer.state_dict()[name], p) for name, p in expected.items())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_heads": 3}, "num_heads: expected a multiple of 2 processes, got 3"),
        ({"num_heads": 1}, "num_heads: expected a multiple of 2 processes, got 1"),
    ],
)
def test_heads_that_cannot_be_shared(two, options, text):
    assert two.run(tasks.heads_refused, options) == [text] * 2


def test_heads_example_finds_all_equal(two):
    printed, nothing = two.run(tasks.compared_heads)
    assert printed.count("2 processes beside one: equal to rounding") == 3 and not nothing


@pytest.mark.parametrize("options", [[], ["--sharded"]], ids=["data parallel", "sharded"])
def test_example_prints_the_errors_of_one_process(two, tmp_path, options):
    arguments = ["--steps", "12", "--batch", "8", "--hidden-size", "8", *options]
    printed, nothing = two.run(tasks.trained_example, arguments)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    alone = tasks.trained_example(torch.device("cpu"), arguments)
    torch.distributed.destroy_process_group()
    found, expected = (re.findall(r"error (\d\.\d+)[,:]", text) for text in (printed, alone))
    assert found == expected and len({*found}) > 5 and not nothing
    assert "2 process(es)" in printed and "1 process(es)" in alone
