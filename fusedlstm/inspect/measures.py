"""The gates and states of a layer at every step, the norms of the gradients through time, and idle units.

The specification (`fusedlstm.engines.reference`) computes everything here, from the equations of the cell. So there is
nothing to add for a new cell.
"""

import copy
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from fusedlstm import base, checks, functional, sequences
from fusedlstm.base import Recurrent
from fusedlstm.cells import CELLS, Cell, Recurrence, Saved, State, Weights
from fusedlstm.conversion import convert
from fusedlstm.engines import reference
from fusedlstm.layout import Layout
from fusedlstm.noise import Batch, Noise
from fusedlstm.plan.choice import table
from fusedlstm.products import without_autocast

# Gates from 0 to 1, by the names that cells give them, as in `fusedlstm.inits`.
SHARES = ("i", "f", "o", "r", "z")
SHUT, OPEN = 0.1, 0.9  # a gate counts as shut below the one, and as open above the other
_ROWS = 4096  # of a batch, in which many gradients go back together


class Trace:
    """The gates and states of one direction of one layer.

    Every tensor is [T, B, H], or [T, B, P] for a projected h. It is zero in padding. Step t is step t of the input,
    also in the reverse direction. A state at step t is the one after the step. The names are those of `Cell.gates` and
    `Cell.states`, and each is an attribute too: `trace.f`, `trace.c`. If both have a name, it is that of the state.

    Attributes:
        gates: The gates by name, after their nonlinearities.
        states: The states by name, h first.
        keep: The share of the memory that a step keeps. It is the derivative of the memory after the step with respect
            to the memory before it, with the gates held fixed and with zoneout. The memory is c, or h if the cell has
            no c. So it is f of an LSTM, z of a GRU, 1 - i of an LSTM with coupled gates, and 0 of a vanilla RNN.
        valid: Which steps are no padding, bool [T, B].
    """

    def __init__(self, gates: dict[str, Tensor], states: dict[str, Tensor], keep: Tensor, valid: Tensor) -> None:
        self.gates, self.states, self.keep, self.valid = gates, states, keep, valid

    def __getattr__(self, name: str) -> Tensor:
        named = vars(self).get("gates", {}) | vars(self).get("states", {})
        if name not in named:
            raise AttributeError(f"{name}: expected one of {', '.join(named)}, got a name that the cell has not")
        return named[name]

    def __repr__(self) -> str:
        T, B, H = self.keep.shape
        return f"Trace(gates {', '.join(self.gates)}; states {', '.join(self.states)}; T={T}, B={B}, H={H})"


class GradientFlow(NamedTuple):
    """How much of a gradient at the last step of a sequence reaches every other step.

    The norm of a Jacobian [H, H] is the root mean square of its singular values, which is its Frobenius norm over the
    square root of H. It is 1 for the identity, so it is 1 at the last step.
    """

    # The norm of d s_T / d s_t for every state s, each [T, B], and 0 in padding. T is the last step of the sequence in
    # the direction of the layer. The other states at step t are held fixed.
    norms: dict[str, Tensor]
    # The same norm of the diagonal matrix that has the product of `Trace.keep` over the steps after t, [T, B].
    kept: Tensor
    distance: Tensor  # [T, B] int64: the number of steps from t to the last one, and -1 in padding

    def by_distance(self, name: str) -> Tensor:
        """Return the mean norm over the batch, [T], by the distance in steps to the last one.

        `name` is the name of a state, or "kept". A mean is over the sequences that are long enough, or NaN if none is.
        """
        norm = self.kept if name == "kept" else self.norms[name]
        there = self.distance >= 0
        totals = norm.new_zeros(2, len(norm))
        for total, values in zip(totals, (norm, torch.ones_like(norm)), strict=True):
            total.index_add_(0, self.distance[there], values[there])
        return totals[0] / totals[1]

    def per_step(self, name: str) -> float:
        """Return the factor by which the norm changes per step, on geometric average.

        It is from the last step to the farthest one at which the norm is not 0, and NaN if there is only one step.
        """
        found = self.by_distance(name)
        far = (found > 0).nonzero()
        steps = int(far[-1]) if len(far) else 0
        return float(found[steps] / found[0]) ** (1 / steps) if steps else float("nan")


