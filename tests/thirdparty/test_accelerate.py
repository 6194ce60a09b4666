"""Accelerate: a prepared model trains, its state is saved and loaded, and mixed precision is autocast."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fusedlstm


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 8, num_layers=2, batch_first=True)
        self.head = nn.Linear(8, 1)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1]).squeeze(-1)


@pytest.fixture(autouse=True)
def fresh():
    """Accelerate keeps one state per process."""
    AcceleratorState._reset_state(reset_partial_state=True)


def loader():
    x = torch.randn(24, 6, 3, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x.sum((1, 2))), batch_size=8)


def test_state_is_saved_and_loaded(both, tmp_path):
    def train(built):
        accelerator = Accelerator(cpu=True)
        model = Net()
        built(model)
        model, optimizer, batches = accelerator.prepare(
            model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), loader()
        )
        losses, again = [], []

        def epoch(into):
            for x, y in batches:
                optimizer.zero_grad()
                loss = nn.functional.mse_loss(model(x), y)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                into.append(loss.item())

        epoch(losses)
        accelerator.save_state(tmp_path / "state")
        epoch(again)
        accelerator.load_state(tmp_path / "state")
        epoch(losses)
        assert losses[3:] == again, "training did not go on as it would have"
        return accelerator.unwrap_model(model), losses

    both(train)


def test_mixed_precision_is_autocast():
    """Of ours alone: on a CPU without bfloat16 instructions torch's layer raises an error."""
    found = []
    for accelerated in (True, False):
        torch.manual_seed(0)
        with fusedlstm.patch_torch():
            model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if accelerated:
            accelerator = Accelerator(cpu=True, mixed_precision="bf16")
            model, optimizer = accelerator.prepare(model, optimizer)
        losses = []
        for x, y in loader():
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=not accelerated):
                predicted = model(x)
            loss = nn.functional.mse_loss(predicted.float(), y)
            accelerator.backward(loss) if accelerated else loss.backward()
            optimizer.step()
            losses.append(loss.item())
        found.append((losses, [p.detach().clone() for p in model.parameters()]))
    assert found[0][0] == found[1][0] and len({*found[0][0]}) == 3
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))
