"""Fused recurrent layers for PyTorch: `fusedlstm.LSTM` takes the place of `torch.nn.LSTM`, and related layers."""

from fusedlstm import cells, inits, onnx, sequences, weights
from fusedlstm.base import Recurrent, RecurrentCell
from fusedlstm.cells import register_cell
from fusedlstm.conversion import convert, dense_weight, patch_torch, restore
from fusedlstm.inspect import explain
from fusedlstm.modules import (
    GRU,
    LSTM,
    RNN,
    SLSTM,
    CoupledLSTM,
    CoupledLSTMCell,
    GRUCell,
    LayerNormGRU,
    LayerNormGRUCell,
    LayerNormLSTM,
    LayerNormLSTMCell,
    LSTMCell,
    PeepholeLSTM,
    PeepholeLSTMCell,
    ResetBeforeGRU,
    ResetBeforeGRUCell,
    RNNCell,
    SLSTMCell,
)
from fusedlstm.sequences import Stream
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
    "LayerNormGRU",
    "LayerNormGRUCell",
    "LayerNormLSTM",
    "LayerNormLSTMCell",
    "PeepholeLSTM",
    "PeepholeLSTMCell",
    "RNNCell",
    "Recurrent",
    "RecurrentCell",
    "ResetBeforeGRU",
    "ResetBeforeGRUCell",
    "SLSTMCell",
    "Stream",
    "__version__",
    "cells",
    "convert",
    "dense_weight",
    "explain",
    "inits",
    "onnx",
    "patch_torch",
    "register_cell",
    "restore",
    "sequences",
    "tune",
    "weights",
]
__version__ = "0.1.0"
