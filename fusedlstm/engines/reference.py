r"""The specification: a recurrence over any cell in plain torch, any dtype, forward and written-out backward.

Dimensions: T steps, B batch, I input size, H hidden size, G gates, K blocks that a step keeps, V vectors, D directions,
S states beside h, P size of h (H, or `proj_size` with a projection), R rows: a row is one step of one sequence.
Sequences have rows [T, B], or [R] if they are packed; lengths, packing and resets are told in `fusedlstm.layout`.
`weight_hh` has H / DH heads (`fusedlstm.products`); one is the usual LSTM.

A recurrence maps `preact_x` (the input part of the preactivations) and the initial states to all h:

.. math::
    \mathrm{preact\_h}_t = h_{t-1} U^T, \qquad
    \mathrm{gates}_t, \mathrm{state}_t = \mathrm{step}(\mathrm{preact\_x}_t, \mathrm{preact\_h}_t, \mathrm{state}_{t-1})

The step and its backward are those of `fusedlstm.cells.cell`; everything here is the same for every cell. A cell
that multiplies gets the product itself in the place of preact_h (`recurrent_part`).

Autograd goes through this. So rows and weights are taken apart once and not at every step: the gradient of an index is
as large as what is indexed.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fusedlstm import transforms
from fusedlstm.cells import Cell, Grads, Recurrence, Saved, State, Weights
from fusedlstm.layout import Layout, spans
from fusedlstm.noise import EVERY_ROW, Batch
from fusedlstm.products import joined, recurrent_product, recurrent_product_backward

States = tuple[Tensor, ...]  # h first, each [B, H]
Product = Callable[..., States]  # of x [B, P] and the names of gates: as `product_with` returns it


def steps_of(T: int, direction: int) -> range:
    """The order in which a direction visits the steps."""
    return range(T) if direction == 0 else range(T - 1, -1, -1)


class Clip:
    """The limit of a graph's first backward.

    Whoever differentiates that backward again sets it to None before: then what comes back through the forward is no
    gradient of a loss, but a part of the derivative of one, which is not clipped.
    """

    def __init__(self, limit: float | None) -> None:
        self.limit = limit


class _ClipGradient(torch.autograd.Function):
    """x, whose gradient is kept within -limit and limit; a tangent is no gradient, and passes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, clip):
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.clip = inputs

    @staticmethod
    def backward(ctx, grad):
        limit = ctx.clip.limit
        return grad if limit is None else grad.clamp(-limit, limit), None

    @staticmethod
    def tangents(ctx, tangent, _):
        return tangent.view_as(tangent)


def _cut(layout: Layout, steps: list[tuple[int, int]], t: int, direction: int) -> Tensor | None:
    """Which of the sequences that have step t enter it with a state of zero in a direction, [n, 1] bool; None: none."""
    if layout.resets is None:
        return None
    _, n = steps[t]
    later = t + direction
    cut = torch.zeros(n, dtype=torch.bool, device=layout.resets.device)
    if later < len(steps):
        first, m = steps[later]
        cut = torch.cat([layout.resets.flatten()[first : first + min(m, n)], cut[m:]])
        if layout.first_row is None and layout.lengths is not None:
            cut = cut & (later < layout.lengths)
    return cut.unsqueeze(1)


def _lives(layout: Layout, t: int) -> Tensor | None:
    """Which sequences have step t, [B, 1] bool; None: all that have a row of it."""
    if layout.first_row is not None or layout.lengths is None:
        return None
    return (t < layout.lengths).unsqueeze(1)


def where(condition: Tensor | None, yes: States, no: States | float) -> States:
    """State by state; all of `yes` if there is no condition."""
    if condition is None:
        return yes
    no = no if isinstance(no, tuple) else (no,) * len(yes)
    return tuple(torch.where(condition, y, n) for y, n in zip(yes, no, strict=True))


def _stack(states: States, empty: Tensor) -> Tensor:
    """The states beside h, [S, B, H]; `empty`, which has that shape, if there are none."""
    return torch.stack(states) if states else empty


def _first(n: int, state: Tensor) -> Tensor:
    """The state of the first n sequences."""
    return state if n == state.size(0) else state[:n]


