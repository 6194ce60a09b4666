"""The gradients of a layer's parameters from those of its preactivations: what the backward does for all steps at
once.
"""

import torch
from torch import Tensor

from fusedlstm.cells import Cell
from fusedlstm.layout import Layout
from fusedlstm.noise import NO_NOISE, Noise, entering
from fusedlstm.products import (
    add_product,
    add_sum_of_rows,
    joined,
    normed_input_backward,
    product,
    recurrent_weight_gradient,
)

ROWS_OF_BLOCK = 512  # of passes over all rows on a CPU


class ParameterGradients:
    """The gradients of a layer's parameters, summed over blocks of steps: one product each.

    `grad_preact` [T, B, D*K*H] or [R, D*K*H] has for every direction K blocks: the first G of them are the gradients of
    the input's preactivations, the last G those of the recurrent ones.
    """

    def __init__(self, cell: Cell, per_direction: list, needs: list) -> None:
        self.cell, self.per_direction, self.needs = cell, per_direction, needs
        self.equations, self.has_bias = self.cell.equations, self.cell.has_bias(per_direction[0])
        # Biases that are added after a norm are among the vectors.
        self.normed_bias = self.cell.norms and self.cell.bias_in_step
        self.H = len(per_direction[0][1]) // self.cell.num_gates
        self.merged = self.cell.num_kept == self.cell.num_gates  # then both directions share each product
        self.of_weight_ih = self.of_bias_ih = None
        self.of_weight_hh, self.of_bias_hh = [None] * len(needs), [None] * len(needs)
        self.of_vectors, self.of_gain_ih = [None] * len(needs), [None] * len(needs)

    def of_input(self, grad_preact: Tensor, x: Tensor) -> Tensor:
        """[R, D*G*H] @ [D*G*H, I], in the shape of x."""
        weight_ih = [self.in_blocks(p[0]) for p in self.per_direction]
        weight_ih = [joined(weight_ih)] if self.merged else weight_ih
        total = None
        for rows, weight in zip(self._of_x(grad_preact), weight_ih, strict=True):
            total = add_product(total, rows, weight)
        return total.view(x.shape)

    def add(
        self,
        grad_preact: Tensor,  # [T, B, D*K*H] or [R, D*K*H]
        x: Tensor,  # [T, B, I] or [R, I]
        output: Tensor,  # [T, B, D*H] or [R, D*H]
        gates: Tensor,  # [T, B, D*K*H] or [R, D*K*H]
        c_seq: Tensor,  # [S, T, B, D*H] or [S, R, D*H]
        hx: Tensor,  # [D, B, H]
        cx: Tensor,  # [S, D, B, H]
        layout: Layout,
        noise: Noise = NO_NOISE,
        products: Tensor | None = None,  # W x [T, B, D, G*H] or [R, D, G*H]; with norms, None: not kept
    ) -> None:
        """The part of some steps. With norms the gradients of the input's preactivations become those of their
        products.
        """
        if layout.lengths is not None and layout.first_row is None:
            # What a sequence without steps begins with is not used, and zero times NaN is NaN.
            unused = (layout.lengths <= 0).unsqueeze(1)
            hx, cx = hx.masked_fill(unused, 0), cx.masked_fill(unused, 0)
        factor = noise.of_sequences(*hx.shape, hx.dtype)
        D, H, of_x = len(self.needs), self.H, self._of_x(grad_preact)
        if self.has_bias and any(n[2] or n[3] for n in self.needs):
            totals = self.of_bias_ih or [None] * len(of_x)
            self.of_bias_ih = [_added(total, g.sum(0)) for total, g in zip(totals, of_x, strict=True)]
        by_direction = enumerate(zip(grad_preact.chunk(D, -1), output.chunk(D, -1), gates.chunk(D, -1), strict=True))
        for d, (g, y, kept) in by_direction:
            of_h = g[..., self.cell.first_h_block * H :]  # [..., G*H]
            if any(n[1] for n in self.needs):
                num_heads = H // self.per_direction[d][1].size(1)
                h, h_0 = (y, hx[d]) if factor is None else entering(y, hx[d], factor[d], layout)
                if self.cell.multiplies:
                    part = self._of_products(of_h, kept, layout.states_before(h, h_0, d), layout, num_heads)
                    self.of_weight_hh[d] = _added(self.of_weight_hh[d], part)
                else:
                    self.of_weight_hh[d] = _add_recurrent_weight_gradient(
                        self.of_weight_hh[d], of_h, h, h_0, d, layout, num_heads
                    )
            needs_bias_hh = self.has_bias and self.cell.bias_in_step and any(n[3] for n in self.needs)
            if needs_bias_hh and not self.normed_bias:
                self.of_bias_hh[d] = _added(self.of_bias_hh[d], of_h.flatten(0, -2).sum(0))
            if self.cell.vectors and any(needs_bias_hh or any(n[-len(self.cell.vectors) :]) for n in self.needs):
                states, initial = (y, *c_seq.chunk(D, -1)[d]), (hx[d], *cx[:, d])
                part = self._of_vectors(g, kept, states, initial, d, layout, noise)
                self.of_vectors[d] = _added(self.of_vectors[d], part)
        if self.cell.norms:
            self._through_input_norms(of_x, x, products)
        if any(n[0] for n in self.needs):
            totals = self.of_weight_ih or [None] * len(of_x)
            self.of_weight_ih = [
                add_sum_of_rows(total, g.t(), x.flatten(0, -2)) for total, g in zip(totals, of_x, strict=True)
            ]

    def _of_products(self, dpreact, gates, h: Tensor, layout: Layout, num_heads: int) -> Tensor:
        """The gradient of weight_hh [G*H, DH] in one direction of a cell that multiplies. h [R, H] enters the steps."""
        by_gate = dpreact.flatten(0, -2).chunk(self.cell.num_gates, -1)
        kept = _without_padding(gates, layout).flatten(0, -2).chunk(self.cell.num_kept, -1)
        pairs = zip(by_gate, self.equations.multiplied(kept, h), strict=True)
        return torch.cat([recurrent_weight_gradient(g, x, num_heads) for g, x in pairs])

    def _of_vectors(self, grad_preact, gates, states, initial, direction: int, layout: Layout, noise: Noise) -> Tensor:
        """The gradients of vectors [V, H] in one direction, of tensors [T, B, ...] or [R, ...] and initial states [B,
        H].
        """
        before = [layout.states_before(s, i, direction) for s, i in zip(states, initial, strict=True)]
        after = [s.flatten(0, -2) for s in states]
        dpreact, kept = grad_preact.flatten(0, -2), _without_padding(gates, layout).flatten(0, -2)
        if noise.holds:  # the state that the step itself made is in no memory
            drop = noise.of_rows(len(kept), direction, self.H, initial[0])[2]
            after = self.equations.update(kept.chunk(self.cell.num_kept, -1), before, drop)
        total = None
        for rows in _row_blocks(len(kept), kept.device):
            by_block = (x[rows].chunk(self.cell.num_kept, -1) for x in (dpreact, kept))
            parts = self.equations.vectors_backward(*by_block, [s[rows] for s in before], [s[rows] for s in after])
            total = _added(total, torch.stack([part.sum(0) for part in parts]))
        return total

    def flat(self) -> list[Tensor | None]:
        """In the order of the parameters; None where none is needed."""
        found = []
        of_weight_ih, of_bias_ih = self._by_direction(self.of_weight_ih), self._by_direction(self.of_bias_ih)
        for d, parameters in enumerate(self.per_direction):
            own = [None] * (len(self.cell.vectors) - (self.cell.norms > 0) + self.normed_bias)
            if self.of_vectors[d] is not None:
                own = self.cell.vectors_gradients(self.of_vectors[d].to(parameters[1].dtype))
            of_normed_bias, own = own[: self.normed_bias], own[self.normed_bias :]
            found += [self._in_gates(of_weight_ih[d]), self.of_weight_hh[d]]
            if self.has_bias:
                bias_ih, bias_hh = self._in_gates(of_bias_ih[d]), self.of_bias_hh[d]
                if not self.cell.bias_in_step and bias_ih is not None:
                    bias_hh = bias_ih.clone()
                found += [bias_ih, *(of_normed_bias or [bias_hh])]
            if self.cell.norms:
                found.append(self.of_gain_ih[d])
            found += own
        return found

    def _through_input_norms(self, of_x: list[Tensor], x: Tensor, products: Tensor | None) -> None:
        """Make the gradients [R, G*H] of normalised input products those of the products, in place."""
        for d, (g, parameters) in enumerate(zip(of_x, self.per_direction, strict=True)):
            gain = parameters[-len(self.cell.vectors)]
            if products is None:
                own = product(x.flatten(0, -2), parameters[0].t())
            else:
                own = products.select(-2, d).flatten(0, -2)
            for rows in _row_blocks(len(g), g.device):
                of_product, of_gain = normed_input_backward(g[rows], own[rows], gain)
                g[rows].copy_(of_product)
                self.of_gain_ih[d] = _added(self.of_gain_ih[d], of_gain)

    def _of_x(self, grad_preact: Tensor) -> list[Tensor]:
        """The gradients of the input's preactivations: [R, D*G*H], or D times [R, G*H], in the order of the blocks."""
        rows = grad_preact.flatten(0, -2)
        if self.merged:
            return [rows]
        return [g[:, : self.cell.num_gates * self.H] for g in rows.chunk(len(self.needs), -1)]

    def _by_direction(self, found: list[Tensor] | None) -> list[Tensor | None]:
        """Gradients in the blocks of `_of_x`, one a direction."""
        if found is None:
            return [None] * len(self.needs)
        return found[0].chunk(len(self.needs)) if self.merged else found

    def in_blocks(self, weight: Tensor) -> Tensor:
        """Rows [G*H, ...] by gates, in the order of the blocks."""
        order = [self.cell.x_blocks.index(block) for block in range(len(self.cell.x_blocks))]
        return _reordered(weight, order)

    def _in_gates(self, gradient: Tensor | None) -> Tensor | None:
        """And back."""
        return gradient if gradient is None else _reordered(gradient, list(self.cell.x_blocks))


