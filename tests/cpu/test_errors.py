"""checks.py and engines.py: torch.nn's type and text where it has one, a clear one where not."""

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import fusedlstm
from fusedlstm import engines
from fusedlstm.plan.devices import DEVICES

X = torch.zeros(5, 2, 3)
H = torch.zeros(1, 2, 4)


def both_raise(make):
    """The error of stock and of ours; they must agree in type and text."""
    raised = []
    for module in (nn, fusedlstm):
        with pytest.raises((ValueError, RuntimeError, TypeError)) as info:
            make(module)
        raised.append(info.value)
    stock, ours = raised
    assert type(ours) is type(stock)
    assert str(ours) == str(stock)


CONSTRUCTORS = {
    "bias": {"bias": 1},
    "batch_first": {"batch_first": 1},
    "input_size type": {"input_size": 3.0},
    "hidden_size type": {"hidden_size": "4"},
    "input_size": {"input_size": 0},
    "hidden_size": {"hidden_size": 0},
    "num_layers": {"num_layers": 0},
    "dropout range": {"dropout": 1.5},
    "dropout bool": {"dropout": True},
    "proj_size negative": {"proj_size": -1},
    "proj_size too large": {"proj_size": 4},
}


@pytest.mark.parametrize("options", CONSTRUCTORS.values(), ids=CONSTRUCTORS.keys())
def test_constructor_errors_are_torchs(options):
    both_raise(lambda module: module.LSTM(**{"input_size": 3, "hidden_size": 4, **options}))


@pytest.mark.parametrize("layer", [fusedlstm.LSTM, fusedlstm.GRU, fusedlstm.PeepholeLSTM])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("kind", ["to_sparse", "to_sparse_csr", "to_mkldnn"])
def test_an_input_without_strides(layer, backend, kind):
    text = "input: expected a dense tensor, got torch\\._?(sparse|mkldnn)"
    with torch.no_grad(), pytest.raises(ValueError, match=text):
        layer(3, 4, backend=backend)(getattr(torch.randn(5, 2, 3), kind)())


FORWARD = {
    "1D": (torch.zeros(3),),
    "4D": (torch.zeros(5, 2, 3, 1),),
    "input size": (torch.zeros(5, 2, 7),),
    "input dtype": (X.double(),),
    "empty sequence": (X[:0],),
    "hx 2D for batched": (X, (H[0], H[0])),
    "hx 3D for unbatched": (X[:, 0], (H, H)),
    "h batch": (X, (torch.zeros(1, 3, 4), H)),
    "c batch": (X, (H, torch.zeros(1, 3, 4))),
    "h features": (X, (torch.zeros(1, 2, 5), H)),
    "h layers": (X, (torch.zeros(2, 2, 4), H)),
    "unbatched h features": (X[:, 0], (torch.zeros(1, 5), torch.zeros(1, 4))),
}
PROJECTED = {
    "h not projected": (X, (H, H)),
    "c projected": (X, (torch.zeros(1, 2, 2), torch.zeros(1, 2, 2))),
}


@pytest.mark.parametrize("arguments", FORWARD.values(), ids=FORWARD.keys())
def test_forward_errors_are_torchs(arguments):
    both_raise(lambda module: module.LSTM(3, 4)(*arguments))


@pytest.mark.parametrize("arguments", PROJECTED.values(), ids=PROJECTED.keys())
def test_projected_state_errors_are_torchs(arguments):
    both_raise(lambda module: module.LSTM(3, 4, proj_size=2)(*arguments))


def test_three_states():
    with pytest.raises(RuntimeError, match="lstm expects two hidden states"):
        fusedlstm.LSTM(3, 4)(X, (H, H, H))


CELL = {
    "3D": (X,),
    "4D hx": (X[0], (torch.zeros(1, 1, 2, 4), H[0])),
    "input size": (torch.zeros(2, 7),),
    "batch": (X[0], (torch.zeros(3, 4), torch.zeros(3, 4))),
    "hidden size": (X[0], (torch.zeros(2, 5), torch.zeros(2, 5))),
}


@pytest.mark.parametrize("arguments", CELL.values(), ids=CELL.keys())
def test_cell_errors_are_torchs(arguments):
    both_raise(lambda module: module.LSTMCell(3, 4)(*arguments))


