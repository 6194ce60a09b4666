"""The layers that a user builds: parameters and conventions of `torch.nn`, no arithmetic."""

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

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
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype: as in
            `torch.nn.LSTM`, with the same parameter names, shapes, gate order (i, f, g, o) and values under a seed.
        backend: "auto", "triton", "torch" or "reference"; see `fusedlstm.engines`. An engine asked for by name
            serves the call or raises.

    Shapes: input [T, B, I], [B, T, I] with `batch_first`, [T, I], or a PackedSequence; h_0 [L * D, B, P] and c_0
        [L * D, B, H] (or without B), zero if not given; output [T, B, D * P] (or like input); h_n and c_n like h_0 and
        c_0. L layers, D directions; P is `proj_size`, or H without one.

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
        self.backend = checks.backend(backend)

    backend = "auto"  # of a module that was made without our constructor

    def flatten_parameters(self) -> None:
        """Does nothing: the kernels read every weight where it lies. Kept because code for `torch.nn` calls it."""

    def forward(
        self,
        input: Tensor | PackedSequence,  # [T, B, I], [B, T, I] or [T, I], or packed
        hx: tuple[Tensor, Tensor] | None = None,  # [L * D, B, P] and [L * D, B, H], or [L * D, P] and [L * D, H]
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        """Run the stack over a sequence; see the class for shapes.

        Raises:
            ValueError, RuntimeError: a shape, dtype or device disagrees; type and text are those of `torch.nn.LSTM`.
        """
        self._update_flat_weights()
        checks.lstm_input(self, input, hx)
        if isinstance(input, PackedSequence):
            data, batch_sizes, sorted_indices, unsorted_indices = input
            hx = self._zeros(data, int(batch_sizes[0])) if hx is None else self.permute_hidden(hx, sorted_indices)
            output, h_n, c_n = self._run(data, hx, batch_sizes)
            output = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
            return output, self.permute_hidden((h_n, c_n), unsorted_indices)
        batched = input.dim() == 3
        batch_dim = 0 if self.batch_first else 1
        if not batched:
            input = input.unsqueeze(batch_dim)
        if hx is None:
            hx = self._zeros(input, input.size(batch_dim))
        elif not batched:
            hx = (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
        output, h_n, c_n = self._run(input, hx)
        if not batched:
            return output.squeeze(batch_dim), (h_n.squeeze(1), c_n.squeeze(1))
        return output, (h_n, c_n)

    def _zeros(self, input: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """h_0 and c_0 where none are given."""
        rows = self.num_layers * (2 if self.bidirectional else 1)
        zeros = torch.zeros(rows, batch, self.hidden_size, dtype=input.dtype, device=input.device)
        return (zeros[..., : self.proj_size] if self.proj_size else zeros), zeros

    def _run(
        self, input: Tensor, hx: tuple[Tensor, Tensor], batch_sizes: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return functional.lstm(
            input,
            (hx[0], hx[1]),
            self._flat_weights,
            batch_sizes=batch_sizes,
            bias=self.bias,
            num_layers=self.num_layers,
            dropout=self.dropout,
            training=self.training,
            bidirectional=self.bidirectional,
            batch_first=self.batch_first,
            proj_size=self.proj_size,
            backend=self.backend,
        )

    # What code for torch.nn.LSTM calls beside forward.
    permute_hidden = nn.LSTM.permute_hidden
    check_forward_args = nn.LSTM.check_forward_args
    get_expected_cell_size = nn.LSTM.get_expected_cell_size


class LSTMCell(nn.RNNCellBase):
    r"""One LSTM step; takes the place of `torch.nn.LSTMCell`. Equations and engines as in :class:`LSTM`.

    Shapes: input [B, I] or [I]; h_0 and c_0 [B, H] or [H], zero if not given; returns (h_1, c_1) of the same shape.
    Raises: ValueError or RuntimeError with the type and text of `torch.nn.LSTMCell`.
    """

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device=None, dtype=None, *, backend: str = "auto"
    ) -> None:
        nn.RNNCellBase.__init__(  # by name, as in LSTM
            self, input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype
        )
        self.backend = checks.backend(backend)

    backend = "auto"  # of a module that was made without our constructor

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
