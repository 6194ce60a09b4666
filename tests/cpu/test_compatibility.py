"""What users do with a layer, for every member; `make compatibility` tries what takes seconds too."""

import features
import pytest

# Graphs, programs and processes.
SLOW = ("compile", "graph", "export", "dynamic", "AOT", "autocast, compiled", "new process")
QUICK = [name for name in features.FEATURES if not any(word in name for word in SLOW)]
# torch's counter does not know the layer of oneDNN, and a trace has no operators of ours.
UNKNOWN = {
    "`FlopCounterMode` counts at least the products of the steps": ("LSTM",),
    "`torch.jit.trace`": ("PeepholeLSTM", "CoupledLSTM", "LayerNormLSTM", "SLSTM"),
}


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("column", features.COLUMNS)
def test_every_member(column, name):
    found = features.outcome(name, features.COLUMNS[column])
    assert (found == "yes") == (column not in UNKNOWN.get(name, ())), found