ONE_STATE = {
    "1D": (torch.zeros(3),),
    "4D": (torch.zeros(5, 2, 3, 1),),
    "input size": (torch.zeros(5, 2, 7),),
    "input dtype": (X.double(),),
    "empty sequence": (X[:0],),
    "hx 2D for batched": (X, H[0]),
    "hx 3D for unbatched": (X[:, 0], H),
    "batch": (X, torch.zeros(1, 3, 4)),
    "features": (X, torch.zeros(1, 2, 5)),
    "layers": (X, torch.zeros(2, 2, 4)),
    "unbatched features": (X[:, 0], torch.zeros(1, 5)),
    "packed input size": (pack_sequence([torch.zeros(5, 7)]),),
    "packed dtype": (pack_sequence([X[:, 0].double()]),),
    "packed batch": (pack_sequence([X[:, 0]]), H),
    "packed hx 2D": (pack_sequence([X[:, 0]]), H[0, :1]),
    "packed data 3D": (PackedSequence(torch.zeros(5, 1, 3), torch.ones(5, dtype=torch.int64)),),
    "hx device": (X, H.to("meta")),
}
LAYERS = {
    "GRU": lambda module, **options: module.GRU(**{"input_size": 3, "hidden_size": 4} | options),
    "RNN": lambda module, **options: module.RNN(**{"input_size": 3, "hidden_size": 4} | options),
    "RNN relu": lambda module, **options: module.RNN(
        **{"input_size": 3, "hidden_size": 4, "nonlinearity": "relu"} | options
    ),
}


@pytest.mark.parametrize("arguments", ONE_STATE.values(), ids=ONE_STATE.keys())
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
def test_errors_of_one_state_are_torchs(make, arguments):
    both_raise(lambda module: make(module)(*arguments))


@pytest.mark.parametrize(
    "options", [*CONSTRUCTORS.values(), {"proj_size": 0}], ids=[*CONSTRUCTORS.keys(), "proj_size is zero"]
)
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
def test_constructor_errors_of_one_state_are_torchs(make, options):
    """But for a projection, which our signatures do not have, and torch's take in order to refuse it."""
    if "proj_size" in options:
        with pytest.raises(ValueError, match="proj_size"):
            make(nn, **options)
        with pytest.raises(TypeError, match="unexpected keyword argument 'proj_size'"):
            make(fusedlstm, **options)
        return
    both_raise(lambda module: make(module, **options))


def test_nonlinearity_errors_are_torchs():
    both_raise(lambda module: module.RNN(3, 4, 1, "sine"))
    both_raise(lambda module: module.RNN(3, 4, nonlinearity="sine"))
    both_raise(lambda module: module.RNNCell(3, 4, nonlinearity="sine")(X[0]))


ONE_STATE_CELL = {
    "3D": (X,),
    "4D hx": (X[0], torch.zeros(1, 1, 2, 4)),
    "input size": (torch.zeros(2, 7),),
    "batch": (X[0], torch.zeros(3, 4)),
    "hidden size": (X[0], torch.zeros(2, 5)),
}


@pytest.mark.parametrize("arguments", ONE_STATE_CELL.values(), ids=ONE_STATE_CELL.keys())
@pytest.mark.parametrize("cell", ["GRUCell", "RNNCell"])
def test_cell_errors_of_one_state_are_torchs(cell, arguments):
    both_raise(lambda module: getattr(module, cell)(3, 4)(*arguments))


