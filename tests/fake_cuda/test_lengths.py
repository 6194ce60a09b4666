"""The host does not read values on a GPU, because that would wait for it. A fake tensor has none and raises."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.nn.utils.rnn import PackedSequence

import fusedlstm
from fake_gpu import DEVICE
from fusedlstm import checks


@pytest.fixture
def looks(monkeypatch):
    monkeypatch.setattr(checks, "DEBUG", True)


def run(lengths, **keywords):
    module = fusedlstm.LSTM(10, 64, device=DEVICE, backend="triton", **keywords)
    return module(torch.empty(5, 3, 10, device=DEVICE), lengths=lengths)


@pytest.mark.parametrize(
    "lengths", [[5, 6, 1], (1, -1, 2), torch.tensor([9, 1, 1]), torch.tensor([1, 1, -2]).short()], ids=str
)
@pytest.mark.parametrize("debug", [True, False])
def test_lengths_of_the_host_are_checked_there(gpu, monkeypatch, lengths, debug):
    monkeypatch.setattr(checks, "DEBUG", debug)
    with pytest.raises(ValueError, match="lengths: expected 0 to 5, got "):
        run(lengths)
    assert not gpu.launches


def test_lengths_of_the_host_are_sent_once(gpu):
    run(torch.tensor([5, 0, 2]))
    assert gpu.kernels == ["recurrence_fwd"] and gpu.operations.count("_to_copy") == 1
    assert gpu.launches[0].arguments["lengths_ptr"].dtype == torch.int64


@pytest.mark.parametrize("keywords", [{}, {"proj_size": 8}, {"bidirectional": True, "save": "states"}], ids=str)
def test_lengths_on_the_device_are_not_looked_at(gpu, keywords):
    run(torch.empty(3, dtype=torch.int64, device=DEVICE), **keywords)
    assert gpu.kernels == ["recurrence_fwd"]


def test_lengths_on_the_device_are_looked_at_if_asked(gpu, looks):
    with pytest.raises(DataDependentOutputException):
        run(torch.empty(3, dtype=torch.int64, device=DEVICE))
    assert not gpu.launches


def packed(dtype=torch.float32):
    """Of an order of its own, that lies on the device."""
    width = () if dtype == torch.bool else (10,)
    data = torch.empty(4, *width, device=DEVICE, dtype=dtype)
    order = torch.empty(3, dtype=torch.int64, device=DEVICE)
    return PackedSequence(data, torch.tensor([3, 1]), order, order.clone())


def test_the_order_of_packed_resets_is_not_looked_at(gpu):
    module = fusedlstm.LSTM(10, 64, device=DEVICE, backend="triton")
    module(packed(), resets=packed(torch.bool))
    assert gpu.kernels == ["recurrence_fwd"]


def test_the_order_of_packed_resets_is_looked_at_if_asked(gpu, looks):
    module = fusedlstm.LSTM(10, 64, device=DEVICE, backend="triton")
    with pytest.raises((DataDependentOutputException, RuntimeError)):
        module(packed(), resets=packed(torch.bool))
    assert not gpu.launches
