"""The layers and cells that a user builds: each names its cell, and has its equations and their source."""

import torch
from torch import Tensor, nn

from fusedlstm import checks
from fusedlstm.base import Device, Init, Recurrent, RecurrentCell

TwoStates = tuple[Tensor, Tensor]  # h and c
FourStates = tuple[Tensor, Tensor, Tensor, Tensor]  # h, c, n and m

# nn.RNNBase and not nn.LSTM: Dynamo breaks the graph at nn.LSTM, nn.GRU and nn.RNN, and at their subclasses.


class LSTM(Recurrent[TwoStates]):
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
        backend, grad_clip, save, num_heads, init, zoneout, candidate_dropout, recurrent_dropout, weight_dropout: as in
            :class:`Recurrent`. Neither heads nor the last four with `proj_size`.

    Shapes: input [T, B, I], [B, T, I] with `batch_first`, [T, I], or a PackedSequence; h_0 [L * D, B, P] and c_0
        [L * D, B, H] (or without B), zero if not given; output [T, B, D * P] (or like input); h_n and c_n like h_0 and
        c_0. L layers, D directions; P is `proj_size`, or H without one.

    Precision: products in the dtype of `input`; on the Triton engine sums, gates and c in float32.
    Memory: beside its output the Triton engine keeps T * B * H * D * (4 * itemsize + 4) bytes a layer for the backward;
        with save="states" 4 * B * H for each of at most nine borders between blocks of steps, in two directions and
        packed none. `bench/memory.py` has kept and peak bytes as functions of the shapes.
    Source: Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000, as `torch.nn.LSTM` writes it.
    """

    cell = "lstm"

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
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
        grad_clip: float | None = None,
        save: str = "gates",
        num_heads: int = 1,
        init: Init = None,
        zoneout: float | tuple[float, float] = 0.0,
        candidate_dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
    ) -> None:
        self.proj_size = proj_size  # before the constructor, which makes the parameters
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device,
            dtype,
            backend=backend,
            grad_clip=grad_clip,
            save=save,
            num_heads=num_heads,
            init=init,
            zoneout=zoneout,
            candidate_dropout=candidate_dropout,
            recurrent_dropout=recurrent_dropout,
            weight_dropout=weight_dropout,
        )

    # What code for torch.nn.LSTM calls beside forward.
    check_forward_args = nn.LSTM.check_forward_args  # type: ignore[assignment]
    get_expected_cell_size = nn.LSTM.get_expected_cell_size


class LSTMCell(RecurrentCell[TwoStates]):
    r"""One LSTM step; takes the place of `torch.nn.LSTMCell`. Equations, engines and heads as in :class:`LSTM`.

    Shapes: input [B, I] or [I]; h_0 and c_0 [B, H] or [H], zero if not given; returns (h_1, c_1) of the same shape.
    Raises: ValueError or RuntimeError with the type and text of `torch.nn.LSTMCell`.
    """

    cell = "lstm"


class GRU(Recurrent[Tensor]):
    r"""A stack of GRU layers; takes the place of `torch.nn.GRU`.

    .. math::
        r_t, z_t = \sigma(W x_t + b + U h_{t-1} + b'), \quad
        n_t = \tanh(W x_t + b + r_t \odot (U h_{t-1} + b')), \quad
        h_t = (1 - z_t) \odot n_t + z_t \odot h_{t-1}

    Example::

        gru = fusedlstm.GRU(10, 20, num_layers=2)
        output, h_n = gru(torch.randn(5, 3, 10))  # [T, B, I] -> [T, B, H]

    Args and shapes: as in :class:`Recurrent`; parameter names, shapes, gate order (r, z, n) and values under a seed are
        those of `torch.nn.GRU`. h_0 is a tensor.
    Source: Cho et al. 2014, with the reset gate after the product as `torch.nn.GRU` has it (Chung et al. 2014).
    """

    cell = "gru"


class GRUCell(RecurrentCell[Tensor]):
    """One GRU step; takes the place of `torch.nn.GRUCell`. Equations as in :class:`GRU`.

    Shapes: input [B, I] or [I]; h_0 [B, H] or [H], zero if not given; returns h_1.
    Raises: ValueError or RuntimeError with the type and text of `torch.nn.GRUCell`.
    """

    cell = "gru"


class RNN(Recurrent[Tensor]):
    r"""A stack of vanilla RNN layers; takes the place of `torch.nn.RNN`.

    .. math::
        h_t = \tanh(W x_t + U h_{t-1} + b), \quad\text{or}\quad h_t = \max(0, W x_t + U h_{t-1} + b)

    Example::

        rnn = fusedlstm.RNN(10, 20, nonlinearity="relu")
        output, h_n = rnn(torch.randn(5, 3, 10))  # [T, B, I] -> [T, B, H]

    Args and shapes: as in :class:`Recurrent`, with `nonlinearity`, "tanh" or "relu", after `num_layers`; parameter
        names, shapes and values under a seed are those of `torch.nn.RNN`. h_0 is a tensor.
    Source: Elman 1990; with the rectifier Le et al. 2015.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
        grad_clip: float | None = None,
        save: str = "gates",
        num_heads: int = 1,
        init: Init = None,
        zoneout: float | tuple[float, float] = 0.0,
        candidate_dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
    ) -> None:
        self.nonlinearity = checks.nonlinearity(nonlinearity)
        self.mode = f"RNN_{nonlinearity.upper()}"
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device,
            dtype,
            backend=backend,
            grad_clip=grad_clip,
            save=save,
            num_heads=num_heads,
            init=init,
            zoneout=zoneout,
            candidate_dropout=candidate_dropout,
            recurrent_dropout=recurrent_dropout,
            weight_dropout=weight_dropout,
        )

    @property
    def cell(self) -> str:  # type: ignore[override]
        return self.mode.lower()


class RNNCell(RecurrentCell[Tensor]):
    """One step of a vanilla RNN; takes the place of `torch.nn.RNNCell`. Equations as in :class:`RNN`.

    Shapes: input [B, I] or [I]; h_0 [B, H] or [H], zero if not given; returns h_1.
    Raises: ValueError or RuntimeError with the type and text of `torch.nn.RNNCell`, of an unknown nonlinearity at once.
    """

    __constants__ = nn.RNNCell.__constants__

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
        num_heads: int = 1,
        init: Init = None,
    ) -> None:
        self.nonlinearity = nonlinearity
        super().__init__(input_size, hidden_size, bias, device, dtype, backend=backend, num_heads=num_heads, init=init)

    @property
    def cell(self) -> str:  # type: ignore[override]
        return checks.cell_of_nonlinearity(self.nonlinearity)


