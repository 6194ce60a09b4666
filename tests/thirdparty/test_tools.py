"""Tools that look at a model: they see ours as they see torch's layer. torchinfo, fvcore and torchao."""

import pytest
import torch
import torchinfo
from fvcore.nn import FlopCountAnalysis
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import fusedlstm

STOCK_AND_OURS = {name: (getattr(nn, name), getattr(fusedlstm, name)) for name in ("LSTM", "GRU", "RNN")}
both_layers = pytest.mark.parametrize(("stock", "ours"), STOCK_AND_OURS.values(), ids=STOCK_AND_OURS)


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        torch.manual_seed(0)
        self.layer = layer(6, 8, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.layer(x)[0].mean(1))


@both_layers
def test_torchinfo(stock, ours):
    """Sizes of outputs, counts of parameters, and operations, line by line."""
    tables = [torchinfo.summary(Net(layer), input_size=(4, 5, 6), depth=3, verbose=0) for layer in (ours, stock)]
    found, expected = map(str, tables)
    assert found == expected and "[4, 5, 16]" in found
    assert tables[0].total_mult_adds == tables[1].total_mult_adds > 0


@both_layers
def test_fvcore(stock, ours):
    """It counts no recurrent layer, torch's neither. `torch.utils.flop_counter` counts ours."""
    x = torch.randn(4, 5, 6)
    found, expected = (FlopCountAnalysis(Net(layer), x).unsupported_ops_warnings(False) for layer in (ours, stock))
    assert found.by_operator() == expected.by_operator() and found.total() == 4 * 16 * 3
    assert found.unsupported_ops() == expected.unsupported_ops()


@both_layers
def test_torchao_leaves_the_layer_as_it_is(stock, ours):
    """`quantize_` takes linear layers, and neither torch's recurrent layers nor ours."""
    x, found = torch.randn(4, 5, 6), []
    for layer in (ours, stock):
        model = Net(layer)
        quantize_(model, Int8WeightOnlyConfig())
        assert type(model.head.weight) is not nn.Parameter
        assert all(type(p) is nn.Parameter for p in model.layer.parameters())
        found.append(model(x).detach())
    torch.testing.assert_close(*found)