VARIANTS = {
    "three states": (
        lambda: fusedlstm.PeepholeLSTM(3, 4)(X, (H, H, H)),
        RuntimeError,
        "hx: expected the 2 states h, c, got 3",
    ),
    "a tensor": (
        lambda: fusedlstm.SLSTM(3, 4)(X, H),
        RuntimeError,
        "hx: expected the 4 states h, c, n, m, got a tensor",
    ),
    "a tuple": (lambda: fusedlstm.GRU(3, 4)(X, (H,)), TypeError, "hx: expected a Tensor, got tuple"),
    "dims": (
        lambda: fusedlstm.SLSTM(3, 4)(X, (H, H, H[0], H)),
        RuntimeError,
        "should also be 3-D but got (3-D, 3-D, 2-D, 3-D) tensors",
    ),
    "the size of m": (
        lambda: fusedlstm.SLSTM(3, 4)(X, (H, H, H, H[..., :3])),
        RuntimeError,
        "Expected hidden[3] size (1, 2, 4), got [1, 2, 3]",
    ),
    "dtype": (
        lambda: fusedlstm.GRU(3, 4)(X, H.double()),
        ValueError,
        "hx: expected the dtype of input (torch.float32), got torch.float64",
    ),
    "dimensions of the input": (
        lambda: fusedlstm.CoupledLSTM(3, 4)(X[0, 0]),
        ValueError,
        "CoupledLSTM: Expected input to be 2D or 3D, got 1D instead",
    ),
    "dimensions of a cell's state": (
        lambda: fusedlstm.SLSTMCell(3, 4)(X[0], (H[0], H[0], H[0], H)),
        ValueError,
        "SLSTMCell: Expected hx[3] to be 1D or 2D, got 3D instead",
    ),
    "size of a cell's state": (
        lambda: fusedlstm.PeepholeLSTMCell(3, 4)(X[0], (H[0], H[0, :, :3])),
        RuntimeError,
        "hidden1 has inconsistent hidden_size: got 3, expected 4",
    ),
    "cell states": (
        lambda: fusedlstm.GRU(3, 4)(X, return_cell_states=True),
        ValueError,
        "return_cell_states: expected False, for gru has no state beside h",
    ),
    "projection": (
        lambda: fusedlstm.PeepholeLSTM(3, 4, proj_size=2),
        TypeError,
        "unexpected keyword argument 'proj_size'",
    ),
    "heads": (
        lambda: fusedlstm.SLSTM(3, 4, num_heads=3),
        ValueError,
        "num_heads: expected a positive divisor of hidden_size (4), got 3",
    ),
    "unknown cell": (
        lambda: type("Mine", (fusedlstm.Recurrent,), {"cell": "mine"})(3, 4),
        ValueError,
        "cell: expected one of lstm, gru, ",
    ),
    "init": (
        lambda: fusedlstm.GRU(3, 4, init="orthogonal"),
        TypeError,
        "init: expected a function of the module, several, or None, got 'orthogonal'",
    ),
}


@pytest.mark.parametrize(("make", "kind", "text"), VARIANTS.values(), ids=VARIANTS.keys())
def test_errors_of_the_family(make, kind, text):
    with pytest.raises(kind, match=re.escape(text)):
        make()


GAPS = {
    "hx dtype": (
        (X, (H.double(), H)),
        ValueError,
        "hx[0]: expected the dtype of input (torch.float32), got torch.float64",
    ),
    "hx tensor": ((X, H), RuntimeError, "lstm expects two hidden states, got a tensor"),
    "hx of None": ((X, (None, None)), TypeError, "hx[0]: expected a Tensor, got NoneType"),
    "hx device": ((X, (H.to("meta"), H)), RuntimeError, "found input tensor at cpu and hx[0] at meta"),
    "input device": ((X.to("meta"),), RuntimeError, "found input tensor at meta and parameter tensor at cpu"),
    "packed input size": (
        (pack_sequence([torch.zeros(5, 7)]),),
        RuntimeError,
        "input.size(-1) must be equal to input_size. Expected 3, got 7",
    ),
    "packed dtype": (
        (pack_sequence([X[:, 0].double()]),),
        ValueError,
        "RNN input dtype (torch.float64) does not match weight dtype (torch.float32)",
    ),
    "packed h batch": (
        (pack_sequence([X[:, 0]]), (H, H)),
        RuntimeError,
        "Expected hidden[0] size (1, 1, 4), got [1, 2, 4]",
    ),
    "packed c batch": (
        (pack_sequence([X[:, 0]]), (H[:, :1], H)),
        RuntimeError,
        "Expected hidden[1] size (1, 1, 4), got [1, 2, 4]",
    ),
    "packed hx 2D": (
        (pack_sequence([X[:, 0]]), (H[0, :1], H[0, :1])),
        RuntimeError,
        "hx and cx should also be 3-D but got (2-D, 2-D) tensors",
    ),
    "packed hx dtype": (
        (pack_sequence([X[:, 0]]), (H[:, :1].double(), H[:, :1])),
        ValueError,
        "hx[0]: expected the dtype of input (torch.float32), got torch.float64",
    ),
    "a length beyond the input": (
        (pack_padded_sequence(torch.zeros(5, 3, 3), [6, 3, 1]),),
        ValueError,
        "expected as many rows of data as batch_sizes say (10), got 9; was a length given",
    ),
    "packed data 3D": (
        (PackedSequence(torch.zeros(5, 1, 3), torch.ones(5, dtype=torch.int64)),),
        RuntimeError,
        "input must have 2 dimensions, got 3",
    ),
}


@pytest.mark.parametrize(("arguments", "kind", "text"), GAPS.values(), ids=GAPS.keys())
def test_clear_errors_where_torch_has_none(arguments, kind, text):
    with pytest.raises(kind, match=re.escape(text)):
        fusedlstm.LSTM(3, 4)(*arguments)


