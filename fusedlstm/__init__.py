"""Fused LSTM layers for PyTorch: `fusedlstm.LSTM` in place of `torch.nn.LSTM`."""

from fusedlstm import heads, sequences
from fusedlstm.conversion import convert, patch_torch, restore
from fusedlstm.modules import LSTM, LSTMCell
from fusedlstm.streaming import Stream
from fusedlstm.tuning import tune

__all__ = [
    "LSTM",
    "LSTMCell",
    "Stream",
    "__version__",
    "convert",
    "heads",
    "patch_torch",
    "restore",
    "sequences",
    "tune",
]
__version__ = "0.1.0"