class Units(NamedTuple):
    """What the units of one direction of one layer do. Every tensor is [H], and a share is from 0 to 1."""

    shut: dict[str, Tensor]  # for every gate, the share of the steps at which it is below 0.1
    open: dict[str, Tensor]  # the share of the steps at which it is above 0.9
    idle: dict[str, Tensor]  # for each kind of units that do the same at every step, which units are of it, bool


class Saturation:
    """How often gates are shut and open. `print` shows it as two tables.

    Attributes:
        units: A :class:`Units` for each pair of the numbers of a layer and a direction.
    """

    def __init__(self, units: dict[tuple[int, int], Units]) -> None:
        self.units = units

    def __str__(self) -> str:
        rows = [
            (place_name(*place), name, f"{own.shut[name].mean():.1%}", f"{own.open[name].mean():.1%}")
            for place, own in self.units.items()
            for name in own.shut
        ]
        shares = table(["layer", "gate", f"below {SHUT}", f"above {OPEN}"], rows)
        kinds = [*next(iter(self.units.values())).idle] if self.units else []
        idle = [
            (place_name(*place), *(f"{int(own.idle[kind].sum())} of {own.idle[kind].numel()}" for kind in kinds))
            for place, own in self.units.items()
        ]
        return f"{shares}\n\n{table(['layer', *kinds], idle)}"


def place_name(layer: int, direction: int) -> str:
    return f"{layer} reverse" if direction else f"{layer}"


def gates(
    module: nn.RNNBase,
    input: Tensor | PackedSequence,  # [T, B, I], [B, T, I] with the module's batch_first, or [T, I], or packed
    hx: base.State | None = None,  # each [L * D, B, H], or [L * D, H]
    *,
    layer: int = 0,
    direction: int = 0,
    lengths: Tensor | None = None,  # [B] integers
    resets: Tensor | PackedSequence | None = None,  # bool, [T, B], [B, T] or [T], or packed like input
    padding_side: Literal["right", "left"] = "right",
) -> Trace:
    """Compute the gates and states of one layer and direction at every step.

    Example::

        lstm = fusedlstm.LSTM(10, 20, num_layers=2)
        trace = fusedlstm.inspect.gates(lstm, torch.randn(5, 3, 10), layer=1)
        print(trace.f.mean(), trace.c.shape)  # how much of c a step keeps, and torch.Size([5, 3, 20])

    Args:
        module: A layer of this package, or an LSTM, GRU or RNN of `torch.nn`.
        input, hx, lengths, resets, padding_side: The arguments of the call, as in `Recurrent.forward`.
        layer: The number of the layer. 0 is the layer that reads `input`.
        direction: 0 is forward, 1 is reverse.

    Returns:
        A :class:`Trace` without gradients, in the order of the batch. The states are those of the module in evaluation,
        whatever its mode is: zoneout takes the expected value, and there is no dropout.

    Raises:
        TypeError: `module` is no such layer.
        ValueError: The module has no such layer or direction.
        ValueError, RuntimeError, TypeError: The call itself would raise this error.

    Precision: That of `fusedlstm.engines.reference` in the dtype of the parameters, or in float32 if that is shorter.
    """
    module = ours(module)
    checks.place(module, layer, direction)
    with torch.no_grad():
        call = call_of(module, input, hx, lengths, resets, padding_side)
        with without_autocast(call.x):
            *_, ran = _layers(call, last=layer)
            return _trace(call, ran, direction)


