"""The layers and cells that a user builds: every class names its cell, and its docstring has the equations."""

import torch
from torch import Tensor, nn

from fusedlstm import checks
from fusedlstm.base import Device, Init, Recurrent, RecurrentCell

TwoStates = tuple[Tensor, Tensor]  # h and c
FourStates = tuple[Tensor, Tensor, Tensor, Tensor]  # h, c, n and m

# nn.RNNBase and not nn.LSTM: Dynamo breaks the graph at nn.LSTM, nn.GRU and nn.RNN, and at their subclasses.


class LSTM(Recurrent[TwoStates]):
    r"""A stack of LSTM layers. It takes the place of `torch.nn.LSTM`.

    .. math::
        i_t, f_t, o_t = \sigma(W x_t + U h_{t-1} + b), \quad g_t = \tanh(W x_t + U h_{t-1} + b), \quad
        c_t = f_t \odot c_{t-1} + i_t \odot g_t, \quad h_t = o_t \odot \tanh(c_t)

    Example::

        lstm = fusedlstm.LSTM(10, 20, num_layers=2)
        output, (h_n, c_n) = lstm(torch.randn(5, 3, 10))  # [T, B, I] -> [T, B, H]

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype: As in
            `torch.nn.LSTM`. Parameter names, shapes, gate order (i, f, g, o) and initial values under a seed are the
            same.
        backend, grad_clip, save, num_heads, init, zoneout, candidate_dropout, recurrent_dropout, weight_dropout: As in
            :class:`Recurrent`. Heads, zoneout and the three dropouts cannot be combined with `proj_size`.

    Shapes: L is the number of layers and D the number of directions. P is `proj_size`, or H without a projection.
        `input` is [T, B, I], or [B, T, I] with `batch_first`, or [T, I] without a batch, or a PackedSequence. h_0 is
        [L * D, B, P] and c_0 is [L * D, B, H], or both without B. They are zero if they are not given. `output` is
        [T, B, D * P], or has the form of `input`. h_n and c_n have the shapes of h_0 and c_0.
    Precision: Products have the dtype of `input`. On the engine "triton", sums, gates and c are float32.
    Memory: Beside its output, the engine "triton" keeps T * B * H * D * (4 * itemsize + 4) bytes per layer for the
        backward. With save="states" it keeps 4 * B * H bytes for each border between blocks of steps, of which there
        are at most nine. It keeps none if there are two directions or if the batch is packed. `bench/memory.py`
        computes kept and peak bytes from the shapes.
    Source: Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000. The equations are those of
        `torch.nn.LSTM`.
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
    r"""One step of an LSTM. It takes the place of `torch.nn.LSTMCell`. The equations are those of :class:`LSTM`.

    Args: As in :class:`RecurrentCell`.
    Shapes: `input` is [B, I] or [I]. h_0 and c_0 are [B, H] or [H], and zero if they are not given. The call returns
        (h_1, c_1) with the shapes of (h_0, c_0).
    Raises: ValueError and RuntimeError, of the same type and with the same text as `torch.nn.LSTMCell`.
    """

    cell = "lstm"


class GRU(Recurrent[Tensor]):
    r"""A stack of GRU layers. It takes the place of `torch.nn.GRU`.

    .. math::
        r_t, z_t = \sigma(W x_t + b + U h_{t-1} + b'), \quad
        n_t = \tanh(W x_t + b + r_t \odot (U h_{t-1} + b')), \quad
        h_t = (1 - z_t) \odot n_t + z_t \odot h_{t-1}

    Example::

        gru = fusedlstm.GRU(10, 20, num_layers=2)
        output, h_n = gru(torch.randn(5, 3, 10))  # [T, B, I] -> [T, B, H]

    Args and shapes: As in :class:`Recurrent`. Parameter names, shapes, gate order (r, z, n) and initial values under a
        seed are those of `torch.nn.GRU`. The state is a tensor, h.
    Source: Cho et al. 2014. The reset gate comes after the product, as in `torch.nn.GRU` (Chung et al. 2014).
    """

    cell = "gru"


class GRUCell(RecurrentCell[Tensor]):
    """One step of a GRU. It takes the place of `torch.nn.GRUCell`. The equations are those of :class:`GRU`.

    Args: As in :class:`RecurrentCell`.
    Shapes: `input` is [B, I] or [I]. h_0 is [B, H] or [H], and zero if it is not given. The call returns h_1, which has
        the shape of h_0.
    Raises: ValueError and RuntimeError, of the same type and with the same text as `torch.nn.GRUCell`.
    """

    cell = "gru"


class ResetBeforeGRU(Recurrent[Tensor]):
    r"""A stack of GRU layers whose reset gate comes before the recurrent product.

    .. math::
        r_t, z_t = \sigma(W x_t + U h_{t-1} + b), \quad
        n_t = \tanh(W x_t + U (r_t \odot h_{t-1}) + b), \quad
        h_t = (1 - z_t) \odot n_t + z_t \odot h_{t-1}

    This is the GRU of Keras with `reset_after=False`, and that of ONNX with `linear_before_reset=0`. It needs a second
    product in each step, so the kernels do not have it. The engine "reference" serves it, and autograd differentiates
    every step. That takes longer than a `GRU`, `save` changes nothing, and a graph of `torch.compile` or `torch.export`
    has one T.

    Args and shapes: As in :class:`Recurrent`. Parameter names, shapes and the gate order (r, z, n) are those of
        `torch.nn.GRU`. b is the sum of both biases. The state is a tensor, h.
    Source: Cho et al. 2014, "Learning phrase representations using RNN encoder-decoder".
    """

    cell = "gru_reset_before"


class ResetBeforeGRUCell(RecurrentCell[Tensor]):
    """One step of :class:`ResetBeforeGRU`. It takes h_0 and returns h_1, each [B, H] or [H]."""

    cell = "gru_reset_before"


class RNN(Recurrent[Tensor]):
    r"""A stack of vanilla RNN layers. It takes the place of `torch.nn.RNN`.

    .. math::
        h_t = \tanh(W x_t + U h_{t-1} + b), \quad\text{or}\quad h_t = \max(0, W x_t + U h_{t-1} + b)

    Example::

        rnn = fusedlstm.RNN(10, 20, nonlinearity="relu")
        output, h_n = rnn(torch.randn(5, 3, 10))  # [T, B, I] -> [T, B, H]

    Args and shapes: As in :class:`Recurrent`, with one more argument after `num_layers`: `nonlinearity` is "tanh" or
        "relu". Parameter names, shapes and initial values under a seed are those of `torch.nn.RNN`. The state is a
        tensor, h.
    Source: Elman 1990. The version with the rectifier is from Le et al. 2015.
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
    """One step of a vanilla RNN. It takes the place of `torch.nn.RNNCell`. The equations are those of :class:`RNN`.

    Args: As in :class:`RecurrentCell`, with one more argument after `bias`: `nonlinearity` is "tanh" or "relu".
    Shapes: `input` is [B, I] or [I]. h_0 is [B, H] or [H], and zero if it is not given. The call returns h_1, which has
        the shape of h_0.
    Raises: ValueError and RuntimeError, of the same type and with the same text as `torch.nn.RNNCell`. An unknown
        nonlinearity is an error in the constructor, and not only in the first call.
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
    r"""A stack of LSTM layers with peepholes: the gates also depend on the cell state c.

    .. math::
        i_t, f_t = \sigma(W x_t + U h_{t-1} + b + p \odot c_{t-1}), \quad g_t = \tanh(W x_t + U h_{t-1} + b), \quad
        c_t = f_t \odot c_{t-1} + i_t \odot g_t,

    .. math::
        o_t = \sigma(W x_t + U h_{t-1} + b + p_o \odot c_t), \quad h_t = o_t \odot \tanh(c_t)

    Args and shapes: As in :class:`Recurrent`. The states are h and c. The parameters are those of `torch.nn.LSTM`, in
        the gate order i, f, g, o. After them, each layer and direction has `weight_ci_l*`, `weight_cf_l*` and
        `weight_co_l*`, each [H]. They are the peepholes p, which are diagonal.
    Source: Gers & Schmidhuber 2000, "Recurrent nets that time and count".
    """

    cell = "peephole"


class PeepholeLSTMCell(RecurrentCell[TwoStates]):
    """One step of :class:`PeepholeLSTM`. It takes (h_0, c_0) and returns (h_1, c_1), each [B, H] or [H]."""

    cell = "peephole"


class CoupledLSTM(Recurrent[TwoStates]):
    r"""A stack of LSTM layers with coupled gates (CIFG): the forget gate f is 1 - i.

    .. math::
        i_t, o_t = \sigma(W x_t + U h_{t-1} + b), \quad g_t = \tanh(W x_t + U h_{t-1} + b), \quad
        c_t = (1 - i_t) \odot c_{t-1} + i_t \odot g_t, \quad h_t = o_t \odot \tanh(c_t)

    Args and shapes: As in :class:`Recurrent`. The states are h and c. There are three gates, in the order i, g, o, so
        `weight_ih_l0` is [3H, I].
    Source: Greff et al. 2015, "LSTM: a search space odyssey".
    """

    cell = "coupled"


class CoupledLSTMCell(RecurrentCell[TwoStates]):
    """One step of :class:`CoupledLSTM`. It takes (h_0, c_0) and returns (h_1, c_1), each [B, H] or [H]."""

    cell = "coupled"


class SLSTM(Recurrent[FourStates]):
    r"""A stack of sLSTM layers, with an exponential input gate, a normaliser n and a stabiliser m.

    .. math::
        f_t, o_t = \sigma(\tilde f_t), \sigma(\tilde o_t), \quad g_t = \tanh(\tilde g_t), \quad
        m_t = \max(\log f_t + m_{t-1}, \tilde\imath_t), \quad i_t = e^{\tilde\imath_t - m_t}, \quad
        \bar f_t = e^{\log f_t + m_{t-1} - m_t},

    .. math::
        c_t = \bar f_t \odot c_{t-1} + i_t \odot g_t, \quad n_t = \bar f_t \odot n_{t-1} + i_t, \quad
        h_t = o_t \odot c_t / n_t

    A tilde marks W x_t + U h_{t-1} + b.

    Args and shapes: As in :class:`Recurrent`. The gate order is i, f, g, o. The states are h, c, n and m, so `hx` is a
        tuple of four tensors. A state with n = 0 is empty, and its m is ignored. So zeros are a valid initial state,
        and a reset leaves one. The heads of the paper are `num_heads`.
    Source: Beck et al. 2024, "xLSTM: extended long short-term memory", with a sigmoid as forget gate.
    """

    cell = "slstm"


class SLSTMCell(RecurrentCell[FourStates]):
    """One step of :class:`SLSTM`. It takes (h_0, c_0, n_0, m_0) and returns the new states, each [B, H] or [H]."""

    cell = "slstm"


class LayerNormLSTM(Recurrent[TwoStates]):
    r"""A stack of LSTM layers with layer normalisation.

    .. math::
        i_t, f_t, o_t = \sigma(\tilde p_t), \quad g_t = \tanh(\tilde p_t), \quad
        \tilde p_t = \gamma_x N(W x_t) + \gamma_h N(U h_{t-1}) + b,

    .. math::
        c_t = f_t \odot c_{t-1} + i_t \odot g_t, \quad h_t = o_t \odot \tanh(\gamma_c N(c_t) + b_c)

    N shifts and scales a vector to mean 0 and variance 1, as `torch.nn.LayerNorm` does, with its epsilon of 1e-5. It
    normalises all 4H preactivations together, and the H elements of c together. The next step gets c without the norm,
    as in the paper. PyTorch's fastrnns benchmark hands on the normalised c instead.

    Args and shapes: As in :class:`Recurrent`, without `num_heads`. The states are h and c. The parameters are those of
        `torch.nn.LSTM`, in the gate order i, f, g, o. After them, each layer and direction has `gain_ih_l*` and
        `gain_hh_l*`, each [4H], and `gain_c_l*` and `bias_c_l*`, each [H]. b is the sum of `bias_ih_l*` and
        `bias_hh_l*`, which are the biases of the first two norms. Gains are 1 and all these biases are 0 at first. With
        `bias=False` there are no `bias_ih_l*` and `bias_hh_l*`.
    Source: Ba, Kiros & Hinton 2016, "Layer normalization".
    """

    cell = "layernorm"


class LayerNormLSTMCell(RecurrentCell[TwoStates]):
    """One step of :class:`LayerNormLSTM`. It takes (h_0, c_0) and returns (h_1, c_1), each [B, H] or [H]."""

    cell = "layernorm"


class LayerNormGRU(Recurrent[Tensor]):
    r"""A stack of GRU layers with layer normalisation.

    .. math::
        r_t, z_t = \sigma(a_t + u_t), \quad n_t = \tanh(a_t + r_t \odot u_t), \quad
        h_t = (1 - z_t) \odot n_t + z_t \odot h_{t-1},

    .. math::
        a_t = \gamma_x N(W x_t) + b, \quad u_t = \gamma_h N(U h_{t-1}) + b'

    N shifts and scales a vector to mean 0 and variance 1, as `torch.nn.LayerNorm` does, with its epsilon of 1e-5. It
    normalises all 3H values of a product together.

    Args and shapes: As in :class:`Recurrent`, without `num_heads`. The parameters are those of `torch.nn.GRU`, in the
        gate order r, z, n. After them, each layer and direction has `gain_ih_l*` and `gain_hh_l*`, each [3H]. b and b'
        are `bias_ih_l*` and `bias_hh_l*`, which are the biases of the norms. Gains are 1 and biases are 0 at first. The
        state is a tensor, h.
    Source: Ba, Kiros & Hinton 2016, "Layer normalization", with the norms and biases of the library haste.
    """

    cell = "layernorm_gru"


class LayerNormGRUCell(RecurrentCell[Tensor]):
    """One step of :class:`LayerNormGRU`. It takes h_0 and returns h_1, each [B, H] or [H]."""

    cell = "layernorm_gru"