class PeepholeLSTM(Recurrent[TwoStates]):
    r"""A stack of LSTM layers whose gates look at the cell.

    .. math::
        i_t, f_t = \sigma(W x_t + U h_{t-1} + b + p \odot c_{t-1}), \quad g_t = \tanh(W x_t + U h_{t-1} + b), \quad
        c_t = f_t \odot c_{t-1} + i_t \odot g_t,

    .. math::
        o_t = \sigma(W x_t + U h_{t-1} + b + p_o \odot c_t), \quad h_t = o_t \odot \tanh(c_t)

    Args and shapes: as in :class:`Recurrent`; states h and c. Parameters are those of `torch.nn.LSTM`, gate order i, f,
        g, o, and after them, per layer and direction, `weight_ci_l*`, `weight_cf_l*` and `weight_co_l*`, each [H]: p is
        diagonal.
    Source: Gers & Schmidhuber 2000, "Recurrent nets that time and count".
    """

    cell = "peephole"


class PeepholeLSTMCell(RecurrentCell[TwoStates]):
    """One step of :class:`PeepholeLSTM`: (h_0, c_0) to (h_1, c_1), each [B, H] or [H]."""

    cell = "peephole"


class CoupledLSTM(Recurrent[TwoStates]):
    r"""A stack of LSTM layers that forget as much as they take in (CIFG): f is 1 - i.

    .. math::
        i_t, o_t = \sigma(W x_t + U h_{t-1} + b), \quad g_t = \tanh(W x_t + U h_{t-1} + b), \quad
        c_t = (1 - i_t) \odot c_{t-1} + i_t \odot g_t, \quad h_t = o_t \odot \tanh(c_t)

    Args and shapes: as in :class:`Recurrent`; states h and c; three gates in the order i, g, o, so `weight_ih_l0` is
        [3H, I].
    Source: Greff et al. 2015, "LSTM: a search space odyssey".
    """

    cell = "coupled"


