"""A recurrence as a loop of torch operations, with the backward written out: for a CPU, where no kernel runs.

Serves what ATen serves badly there, packed sequences of different lengths, GRUs and vanilla RNNs, or not at all: other
cells, all cell states, clipped gradients of the states, lengths and resets inside a compiled graph. What makes it fast
is that nothing is done at a step that can be done for many steps at once: beside the recurrent product a step has only
operations on states, in place, on views that are made beforehand; factors that do not depend on the gradients of later
steps are one operation each for a block of steps; and the gradients of the weights are one product outside. Heads are a
batch in the recurrent product.
Equations, names and layouts are those of `fusedlstm.engines.reference`.

A cell's step is two functions (`fusedlstm.cells.cell.Loop`):

    forward(at) -> step(t, state) -> state
    backward(at) -> step(t, dstate) -> dh_direct

Each is called once for a block of steps, and does what can be done for all of them at once. The function that it
returns is called step by step, and t counts from the first step of the block. Forward, that takes the states before a
step, each [n, H], fills the rows of step t and returns the states after it. Backward, it takes the gradients of the
states beside h after step t, each [n, H], makes them those before the step in place, and fills `at.dpreact` of step t
from `at.dh`, which is complete by then. It returns the gradient of the h before that does not pass through `weight_hh`,
[n, H], or None; the whole gradient if the cell multiplies. A cell that has no such functions gets them from its
equations (`derived`).
"""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fusedlstm import products
from fusedlstm.cells import Cell, Grads, Loop, Recurrence, Saved, State, Weights
from fusedlstm.engines.reference import product_backward_with, product_with, recurrent_part, steps_of
from fusedlstm.layout import Layout, Pieces, spans
from fusedlstm.noise import EVERY_ROW, Batch

# The fewest elements for which torch takes one more thread. A pass over a block of steps has as many for every thread,
# and what it makes is still in the cache when the steps take it.
GRAIN = 1 << 15


