"""Functions that set the initial values of a layer or a cell, in place. Pass them to a constructor as `init`.

    lstm = fusedlstm.LSTM(10, 20, init=[inits.orthogonal_, inits.forget_bias_])
    gru = fusedlstm.GRU(10, 20, init=functools.partial(inits.chrono_, longest=784))
    inits.chrono_(gru, longest=784)  # the same, after construction

By default the values are those of torch (`uniform_`). The functions in `init` run after that, in order, at construction
and in `reset_parameters`. They find the biases by the names of the gates (`fusedlstm.cells`). The gates f of an LSTM
and z of a GRU keep the state. In an LSTM with coupled gates 1 - i does so. torch's layers have two biases, which are
added. These functions write the value to `bias_ih` and set `bias_hh` to zero.
"""

import math
import pickle
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fusedlstm import checks

Module = nn.RNNBase | nn.RNNCellBase  # of fusedlstm, which has a cell
# How the bias of a gate moves the share of the state that a step keeps.
KEEPS = {"f": 1, "z": 1, "i": -1}


def uniform_(module: Module) -> None:
    """Draw every parameter uniformly from -1 / sqrt(H) to 1 / sqrt(H), as `torch.nn` does.

    The parameters are drawn in the order of `parameters()`, so that under a seed the values are those of `torch.nn`. In
    a layer with norms, gains are 1 and biases are 0, as in `torch.nn.LayerNorm`.

    Args:
        module: A layer or a cell of this package.
    """
    bound = 1 / math.sqrt(module.hidden_size) if module.hidden_size else 0.0
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -bound, bound)
    if checks.recurrent(module).norms:
        for name, parameter in module.named_parameters():
            if not name.startswith("weight"):
                nn.init.constant_(parameter, float(name.startswith("gain")))


def forget_bias_(module: Module, value: float = 1.0) -> None:
    """Set the bias of the gate that keeps the state (Gers et al. 2000; Jozefowicz et al. 2015).

    This gate is f of an LSTM and z of a GRU. In an LSTM with coupled gates it is i, which gets -value. With a value of
    1, a step keeps about three quarters of the state at first.

    Args:
        module: A layer or a cell of this package.
        value: The sum of both biases, for every unit.

    Raises:
        TypeError: `module` is not a layer or a cell of this package.
        ValueError: The cell has no gate that keeps the state, or the module has no biases.
    """
    gates = checks.keeping_gates(module, KEEPS)[:1]
    for bias_ih, bias_hh in checks.biases(module):
        for rows, sign in _rows(module, gates):
            _set(bias_ih, bias_hh, rows, sign * value)


def chrono_(module: Module, longest: int) -> None:
    """Set the biases so that the units remember for 1 to `longest` steps (Tallec & Ollivier 2018).

    An LSTM gets b_f = log u and b_i = -b_f. u is drawn uniformly from 1 to longest - 1 for each unit. A GRU gets
    b_z = log u, and an LSTM with coupled gates gets b_i = -log u.

    Args:
        module: A layer or a cell of this package.
        longest: The largest number of steps, at least 2.

    Raises:
        TypeError: `module` is not a layer or a cell of this package, or `longest` is not a number.
        ValueError: `longest` is less than 2, the cell has no gate that keeps the state, or the module has no biases.
    """
    checks.longest(longest)
    gates = checks.keeping_gates(module, KEEPS)
    for bias_ih, bias_hh in checks.biases(module):
        remembered = bias_ih.detach().new_empty(module.hidden_size).uniform_(1, longest - 1).log_()
        for rows, sign in _rows(module, gates):
            _set(bias_ih, bias_hh, rows, sign * remembered)


def orthogonal_(module: Module, gain: float = 1.0) -> None:
    """Make the recurrent weights orthogonal (Saxe et al. 2014).

    The matrix of each gate becomes a random orthogonal matrix times `gain`. With heads, each head has one of its own.

    Args:
        module: A layer or a cell of this package.
        gain: The factor.

    Raises:
        TypeError: `module` is not a layer or a cell of this package.
    """
    checks.recurrent(module)
    for name, weight in module.named_parameters(recurse=False):
        if name.startswith("weight_hh"):
            for block in weight.detach().split(module.hidden_size // module.num_heads):  # type: ignore[operator]
                exact = torch.empty_like(block, dtype=torch.promote_types(block.dtype, torch.float32))
                block.copy_(nn.init.orthogonal_(exact, gain))


class Unpicklable:
    """A function of `init` on its way into a pickle that cannot hold it, a lambda for example.

    A copy has the function itself. What is loaded from a pickle has its parameters, and only drawing them anew fails.
    """

    def __init__(self, name: str, function: Callable[[Module], object] | None = None) -> None:
        self.__name__, self.function = name, function

    def __reduce__(self):
        return Unpicklable, (self.__name__,)

    def __deepcopy__(self, memo):
        return self.function or self

    def __call__(self, module: Module) -> None:
        if self.function is None:
            raise RuntimeError(
                f"init: expected functions that a pickle can hold, got {self.__name__}, which was lost in a pickle; "
                "set module.init before reset_parameters()"
            )
        self.function(module)


def portable(function: Callable[[Module], object]) -> Callable[[Module], object]:
    """The function, or what stands for it in a pickle."""
    try:
        pickle.dumps(function)
    except Exception:  # of any type, by the objects that it holds
        return Unpicklable(getattr(function, "__name__", repr(function)), function)
    return function


def _rows(module: Module, gates: list[str]) -> list[tuple[slice, int]]:
    """The rows of the biases of these gates, and the sign with which they move the share of the state that is kept."""
    of, H = checks.recurrent(module), module.hidden_size
    return [(slice(k * H, (k + 1) * H), KEEPS[name]) for name in gates for k in [of.gates.index(name)]]


def _set(bias_ih: Tensor, bias_hh: Tensor, rows: slice, value: Tensor | float) -> None:
    with torch.no_grad():
        bias_ih[rows] = value
        bias_hh[rows] = 0