class CoupledLSTMCell(RecurrentCell[TwoStates]):
    """One step of :class:`CoupledLSTM`: (h_0, c_0) to (h_1, c_1), each [B, H] or [H]."""

    cell = "coupled"


class SLSTM(Recurrent[FourStates]):
    r"""A stack of sLSTM layers: exponential input gate, normaliser n and stabiliser m.

    .. math::
        f_t, o_t = \sigma(\tilde f_t), \sigma(\tilde o_t), \quad g_t = \tanh(\tilde g_t), \quad
        m_t = \max(\log f_t + m_{t-1}, \tilde\imath_t), \quad i_t = e^{\tilde\imath_t - m_t}, \quad
        \bar f_t = e^{\log f_t + m_{t-1} - m_t},

    .. math::
        c_t = \bar f_t \odot c_{t-1} + i_t \odot g_t, \quad n_t = \bar f_t \odot n_{t-1} + i_t, \quad
        h_t = o_t \odot c_t / n_t

    with a tilde for W x_t + U h_{t-1} + b.

    Args and shapes: as in :class:`Recurrent`; gate order i, f, g, o; states h, c, n and m, so hx is a tuple of four. A
        state with n = 0 holds nothing, and its m is not looked at: zeros are a beginning, and so is what a reset
        leaves. The paper has `num_heads` heads.
    Source: Beck et al. 2024, "xLSTM: extended long short-term memory", with the forget gate a sigmoid.
    """

    cell = "slstm"


class SLSTMCell(RecurrentCell[FourStates]):
    """One step of :class:`SLSTM`: (h_0, c_0, n_0, m_0) to the same of the next step, each [B, H] or [H]."""

    cell = "slstm"


class LayerNormLSTM(Recurrent[TwoStates]):
    r"""A stack of LSTM layers with layer normalisation.

    .. math::
        i_t, f_t, o_t = \sigma(\tilde p_t), \quad g_t = \tanh(\tilde p_t), \quad
        \tilde p_t = \gamma_x N(W x_t) + \gamma_h N(U h_{t-1}) + b,

    .. math::
        c_t = f_t \odot c_{t-1} + i_t \odot g_t, \quad h_t = o_t \odot \tanh(\gamma_c N(c_t) + b_c)

    N makes a vector's mean 0 and its variance 1: of all 4H preactivations together, and of the H numbers of c
    (`torch.nn.LayerNorm`, with its epsilon of 1e-5). c itself is carried to the next step, as in the paper; PyTorch's
    fastrnns benchmark carries the normalised one.

    Args and shapes: as in :class:`Recurrent`, but for `num_heads`, of which there is one; states h and c. Parameters
        are those of `torch.nn.LSTM`, gate order i, f, g, o, and after them, per layer and direction, `gain_ih_l*` and
        `gain_hh_l*` [4H], `gain_c_l*` and `bias_c_l*` [H]. b is the sum of `bias_ih_l*` and `bias_hh_l*`: the biases of
        the first two norms. Gains begin as 1 and these biases as 0; without `bias` only the first two are left out.
    Source: Ba, Kiros & Hinton 2016, "Layer normalization".
    """

    cell = "layernorm"


class LayerNormLSTMCell(RecurrentCell[TwoStates]):
    """One step of :class:`LayerNormLSTM`: (h_0, c_0) to (h_1, c_1), each [B, H] or [H]."""

    cell = "layernorm"