def test_a_list_of_lengths_is_on_the_host_whatever_the_default_device_is():
    lstm, x = fusedlstm.LSTM(3, 4), X
    with torch.device("meta"), pytest.raises(ValueError, match="lengths: expected 0 to 5, got 6"):
        lstm(x, lengths=[1] * (x.size(1) - 1) + [6])


def test_the_switch_for_looking_at_values_on_a_device():
    code = "import importlib, os; from fusedlstm import checks\n"
    code += "for value in ('1', '0', ''):\n    os.environ['FUSEDLSTM_DEBUG'] = value\n"
    code += "    print(importlib.reload(checks).DEBUG)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["True", "False", "False"]


def test_dropout_warning_is_torchs():
    with pytest.warns(UserWarning, match="num_layers greater than 1"):
        fusedlstm.LSTM(3, 4, dropout=0.5)


def test_unknown_backend(monkeypatch):
    with pytest.raises(ValueError, match="backend: expected one of auto, triton, torch, reference, got 'cuda'"):
        fusedlstm.LSTM(3, 4, backend="cuda")
    monkeypatch.setenv("FUSEDLSTM_BACKEND", "fast")
    with pytest.raises(ValueError, match="FUSEDLSTM_BACKEND: expected one of .* got 'fast'"):
        fusedlstm.LSTM(3, 4)(X)


def test_triton_without_a_gpu(monkeypatch):
    message = "backend='triton' cannot serve this call: the kernels need a CUDA or ROCm device, got tensors on 'cpu'"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        fusedlstm.LSTM(3, 4, backend="triton")(X)
    with pytest.raises(RuntimeError, match=re.escape(message)):
        fusedlstm.LSTMCell(3, 4, backend="triton")(X[0])
    monkeypatch.setenv("FUSEDLSTM_BACKEND", "triton")
    with pytest.raises(RuntimeError, match=re.escape(message)):
        fusedlstm.LSTM(3, 4)(X)
    fusedlstm.LSTM(3, 4, backend="torch")(X)  # a backend asked for by name is not overridden


def test_what_the_kernels_need_is_named_before_the_device(monkeypatch):
    lstm = fusedlstm.LSTM(3, 4, backend="triton")
    with monkeypatch.context() as without_triton:
        without_triton.setattr(engines, "TRITON_IS_INSTALLED", False)
        with pytest.raises(
            RuntimeError, match="the package triton is not installed .it exists for Linux only.: pip install"
        ):
            lstm(X)
    monkeypatch.setattr(engines, "NUMPY_IS_INSTALLED", False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(
        RuntimeError, match=re.escape('interprets with numpy, which is not installed: pip install ".[interpret]"')
    ):
        lstm(X)
    fusedlstm.LSTM(3, 4)(X)  # `auto` has no need of either


def test_choice_of_engine(monkeypatch):
    from fusedlstm.engines import launch

    known = SimpleNamespace(major=9, minor=0, name="H100", multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: known)
    launch._device_limits.cache_clear()
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert engines.choose("auto", cpu, torch.float32) == "torch"
    assert engines.choose("auto", cuda, torch.bfloat16) == "triton"
    assert engines.choose("auto", cuda, torch.float64) == "torch"
    assert engines.choose("reference", cpu, torch.float64) == "reference"
    with pytest.raises(RuntimeError, match="serve float32, float16 and bfloat16, got torch.float64"):
        engines.choose("triton", cuda, torch.float64)

    device_limits = launch.device_limits
    monkeypatch.setattr(launch, "device_limits", lambda index: DEVICES["sm_90"])
    assert engines.choose("auto", cuda, torch.bfloat16, "lstm", 1024) == "triton"
    large = (cuda, torch.bfloat16, "lstm", 16384)
    assert engines.choose("auto", *large) == "triton"
    assert engines.choose("auto", *large, layout="packed") == "torch"
    with pytest.raises(RuntimeError, match="hidden=16384 with 1 direction.*, ragged, does not fit NVIDIA H200"):
        engines.choose("triton", *large, layout="ragged")
    monkeypatch.setattr(launch, "device_limits", device_limits)
    launch._device_limits.cache_clear()
    known.major = 7
    with pytest.raises(RuntimeError, match="from compute capability 8.0 on .*, H100 has 7.0"):
        engines.choose("triton", cuda, torch.float16, "lstm", 64)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert engines.choose("triton", cpu, torch.float32) == "triton"
