"""Fused LSTM layers for PyTorch: `fusedlstm.LSTM` in place of `torch.nn.LSTM`."""

from fusedlstm.conversion import convert, patch_torch, restore
from fusedlstm.modules import LSTM, LSTMCell

__all__ = ["LSTM", "LSTMCell", "__version__", "convert", "patch_torch", "restore"]
__version__ = "0.1.0"