class Forward(NamedTuple):
    """A block of steps of one direction. Rows lie step by step; what is not given is to be filled."""

    sizes: list[int]  # rows of every step
    preact_x: Tensor  # [R, G*H], given
    vectors: tuple[Tensor, ...]  # each [H], given
    gates: Tensor  # [R, K*H]
    states: tuple[Tensor, ...]  # h first, each [R, H]
    weight_hh: Tensor | None  # [G*H, DH], given; None: `preact_x` has the recurrent part
    add_recurrent: Callable[[Tensor, Tensor, Tensor], Tensor]  # preact [n, G*H], h [n, H], out: preact + h U^T

    def add_product(self, gates: slice) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """`add_recurrent` with the rows of some gates."""
        H = self.states[0].size(1)
        return _recurrent_product(self.weight_hh[gates.start * H : gates.stop * H], H)

    def by_step(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Views of the rows of every step."""
        return rows.split(self.sizes)


class Backward(NamedTuple):
    """A block of steps of one direction. Rows lie step by step."""

    sizes: list[int]
    vectors: tuple[Tensor, ...]  # each [H]
    weight_hh: Tensor  # [G*H, DH]
    gates: Tensor  # [R, K*H]
    states: tuple[Tensor, ...]  # each [R, H]
    before: Callable[[int], Tensor]  # of a state, by its number: what entered every row, [R, H]; not to be changed
    dh: Tensor  # [R, H]
    dpreact: Tensor  # [R, K*H], to be filled

    def add_product_backward(self, gates: slice) -> Callable[[Tensor, Tensor], Tensor]:
        """A function of dx [n, H] and dpreact [n, gates*H]: dx += dpreact U, with the rows of some gates."""
        H = self.dh.size(1)
        return _recurrent_backward(self.weight_hh[gates.start * H : gates.stop * H], H, None)

    def by_step(self, rows: Tensor) -> tuple[Tensor, ...]:
        return rows.split(self.sizes)

    def blocks_by_step(self, rows: Tensor) -> tuple[Tensor, ...]:
        """[R, n*H] as [rows of a step, n, H]."""
        return rows.unflatten(1, (-1, self.dh.size(1))).split(self.sizes)


def derived(cell: Cell) -> Loop:
    """A cell's step from its equations."""
    equations, G = cell.equations, cell.num_gates

    def forward(at: Forward):
        preact_x, gates = map(at.by_step, (at.preact_x, at.gates))
        states = [*zip(*map(at.by_step, at.states), strict=True)]  # step by step
        product = None if at.weight_hh is None else product_with(cell, at.weight_hh)

        def step(t, state):
            preact_h = (0.0,) * G if product is None else recurrent_part(cell, state[0], product)
            kept, state = equations.step(preact_x[t].chunk(G, -1), preact_h, state, at.vectors, 1.0)
            torch.cat(kept, -1, out=gates[t])
            return tuple(seq.copy_(s) for seq, s in zip(states[t], state, strict=True))

        return step

    def backward(at: Backward):
        gates, dpreact = at.blocks_by_step(at.gates), at.blocks_by_step(at.dpreact)
        before = [*zip(*(at.by_step(at.before(k)) for k in range(len(at.states))), strict=True)]
        states, dh = [*zip(*map(at.by_step, at.states), strict=True)], at.by_step(at.dh)
        more = (product_backward_with(cell, at.weight_hh, at.dh.size(1)),) if cell.multiplies else ()

        def step(t, dstate):
            dpreacts, (dh_direct, *dstate_prev) = equations.step_backward(
                gates[t].unbind(1), before[t], states[t], (dh[t], *dstate), at.vectors, 1.0, *more
            )
            torch.stack(dpreacts, 1, out=dpreact[t])
            for ds, ds_prev in zip(dstate, dstate_prev, strict=True):
                ds.copy_(ds_prev)
            return dh_direct

        return step

    return Loop(forward, backward)


def _step_of(cell: Cell) -> Loop:
    return cell.loop or derived(cell)


def _steps_of_block(batch: int, H: int) -> int:
    return max(1, GRAIN * torch.get_num_threads() // max(1, batch * H))


def _in_blocks(begin: Callable, of_block: Callable, steps: list[tuple[int, int]], H: int) -> Callable:
    """The step of a direction, from the first function of a cell, which is called for one block of steps after another.

    `of_block` gives from a slice of the steps what that function takes.
    """
    length, number, step = _steps_of_block(max((n for _, n in steps), default=0), H), None, None
    if 0 < len(steps) <= length:
        return begin(of_block(slice(0, len(steps))))

    def of_direction(t: int, state):
        nonlocal number, step
        if t // length != number:
            number, step = t // length, None  # the buffers of the block before are free when those of this one are made
            step = begin(of_block(slice(number * length, min((number + 1) * length, len(steps)))))
        return step(t - number * length, state)

    return of_direction


def recurrence_fwd(
    spec: Recurrence,
    preact_x: Tensor,  # [D, T, B, G*H] or packed [D, R, G*H]
    weights: Weights,
    state: State,
    batch: Batch = EVERY_ROW,  # without noise in the steps
) -> Saved:
    """All steps forward."""
    D, *leading, GH = preact_x.shape
    layout, (hx, cx) = batch.layout, state
    S, H, K = len(cx), hx.size(-1), spec.cell.num_kept
    if layout.name == "ragged" or layout.resets is not None:
        pieces, packed = _pieces(layout, leading, hx.device)
        entered = State(_enter(pieces, hx), _enter(pieces, cx))
        saved = recurrence_fwd(spec, _packed(preact_x, pieces, leading), weights, entered, Batch(packed))
        return Saved(
            _unpacked(saved.output, pieces, leading),
            _leave(pieces, saved.h_n, hx),
            _leave(pieces, saved.c_n, cx),
            _unpacked(saved.gates, pieces, leading) if spec.save_gates else saved.gates,
            _unpacked(saved.c_seq, pieces, leading) if spec.save_states else saved.c_seq,
        )
    steps = spans(layout.first_row, leading)
    sizes = [n for _, n in steps]
    R = sum(sizes)
    output, c_seq = preact_x.new_empty(R, D, H), preact_x.new_empty(S, R, D, H)
    # The gates of a vanilla RNN are its states, and are copied at the end.
    are_states = spec.cell.loop is not None and spec.cell.gates == spec.cell.states
    gates = output if are_states else preact_x.new_empty(R, D, K * H)
    h_n, c_n = hx.clone(), cx.clone()  # rows beyond a step's keep what they have
    weight_hh = weights.weight_hh or [None] * D
    add_recurrent = [_recurrent_product(weight, H) for weight in weight_hh]
    by_rows = preact_x.reshape(D, R, GH)

    def of_block(d: int, block: slice) -> Forward:
        rows = _rows(steps, block)
        return Forward(
            sizes=sizes[block],
            preact_x=by_rows[d, rows],
            vectors=() if weights.vectors is None else weights.vectors[d].unbind(),
            gates=gates[rows, d],
            states=(output[rows, d], *c_seq[:, rows, d]),
            weight_hh=weight_hh[d],
            add_recurrent=add_recurrent[d],
        )

    # The steps write to tensors that were made outside. Autograd would keep a history of every view of them. That takes
    # longer than the steps where a compiler asks for it.
    with torch.inference_mode():
        for d in range(D):
            step = _in_blocks(_step_of(spec.cell).forward, partial(of_block, d), steps, H)
            _run(step, sizes, d, (h_n[d], *c_n[:, d]))
    if are_states and spec.save_gates:
        gates = output.clone()
    return Saved(
        output.view(*leading, D * H),
        h_n,
        c_n,
        gates.view(*leading, D * K * H) if spec.save_gates else gates.new_empty(0),
        c_seq.view(S, *leading, D * H) if spec.save_states else c_seq.new_empty(0),
    )


def _run(step, sizes: list[int], d: int, finals: tuple[Tensor, ...]) -> None:
    """One direction; `finals`, each [B, H], come as the initial states and become the final ones."""
    state, before = finals, len(finals[0])
    for t in steps_of(len(sizes), d):
        n = sizes[t]
        if n < before:  # some ended
            for final, s in zip(finals, state, strict=True):
                final[n:before] = s[n:]
            state = tuple(s[:n] for s in state)
        elif n > before:  # in reverse some begin
            state = tuple(torch.cat([s, final[before:n]]) for final, s in zip(finals, state, strict=True))
        state = step(t, state)
        before = n
    for final, s in zip(finals, state, strict=True):
        final[:before] = s


def _recurrent_product(weight_hh: Tensor | None, H: int):
    """A function of preact [B, G*H], h [B, H] and out [B, G*H] that writes preact + h U^T; preact alone without
    weights.
    """
    if weight_hh is None:
        return lambda preact, h, out: out.copy_(preact)
    DH = weight_hh.size(1)
    if DH == H:
        weight_t = weight_hh.t()
        return lambda preact, h, out: torch.addmm(preact, h, weight_t, out=out)
    G, n = len(weight_hh) // H, H // DH
    by_head = weight_hh.reshape(G, n, DH, DH).permute(1, 3, 0, 2).reshape(n, DH, G * DH)

    def add(preact, h, out):
        B = len(h)
        product = torch.bmm(h.view(B, n, DH).transpose(0, 1), by_head).view(n, B, G, DH)
        by_gate_and_head = out.unflatten(1, (G, n, DH))
        torch.add(preact.unflatten(1, (G, n, DH)), product.permute(1, 2, 0, 3), out=by_gate_and_head)
        return out

    return add


def recurrence_bwd(
    spec: Recurrence,
    grads: Grads,
    saved: Saved,
    weights: Weights,
    state: State,
    batch: Batch = EVERY_ROW,  # without noise in the steps
) -> tuple[Tensor, Tensor, Tensor]:
    """All steps backward: grad_preact like gates, grad_hx [D, B, H], grad_cx [S, D, B, H]."""
    *leading, _ = saved.output.shape
    of, layout, (hx, cx), clip = spec.cell, batch.layout, state, spec.clip
    S, (D, _, H), K = len(cx), hx.shape, of.num_kept
    if layout.name == "ragged" or layout.resets is not None:
        pieces, packed = _pieces(layout, leading, hx.device)
        of_rows = (None if g is None else _packed(g, pieces, leading) for g in grads[:2])
        left = Grads(*of_rows, _left(pieces, grads.h_n), _left(pieces, grads.c_n))
        kept = {name: _packed(getattr(saved, name), pieces, leading) for name in ("output", "gates", "c_seq")}
        entered = State(_enter(pieces, hx), _enter(pieces, cx))
        grad_preact, grad_h, grad_c = recurrence_bwd(
            spec, left, saved._replace(**kept), weights, entered, Batch(packed)
        )
        return (
            _unpacked(grad_preact, pieces, leading),
            _entered(pieces, grad_h, grads.h_n),
            _entered(pieces, grad_c, grads.c_n),
        )
    steps = spans(layout.first_row, leading)
    sizes = [n for _, n in steps]
    R = sum(sizes)
    gates, output, c_seq = saved.gates.view(R, D, K * H), saved.output.view(R, D, H), saved.c_seq.view(S, R, D, H)
    grad_preact = gates.new_empty(R, D, K * H)
    grad_hx = torch.zeros_like(hx) if R else grads.h_n.clone()
    grad_cx = grads.c_n.clone()
    dh = gates.new_zeros(R, D, H) if grads.output is None else grads.output.reshape(R, D, H).clone()
    dc_seq = () if grads.c_seq is None else grads.c_seq.reshape(S, R, D, H)
    if R:
        ends = _last_rows(steps, hx.size(1), dh.device)
        for d in range(D):  # a final h is the output of a last step
            dh[:, d].index_add_(0, ends[d], grads.h_n[d])

    def of_block(d: int, block: slice) -> Backward:
        rows, states, initial = _rows(steps, block), (output[:, d], *c_seq[:, :, d]), (hx[d], *cx[:, d])
        return Backward(
            sizes=sizes[block],
            vectors=() if weights.vectors is None else weights.vectors[d].unbind(),
            weight_hh=weights.weight_hh[d],
            gates=gates[rows, d],
            states=tuple(s[rows] for s in states),
            before=lambda k: _states_before(states[k], initial[k], steps, d, block),
            dh=dh[rows, d],
            dpreact=grad_preact[rows, d],
        )

    with torch.inference_mode():  # as in the forward
        for d in range(D):
            dpreact_h = grad_preact[:, d, of.first_h_block * H :][:, : of.num_gates * H]
            _run_backward(
                _in_blocks(_step_of(spec.cell).backward, partial(of_block, d), steps, H),
                sizes,
                d,
                dh[:, d].split(sizes),
                dpreact_h.split(sizes),
                [g[:, d].split(sizes) for g in dc_seq],
                grad_hx[d],
                tuple(grad_cx[:, d]),
                _recurrent_backward(None if of.multiplies else weights.weight_hh[d], H, clip),
                clip,
            )
    return grad_preact.view(*leading, D * K * H), grad_hx, grad_cx


def _run_backward(step, sizes, d, dh, dpreact_h, dc_seq, grad_hx, dfinals, add_recurrent_backward, clip) -> None:
    """One direction; `dfinals`, each [B, H], come as the gradients of the final states beside h, and become the initial
    ones'.
    """
    order = list(steps_of(len(sizes), d))
    dstate, m = dfinals, len(grad_hx)  # the gradients of the first m sequences
    for t, before in itertools.pairwise([*reversed(order), None]):
        n = sizes[t]
        if n != m:
            dstate, m = tuple(ds[:n] for ds in dfinals), n
        if dc_seq:
            for ds, of_step in zip(dstate, dc_seq, strict=True):
                ds += of_step[t]
        direct = step(t, dstate)
        if clip is not None:
            for ds in dstate:
                ds.clamp_(-clip, clip)
        # The gradient of h goes to the step before, or to hx for those that begin here.
        if before is not None and sizes[before] == n:
            add_recurrent_backward(dh[before], dpreact_h[t], direct)
            continue
        dh_before = grad_hx[:0] if before is None else dh[before]
        n_before = min(n, len(dh_before))
        for rows, grad_h in ((slice(0, n_before), dh_before), (slice(n_before, n), grad_hx)):
            if rows.start < rows.stop:
                add_recurrent_backward(grad_h[rows], dpreact_h[t][rows], None if direct is None else direct[rows])


def _recurrent_backward(weight_hh: Tensor | None, H: int, clip: float | None):
    """A function of grad_h [B, H], dpreact [B, G*H] and direct [B, H] or None: grad_h += dpreact U + direct,
    clipped. Without weights it is only direct, which then is not None.
    """
    if weight_hh is None:
        return lambda grad_h, _, direct: grad_h.add_(direct if clip is None else direct.clamp(-clip, clip))
    dense = weight_hh.size(1) == H

    def add(grad_h, dpreact, direct=None):
        if direct is not None:
            grad_h += direct
        if dense:
            grad_h.addmm_(dpreact, weight_hh)
        else:
            grad_h += products.recurrent_product_backward(dpreact, weight_hh, H)

    def add_clipped(grad_h, dpreact, direct):
        through = products.recurrent_product_backward(dpreact, weight_hh, H)
        if direct is not None:
            through += direct
        grad_h += through.clamp_(-clip, clip)

    return add if clip is None else add_clipped


def _last_rows(steps: list[tuple[int, int]], batch: int, device: torch.device) -> list[Tensor]:
    """The row of every sequence's last step, [B], in both directions; of a dense batch nothing comes from the host."""
    sequence = torch.arange(batch, device=device)
    first, n = steps[-1]
    if n == batch:
        return [sequence + first, sequence]
    forward: list[int] = []
    for first, n in reversed(steps):
        forward += range(first + len(forward), first + n)
    return [torch.tensor(forward, device=device), sequence]


def _states_before(seq: Tensor, initial: Tensor, steps: list[tuple[int, int]], d: int, block: slice) -> Tensor:
    """The states that entered the rows of a block of steps, [R', H], from those of all rows [R, H]: those of the step
    before, or `initial` [B, H] where a sequence begins.
    """
    n, rows = len(initial), _rows(steps, block)
    if steps[-1][1] == n:  # all have every step
        first, last = (rows.start - n, rows.stop - n) if d == 0 else (rows.start + n, rows.stop + n)
        before = seq[max(first, 0) : last]
        if len(before) == rows.stop - rows.start:
            return before
        return torch.cat([initial, before] if d == 0 else [before, initial])
    pieces: list[Tensor] = []
    for t in range(block.start, block.stop):
        n, prev = steps[t][1], t - 1 if d == 0 else t + 1
        first_prev, n_prev = steps[prev] if 0 <= prev < len(steps) else (0, 0)
        pieces.append(seq[first_prev : first_prev + min(n, n_prev)])
        if n > n_prev:
            pieces.append(initial[n_prev:n])
    return torch.cat(pieces)


def _rows(steps: list[tuple[int, int]], block: slice) -> slice:
    """The rows of a block of steps."""
    return slice(steps[block.start][0], sum(steps[block.stop - 1]))


def _pieces(layout: Layout, leading: list[int], device: torch.device) -> tuple[Pieces, Layout]:
    """The uncut pieces of a batch, and how these lie."""
    pieces = Pieces.of(layout, tuple(leading), device)
    return pieces, Layout.of_packed(pieces.batch_sizes, len(pieces.enters[0]), device)


def _packed(seq: Tensor, pieces: Pieces, leading: list[int]) -> Tensor:
    """[..., *leading, features] -> [..., R, features]"""
    rows = seq.flatten(-1 - len(leading), -2)
    return rows.index_select(-2, pieces.rows)


def _unpacked(seq: Tensor, pieces: Pieces, leading: list[int]) -> Tensor:
    """[..., R, features] -> [..., *leading, features], with zeros in the padding."""
    rows = seq.new_zeros(*seq.shape[:-2], math.prod(leading), seq.size(-1))
    return rows.index_copy_(-2, pieces.rows, seq).unflatten(-2, leading)


def _enter(pieces: Pieces, state: Tensor) -> Tensor:
    """[..., D, B, H] -> [..., D, pieces, H]"""
    known = torch.cat([state, state.new_zeros(*state.shape[:-2], 1, state.size(-1))], -2)
    return _select(known, pieces.enters)


def _leave(pieces: Pieces, state: Tensor, initial: Tensor) -> Tensor:
    """[..., D, pieces, H] -> [..., D, B, H]; `initial` where there is no step."""
    return _select(torch.cat([state, initial], -2), pieces.leaves)


def _select(known: Tensor, rows: tuple[Tensor, Tensor]) -> Tensor:
    """[..., D, n, H] -> [..., D, m, H], of every direction its own rows [m]."""
    by_direction = [s.index_select(-2, rows[d]) for d, s in enumerate(known.unbind(-3))]
    return torch.stack(by_direction, -3)


def _left(pieces: Pieces, grad: Tensor) -> Tensor:
    """The gradient of `_leave`: [..., D, B, H] -> [..., D, pieces, H]."""
    n = len(pieces.enters[0])
    return _scattered(grad, pieces.leaves, n + grad.size(-2))[..., :n, :]


def _entered(pieces: Pieces, grad: Tensor, grad_final: Tensor) -> Tensor:
    """The gradient of `_enter`, [..., D, pieces, H] -> [..., D, B, H], and of `_leave` where a sequence has no
    steps.
    """
    n, B = grad.size(-2), grad_final.size(-2)
    found = _scattered(grad, pieces.enters, B + 1)[..., :B, :].contiguous()
    empty = torch.stack([rows >= n for rows in pieces.leaves[: grad.size(-3)]]).unsqueeze(-1)  # [D, B, 1]
    return torch.where(empty, grad_final, found)


def _scattered(grad: Tensor, rows: tuple[Tensor, Tensor], size: int) -> Tensor:
    """[..., D, m, H] -> [..., D, size, H], with zeros where no row goes."""
    found = grad.new_zeros(*grad.shape[:-2], size, grad.size(-1))
    for d, (into, g) in enumerate(zip(found.unbind(-3), grad.unbind(-3), strict=True)):
        into.index_copy_(-2, rows[d], g)
    return found