def _of_step(masks: tuple, first: int, n: int) -> tuple:
    """Of masks of all rows, those of a step's."""
    return tuple(m[first : first + n] if isinstance(m, Tensor) else m for m in masks)


def _held(held_h: Tensor | float, held_c: Tensor | float, stepped: States, entered: States) -> States:
    """Zoneout of a state: masks or, in the mean, numbers."""
    return tuple(
        s if isinstance(held, float) and held == 0 else held * e + (1 - held) * s
        for held, s, e in zip((held_h, *[held_c] * (len(stepped) - 1)), stepped, entered, strict=True)
    )


def product_with(
    cell: Cell,
    weight_hh: Tensor,  # [G * H, P], or [G * H, DH] with heads
) -> Product:
    """A function that multiplies x [B, P] with the rows of some gates, or of all, and returns a tuple by gate."""
    weights = {cell.gates: weight_hh}

    def product(x: Tensor, *names: str) -> States:
        if names not in weights:
            by_gate = weight_hh.chunk(cell.num_gates)
            weights[names] = joined([by_gate[cell.gates.index(name)] for name in names])
        return recurrent_product(x, weights[names]).chunk(len(names), -1)

    return product


def recurrent_part(
    cell: Cell,
    h: Tensor,  # [B, P]
    product: Product,
    factor: Tensor | None = None,  # [B, H], of what enters the recurrent product
) -> States | Product:
    """What a step takes as `preact_h`: the product with h by gate, or, if the cell multiplies, a function for it."""

    def with_factor(x: Tensor, *names: str) -> States:
        return product(x if factor is None else x * factor, *names)

    return with_factor if cell.multiplies else with_factor(h, *cell.gates)


def product_backward_with(
    cell: Cell,
    weight_hh: Tensor,  # [G * H, DH]
    hidden: int,
    factor: Tensor | None = None,  # [B, H], as in `recurrent_part`
) -> Callable[..., Tensor]:
    """A function from the gradients of products by gate, and the names of the gates, to the gradient of x [B, H]."""
    by_gate = dict(zip(cell.gates, weight_hh.chunk(cell.num_gates), strict=True))
    weights: dict[tuple[str, ...], Tensor] = {}

    def product_backward(dpreact: States, *names: str) -> Tensor:
        if names not in weights:
            weights[names] = joined([by_gate[name] for name in names])
        dx = recurrent_product_backward(joined([*dpreact], -1), weights[names], hidden)
        return dx if factor is None else dx * factor

    return product_backward


def step(
    cell: Cell,
    preact_x: Tensor,  # [B, G * H]
    entered: States,  # h [B, P], the others [B, H]
    product: Product,
    vectors: States,  # V times [H]
    masks: tuple,  # zoneout of h, of the other states, and the factor of the candidate: numbers or [B, H]
    weight_hr: Tensor | None = None,  # [P, H]
    factor: Tensor | None = None,  # [B, H], of the h that enters the recurrent product
) -> tuple[States, States]:
    """One step of one direction. Returns the gates and the states."""
    preact_h = recurrent_part(cell, entered[0], product, factor)
    held_h, held_c, drop = masks
    gates, now = cell.equations.step(preact_x.chunk(cell.num_gates, -1), preact_h, entered, vectors, drop)
    now = _held(held_h, held_c, now, entered)
    return gates, now if weight_hr is None else (now[0] @ weight_hr.t(), *now[1:])


