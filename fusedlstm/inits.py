"""Initial values: functions that change a layer or a cell in place, and what the argument `init` of their constructors
takes.

    lstm = fusedlstm.LSTM(10, 20, init=[inits.orthogonal_, inits.forget_bias_])
    gru = fusedlstm.GRU(10, 20, init=functools.partial(inits.chrono_, longest=784))
    inits.chrono_(gru, longest=784)  # later, the same

Without `init` values are torch's, `uniform_`; what `init` has follows it, in order, and again in `reset_parameters`.
Biases are known by the names of the gates (`fusedlstm.cells`): f of an LSTM and z of a GRU keep the state, 1 - i of
coupled gates does. torch's layers have two biases, which are added: what is said of the sum is written to `bias_ih`,
and `bias_hh` is zero.
"""

import math

import torch
from torch import Tensor, nn

from fusedlstm import checks

Module = nn.RNNBase | nn.RNNCellBase  # of fusedlstm, which has a cell
# How the bias of a gate moves the share of the state that a step keeps.
KEEPS = {"f": 1, "z": 1, "i": -1}


def uniform_(module: Module) -> None:
    """Every parameter uniform in 1 / sqrt(H), drawn in the order of `parameters()`: the values of `torch.nn` under a
    seed.

    Gains and biases of norms are 1 and 0, as those of `torch.nn.LayerNorm`.
    """
    bound = 1 / math.sqrt(module.hidden_size) if module.hidden_size else 0.0
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -bound, bound)
    if checks.recurrent(module).norms:
        for name, parameter in module.named_parameters():
            if not name.startswith("weight"):
                nn.init.constant_(parameter, float(name.startswith("gain")))


def forget_bias_(module: Module, value: float = 1.0) -> None:
    """The bias of the gate that keeps the state: at 1, a step keeps three quarters (Gers et al. 2000; Jozefowicz et al.
    2015).

    Raises:
        ValueError: no gate of the cell keeps the state, or the module has no biases.
    """
    gates = checks.keeping_gates(module, KEEPS)[:1]
    for bias_ih, bias_hh in checks.biases(module):
        for rows, sign in _rows(module, gates):
            _set(bias_ih, bias_hh, rows, sign * value)


def chrono_(module: Module, longest: int) -> None:
    """Units that remember for 1 to `longest` steps (Tallec & Ollivier 2018): b_f = log u and b_i = -b_f, u uniform in
    [1, longest - 1], unit by unit. GRU: b_z = log u; coupled gates: b_i = -log u.

    Raises:
        ValueError: as `forget_bias_`, or `longest` is less than 2.
    """
    checks.longest(longest)
    gates = checks.keeping_gates(module, KEEPS)
    for bias_ih, bias_hh in checks.biases(module):
        remembered = bias_ih.detach().new_empty(module.hidden_size).uniform_(1, longest - 1).log_()
        for rows, sign in _rows(module, gates):
            _set(bias_ih, bias_hh, rows, sign * remembered)


def orthogonal_(module: Module, gain: float = 1.0) -> None:
    """Recurrent weights orthogonal (Saxe et al. 2014), each gate's, and of each head, by itself; times `gain`."""
    checks.recurrent(module)
    for name, weight in module.named_parameters(recurse=False):
        if name.startswith("weight_hh"):
            for block in weight.detach().split(module.hidden_size // module.num_heads):  # type: ignore[operator]
                exact = torch.empty_like(block, dtype=torch.promote_types(block.dtype, torch.float32))
                block.copy_(nn.init.orthogonal_(exact, gain))


def _rows(module: Module, gates: list[str]) -> list[tuple[slice, int]]:
    """Where the biases of gates are, and in which direction they move what is kept."""
    of, H = checks.recurrent(module), module.hidden_size
    return [(slice(k * H, (k + 1) * H), KEEPS[name]) for name in gates for k in [of.gates.index(name)]]


def _set(bias_ih: Tensor, bias_hh: Tensor, rows: slice, value: Tensor | float) -> None:
    with torch.no_grad():
        bias_ih[rows] = value
        bias_hh[rows] = 0