def gradient_flow(
    module: nn.RNNBase,
    input: Tensor | PackedSequence,  # [T, B, I], [B, T, I] with the module's batch_first, or [T, I], or packed
    hx: base.State | None = None,  # each [L * D, B, H], or [L * D, H]
    *,
    layer: int = 0,
    direction: int = 0,
    lengths: Tensor | None = None,  # [B] integers
    resets: Tensor | PackedSequence | None = None,  # bool, [T, B], [B, T] or [T], or packed like input
    padding_side: Literal["right", "left"] = "right",
    probes: int | None = None,
) -> GradientFlow:
    """Measure how much of a gradient at the last step of a layer reaches every step before it.

    Example::

        rnn, lstm = fusedlstm.RNN(10, 20), fusedlstm.LSTM(10, 20, init=fusedlstm.inits.forget_bias_)
        for layer in (rnn, lstm):
            flow = fusedlstm.inspect.gradient_flow(layer, torch.randn(50, 3, 10))
            print({name: flow.per_step(name) for name in flow.norms})

    Args:
        module, input, hx, layer, direction, lengths, resets, padding_side: As in :func:`gates`.
        probes: With None, the norms are exact. This takes one backward per unit of the layer. A number takes as many
            backwards, from random vectors of signs. Their mean estimates the square of the norm without bias
            (Hutchinson 1990). The vectors are the same in every call, and torch's generators do not move.

    Returns:
        A :class:`GradientFlow` in the order of the batch, of the module in evaluation. No gradient crosses a reset.
        `grad_clip` is not applied.

    Raises:
        TypeError: `module` is no such layer.
        ValueError: The module has no such layer or direction, or `probes` is less than 1.
        ValueError, RuntimeError, TypeError: The call itself would raise this error.

    Precision: As in :func:`gates`.
    Source: Pascanu et al. 2013, "On the difficulty of training recurrent neural networks".
    """
    module = ours(module)
    checks.place(module, layer, direction)
    if probes is not None:
        checks.at_least_one("probes", probes)
    with torch.no_grad():
        call = call_of(module, input, hx, lengths, resets, padding_side)
        with without_autocast(call.x):
            *_, ran = _layers(call, last=layer)
            return _flow(call, ran, direction, probes)


def saturation(module: nn.RNNBase, loader: Iterable[Any]) -> Saturation:
    """Count how often the gates of a layer are shut and open, and find units that do the same at every step.

    A gate is shut below 0.1 and open above 0.9. These are the gates with the names i, f, o, r and z. The input gate i
    of an SLSTM is relative to what the unit has stored. A unit *always keeps* if it keeps more than 0.9 of its memory
    at every step, and *always forgets* if it keeps less than 0.1 (`Trace.keep`). It *never writes* if its input gate is
    below 0.1 at every step. That is i, or 1 - z of a GRU. An RNN has no such gate. There `|h|` is counted in place of
    a gate. A unit is *always saturated* if `|h|` is above 0.9 at every step, where tanh passes little gradient, and
    *always zero* if h is 0 at every step, where a rectifier passes none.

    Example::

        print(fusedlstm.inspect.saturation(fusedlstm.GRU(10, 20), [torch.randn(50, 3, 10) for _ in range(4)]))

    Args:
        module: A layer of this package, or an LSTM, GRU or RNN of `torch.nn`.
        loader: Inputs of the module, each a tensor or a PackedSequence, or tuples and lists that begin with one, as a
            DataLoader gives them. Initial states are zero, and padding is not counted.

    Returns:
        A :class:`Saturation` with all layers and directions.

    Raises:
        TypeError: `module` is no such layer.
        ValueError: `loader` has no steps.
        ValueError, RuntimeError, TypeError: A call with one of the inputs would raise this error.

    Source: The counts per unit are those of Karpathy et al. 2015, "Visualizing and understanding recurrent networks".
    """
    module = ours(module)
    count = Counts()
    for item in loader:
        bare = isinstance(item, Tensor | PackedSequence) or not isinstance(item, Sequence)
        input = item if bare else item[0]
        with torch.no_grad():
            device = module._flat_weights[0].device
            call = call_of(module, input.to(device) if hasattr(input, "to") else input)
            with without_autocast(call.x):
                count.add(call.cell, traces(call))
    return count.result()