def recurrence_fwd(
    spec: Recurrence,
    preact_x: Tensor,  # [D, T, B, G * H] or packed [D, R, G * H]
    weights: Weights,  # weight_hh D times [G * H, P], or [G * H, DH] with heads
    state: State,  # hx [D, B, P], cx [S, D, B, H]
    batch: Batch = EVERY_ROW,
) -> Saved:
    """All T steps of one layer, both directions; plain autograd can differentiate it.

    With a projection, output is [T, B, D * P] and h_n [D, B, P]. `spec.clip` is a `Clip` if the gradient is to be
    differentiated again.
    """
    (weight_hh, vectors, _, _, weight_hr), (hx, cx), (layout, noise) = weights, state, batch
    clip = spec.clip if spec.clip is None or isinstance(spec.clip, Clip) else Clip(spec.clip)
    D, *leading, _ = preact_x.shape
    steps = spans(layout.first_row, leading)
    preact_x = preact_x.flatten(1, -2)  # [D, R, G * H]
    factors = noise.of_sequences(*hx.shape, hx.dtype)
    output, h_n, c_n, gates_seq, c_seq = [], [], [], [], []
    for d in range(D):
        # Not by `unbind`, which gives an empty list for an h alone: torch cannot load a program with one.
        states = (hx[d], *(cx[k, d] for k in range(len(cx))))
        own = () if vectors is None else tuple(vectors[d])
        masks = noise.of_rows(preact_x.size(1), d, hx.size(-1), hx)
        by_step, gates = [None] * len(steps), [None] * len(steps)
        rows, product = preact_x[d].split([n for _, n in steps]), product_with(spec.cell, weight_hh[d])
        for t in steps_of(len(steps), d):
            first, n = steps[t]  # sequences 0 to n - 1 have this step; the others have ended, or in reverse not begun
            lives, cut = _lives(layout, t), _cut(layout, steps, t, d)
            entered = tuple(_first(n, s) for s in states)
            if clip is not None:
                entered = tuple(transforms.apply(_ClipGradient, s, clip) for s in entered)
            if cut is not None:
                entered = where(~cut, entered, 0.0)
            # What a sequence that has ended would have begun a step with has no gradient; zero times NaN is NaN.
            entered, (x,) = where(lives, entered, 0.0), where(lives, (rows[t],), 0.0)
            factor = None if factors is None else factors[d, :n]
            projection = weight_hr[d] if weight_hr else None
            of_step = _of_step(masks, first, n)
            gates[t], now = step(spec.cell, x, entered, product, own, of_step, projection, factor)
            by_step[t] = where(lives, now, 0.0)
            now = where(lives, now, tuple(_first(n, s) for s in states))
            if n < states[0].size(0):
                now = tuple(torch.cat([new, old[n:]]) for new, old in zip(now, states, strict=True))
            states = now
        output.append(torch.cat([s[0] for s in by_step]))
        h_n.append(states[0])
        c_n.append(_stack(states[1:], cx[:, d]))
        if spec.save_gates:
            gates_seq.append(torch.cat([torch.cat(g, -1) for g in gates]))
        c_seq.append(torch.cat([_stack(s[1:], cx[:, d, : s[0].size(0)]) for s in by_step], 1))
    return Saved(
        torch.cat(output, -1).unflatten(0, leading),
        torch.stack(h_n),
        torch.stack(c_n, 1),
        torch.cat(gates_seq, -1).unflatten(0, leading) if spec.save_gates else hx.new_empty(0),
        torch.cat(c_seq, -1).unflatten(1, leading) if spec.save_states else hx.new_empty(0),
    )


