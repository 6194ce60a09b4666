"""Fused LSTM layers for PyTorch: `fusedlstm.LSTM` in place of `torch.nn.LSTM`."""

from fusedlstm.modules import LSTM, LSTMCell

__all__ = ["LSTM", "LSTMCell", "__version__"]
__version__ = "0.1.0"