class Counts:
    """The counts of `saturation`, batch by batch."""

    def __init__(self) -> None:
        self.steps: dict[tuple[int, int], int] = {}
        self.units: dict[tuple[int, int], Units] = {}

    def add(self, cell: Cell, traces: Iterable[tuple[int, int, Trace]]) -> None:
        for layer, direction, trace in traces:
            place, steps = (layer, direction), int(trace.valid.sum())
            if not steps:
                continue
            found = _counted(cell, trace)
            if place in self.units:
                before = self.units[place]
                found = Units(
                    {k: before.shut[k] + v for k, v in found.shut.items()},
                    {k: before.open[k] + v for k, v in found.open.items()},
                    {k: before.idle[k] & v for k, v in found.idle.items()},
                )
            self.units[place] = found
            self.steps[place] = self.steps.get(place, 0) + steps

    def result(self) -> Saturation:
        if not self.units:
            raise ValueError("loader: expected at least one step, got none")
        shares = {}
        for place, (shut, opened, idle) in self.units.items():
            steps = self.steps[place]
            shares[place] = Units(
                {k: v / steps for k, v in shut.items()}, {k: v / steps for k, v in opened.items()}, idle
            )
        return Saturation(shares)


def _counted(cell: Cell, trace: Trace) -> Units:
    """The numbers of steps, in place of their shares."""
    valid = trace.valid
    counted = {k: v[valid] for k, v in trace.gates.items() if k in SHARES}  # each [R, H]
    keep, memory = trace.keep[valid], cell.states[:2][-1]
    if counted:
        write = counted.get("i", 1 - keep)
        idle = {
            "always keep": (keep > OPEN).all(0),
            "always forget": (keep < SHUT).all(0),
            "never write": (write < SHUT).all(0),
        }
    else:
        h = trace.states[memory][valid].abs()
        counted = {f"|{memory}|": h}
        idle = {"always saturated": (h > OPEN).all(0), "always zero": (h == 0).all(0)}
    shut = {k: (v < SHUT).sum(0).double() for k, v in counted.items()}
    return Units(shut, {k: (v > OPEN).sum(0).double() for k, v in counted.items()}, idle)


# The call, in one form.


class Call(NamedTuple):
    """A call of one of our layers. Padding is on the right. The tensors have the dtype in which to compute."""

    cell: Cell
    x: Tensor  # [T, B, I]
    states: tuple[Tensor, ...]  # each [L * D, B, H], or P of a projected h
    parameters: list[list[Tensor]]  # per layer and direction
    directions: int
    projected: bool
    batch: Batch
    padded_left: bool

    @property
    def valid(self) -> Tensor:
        """Which steps are no padding, bool [T, B]."""
        T, B = self.x.shape[:2]
        lengths, steps = self.batch.layout.lengths, torch.arange(T, device=self.x.device).unsqueeze(1)
        return (steps < (T if lengths is None else lengths)).expand(T, B)

    def as_given(self, x: Tensor) -> Tensor:
        """A tensor [T, B, ...] whose padding is where that of the input was."""
        lengths = self.batch.layout.lengths
        return functional.rolled(x, -lengths) if self.padded_left and lengths is not None else x


def ours(module: Any) -> Recurrent:
    """One of our layers with the same parameters."""
    if isinstance(module, nn.RNNBase) and not isinstance(module, Recurrent):
        module = convert(copy.copy(module))
    if not isinstance(module, Recurrent):
        raise TypeError(
            "module: expected a layer of fusedlstm, or an LSTM, GRU or RNN of torch.nn, got "
            f"{type(module).__module__}.{type(module).__name__}"
        )
    return module


def call_of(
    module: Recurrent,
    input: Any,
    hx: base.State | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | PackedSequence | None = None,
    padding_side: str = "right",
) -> Call:
    """Check the arguments of a call and bring them into one form."""
    if isinstance(input, Tensor) and input.is_nested:
        checks.with_jagged_input(input, lengths, resets, False)
        input, lengths = sequences.padded_from_jagged(input, batch_first=module.batch_first)
    data, states, weights, rows, _ = module._prepared(input, hx, lengths, resets, padding_side)
    if isinstance(input, PackedSequence):
        if isinstance(resets, PackedSequence):
            resets, _ = pad_packed_sequence(resets, module.batch_first)
        padded, lengths = sequences.padded_from_packed(input, batch_first=module.batch_first)
        data, states, weights, rows, _ = module._prepared(padded, hx, lengths, resets, "right")
    x, cuts, lengths = data, rows.resets, rows.lengths
    if rows.batch_first:
        x, cuts = x.transpose(0, 1), None if cuts is None else cuts.transpose(0, 1)
    cuts = None if cuts is None else cuts.to(x.device, torch.bool)
    lengths = None if lengths is None else lengths.to(x.device, torch.int64).clamp(0, len(x))
    if rows.padded_left and lengths is not None:
        x, cuts = functional.rolled(x, lengths), None if cuts is None else functional.rolled(cuts, lengths)
    cell, D = CELLS[module.cell], module._directions
    count = len(weights) // (module.num_layers * D)
    dtype = torch.promote_types(weights[0].dtype, torch.float32)
    parameters = [[w.detach().to(dtype) for w in weights[k : k + count]] for k in range(0, len(weights), count)]
    batch = Batch(Layout(lengths, None, cuts), Noise(None, module.rates.in_steps(False)))
    states = tuple(s.detach().to(dtype) for s in states)
    return Call(
        cell, x.detach().to(dtype), states, parameters, D, module.proj_size > 0, batch, padded_left=rows.padded_left
    )