def recurrence_bwd(
    spec: Recurrence,
    grads: Grads,
    saved: Saved,
    weights: Weights,
    state: State,
    batch: Batch = EVERY_ROW,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients that must be found step by step; those of the weights follow from them as one product each.

    Returns:
        grad_preact like gates (zero in padding), grad_hx [D, B, H], grad_cx [S, D, B, H].
    """
    of, step_backward = spec.cell, spec.cell.equations.step_backward
    first_h = of.first_h_block
    (weight_hh, vectors, *_), (hx, cx), (layout, noise), clip = weights, state, batch, spec.clip
    *leading, _ = saved.gates.shape
    D, H, steps = len(weight_hh), hx.size(-1), spans(layout.first_row, leading)
    output, gates, grad_output = (
        x.reshape(-1, D, x.size(-1) // D) for x in (saved.output, saved.gates, _or_zero(grads.output, saved.output))
    )  # [R, D, features]
    c_seq, grad_c_seq = (
        x.reshape(len(cx), len(output), D, H) for x in (saved.c_seq, _or_zero(grads.c_seq, saved.c_seq))
    )
    factors = noise.of_sequences(*hx.shape, hx.dtype)
    grad_preact, grad_hx, grad_cx = [], [], []
    for d in range(D):
        order = steps_of(len(steps), d)
        dstate, own = (grads.h_n[d], *grads.c_n[:, d]), () if vectors is None else tuple(vectors[d])
        masks = noise.of_rows(len(output), d, H, hx)
        dpreacts = [None] * len(steps)
        for k, t in reversed(list(enumerate(order))):
            first, n = steps[t]
            rows = slice(first, first + n)
            reached = (output[rows, d], *c_seq[:, rows, d])
            lives, cut = _lives(layout, t), _cut(layout, steps, t, d)
            # The state before: that of the step before where the sequence has it, else the initial one.
            first_prev, n_prev = steps[order[k - 1]] if k > 0 else (0, 0)
            n_prev = min(n, n_prev)
            rows_prev = slice(first_prev, first_prev + n_prev)
            state_prev = (
                torch.cat([output[rows_prev, d], hx[d, n_prev:n]]),
                *torch.cat([c_seq[:, rows_prev, d], cx[:, d, n_prev:n]], 1),
            )
            begins = _lives(layout, t + 1) if d == 1 and t + 1 < len(steps) else None
            state_prev = where(begins, state_prev, tuple(s[:n] for s in (hx[d], *cx[:, d])))
            entered = state_prev if cut is None else where(~cut, state_prev, 0.0)
            carried = tuple(ds[:n] for ds in dstate)
            now = tuple(ds + g for ds, g in zip(carried, (grad_output[rows, d], *grad_c_seq[:, rows, d]), strict=True))
            held_h, held_c, drop = _of_step(masks, first, n)
            kept = gates[rows, d].chunk(of.num_kept, -1)
            through = (0.0,) * len(now)
            if noise.holds:
                reached = of.equations.update(kept, entered, drop)
                through = tuple(held * ds for held, ds in zip((held_h, *[held_c] * (len(now) - 1)), now, strict=True))
                now = tuple(ds - part for ds, part in zip(now, through, strict=True))
            factor = None if factors is None else factors[d, :n]
            more = (product_backward_with(of, weight_hh[d], H, factor),) if of.multiplies else ()
            dpreact, now = step_backward(kept, entered, reached, now, own, drop, *more)
            now = tuple(ds + part for ds, part in zip(now, through, strict=True))
            dpreact = where(lives, dpreact, 0.0)
            dpreacts[t] = torch.cat(dpreact, -1)
            if not of.multiplies:
                dh = recurrent_product_backward(torch.cat(dpreact[first_h:], -1), weight_hh[d], H)
                now = (now[0] + (dh if factor is None else dh * factor), *now[1:])
            if cut is not None:
                now = where(~cut, now, 0.0)
            if clip is not None:
                now = tuple(ds.clamp(-clip, clip) for ds in now)
            now = where(lives, now, carried)
            dstate = tuple(torch.cat([new, old[n:]]) for new, old in zip(now, dstate, strict=True))
        grad_preact.append(torch.cat(dpreacts))
        grad_hx.append(dstate[0])
        grad_cx.append(_stack(dstate[1:], cx[:, d]))
    return torch.cat(grad_preact, -1).unflatten(0, leading), torch.stack(grad_hx), torch.stack(grad_cx, 1)


def _or_zero(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad


def layer(
    spec: Recurrence,
    input: Tensor,  # [T, B, I] or packed [R, I]
    state: State,  # hx [D, B, P], cx [S, D, B, H]
    per_direction: list[list[Tensor]],  # weight_ih [G*H, I], weight_hh as above (, bias_ih, bias_hh [G*H]), vectors [H]
    batch: Batch = EVERY_ROW,
    weight_hr: list[Tensor] | None = None,  # D times [P, H]
) -> Saved:
    """One layer with its input product."""
    preact_x = input_part(spec.cell, input, per_direction)
    weights = Weights([p[1] for p in per_direction], spec.cell.step_vectors(per_direction), weight_hr=weight_hr)
    return recurrence_fwd(spec, preact_x, weights, state, batch)


def input_part(
    of: Cell,
    input: Tensor,  # [T, B, I] or packed [R, I]
    per_direction: list[list[Tensor]],  # as in `layer`
) -> Tensor:
    """The input's part of the preactivations of a layer, [D, T, B, G * H] or packed [D, R, G * H]."""
    if of.norms:
        products = torch.stack([input @ p[0].t() for p in per_direction], -2)
        return of.normed(products, per_direction).movedim(-2, 0)
    biases = [of.input_bias(p) for p in per_direction]
    return torch.stack([input @ p[0].t() + (0 if b is None else b) for p, b in zip(per_direction, biases, strict=True)])
