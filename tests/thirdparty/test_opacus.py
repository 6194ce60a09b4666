"""Opacus: the gradient of every sample is that of a loop over the samples, and a model trains with its engine.

Opacus refuses torch.nn.LSTM and offers a layer of its own in its place. Ours needs none. In the mode "ew" an LSTM, GRU
or RNN works as it is. In the mode "hooks", which serves every layer, the layer must return one tensor, for Opacus
follows no other results.
"""

import copy

import pytest
import torch
from opacus import PrivacyEngine
from opacus.grad_sample import wrap_model
from opacus.validators import ModuleValidator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fusedlstm

EVERY = ("LSTM", "GRU", "RNN", "PeepholeLSTM", "CoupledLSTM", "LayerNormLSTM", "SLSTM")
CASES = [*(("hooks", name) for name in EVERY), *(("ew", name) for name in EVERY[:3])]


class Output(nn.Module):
    """A base that makes of a layer one that returns its output alone."""

    def forward(self, x):
        return super().forward(x)[0]


class Classifier(nn.Module):
    def __init__(self, mode, name):
        super().__init__()
        layer = getattr(fusedlstm, name)
        if mode == "hooks":
            layer = type(name, (Output, layer), {})
        self.layer = layer(5, 8, num_layers=2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        found = self.layer(x)
        return self.head((found if isinstance(found, torch.Tensor) else found[0]).mean(1))


def data(samples):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(samples, 6, 5, generator=generator), torch.randint(3, (samples,), generator=generator)


@pytest.mark.parametrize(("mode", "name"), CASES)
def test_gradients_of_samples_are_those_of_a_loop(mode, name):
    torch.manual_seed(0)
    model, (x, y) = Classifier(mode, name), data(4)
    one_by_one = []
    for k in range(len(x)):
        alone = copy.deepcopy(model)
        nn.functional.cross_entropy(alone(x[k : k + 1]), y[k : k + 1]).backward()
        one_by_one.append([p.grad for p in alone.parameters()])
    wrapped = wrap_model(model, grad_sample_mode=mode, batch_first=True, loss_reduction="mean")
    nn.functional.cross_entropy(wrapped(x), y).backward()
    for p, samples in zip(model.parameters(), zip(*one_by_one, strict=True), strict=True):
        torch.testing.assert_close(p.grad_sample, torch.stack(samples))


@pytest.mark.parametrize(("mode", "name"), [("hooks", "PeepholeLSTM"), ("ew", "LSTM")])
def test_trains_with_the_engine(mode, name):
    torch.manual_seed(0)
    model = Classifier(mode, name)
    assert not ModuleValidator.validate(model, strict=False)
    before = [p.detach().clone() for p in model.parameters()]
    engine = PrivacyEngine()
    private, optimizer, batches = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
        data_loader=DataLoader(TensorDataset(*data(64)), batch_size=16),
        noise_multiplier=0.5,
        max_grad_norm=1.0,
        grad_sample_mode=mode,
        poisson_sampling=mode == "hooks",  # ExpandedWeights take no batch that may be empty
    )
    for x, y in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(private(x), y).backward()
        optimizer.step()
    assert all(
        torch.isfinite(p).all() and not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)
    )
    assert 0 < engine.get_epsilon(1e-5) < float("inf")


def test_torch_is_refused():
    """What ours is spared."""
    assert ModuleValidator.validate(nn.LSTM(5, 8), strict=False)
