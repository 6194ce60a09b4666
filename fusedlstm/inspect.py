"""Look inside of a layer: which engine runs it and why, its gates and states at every step, and a plot of them."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fusedlstm import checks, functional
from fusedlstm.base import Recurrent, State
from fusedlstm.cells import CELLS, Recurrence, Weights
from fusedlstm.cells import State as Entering
from fusedlstm.engines import reference
from fusedlstm.modules import LSTM


class GateTrace(NamedTuple):
    """Everything that one direction of one layer computed. Step t is step t of the input, also in reverse."""

    i: Tensor  # [T, B, H]  input gate, 0 to 1
    f: Tensor  # [T, B, H]  forget gate, 0 to 1
    g: Tensor  # [T, B, H]  candidate, -1 to 1
    o: Tensor  # [T, B, H]  output gate, 0 to 1
    h: Tensor  # [T, B, P]  hidden state after the step, -1 to 1; with a projection P is proj_size and h is unbounded
    c: Tensor  # [T, B, H]  cell state after the step, unbounded


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
    data, states, rows, _ = module._prepared(input, hx, lengths, resets, padding_side)
    return functional.explain(spec, data, states, module._flat_weights, rows)


@torch.no_grad()
def gate_trace(
    module: nn.RNNBase,
    input: Tensor,  # [T, B, I], [B, T, I] with the module's batch_first, or [T, I]
    hx: tuple[Tensor, Tensor] | None = None,  # each [L * D, B, H] or [L * D, H]
    layer: int = 0,
    direction: int = 0,
) -> GateTrace:
    """Compute the gates and states of one layer and direction. The specification does this, whatever the engine is.

    Args:
        module: A `fusedlstm.LSTM` or a `torch.nn.LSTM`.
        input: The input of the module's `forward`, not packed, in the dtype of the module.
        hx: h and c before step 0. They are zero if they are not given.
        layer: The number of the layer. 0 is the layer that reads `input`.
        direction: 0 is forward, 1 is reverse.

    Returns:
        A :class:`GateTrace` of i, f, g, o, h and c, without gradients. Each is [T, B, H], and h is [T, B, P] with a
        projection. B is 1 if `input` has no batch axis. Dropout between layers, zoneout and the dropouts inside of a
        step are left out.

    Raises:
        TypeError: `module` is not an LSTM, or `input` is packed.
        ValueError: The module has no such layer or direction.
        ValueError, RuntimeError: `input` or `hx` is wrong. Type and text are those of `fusedlstm.LSTM`.

    Precision: That of `fusedlstm.engines.reference` in the dtype of `input`.
    """
    checks.traced(module, input, layer, direction)
    module._update_flat_weights()
    checks.sequence(module, input, hx)
    D = 2 if module.bidirectional else 1
    x = input.unsqueeze(1) if input.dim() == 2 else input.transpose(0, 1) if module.batch_first else input
    if hx is None:
        zeros = x.new_zeros(module.num_layers * D, x.size(1), module.hidden_size)
        hx = (zeros[..., : module.proj_size or module.hidden_size], zeros)
    elif input.dim() == 2:
        hx = (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
    spec, flat = Recurrence(CELLS[LSTM.cell]), module._flat_weights
    count = len(flat) // (module.num_layers * D)
    parameters = [flat[k : k + count] for k in range(0, len(flat), count)]  # per layer and direction
    projections = [[p.pop()] if module.proj_size else None for p in parameters]  # weight_hr
    for k in range(layer):
        rows = slice(k * D, (k + 1) * D)
        weight_hr = [w for ws in projections[rows] for w in ws] if module.proj_size else None
        state = Entering(hx[0][rows], hx[1][rows].unsqueeze(0))
        x = reference.layer(spec, x, state, parameters[rows], weight_hr=weight_hr).output

    # The direction by itself, turned forward: step t of a reverse direction is its step T - 1 - t.
    row = layer * D + direction
    weight_ih, weight_hh, *biases = parameters[row]
    preact_x = x @ weight_ih.t() + (sum(biases) if biases else 0)  # [T, B, 4H]
    if direction == 1:
        preact_x = preact_x.flip(0)
    state = Entering(hx[0][row : row + 1], hx[1][row : row + 1].unsqueeze(0))
    weights = Weights([weight_hh], weight_hr=projections[row])
    h, _, _, gates, c_seq = reference.recurrence_fwd(spec, preact_x.unsqueeze(0), weights, state)
    T, B = x.shape[:2]
    i, f, g, o = gates.reshape(T, B, -1).chunk(4, -1)
    trace = GateTrace(i, f, g, o, h, c_seq.reshape(T, B, -1))
    return GateTrace(*(value.flip(0) for value in trace)) if direction == 1 else trace


# Gates are shares from 0 to 1 and get a sequential map; g, c and h have a sign and get a diverging one around zero.
_PANELS = {
    "i": ("input gate  $i$", "viridis"),
    "f": ("forget gate  $f$", "viridis"),
    "o": ("output gate  $o$", "viridis"),
    "g": ("candidate  $g$", "RdBu_r"),
    "c": ("cell state  $c$", "RdBu_r"),
    "h": ("hidden state  $h$", "RdBu_r"),
}


def plot_gates(trace: GateTrace, *, sample: int = 0, figure=None, period: int | None = None):
    """Draw the gates and states of one sequence as six heat maps, with units as rows and steps as columns.

    Args:
        trace: The result of :func:`gate_trace`.
        sample: The number of the sequence in the batch.
        figure: A matplotlib `Figure` or `SubFigure` to draw on. If it is not given, a new one of 12 by 7 inches.
        period: The distance between two ticks, in steps. If it is not given, matplotlib chooses.

    Returns:
        The figure. All panels have the units in the same order: by the mean step at which their cell state changes,
        with the earliest on top. A projected h has units of its own, which stay in their order.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
        IndexError: The batch has no such sequence.
    """
    checks.needs("matplotlib.figure", "demo")
    from matplotlib.figure import Figure

    if figure is None:
        figure = Figure(figsize=(12, 7), layout="constrained")
    maps = {name: value[:, sample].detach().float().cpu() for name, value in trace._asdict().items()}  # each [T, H]
    order = _order_of_activity(maps["c"])
    T, H = maps["c"].shape
    projected = maps["h"].size(1) != H
    panels = figure.subplots(2, 3, sharex=True, sharey=not projected)
    for panel, (name, (title, colours)) in zip(panels.flat, _PANELS.items(), strict=True):
        own_units = projected and name == "h"
        values = (maps[name] if own_units else maps[name][:, order]).t().numpy()  # [H, T] or [P, T]
        low, high = (0, 1) if colours == "viridis" else (-1, 1)
        unbounded = name == "c" or own_units
        if unbounded:
            # A few units that count far must not wash out the others.
            high = max(float(maps[name].abs().quantile(0.98)), 1e-6)
            low = -high
        image = panel.imshow(
            values,
            aspect="auto",
            cmap=colours,
            vmin=low,
            vmax=high,
            interpolation="nearest",
            extent=(0, T, len(values), 0),
        )
        panel.set_title(f"{title}, projected" if own_units else title, fontsize=11)
        figure.colorbar(image, ax=panel, pad=0.02, fraction=0.05, extend="both" if unbounded else "neither")
        if period:
            panel.set_xticks(range(0, T + 1, period))
    for panel in panels[-1]:
        panel.set_xlabel("step")
    for panel in panels[:, 0]:
        panel.set_ylabel("unit, by when it is active")
    return figure


def _order_of_activity(c: Tensor) -> Tensor:  # [T, H] -> [H]
    change = torch.diff(c, dim=0, prepend=torch.zeros_like(c[:1])).abs()
    steps = torch.arange(len(c), dtype=c.dtype, device=c.device).unsqueeze(1)
    return ((change * steps).sum(0) / change.sum(0).clamp_min(1e-12)).argsort()
