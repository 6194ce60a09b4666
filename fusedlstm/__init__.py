"""Fused recurrent layers for PyTorch: `fusedlstm.LSTM` in place of `torch.nn.LSTM`, and the family around it."""

from fusedlstm import heads, inits, sequences
from fusedlstm.conversion import convert, patch_torch, restore
from fusedlstm.modules import (
    GRU,
    LSTM,
    RNN,
    SLSTM,
    CoupledLSTM,
    CoupledLSTMCell,
    GRUCell,
    LayerNormLSTM,
    LayerNormLSTMCell,
    LSTMCell,
    PeepholeLSTM,
    PeepholeLSTMCell,
    RNNCell,
    SLSTMCell,
)
from fusedlstm.recurrent import Recurrent, RecurrentCell
from fusedlstm.registry import register_cell
from fusedlstm.streaming import Stream
from fusedlstm.tuning import tune

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "SLSTM",
    "CoupledLSTM",
    "CoupledLSTMCell",
    "GRUCell",
    "LSTMCell",
    "LayerNormLSTM",
    "LayerNormLSTMCell",
    "PeepholeLSTM",
    "PeepholeLSTMCell",
    "RNNCell",
    "Recurrent",
    "RecurrentCell",
    "SLSTMCell",
    "Stream",
    "__version__",
    "convert",
    "heads",
    "inits",
    "patch_torch",
    "register_cell",
    "restore",
    "sequences",
    "tune",
]
__version__ = "0.1.0"
