"""Look inside of a layer: which engine runs it, its gates, how far its gradients reach, which units are idle.

`Monitor` logs the same during a training.
"""

from typing import Literal

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fusedlstm import checks, functional
from fusedlstm.base import Recurrent, State
from fusedlstm.inspect.measures import GradientFlow, Saturation, Trace, Units, gates, gradient_flow, saturation
from fusedlstm.inspect.monitor import Monitor
from fusedlstm.inspect.plots import plot_gates, plot_gradient_flow, plot_saturation

__all__ = [
    "GradientFlow",
    "Monitor",
    "Saturation",
    "Trace",
    "Units",
    "explain",
    "gates",
    "gradient_flow",
    "plot_gates",
    "plot_gradient_flow",
    "plot_saturation",
    "saturation",
]


def explain(
    module: Recurrent,
    input: Tensor | PackedSequence,  # [T, B, I], [B, T, I] with the module's batch_first, or [T, I], or packed
    hx: State | None = None,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | PackedSequence | None = None,
    padding_side: Literal["right", "left"] = "right",
    return_cell_states: bool = False,
    return_states: bool = False,
    grad_clip: float | None = None,
) -> functional.Explanation:
    """Say which engine would run a call of a layer, why, and how. This computes nothing.

    Example::

        lstm = fusedlstm.LSTM(10, 20)
        print(fusedlstm.explain(lstm, torch.randn(5, 3, 10)))  # engine torch: auto takes the kernels on a GPU only; ...

    Args:
        module: A layer of this package.
        input, hx, lengths, resets, padding_side, return_cell_states, return_states, grad_clip: The arguments of the
            call, as in `Recurrent.forward`.

    Returns:
        A named tuple of three texts: `engine` ("triton", "torch" or "reference"), `why` it was chosen, and `how` it
        runs. `print` shows them on one line.

    Raises:
        TypeError: `module` is not a layer of this package.
        ValueError, RuntimeError: The call itself would raise this error.
    """
    checks.instance("module", module, Recurrent)
    spec = module._spec(return_cell_states, return_states, grad_clip)
    *call, _ = module._prepared(input, hx, lengths, resets, padding_side)
    return functional.explain(spec, *call)