def _without_padding(gates: Tensor, layout: Layout) -> Tensor:
    """gates [T, B, ...] or [R, ...], with zeros in the padding, where they have no meaning."""
    if layout.lengths is None or layout.first_row is not None:
        return gates
    steps = torch.arange(len(gates), device=gates.device).unsqueeze(1)
    return gates.masked_fill((steps >= layout.lengths).unsqueeze(-1), 0)


def _row_blocks(rows: int, device: torch.device) -> list[slice]:
    """Blocks of rows that fit a CPU's cache; one on a GPU, whose passes want to be long, and in a graph, which is for
    any number.
    """
    if device.type != "cpu" or torch.compiler.is_compiling():
        return [slice(None)]
    return [slice(begin, begin + ROWS_OF_BLOCK) for begin in range(0, max(rows, 1), ROWS_OF_BLOCK)]


def _reordered(x: Tensor, order: list[int]) -> Tensor:
    """x [G*H, ...] by blocks of H rows; an empty order is the one that it has."""
    if order == [*range(len(order))]:
        return x
    blocks = x.chunk(len(order))  # and no index, which a device would have to wait for
    return torch.cat([blocks[k] for k in order])


def _added(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)


def _add_recurrent_weight_gradient(
    total: Tensor | None,  # [G*H, DH]
    grad_preact: Tensor,  # [T, B, G*H] or [R, G*H]
    output: Tensor,  # [T, B, H] or [R, H]
    hx: Tensor,  # [B, H]
    direction: int,
    layout: Layout,
    num_heads: int,
) -> Tensor:
    """total + sum over t of grad_preact_t^T h_{t-1}, within heads: [G*H, DH]."""
    # Else the states before are views: output is zero where a sequence has no later step, grad_preact where it has no
    # step.
    if layout.first_row is not None or layout.resets is not None:
        before = layout.states_before(output, hx, direction)
        return recurrent_weight_gradient(grad_preact.flatten(0, -2), before, num_heads, total)
    total = recurrent_weight_gradient(of_first_steps(grad_preact, direction, layout), hx, num_heads, total)
    if len(output) == 1:
        return total
    later, earlier = (slice(1, None), slice(None, -1)) if direction == 0 else (slice(None, -1), slice(1, None))
    return recurrent_weight_gradient(grad_preact[later].flatten(0, 1), output[earlier].flatten(0, 1), num_heads, total)


def of_first_steps(seq: Tensor, direction: int, layout: Layout) -> Tensor:
    """Of every sequence the row of its first step, [B, features] of [T, B, features] or [R, features].

    Zeros where a reset drops its hx.
    """
    if direction == 0:
        found = seq[0] if layout.first_row is None else seq[: len(layout.lengths)]
    elif layout.lengths is None:
        found = seq[-1]
    else:
        found = seq.flatten(0, -2)[layout.begin_rows(seq.shape[:-1], direction, seq.device)]
    dropped = layout.drops_hx(seq.shape[:-1], direction)
    return found if dropped is None else found.masked_fill(dropped.unsqueeze(1), 0)
