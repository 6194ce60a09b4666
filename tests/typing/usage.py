"""What a type checker says of users' code. Nothing runs this file; `make typecheck` reads it.

A line that is wrong has an ignore with the code of its error. mypy reports an ignore that is not needed.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from typing_extensions import assert_type

import fusedlstm
from fusedlstm.conversion import Report

Two = tuple[Tensor, Tensor]
Four = tuple[Tensor, Tensor, Tensor, Tensor]


class MyGRU(fusedlstm.Recurrent[Tensor]):
    cell = "gru"


class Plain(fusedlstm.Recurrent):
    cell = "lstm"


def constructors() -> None:
    fusedlstm.LSTM(10, 20, 2, True, False, 0.1, True, 5, "cpu", torch.float32)
    fusedlstm.RNN(10, 20, 2, "relu", num_heads=2, zoneout=(0.1, 0.2), weight_dropout=0.5)
    fusedlstm.GRU(10, 20, backend="torch", grad_clip=1, save="states", init=fusedlstm.inits.orthogonal_)
    fusedlstm.GRU(10, 20, init=[functools.partial(fusedlstm.inits.chrono_, longest=9), nn.Module.eval])
    fusedlstm.LSTMCell(10, 20, device=torch.device("cpu"), num_heads=4)
    fusedlstm.LSTM(10, 20, bidirection=True)  # type: ignore[call-arg]
    fusedlstm.GRU(10, 20, proj_size=5)  # type: ignore[call-arg]
    fusedlstm.GRUCell(10, 20, zoneout=0.1)  # type: ignore[call-arg]
    fusedlstm.LSTM(10, 20, dropout="0.1")  # type: ignore[arg-type]
    fusedlstm.RNN(10, 20, 1, False)  # type: ignore[arg-type]
    fusedlstm.LSTM(10, 20, init=1)  # type: ignore[arg-type]


def calls(x: Tensor, packed: PackedSequence, either: Tensor | PackedSequence, wanted: bool) -> None:
    lstm, gru = fusedlstm.LSTM(10, 20), fusedlstm.GRU(10, 20)
    assert_type(lstm(x), tuple[Tensor, Two])
    assert_type(lstm(x, (x, x), lengths=x, resets=x, grad_clip=1), tuple[Tensor, Two])
    assert_type(lstm.forward(packed, (x, x)), tuple[PackedSequence, Two])
    assert_type(lstm(either)[1], Two)
    assert_type(lstm(x, return_cell_states=True), tuple[Tensor, Two, Any])
    assert_type(lstm(packed, resets=packed, return_cell_states=True), tuple[PackedSequence, Two, Any])
    assert_type(lstm(x, return_cell_states=wanted), tuple[Any, ...])
    assert_type(lstm(x, lengths=x, padding_side="left", return_states=True), tuple[Tensor, Two, Any])
    lstm(x, lengths=x, padding_side="top")  # type: ignore[call-overload]
    assert_type(gru(x, x), tuple[Tensor, Tensor])
    assert_type(fusedlstm.RNN(10, 20)(packed), tuple[PackedSequence, Tensor])
    assert_type(fusedlstm.SLSTM(10, 20)(x), tuple[Tensor, Four])
    assert_type(MyGRU(10, 20)(x), tuple[Tensor, Tensor])
    assert_type(Plain(10, 20)(x), tuple[Tensor, Any])
    lstm(x, x)  # type: ignore[call-overload]
    gru(x, (x, x))  # type: ignore[call-overload]
    lstm(x, length=x)  # type: ignore[call-overload]
    lstm(x, resets=packed)  # type: ignore[type-var]
    _output, _h_n, _c_n = lstm(x)  # type: ignore[misc]


def steps(x: Tensor, packed: PackedSequence) -> None:
    assert_type(fusedlstm.LSTMCell(10, 20)(x), Two)
    assert_type(fusedlstm.GRUCell(10, 20)(x, x), Tensor)
    assert_type(fusedlstm.SLSTMCell(10, 20).forward(x), Four)
    fusedlstm.LSTMCell(10, 20)(packed)  # type: ignore[arg-type]
    fusedlstm.LSTMCell(10, 20)(x, x)  # type: ignore[arg-type]


def functions(model: nn.Sequential, x: Tensor, packed: PackedSequence) -> None:
    assert_type(fusedlstm.convert(model), nn.Sequential)
    assert_type(fusedlstm.convert(model, backend="torch", return_report=True), tuple[nn.Sequential, Report])
    assert_type(fusedlstm.restore(model), nn.Sequential)
    assert_type(fusedlstm.restore(model, return_report=True), tuple[nn.Sequential, Report])
    with fusedlstm.patch_torch(backend="torch"):
        pass
    assert_type(fusedlstm.sequences.padded_from_packed(packed), tuple[Tensor, Tensor])
    assert_type(fusedlstm.explain(fusedlstm.LSTM(10, 20), x).why, str)
    fusedlstm.Stream(fusedlstm.LSTM(10, 20), detach=False)(x, resets=x)
    fusedlstm.convert([model])  # type: ignore[call-overload]
    fusedlstm.Stream(fusedlstm.LSTM(10, 20), detached=True)  # type: ignore[call-arg]
    fusedlstm.explain(nn.LSTM(10, 20), x)  # type: ignore[arg-type]


def attributes(lstm: fusedlstm.LSTM) -> None:
    lstm.backend, lstm.grad_clip, lstm.save, lstm.init = "torch", None, "states", fusedlstm.inits.forget_bias_
    assert_type(lstm.num_heads, int)
    lstm.grad_clip = "1"  # type: ignore[assignment]
    lstm.num_heads = "1"  # type: ignore[assignment]