class _Ran(NamedTuple):
    """A layer that ran, and what went in."""

    preact_x: Tensor  # [D, T, B, G * H]
    weights: Weights
    state: State
    saved: Saved


def _layers(call: Call, last: int) -> Iterator[_Ran]:
    """Run the layers up to the last one, one after another."""
    x, D = call.x, call.directions
    for layer in range(last + 1):
        own = slice(layer * D, (layer + 1) * D)
        hx, *others = (s[own] for s in call.states)
        state = State(hx, torch.stack(others) if others else hx.new_empty(0, *hx.shape))
        parameters = [p[:-1] if call.projected else p for p in call.parameters[own]]
        weights = Weights(
            [p[1] for p in parameters],
            call.cell.step_vectors(parameters),
            weight_hr=[p[-1] for p in call.parameters[own]] if call.projected else None,
        )
        preact_x = reference.input_part(call.cell, x, parameters)
        saved = reference.recurrence_fwd(Recurrence(call.cell), preact_x, weights, state, call.batch)
        yield _Ran(preact_x, weights, state, saved)
        x = saved.output


def traces(call: Call) -> Iterator[tuple[int, int, Trace]]:
    """The traces of all layers and directions, with their numbers."""
    for layer, ran in enumerate(_layers(call, last=len(call.parameters) // call.directions - 1)):
        for direction in range(call.directions):
            yield layer, direction, _trace(call, ran, direction)


def _trace(call: Call, ran: _Ran, direction: int) -> Trace:
    cell, valid, D = call.cell, call.valid.unsqueeze(-1), call.directions
    saved = ran.saved
    blocks = saved.gates.unflatten(-1, (D, cell.num_kept, -1))[:, :, direction].unbind(-2)
    places = cell.x_blocks or range(cell.num_gates)
    found = {name: blocks[place] for name, place in zip(cell.gates, places, strict=True)}
    found |= {name: torch.sigmoid(found[name]) for name in cell.before_sigmoid}
    seqs = [saved.output, *saved.c_seq]
    states = dict(zip(cell.states, (s.unflatten(-1, (D, -1))[:, :, direction] for s in seqs), strict=True))
    keep = _keep(call, ran, blocks, [*states.values()], direction)

    def shown(x: Tensor) -> Tensor:
        return call.as_given(torch.where(valid, x, 0))

    return Trace(
        {name: shown(x) for name, x in found.items()},
        {name: shown(x) for name, x in states.items()},
        shown(keep),
        call.as_given(call.valid),
    )


def _before(call: Call, ran: _Ran, after: Sequence[Tensor], direction: int) -> list[Tensor]:
    """The states that entered every step, each [T, B, H], from those after it."""
    initial = (ran.state.hx[direction], *ran.state.cx[:, direction])
    before = (call.batch.layout.states_before(seq, s, direction) for seq, s in zip(after, initial, strict=True))
    return [x.view(seq.shape) for x, seq in zip(before, after, strict=True)]


def _keep(call: Call, ran: _Ran, blocks: Sequence[Tensor], after: list[Tensor], direction: int) -> Tensor:
    """`Trace.keep`, [T, B, H], from the derivative that the cell's own equations have."""
    cell, of, before = call.cell, call.cell.equations, _before(call, ran, after, direction)
    memory = min(1, cell.num_cell_states)  # c, or h without it
    one = torch.ones_like(before[memory])
    with torch.enable_grad():
        before[memory].requires_grad_()
        if of.update is not None:
            reached = of.update(blocks, before, 1.0)[memory]
        else:
            reached = _stepped(call, ran, before, direction)[memory].view(one.shape)
    # Element by element, so the gradient of the sum is the derivative. An RNN does not depend on its memory.
    keep = torch.autograd.grad(reached, before[memory], one)[0] if reached.requires_grad else 0 * one
    rates = call.batch.noise.rates
    held = rates[memory] if rates else 0.0
    return held + (1 - held) * keep


def _stepped(call: Call, ran: _Ran, before: list[Tensor], direction: int) -> Sequence[Tensor]:
    """The states after every step, each [T * B, H], whose gradients do not pass through the recurrent weight."""
    cell, weights, states = call.cell, ran.weights, [s.flatten(0, -2) for s in before]
    vectors = () if weights.vectors is None else tuple(weights.vectors[direction])
    with torch.no_grad():
        preact_h: Any = reference.recurrent_part(
            cell, states[0], reference.product_with(cell, weights.weight_hh[direction])
        )
    if cell.multiplies:
        preact_h = torch.no_grad()(preact_h)
    preact_x = ran.preact_x[direction].flatten(0, -2).chunk(cell.num_gates, -1)
    return cell.equations.step(preact_x, preact_h, states, vectors, 1.0)[1]


# Gradients through time.


def _flow(call: Call, ran: _Ran, direction: int, probes: int | None) -> GradientFlow:
    valid, resets = call.valid, call.batch.layout.resets
    back = -1 if direction == 0 else 1  # from what is of the step that comes after in this direction
    distance = torch.where(valid, _distance(valid, direction), -1)
    # The state after a step enters the next one, if there is one and no cut.
    uncut = valid if resets is None else valid & ~resets
    passes = (uncut.roll(-1, 0) if direction == 0 else uncut) & (distance > 0)
    after = [s.unflatten(-1, (call.directions, -1))[:, :, direction] for s in (ran.saved.output, *ran.saved.c_seq)]
    before = _before(call, ran, after, direction)
    starts = [_vectors(s, probes) for s in after]
    # All vectors of all states go back together. `of` has the number of the state with which each begins.
    of = torch.cat([torch.full((len(v),), k, device=valid.device) for k, v in enumerate(starts)])
    squares = torch.zeros(len(starts), *valid.shape, dtype=torch.float64, device=valid.device)
    for some in torch.arange(len(of), device=valid.device).split(max(1, _ROWS // max(1, valid.size(1)))):
        squares += _squares(call, ran, before, starts, of, some, passes, direction)
    norms = {}
    for k, name in enumerate(call.cell.states):
        # The squares of J^T v add up to those of J for the vectors of the units, and each is their mean for signs.
        count = after[k].size(-1) * (1 if probes is None else probes)
        norm = (squares[k] / max(1, count)).sqrt()
        norms[name] = call.as_given(torch.where(distance >= 0, norm, 0.0))
    keep = _trace(call._replace(padded_left=False), ran, direction).keep
    factors = torch.where((distance > 0).unsqueeze(-1), keep.double().roll(back, 0) * passes.unsqueeze(-1), 1.0)
    product = factors.flip(0).cumprod(0).flip(0) if direction == 0 else factors.cumprod(0)
    kept = torch.linalg.vector_norm(product, dim=-1) / max(1, keep.size(-1)) ** 0.5
    return GradientFlow(norms, call.as_given(torch.where(distance >= 0, kept, 0.0)), call.as_given(distance))


def _distance(valid: Tensor, direction: int) -> Tensor:
    """The number of steps to the last one in a direction, [T, B]; of no meaning in padding."""
    steps = torch.arange(len(valid), device=valid.device).unsqueeze(1)
    return valid.sum(0) - 1 - steps if direction == 0 else steps.expand(valid.shape)


def _vectors(state: Tensor, probes: int | None) -> Tensor:
    """The vectors v of a state [T, B, H], [V, B, H]: those of the units, or signs."""
    _, B, H = state.shape
    if probes is None:
        return torch.eye(H, dtype=state.dtype, device=state.device).unsqueeze(1).expand(H, B, H)
    signs = torch.randint(2, (probes, B, H), generator=torch.Generator().manual_seed(0)) * 2 - 1
    return signs.to(state.device, state.dtype)


def _squares(
    call: Call,
    ran: _Ran,
    before: list[Tensor],  # each [T, B, H]
    starts: list[Tensor],  # for each state, vectors [V, B, H]
    of: Tensor,  # [V of all states]: the state of each vector
    some: Tensor,  # [W] the numbers of the vectors to take
    passes: Tensor,  # [T, B] bool
    direction: int,
) -> Tensor:
    """The sum over the vectors of the squared length of J^T v, for every state and the J of every step, [S, T, B]."""
    (T, B), (W,) = passes.shape, some.shape
    grads = []
    for k, vectors in enumerate(starts):
        grads.append(vectors.new_zeros(W, B, vectors.size(-1)))
        own = of[some] == k
        grads[k][own] = vectors[some[own] - int((of < k).sum())]
    mine = [(of[some] == k).view(W, 1) for k in range(len(starts))]
    # The length of all grads is kept apart, as a logarithm. Else they would soon be too small for float32.
    log_length = torch.zeros(W, B, 1, dtype=torch.float64, device=passes.device)
    found = torch.zeros(len(starts), T, B, dtype=torch.float64, device=passes.device)
    order = reference.steps_of(T, 1 - direction)
    for t, earlier in itertools.zip_longest(order, order[1:]):
        # `grads` are with respect to the states after step t.
        for k, grad in enumerate(grads):
            length = torch.linalg.vector_norm(grad, dim=-1, dtype=torch.float64) * log_length.squeeze(-1).exp()
            found[k, t] = (length.square() * mine[k]).sum(0)
        if earlier is None:
            break
        came = _through_step(call, ran, [s[t] for s in before], grads, t, direction)
        lives, enters = call.valid[t].unsqueeze(-1), passes[earlier].unsqueeze(-1)
        grads = [torch.where(lives, g * enters, old) for g, old in zip(came, grads, strict=True)]
        length = torch.cat(grads, -1).norm(dim=-1, keepdim=True)  # [W, B, 1]
        length = torch.where(length > 0, length, 1)
        grads = [g / length for g in grads]
        log_length += length.double().log()
    return found


def _through_step(
    call: Call,
    ran: _Ran,
    before: list[Tensor],  # each [B, H]
    grads: list[Tensor],  # each [V, B, H], with respect to the states after step t
    t: int,
    direction: int,
) -> list[Tensor]:
    """The gradients with respect to the states that enter step t, each [V, B, H], by a step of the specification."""
    V = len(grads[0])
    own = slice(direction, direction + 1)
    vectors, weight_hr = ran.weights.vectors, ran.weights.weight_hr
    weights = Weights(
        ran.weights.weight_hh[own],
        None if vectors is None else vectors[own],
        weight_hr=weight_hr[own] if weight_hr else None,
    )

    def rows(x: Tensor) -> Tensor:  # [B, features] to [V * B, features]
        return x.expand(V, *x.shape).flatten(0, 1)

    entering = [rows(s).requires_grad_() for s in before]
    with torch.enable_grad():
        others = torch.stack(entering[1:]) if entering[1:] else entering[0].new_empty(0, *entering[0].shape)
        state = State(entering[0].unsqueeze(0), others.unsqueeze(1))
        spec = Recurrence(call.cell, save_gates=False, save_states=False)
        preact_x = rows(ran.preact_x[direction, t]).view(1, 1, -1, ran.preact_x.size(-1))
        saved = reference.recurrence_fwd(spec, preact_x, weights, state, Batch(noise=call.batch.noise))
        left = (saved.h_n[0], *saved.c_n[:, 0])
    found = torch.autograd.grad(left, entering, [g.flatten(0, 1) for g in grads], materialize_grads=True)
    return [g.view(V, -1, g.size(-1)) for g in found]
