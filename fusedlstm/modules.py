"""The layers that a user builds: parameters and conventions of `torch.nn`, no arithmetic."""

import torch
from torch import Tensor, nn

from fusedlstm import checks, functional

# nn.RNNBase and not nn.LSTM: Dynamo breaks the graph at nn.LSTM and at its subclasses.


class LSTM(nn.RNNBase):
    r"""A stack of LSTM layers; takes the place of `torch.nn.LSTM`.

    .. math::
        i_t, f_t, o_t = \sigma(W x_t + U h_{t-1} + b), \quad g_t = \tanh(W x_t + U h_{t-1} + b), \quad
        c_t = f_t \odot c_{t-1} + i_t \odot g_t, \quad h_t = o_t \odot \tanh(c_t)

    Example::

        lstm = fusedlstm.LSTM(10, 20, num_layers=2)
        output, (h_n, c_n) = lstm(torch.randn(5, 3, 10))  # [T, B, I] -> [T, B, H]

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as in
            `torch.nn.LSTM`, with the same parameter names, shapes, gate order (i, f, g, o) and values under a seed.
        proj_size: not supported yet, must be 0.
        backend: "auto", "triton", "torch" or "reference"; see `fusedlstm.engines`. An engine asked for by name
            serves the call or raises.

    Shapes: input [T, B, I], [B, T, I] with `batch_first`, or [T, I]; h_0 and c_0 [L * D, B, H] or [L * D, H], zero
        if not given; output [T, B, D * H] (or like input); h_n and c_n like h_0 and c_0. L layers, D directions.

    Precision: products in the dtype of `input`; on the Triton engine sums, gates and c in float32.
    Memory: the Triton engine keeps T * B * H * D * (4 * itemsize + 4) bytes a layer for the backward.
    Source: Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000, as `torch.nn.LSTM` writes it.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device=None,
        dtype=None,
        *,
        backend: str = "auto",
    ) -> None:
        nn.RNNBase.__init__(  # by name: between this class and nn.RNNBase a subclass may have nn.LSTM
            self,
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
        )
        checks.no_projection(proj_size)
        self.backend = checks.backend(backend)

    def flatten_parameters(self) -> None:
        """Does nothing: the kernels read every weight where it lies. Kept because code for `torch.nn` calls it."""

    def forward(
        self,
        input: Tensor,  # [T, B, I], [B, T, I] or [T, I]
        hx: tuple[Tensor, Tensor] | None = None,  # each [L * D, B, H] or [L * D, H]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run the stack over a sequence; see the class for shapes.

        Raises:
            ValueError, RuntimeError: a shape, dtype or device disagrees; type and text are those of `torch.nn.LSTM`.
        """
        self._update_flat_weights()
        checks.lstm_input(self, input, hx)
        batched = input.dim() == 3
        batch_dim = 0 if self.batch_first else 1
        if not batched:
            input = input.unsqueeze(batch_dim)
        if hx is None:
            rows = self.num_layers * (2 if self.bidirectional else 1)
            zeros = torch.zeros(rows, input.size(batch_dim), self.hidden_size, dtype=input.dtype, device=input.device)
            hx = (zeros, zeros)
        elif not batched:
            hx = (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
        output, h_n, c_n = functional.lstm(
            input,
            hx,
            self._flat_weights,
            bias=self.bias,
            num_layers=self.num_layers,
            dropout=self.dropout,
            training=self.training,
            bidirectional=self.bidirectional,
            batch_first=self.batch_first,
            backend=self.backend,
        )
        if not batched:
            return output.squeeze(batch_dim), (h_n.squeeze(1), c_n.squeeze(1))
        return output, (h_n, c_n)


class LSTMCell(nn.RNNCellBase):
    r"""One LSTM step; takes the place of `torch.nn.LSTMCell`. Equations and engines as in :class:`LSTM`.

    Shapes: input [B, I] or [I]; h_0 and c_0 [B, H] or [H], zero if not given; returns (h_1, c_1) of the same shape.
    Raises: ValueError or RuntimeError with the type and text of `torch.nn.LSTMCell`.
    """

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device=None, dtype=None, *, backend: str = "auto"
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)
        self.backend = checks.backend(backend)

    def forward(
        self,
        input: Tensor,  # [B, I] or [I]
        hx: tuple[Tensor, Tensor] | None = None,  # each [B, H] or [H]
    ) -> tuple[Tensor, Tensor]:
        """Run one step; see the class for shapes."""
        checks.lstm_cell_input(self, input, hx)
        batched = input.dim() == 2
        if not batched:
            input = input.unsqueeze(0)
        if hx is None:
            zeros = torch.zeros(input.size(0), self.hidden_size, dtype=input.dtype, device=input.device)
            hx = (zeros, zeros)
        elif not batched:
            hx = (hx[0].unsqueeze(0), hx[1].unsqueeze(0))
        h, c = functional.lstm_cell(
            input, hx, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh, backend=self.backend
        )
        return (h, c) if batched else (h.squeeze(0), c.squeeze(0))
