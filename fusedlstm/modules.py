"""The layers that a user builds: parameters and conventions of `torch.nn`, no arithmetic."""

import functools

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
        grad_clip: in the backward, every element of the gradient of an h or c that enters a step is kept within
            -grad_clip and grad_clip; None is no limit. Of scaled losses (`GradScaler`) it bounds the scaled gradient.
        save: what our own loops, the kernels' above all, keep for the backward: "gates" is faster; "states" is lean, the
            backward recomputes the gates with one more product. Where ATen serves the call, ATen decides.
        num_heads: n, how many groups of DH = H / n hidden units there are, each of which sees only its own h: U is block
            diagonal. Unit u is of head u // DH, and `weight_hh_l*` is [4H, DH], a column for every unit of the row's
            head; initial values are uniform in 1 / sqrt(H) as all others. 1 is the usual LSTM. Not with `proj_size`.

    Shapes: input [T, B, I], [B, T, I] with `batch_first`, [T, I], or a PackedSequence; h_0 [L * D, B, P] and c_0
        [L * D, B, H] (or without B), zero if not given; output [T, B, D * P] (or like input); h_n and c_n like h_0 and
        c_0. L layers, D directions; P is `proj_size`, or H without one.

    Precision: products in the dtype of `input`; on the Triton engine sums, gates and c in float32.
    Memory: beside its output the Triton engine keeps T * B * H * D * (4 * itemsize + 4) bytes a layer for the backward;
        with save="states" 4 * B * H for each of at most nine borders between blocks of steps, in two directions and
        packed none. `fusedlstm.memory` has kept and peak bytes as functions of the shapes.
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
        grad_clip: float | None = None,
        save: str = "gates",
        num_heads: int = 1,
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
            device if num_heads == 1 else "meta",
            dtype,
        )
        self.backend = checks.backend(backend)
        self.grad_clip = checks.grad_clip(grad_clip)
        self.save = checks.save(save)
        self.num_heads = checks.num_heads(num_heads, hidden_size, proj_size)
        if num_heads > 1:
            _make_heads(self, device)

    backend, grad_clip, save, num_heads = "auto", None, "gates", 1  # of a module that was made without our constructor

    def extra_repr(self) -> str:
        return _with_heads(super().extra_repr(), self.num_heads)

    def flatten_parameters(self) -> None:
        """Does nothing: the kernels read every weight where it lies. Kept because code for `torch.nn` calls it."""

    def forward(
        self,
        input: Tensor | PackedSequence,  # [T, B, I], [B, T, I] or [T, I], or packed
        hx: tuple[Tensor, Tensor] | None = None,  # [L * D, B, P] and [L * D, B, H], or [L * D, P] and [L * D, H]
        *,
        lengths: Tensor | None = None,  # [B] integers
        resets: Tensor | PackedSequence | None = None,  # bool, [T, B], [B, T] or [T], or packed like input
        return_cell_states: bool = False,
        grad_clip: float | None = None,
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        """Run the stack over a sequence; see the class for shapes.

        Args:
            lengths: how many steps every sequence has, 0 to T, on any device. The rest is padding: output is zero there,
                h_n and c_n are those of the last step before it (hx, where there is none), and the reverse direction
                begins before it. The same numbers as packing; what the padding holds should be finite.
            resets: a true at step t cuts the sequence between t - 1 and t: forward, the state that enters step t is zero
                (at t = 0 hx is dropped); in the reverse direction, that which enters step t - 1. No gradient crosses.
            return_cell_states: return also c of every step of the last layer, [T, B, D * H] or like the output.
            grad_clip: for this call, in place of the module's.

        Raises:
            ValueError, RuntimeError: a shape, dtype or device disagrees; type and text are those of `torch.nn.LSTM`.
        """
        self._update_flat_weights()
        checks.lstm_input(self, input, hx)
        if lengths is not None or resets is not None:
            lengths, resets = checks.lengths_and_resets(input, lengths, resets, self.batch_first)
        run = functools.partial(
            self._run,
            cell_states=return_cell_states,
            grad_clip=checks.grad_clip(self.grad_clip if grad_clip is None else grad_clip),
        )
        if isinstance(input, PackedSequence):
            data, batch_sizes, sorted_indices, unsorted_indices = input
            hx = self._zeros(data, int(batch_sizes[0])) if hx is None else self.permute_hidden(hx, sorted_indices)
            output, h_n, c_n, c_seq = run(data, hx, batch_sizes=batch_sizes, resets=resets)
            output, c_seq = (
                None if x is None else PackedSequence(x, batch_sizes, sorted_indices, unsorted_indices)
                for x in (output, c_seq)
            )
            h_n, c_n = self.permute_hidden((h_n, c_n), unsorted_indices)
        else:
            batched = input.dim() == 3
            batch_dim = 0 if self.batch_first else 1
            if not batched:
                input, resets = input.unsqueeze(batch_dim), None if resets is None else resets.unsqueeze(batch_dim)
            if hx is None:
                hx = self._zeros(input, input.size(batch_dim))
            elif not batched:
                hx = (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
            output, h_n, c_n, c_seq = run(input, hx, lengths=lengths, resets=resets)
            if not batched:
                output, c_seq = (None if x is None else x.squeeze(batch_dim) for x in (output, c_seq))
                h_n, c_n = h_n.squeeze(1), c_n.squeeze(1)
        return (output, (h_n, c_n), c_seq) if return_cell_states else (output, (h_n, c_n))

    def _zeros(self, input: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """h_0 and c_0 where none are given."""
        rows = self.num_layers * (2 if self.bidirectional else 1)
        zeros = torch.zeros(rows, batch, self.hidden_size, dtype=input.dtype, device=input.device)
        return (zeros[..., : self.proj_size] if self.proj_size else zeros), zeros

    def _run(self, input: Tensor, hx: tuple[Tensor, Tensor], **options):
        return functional.lstm(
            input,
            (hx[0], hx[1]),
            self._flat_weights,
            bias=self.bias,
            num_layers=self.num_layers,
            dropout=self.dropout,
            training=self.training,
            bidirectional=self.bidirectional,
            batch_first=self.batch_first,
            proj_size=self.proj_size,
            save=self.save,
            backend=self.backend,
            **options,
        )

    # What code for torch.nn.LSTM calls beside forward.
    permute_hidden = nn.LSTM.permute_hidden
    check_forward_args = nn.LSTM.check_forward_args
    get_expected_cell_size = nn.LSTM.get_expected_cell_size


class LSTMCell(nn.RNNCellBase):
    r"""One LSTM step; takes the place of `torch.nn.LSTMCell`. Equations, engines and heads as in :class:`LSTM`.

    Shapes: input [B, I] or [I]; h_0 and c_0 [B, H] or [H], zero if not given; returns (h_1, c_1) of the same shape.
    Raises: ValueError or RuntimeError with the type and text of `torch.nn.LSTMCell`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        backend: str = "auto",
        num_heads: int = 1,
    ) -> None:
        made_on = device if num_heads == 1 else "meta"
        nn.RNNCellBase.__init__(  # by name, as in LSTM
            self, input_size, hidden_size, bias, num_chunks=4, device=made_on, dtype=dtype
        )
        self.backend = checks.backend(backend)
        self.num_heads = checks.num_heads(num_heads, hidden_size)
        if num_heads > 1:
            _make_heads(self, device)

    backend, num_heads = "auto", 1  # of a module that was made without our constructor

    def extra_repr(self) -> str:
        return _with_heads(super().extra_repr(), self.num_heads)

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


def _make_heads(module: LSTM | LSTMCell, device) -> None:
    """Give a module whose parameters torch made dense, and on the meta device, those of its heads on `device`."""
    for name, weight in list(module.named_parameters()):
        if name.startswith("weight_hh"):
            heads = weight.new_empty(len(weight), module.hidden_size // module.num_heads)
            setattr(module, name, nn.Parameter(heads))
    module.to_empty(device=torch.empty(0, device=device).device)  # None is the default device
    module.reset_parameters()


def _with_heads(text: str, num_heads: int) -> str:
    return text if num_heads == 1 else f"{text}, num_heads={num_heads}"
