"""Layers with their gradients: one `autograd.Function` for a layer, and for several layers in one launch.

Around the ops (`fusedlstm.ops`), which hold what must be done step by step, are the large products: that of the input
before the loop, and those of the weights, biases and input after it (`fusedlstm.gradients`). `LoopFunction` knows what
autograd must know. What is computed is told by its first argument, a value without tensors: a `Layer`, a `Wave` or
`Specified`.

A wave is one launch in which layer l does step t beside layer l + 1 doing step t - 1. So a stack of L layers waits T +
L - 1 times for an exchange and not L * T times, where the device has room for all of them (`fusedlstm.plan.wave`). The
numbers are those of one layer after another, except that what a layer takes from the one below is not rounded in
between.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fusedlstm import transforms
from fusedlstm.cells import CELLS, Cell, Recurrence, State, Weights
from fusedlstm.engines import reference
from fusedlstm.gradients import ParameterGradients, of_first_steps
from fusedlstm.layout import DENSE, Layout
from fusedlstm.noise import NO_NOISE, Batch, Noise, entering
from fusedlstm.ops import (
    c_seq_dtype,
    grouped,
    input_product,
    input_products,
    is_batch_major,
    is_one_step,
    one_by_one,
    operations,
    preact_from,
    recompute,
    recurrence_bwd,
    recurrence_fwd,
    state_dtype,
    states_beside_h,
    step_fwd,
    wave_bwd,
    wave_fwd,
)
from fusedlstm.products import (
    add_recurrent_product,
    joined,
    normalised,
    product,
    stacked,
    with_samples,
    without_autocast,
)

# Blocks of steps with save="states": with more of them the borders grow as the buffers shrink. A product of fewer rows
# is slow, and what it saves is little.
MOST_BLOCKS, FEWEST_STEPS, FEWEST_ROWS = 10, 4, 256


class LoopFunction(torch.autograd.Function):
    """A layer or a wave with its gradients. `parameters`: as `fusedlstm.cells.cell` has them, per recurrence."""

    generate_vmap_rule = True

    @staticmethod
    def forward(loop, lengths, first_row, resets, seed, input, hx, cx, preact_0, *parameters):
        """input [T, B, I] or [R, I], hx [D, B, H], cx [S, D, B, H]; returns what `loop.forward` does."""
        batch = loop.batch((lengths, first_row, resets, seed))
        results = loop.forward(input, hx, cx, preact_0, grouped(parameters, loop.recurrences), batch)
        # Users change results in place. ATen's loops keep an output of their own for the backward, so ours does too.
        # cuDNN keeps the one that it returns, and so do the kernels, and whoever asks for little memory.
        output, copies = results[0], loop.engine == "torch" and loop.save == "gates"
        return (output.clone(), *results[1:], output) if copies else (*results, output.new_empty(0))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.loop, *layout, seed, input, hx, cx, preact_0 = inputs[:9]
        h, _, _, gates, c_seq, borders, products, own_h = output
        # None of these has a gradient. Their tangents are zero and not None, which torch.vmap does not take.
        ctx.without_tangents = [(x.shape, x.dtype) for x in (gates, c_seq, borders, products, own_h)]
        ctx.set_materialize_grads(False)
        kept = ctx.loop.kept(gates, c_seq, borders, products)
        h = own_h if own_h.numel() else h
        h = None if ctx.loop.save == "nothing" else h
        # torch.vmap takes what is saved for both ways to be the same.
        for save in (ctx.save_for_backward, ctx.save_for_forward):
            save(*layout, seed, input, hx, cx, preact_0, h, *kept, *inputs[9:])

    @staticmethod
    def tangents(ctx, *tangents):
        saved = ctx.saved_tensors
        call = ctx.loop.specified(ctx.loop.batch(saved[:4]), None)
        output, h_n, c_n, c_seq = transforms.tangents(call, (*saved[4:8], *saved[12:]), tangents[5:])
        output, c_seq = ctx.loop.whole(output, c_seq)
        gates, kept_c_seq, *others = (output.new_zeros(shape, dtype=dtype) for shape, dtype in ctx.without_tangents)
        return output, h_n, c_n, gates, c_seq if ctx.loop.wants_c_seq else kept_c_seq, *others

    @staticmethod
    def backward(ctx, grad_output, grad_h_n, grad_c_n, _grad_gates, grad_c_seq, *_):
        saved = ctx.saved_tensors  # once: a checkpoint gives them once
        input, hx, cx, preact_0, output, kept, c_kept, products = saved[4:12]
        loop, parameters, batch = ctx.loop, saved[12:], ctx.loop.batch(saved[:4])
        needs = ctx.needs_input_grad[5:]
        if not loop.wants_c_seq:
            grad_c_seq = None  # a compiler gives one for every result
        grad_output, grad_c_seq = loop.last(grad_output, grad_c_seq)
        grads = (grad_output, grad_h_n, grad_c_n, grad_c_seq)
        inputs, kept = (input, hx, cx, preact_0, *parameters), (output, kept, c_kept, products)
        if transforms.cannot_take(grads) or loop.save == "nothing":
            return *[None] * 5, *_differentiable(loop, grads, inputs, batch, needs)
        if torch.is_grad_enabled():  # with create_graph=True
            arguments = (Gradients(loop, tuple(needs)), *batch.flat[0], *grads, *kept, *inputs)
            found = iter(transforms.apply(GradientFunction, *arguments, name=f"{_name(loop)}_gradients"))
            return *[None] * 5, *(next(found) if need else None for need in needs)
        with without_autocast(input):
            return *[None] * 5, *loop.backward(grads, kept, inputs, batch, needs)


class GradientFunction(torch.autograd.Function):
    """The backward of `LoopFunction`, which has derivatives in its turn: those of the specification's gradients.

    So whoever asks for a graph of gradients, as `torch.func.grad` always does, pays for it only if it is used.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(gradients, lengths, first_row, resets, seed, *tensors):
        """The gradients that are needed, of four `grads`, four kept tensors and the inputs of `LoopFunction`."""
        batch, (grads, kept, inputs) = gradients.loop.batch((lengths, first_row, resets, seed)), _in_three(tensors)
        with without_autocast(inputs[0]):
            found = gradients.loop.backward(grads, kept, inputs, batch, gradients.needs)
        return tuple(g for g, need in zip(found, gradients.needs, strict=True) if need)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.gradients, *tables = inputs[:5]
        grads, _, of_loop = _in_three(inputs[5:])
        ctx.set_materialize_grads(False)
        for save in (ctx.save_for_backward, ctx.save_for_forward):
            save(*tables, *grads, *of_loop)

    @staticmethod
    def specified(ctx):
        """A function of `grads` and the inputs of `LoopFunction`, and these."""
        loop, needs = ctx.gradients.loop, ctx.gradients.needs
        tables, tensors = ctx.saved_tensors[:4], ctx.saved_tensors[4:]

        def call(*tensors):
            found = _differentiable(loop, tensors[:4], tensors[4:], loop.batch(tables), needs)
            return tuple(g for g, need in zip(found, needs, strict=True) if need)

        return call, tensors

    @staticmethod
    def tangents(ctx, *tangents):
        call, tensors = GradientFunction.specified(ctx)
        grads, _, of_loop = _in_three(tangents[5:])
        return transforms.tangents(call, tensors, (*grads, *of_loop))

    @staticmethod
    def backward(ctx, *grads):
        if all(g is None for g in grads):
            return (None,) * len(ctx.needs_input_grad)
        call, tensors = GradientFunction.specified(ctx)
        of_grads, _, of_loop = _in_three(ctx.needs_input_grad[5:])
        found = transforms.gradients(call, tensors, (*of_grads, *of_loop), grads)
        return *[None] * 5, *found[:4], *[None] * 4, *found[4:]


def _in_three(values: tuple) -> tuple[tuple, tuple, tuple]:
    """Of `grads`, of what was kept and of the inputs, from those of all."""
    return values[:4], values[4:8], values[8:]


@dataclass(frozen=True)
class Gradients:
    """What `GradientFunction` computes: the gradients of a loop by those of its inputs that need one."""

    loop: "Loop"
    needs: tuple[bool, ...]


@dataclass(frozen=True)
class Loop:
    """What is computed. It is no tuple, because torch's transforms would take that apart."""

    cell: Cell
    engine: str  # of the ops
    recurrences: int  # directions of a layer, or layers of a wave
    clip: float | None  # the largest element of the gradient of a state that enters a step
    wants_c_seq: bool
    save: str = "gates"
    rates: Sequence[float] = ()  # of `Noise`, as the next
    place: Sequence[int] = (0, 0)

    def batch(self, tables: Sequence[Tensor | None]) -> Batch:
        """Of `Batch.flat`."""
        return Batch.of(tables, self.rates, self.place)

    def last(self, output, c_seq):
        """Of gradients of the results, those of what is returned: all."""
        return output, c_seq

    def whole(self, output, c_seq):
        """And back."""
        return output, c_seq


class Layer(Loop):
    """One layer in all its directions, over blocks of steps (`begins_of_blocks`).

    With `save` "gates" that is one block, which keeps gates and c_seq. With "states" a block keeps the c that enters
    it, and the backward recomputes the rest from the output.
    """

    def forward(self, input, hx, cx, preact_0, parameters, batch) -> tuple[Tensor, ...]:
        """What `recurrence_fwd` returns; c of all steps that begin a block but the first, [blocks - 1, S, D, B, H]; and
        the products of `_block_fwd`."""
        blocks = self.blocks(input, batch.layout)
        keeps_gates, saves_states = self.save == "gates", self.save == "gates" or self.wants_c_seq
        output, c_seq, borders = None, None, []
        h, c = hx, cx if keeps_gates else cx.to(state_dtype(input.dtype))
        for k, steps in enumerate(blocks):
            x, own = input[steps], batch.of_steps(steps, h.size(1))
            first = preact_0 if k == 0 else None
            part, h, c, gates, c_part, products = _block_fwd(
                self.cell, self.engine, x, parameters, h, c, first, own, keeps_gates, saves_states
            )
            output = _placed(output, part, steps, input.size(0))
            c_seq = _placed(c_seq, c_part, steps, input.size(0), dim=1) if saves_states else c_part
            borders.append(c)
            del part, c_part  # or they would live beside those of the next block
        borders = torch.stack(borders[:-1]) if len(blocks) > 1 else c.new_empty(0)
        return output, h, c.to(cx.dtype), gates, c_seq, borders, products

    def kept(self, gates, c_seq, borders, products) -> tuple[Tensor | None, ...]:
        """What the backward needs beside input and output."""
        return (gates, c_seq, products) if self.save == "gates" else (borders, None, None)

    def specified(self, batch: Batch, clip: reference.Clip | None) -> Callable[..., tuple[Tensor, ...]]:
        """The specification, in operations that autograd can differentiate again; returns what has gradients."""
        spec = Recurrence(self.cell, clip, save_gates=False)

        def call(input, hx, cx, preact_0, *parameters):
            per_direction = grouped(parameters, self.recurrences)
            preact_x = input_product(self.cell, input, per_direction, preact_0, batch.layout)
            weights = Weights([p[1] for p in per_direction], self.cell.step_vectors(per_direction))
            saved = reference.recurrence_fwd(spec, preact_x, weights, State(hx, cx), batch)
            return saved.output, saved.h_n, saved.c_n, saved.c_seq.to(state_dtype(saved.c_seq.dtype))

        return call

    def backward(self, grads, kept, inputs, batch, needs) -> tuple[Tensor | None, ...]:
        """The gradients of input, hx, cx, preact_0 and the parameters."""
        grad_output, grad_h_n, grad_c_n, grad_c_seq = grads
        (output, kept, c_kept, products), (input, hx, cx, preact_0, *parameters) = kept, inputs
        parameters = grouped(parameters, self.recurrences)
        weight_hh, vectors = [p[1] for p in parameters], self.cell.step_vectors(parameters)
        gradients = ParameterGradients(self.cell, parameters, grouped(needs[4:], self.recurrences))
        blocks = self.blocks(input, batch.layout)
        of_states = cx.dtype if self.save == "gates" else state_dtype(input.dtype)
        grad_h = torch.zeros_like(hx) if grad_h_n is None else grad_h_n
        grad_c = torch.zeros_like(cx, dtype=of_states) if grad_c_n is None else grad_c_n.to(of_states)
        grad_input = grad_preact_0 = None
        for k, steps in reversed([*enumerate(blocks)]):
            own = batch.of_steps(steps, hx.size(1))
            h, c = (hx, cx.to(of_states)) if k == 0 else (output[steps.start - 1].unsqueeze(0), kept[k - 1])
            x, y = input[steps], output[steps]
            if self.save == "gates":
                gates, c_seq = kept, c_kept
            else:
                first = preact_0 if k == 0 else None
                gates, c_seq = _recomputed(self.cell, self.engine, x, parameters, first, h, c, y, own)
            of_rows = (
                None if grad_output is None else grad_output[steps],
                None if grad_c_seq is None else grad_c_seq[:, steps],
            )
            grad_preact, grad_h, grad_c = recurrence_bwd(
                self.cell.name,
                self.engine,
                [*of_rows, grad_h, grad_c],
                weight_hh,
                vectors,
                h,
                c,
                [y, gates, c_seq],
                *own.flat,
                self.clip,
            )
            gradients.add(grad_preact, x, y, gates, c_seq, h, c, *own, products)
            del gates, c_seq  # what a block needs does not live beside the next one's
            if needs[0]:
                grad_input = _placed(grad_input, gradients.of_input(grad_preact, x), steps, input.size(0))
            if needs[3] and k == 0:
                by_direction = enumerate(grad_preact.chunk(self.recurrences, -1))
                grad_preact_0 = torch.stack([of_first_steps(g, d, own.layout) for d, g in by_direction])
            grad_preact = by_direction = None
        return grad_input, grad_h, grad_c.to(cx.dtype), grad_preact_0, *gradients.flat()

    def blocks(self, input: Tensor, layout: Layout) -> list[slice]:
        """The steps of every block, all there are in one where they cannot be told apart by the rows."""
        if self.save == "gates" or self.recurrences == 2 or layout.first_row is not None:
            return [slice(None)]
        begins = begins_of_blocks(*input.shape[:2])
        return [slice(begin, end) for begin, end in itertools.pairwise(begins)]


@dataclass(frozen=True)
class Specified(Loop):
    """A layer of the specification whose gradient is clipped, perhaps with a projection. It keeps nothing.

    Plain autograd would clip what comes back through the forward in a second derivative too.
    """

    save: str = "nothing"
    projected: bool = False  # whether the last parameter of a direction is weight_hr [P, H]

    def forward(self, input, hx, cx, preact_0, parameters, batch) -> tuple[Tensor, ...]:
        flat = [p for direction in parameters for p in direction]
        output, h_n, c_n, c_seq = self.specified(batch, None)(input, hx, cx, preact_0, *flat)
        return output, h_n, c_n, output.new_empty(0), c_seq, output.new_empty(0), output.new_empty(0)

    def kept(self, *_) -> tuple[None, ...]:
        return None, None, None

    def specified(self, batch: Batch, clip: reference.Clip | None) -> Callable[..., tuple[Tensor, ...]]:
        spec = Recurrence(self.cell, clip, save_gates=False)

        def call(input, hx, cx, _, *flat):
            parameters, weight_hr = grouped(flat, self.recurrences), None
            if self.projected:
                parameters, weight_hr = [p[:-1] for p in parameters], [p[-1] for p in parameters]
            saved = reference.layer(spec, input, State(hx, cx), parameters, batch, weight_hr)
            return saved.output, saved.h_n, saved.c_n, saved.c_seq

        return call


class Wave(Loop):
    """The layers of a stack in one launch. Kernels only; one direction, and nothing between the layers."""

    def forward(self, input, hx, cx, preact_0, parameters, batch, *saves: bool) -> tuple[Tensor, ...]:
        """What `wave_fwd` returns, of all layers, and two that are empty; `saves`: gates and states, both if nothing is
        said.
        """
        cell = self.cell
        preact_x = input_product(cell, input, parameters[:1], None, batch.layout)
        weights = (*_above_first(cell, parameters, input), [p[1] for p in parameters], cell.step_vectors(parameters))
        found = wave_fwd(cell.name, preact_x, *weights, hx, cx, batch.flat[0], *(saves or (True, True)), self.engine)
        return *found, input.new_empty(0), input.new_empty(0)

    def kept(self, gates, c_seq, borders, products) -> tuple[Tensor | None, ...]:
        return gates, c_seq, None

    def last(self, output, c_seq):
        """Of every layer but the last nothing is returned."""
        return None if output is None else output[-1], None if c_seq is None else c_seq[:, -1]

    def whole(self, output, c_seq):
        """As the last of all layers, of which the others are zero."""
        return tuple(
            torch.stack([*[torch.zeros_like(x)] * (self.recurrences - 1), x], dim)
            for dim, x in ((0, output), (1, c_seq))
        )

    def specified(self, batch: Batch, clip: reference.Clip | None) -> Callable[..., tuple[Tensor, ...]]:
        """As that of a layer, of the last one; with a clip each layer has its own, as without a wave."""
        limit = None if clip is None else clip.limit

        def call(x, hx, cx, preact_0, *flat):
            h_n, c_n = [], []
            for k, own in enumerate(grouped(flat, self.recurrences)):
                state = (hx[k : k + 1], cx[:, k : k + 1])
                x, h, c, c_seq = specified_layer(self.cell, x, *state, [own], batch, limit, wants_c_seq=True)
                h_n.append(h)
                c_n.append(c)
            return x, torch.cat(h_n), torch.cat(c_n, 1), c_seq.to(state_dtype(c_seq.dtype))

        return call

    def backward(self, grads, kept, inputs, batch, needs) -> tuple[Tensor | None, ...]:
        grad_output, grad_h_n, grad_c_n, grad_c_seq = grads
        (output, gates, c_seq, _), (input, hx, cx, _, *parameters) = kept, inputs
        parameters = grouped(parameters, self.recurrences)
        of_layers = zip(parameters, grouped(needs[4:], self.recurrences), strict=True)
        layers = [ParameterGradients(self.cell, [p], [n]) for p, n in of_layers]
        grad_preact, grad_hx, grad_cx = wave_bwd(
            self.cell.name,
            [
                grad_output,
                grad_c_seq,
                torch.zeros_like(hx) if grad_h_n is None else grad_h_n,
                torch.zeros_like(cx) if grad_c_n is None else grad_c_n,
            ],
            stacked([layers[0].in_blocks(p[0]) for p in parameters[1:]]),
            [p[1] for p in parameters],
            self.cell.step_vectors(parameters),
            hx,
            cx,
            [output, gates, c_seq],
            batch.flat[0],
            self.clip,
            self.engine,
        )
        grad_input = layers[0].of_input(grad_preact[0], input) if needs[0] else None
        gradients = []
        for k, own in enumerate(layers):
            x = input if k == 0 else output[k - 1]
            own.add(grad_preact[k], x, output[k], gates[k], c_seq[:, k], hx[k : k + 1], cx[:, k : k + 1], batch.layout)
            gradients += own.flat()
        return grad_input, grad_hx, grad_cx, None, *gradients


def layer(
    cell: Cell,
    input: Tensor,  # [T, B, I] or packed [R, I]
    state: tuple[Tensor, ...],  # h first, each [D, B, H]
    parameters: list[list[Tensor]],  # per direction, as in `fusedlstm.cells.cell`
    engine: str,
    layout: Layout = DENSE,
    clip: float | None = None,
    wants_c_seq: bool = False,
    preact_0: Tensor | None = None,  # [D, B, G*H]
    save: str = "gates",
    noise: Noise = NO_NOISE,
) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
    """One layer over a sequence, differentiable in every tensor.

    Args:
        cell: One of `fusedlstm.cells.CELLS`.
        engine: Of the ops, see `fusedlstm.ops`.
        clip: The largest element of the gradient of a state that enters a step.
        wants_c_seq: Whether the states beside h are wanted of every step.
        preact_0: Added to the preactivations of every sequence's first step, unless a reset drops its initial state.
        save: What is kept for the backward beside input and output: "gates" and c of every step, or "states", c between
            blocks of steps, from which the backward recomputes the others.
        noise: Zoneout and dropouts inside of the steps.

    Returns:
        output [T, B, D*H] or [R, D*H], the final states, and c_seq [S, T, B, D*H] or [S, R, D*H] in the dtype of
        `input`.
    """
    hx, cx = state[0], states_beside_h(state)
    _, *of_noise = noise
    loop, batch = Layer(cell, engine, len(parameters), clip, wants_c_seq, save, *of_noise), Batch(layout, noise)
    found = followed = _followed(loop, input, hx, cx, preact_0, parameters, batch)
    if found is None:
        found = _block_fwd(cell, engine, input, parameters, hx, cx, preact_0, batch, False, wants_c_seq)
    output, h_n, c_n, _, c_seq, *_ = found
    if wants_c_seq:  # the backward needs its own, and users change results in place
        c_seq = c_seq.to(output.dtype, copy=followed is not None)
    return output, (h_n, *one_by_one(c_n)), c_seq if wants_c_seq else None


def specified_layer(
    cell: Cell,
    input: Tensor,  # [T, B, I] or packed [R, I]
    hx: Tensor,  # [D, B, P]
    cx: Tensor,  # [S, D, B, H]
    parameters: list[list[Tensor]],  # per direction, as in `fusedlstm.cells.cell`, with a projection weight_hr too
    batch: Batch,
    clip: float | None,
    wants_c_seq: bool = False,
    projected: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One layer of the specification; returns output, h_n, c_n and c_seq as `reference.recurrence_fwd` does."""
    flat = [p for own in parameters for p in own]
    _, *of_noise = batch.noise
    loop = Specified(cell, "reference", len(parameters), clip, wants_c_seq, "nothing", *of_noise, projected)
    # A compiled graph has no second derivatives.
    if clip is None or torch.compiler.is_compiling() or not transforms.followed((input, hx, cx, *flat)):
        return loop.specified(batch, clip)(input, hx, cx, None, *flat)
    output, h_n, c_n, _, c_seq, *_ = _applied(loop, *batch.flat[0], input, hx, cx, None, *flat)
    return output, h_n, c_n, c_seq


def wave(
    cell: Cell,
    engine: str,  # "triton" or "auto"
    input: Tensor,  # [T, B, I] or packed [R, I]
    state: tuple[Tensor, ...],  # h first, each [L, B, H]
    parameters: list[list[Tensor]],  # per layer, as in `fusedlstm.cells.cell`
    layout: Layout,
    clip: float | None = None,
    wants_c_seq: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
    """All layers over a sequence, differentiable in every tensor; returns as `layer` does, of the last one."""
    hx, cx = state[0], states_beside_h(state)
    loop = Wave(cell, engine, len(parameters), clip, wants_c_seq)
    found = _followed(loop, input, hx, cx, None, parameters, Batch(layout))
    if found is None:
        found = loop.forward(input, hx, cx, None, parameters, Batch(layout), False, wants_c_seq)
    output, h_n, c_n, _, c_seq, *_ = found
    return output[-1], (h_n, *one_by_one(c_n)), c_seq[:, -1].to(output.dtype) if wants_c_seq else None


def _differentiable(loop, grads, tensors, batch: Batch, needs) -> list[Tensor | None]:
    """The gradients by the specification, which autograd can differentiate again.

    The clip is then a function of a gradient, with a derivative of 1 within its limits and of 0 outside of them.
    """
    clip = None if loop.clip is None else reference.Clip(loop.clip)
    found = transforms.gradients(loop.specified(batch, clip), tensors, needs, grads)
    if clip is not None:
        clip.limit = None
    return found


def _followed(loop: Layer | Wave, input, hx, cx, preact_0, parameters, batch) -> tuple[Tensor, ...] | None:
    """The results with a gradient; None if nobody follows them."""
    flat = [p for own in parameters for p in own]
    tensors = (input, hx, cx, *flat) if preact_0 is None else (input, hx, cx, preact_0, *flat)
    if not transforms.followed(tensors):
        return None
    return _applied(loop, *batch.flat[0], input, hx, cx, preact_0, *flat)


def _applied(loop: Loop, *arguments) -> tuple[Tensor, ...]:
    in_blocks = loop.cell.norms > 0 and loop.engine == "torch"
    if torch.compiler.is_exporting() or (in_blocks and torch.compiler.is_compiling()):
        return layer_fwd(*_as_op(loop, *arguments))
    return transforms.apply(LoopFunction, loop, *arguments, name=_name(loop))


# An exported program has no `autograd.Function`. There a layer is an op that has its gradient. A layer with norms is an
# op in every graph for a CPU: the op passes over the rows block by block, and a compiler over all at once. The others
# keep the function, because a compiler fuses what is around the loop.


def _as_op(loop: Loop, *arguments) -> tuple[Any, ...]:
    """The arguments of `layer_fwd`, from those of `LoopFunction.forward`."""
    *tables, input, hx, cx, preact_0 = arguments[:8]
    options = (loop.clip, [*loop.rates], [*loop.place], loop.save, loop.wants_c_seq)
    return loop.cell.name, loop.engine, tables, [input, hx, cx, *arguments[8:]], preact_0, *options


def _as_function(cell, engine, tables, tensors, preact_0, clip, rates, place, save, wants_c_seq) -> tuple[Any, ...]:
    """And back."""
    loop = Layer(CELLS[cell], engine, len(tensors[1]), clip, wants_c_seq, save, rates, place)
    return loop, *tables, *tensors[:3], preact_0, *tensors[3:]


def _keep(ctx, inputs, output):
    ctx.of_op = inputs[:2], inputs[5:9]
    # torch takes a list of tensors apart, even an empty one, and wants its gradients.
    taken_apart = [isinstance(x, list) and all(isinstance(y, Tensor) for y in x) for x in inputs]
    ctx.of_lists = [[None] * len(x) if apart else None for x, apart in zip(inputs, taken_apart, strict=True)]
    LoopFunction.setup_context(ctx, _as_function(*inputs), output)


def _through(ctx, grad_output, grad_h_n, grad_c_n, _grad_gates, grad_c_seq, *_):
    saved, (names, options) = ctx.saved_tensors, ctx.of_op
    of_tensors, of_preact_0 = ctx.needs_input_grad[3:5]
    needs = [*of_tensors[:3], of_preact_0, *of_tensors[3:]]
    inputs, kept = [*saved[4:8], *saved[12:]], [*saved[8:12]]
    grads = [grad_output, grad_h_n, grad_c_n, grad_c_seq if ctx.loop.wants_c_seq else None]
    found = iter(layer_bwd(*names, grads, kept, [*saved[:4]], inputs, *options, needs))
    gradients = [next(found) if need else None for need in needs]
    grad_preact_0 = gradients.pop(3)
    return *[None] * 2, ctx.of_lists[2], gradients, grad_preact_0, *ctx.of_lists[5:]


@transforms.op("layer_fwd", _through, _keep)
def layer_fwd(
    cell: str,
    engine: str,
    tables: list[Tensor | None],  # `Batch.flat`
    tensors: list[Tensor],  # input, hx, cx and the parameters of `LoopFunction`
    preact_0: Tensor | None,
    clip: float | None,  # these five: as in `Loop`
    rates: list[float],
    place: list[int],
    save: str,
    wants_c_seq: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`LoopFunction` of a layer."""
    given = (cell, engine, tables, tensors, preact_0, clip, rates, place, save, wants_c_seq)
    return tuple(x.contiguous() for x in LoopFunction.forward(*_as_function(*given)))


@torch.library.register_fake(layer_fwd)
def _(*given):
    loop, *tables, input, hx, cx, _, weight_ih = _as_function(*given)[:10]
    (*rows, _), (D, _, H), keeps_gates = input.shape, hx.shape, loop.save == "gates"
    blocks = 1 if keeps_gates else len(loop.blocks(input, loop.batch(tables).layout))
    of_states, states = cx.dtype if keeps_gates else state_dtype(input.dtype), c_seq_dtype(loop.engine, input)

    def made(wanted: bool, *shape, dtype=input.dtype):
        return input.new_empty(shape if wanted else 0, dtype=dtype)

    return (
        made(True, *rows, D * H),
        hx.new_empty(hx.shape),
        cx.new_empty(cx.shape),
        made(keeps_gates, *rows, D * loop.cell.num_kept * H),
        made(keeps_gates or loop.wants_c_seq, len(cx), *rows, D * H, dtype=states),
        made(blocks > 1, blocks - 1, *cx.shape, dtype=of_states),
        made(keeps_gates and loop.cell.norms > 0, *rows, D, len(weight_ih)),
        made(keeps_gates and loop.engine == "torch", *rows, D * H),
    )


@transforms.op("layer_bwd")
def layer_bwd(
    cell: str,
    engine: str,
    grads: list[Tensor | None],  # of output, h_n, c_n and c_seq
    kept: list[Tensor | None],  # output and `Layer.kept`
    tables: list[Tensor | None],  # these: as in the forward
    inputs: list[Tensor | None],  # input, hx, cx, preact_0 and the parameters of `LoopFunction`
    clip: float | None,
    rates: list[float],
    place: list[int],
    save: str,
    needs: list[bool],  # of each of `inputs`
) -> list[Tensor]:
    """The gradients that are needed."""
    loop = Layer(CELLS[cell], engine, len(inputs[1]), clip, False, save, rates, place)
    with without_autocast(inputs[0]):
        found = loop.backward(grads, kept, inputs, loop.batch(tables), needs)
    return [_apart(g) for g, need in zip(found, needs, strict=True) if need]


def _apart(x: Tensor) -> Tensor:
    """x without gaps in memory of its own, as the results of an op must be: gradients may be views of one tensor."""
    return x.clone(memory_format=torch.contiguous_format) if x.untyped_storage().nbytes() > x.nbytes else x.contiguous()


@torch.library.register_fake(layer_bwd)
def _(cell, engine, grads, kept, tables, inputs, clip, rates, place, save, needs):
    return [x.new_empty(x.shape) for x, need in zip(inputs, needs, strict=True) if need]


@register_flop_formula(torch.ops.fusedlstm.layer_fwd)
def _(cell, engine, tables, tensors, *_, **__) -> int:
    return operations(tensors[0][:-1], [p for p in tensors[3:] if len(p) == 2])


@register_flop_formula(torch.ops.fusedlstm.layer_bwd)
def _(cell, engine, grads, kept, tables, inputs, *_, **__) -> int:
    return 2 * operations(inputs[0][:-1], [p for p in inputs[4:] if len(p) == 2])


def _name(loop: Loop) -> str:
    """What a profiler shows, which tells the cell, such as fusedlstm::gru_layer."""
    return f"fusedlstm::{loop.cell.name}_{type(loop).__name__.lower()}"


def layers_together(
    cell: Cell,
    input: Tensor,  # [T, B, I] or packed [R, I]
    state: tuple[Tensor, ...],  # h first, each [L, B, H]
    weights: list[Tensor],
    layers: int,
    layout: Layout,
) -> int:
    """How many layers of a stack a launch should take: 1 where a wave does not fit or does not pay."""
    if torch.compiler.is_compiling():
        return 1  # a graph is for any batch, and the choice is not
    from fusedlstm.engines import launch

    hx = state[0]
    if weights[1].size(1) < hx.size(-1):
        return 1  # heads
    training = torch.is_grad_enabled() and any(x.requires_grad for x in (input, *state, *weights))
    return launch.layers_together(cell.name, input, hx, layers, layout.name, training)


def _above_first(cell: Cell, parameters: list, like: Tensor) -> tuple[Tensor, Tensor]:
    """weight_ih [L-1, G*H, H] and what is added to its product [L-1, G*H] of the layers above the first."""
    weight_ih = stacked([p[0] for p in parameters[1:]])
    if not cell.has_bias(parameters[0]):
        return weight_ih, like.new_zeros(weight_ih.shape[:2])
    return weight_ih, stacked([cell.input_bias(p) for p in parameters[1:]])


def _block_fwd(
    cell: Cell,
    engine: str,
    input: Tensor,  # [T, B, I] or [R, I]
    parameters: list,
    hx: Tensor,  # [D, B, H]
    cx: Tensor,  # [S, D, B, H]
    preact_0: Tensor | None,  # [D, B, G*H]
    batch: Batch,
    save_gates: bool,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Input product and time loop, in one kernel if there is a single step; returns what `recurrence_fwd` does.

    And the products [T, B, D, G*H] or [R, D, G*H] that the backward of input norms takes; empty unless gates are saved.
    """
    if preact_0 is None and not batch.noise.rates and is_one_step(cell, engine, input, batch.layout):
        flat = [p for direction in parameters for p in direction]
        output, h_n, c_n, gates, c_seq = step_fwd(
            cell.name, input[0], hx, cx, flat, len(parameters), save_gates, save_states, engine
        )
        gates, c_seq = gates.unsqueeze(0) if save_gates else gates, c_seq.unsqueeze(1) if save_states else c_seq
        return output.unsqueeze(0), h_n, c_n, gates, c_seq, input.new_empty(0)
    products = input_products(cell, input, parameters)
    preact_x = preact_from(cell, input, products, parameters, preact_0, batch.layout)
    if not (cell.norms and save_gates):
        products = input.new_empty(0)
    own = ([p[1] for p in parameters], cell.step_vectors(parameters), hx, cx, *batch.flat)
    return *recurrence_fwd(cell.name, engine, preact_x, *own, save_gates, save_states), products


def begins_of_blocks(T: int, B: int) -> list[int]:
    """The steps at which the blocks of a batch begin, and T: blocks of as equal a length as can be."""
    count = max(1, min(MOST_BLOCKS, T // FEWEST_STEPS, T * B // FEWEST_ROWS))
    return [k * T // count for k in range(count + 1)]


def _placed(whole: Tensor | None, part: Tensor, steps: slice, size: int, dim: int = 0) -> Tensor:
    """`part` put at `steps` of a whole that has `size` of them, made when its first part comes; `part` if it is all."""
    if part.size(dim) == size:
        return part
    if whole is None:
        whole = part.new_empty(*part.shape[:dim], size, *part.shape[dim + 1 :])
    whole.narrow(dim, steps.start, part.size(dim)).copy_(part)
    return whole


def _recomputed(
    cell: Cell,
    engine: str,
    input: Tensor,  # [T, B, I] or [R, I]
    parameters: list,
    preact_0: Tensor | None,  # [D, B, G*H]
    hx: Tensor,  # [D, B, H]
    cx: Tensor,  # [S, D, B, H]
    output: Tensor,  # [T, B, D*H] or [R, D*H]
    batch: Batch,
) -> tuple[Tensor, Tensor]:
    """gates and c_seq of a forward: since its output is known, the recurrent products are one product of all steps."""
    preact = with_samples(input_product(cell, input, parameters, preact_0, batch.layout), output)
    if is_batch_major(input):
        preact = preact.contiguous()
    taken, factor = cell.step_vectors(parameters), batch.noise.of_sequences(*hx.shape, hx.dtype)
    by_direction = output.chunk(len(parameters), -1)

    def before(d: int) -> Tensor:
        """The h that enters the recurrent product, [R, H]."""
        y, h_0 = by_direction[d], hx[d]
        return batch.layout.states_before(
            *((y, h_0) if factor is None else entering(y, h_0, factor[d], batch.layout)), d
        )

    if cell.norms and cell.num_cell_states:
        return _recomputed_with_norms(cell, engine, preact, parameters, taken, before, hx, cx, output, batch)
    if not cell.adds:
        gates = _recomputed_at_once(cell, preact, parameters, taken, before, output)
        return gates, output.new_empty(0, *output.shape, dtype=c_seq_dtype(engine, output))
    for d, p in enumerate(parameters):
        add_recurrent_product(preact[d].view(-1, preact.size(-1)), before(d), p[1])
    return recompute(cell.name, engine, preact, taken, hx, cx, *batch.flat)


def _recomputed_with_norms(
    cell: Cell,
    engine: str,
    preact_x: Tensor,  # [D, T, B, 4*H] or [D, R, 4*H]
    parameters: list,
    vectors: Tensor,  # [D, 6, H]
    before: Callable[[int], Tensor],  # from a direction to the h that enters its recurrent product, [R, H]
    hx: Tensor,  # [D, B, H]
    cx: Tensor,  # [1, D, B, H]
    output: Tensor,  # [T, B, D*H] or [R, D*H]
    batch: Batch,
) -> tuple[Tensor, Tensor]:
    """Of a cell with norms and c: once the recurrent products are normalised too, both are those of `Cell.plain`."""
    plain = cell.plain
    D, H = len(parameters), hx.size(-1)
    recurrent = [product(before(d), p[1].t()) for d, p in enumerate(parameters)]  # [R, 4*H]
    for x, u, own in zip(preact_x, recurrent, vectors, strict=True):
        x += (normalised(u) * own[:4].flatten()).view(x.shape)
    gates, c_seq = recompute(plain.name, engine, preact_x, None, hx, cx, *batch.flat)
    kept = []
    for d, (u, own) in enumerate(zip(recurrent, vectors, strict=True)):
        of_d, c = gates.chunk(D, -1)[d].flatten(0, -2), c_seq[0].chunk(D, -1)[d]
        if batch.noise.holds:  # the c that the step itself made
            drop = batch.noise.of_rows(len(u), d, H, hx)[2]
            c = plain.equations.update(of_d.chunk(4, -1), (None, batch.layout.states_before(c, cx[0, d], d)), drop)[1]
        m = torch.tanh(own[4] * normalised(c.flatten(0, -2)) + own[5]).to(output.dtype)
        kept += [of_d, m, u]
    return torch.cat(kept, -1).unflatten(0, output.shape[:-1]), c_seq


def _recomputed_at_once(
    cell: Cell,
    preact_x: Tensor,  # [D, T, B, G*H] or [D, R, G*H]
    parameters: list,
    vectors: Tensor | None,  # [D, V, H]
    before: Callable[[int], Tensor],  # from a direction to the h that enters its recurrent product, [R, H]
    output: Tensor,  # [T, B, D*H] or [R, D*H]
) -> Tensor:
    """gates of a cell without states beside h: every step is known at once."""
    gates = []
    dtype = state_dtype(preact_x.dtype)
    for d, p in enumerate(parameters):
        h = before(d)
        x = preact_x[d].flatten(0, -2)
        if cell.multiplies:
            preact_h = reference.recurrent_part(cell, h, reference.product_with(cell, p[1]))
        else:
            preact_h = torch.zeros_like(x)
            add_recurrent_product(preact_h, h, p[1])
            preact_h = preact_h.to(dtype).chunk(cell.num_gates, -1)
        own = () if vectors is None else vectors[d].to(dtype).unbind(0)
        kept, _ = cell.equations.step(x.to(dtype).chunk(cell.num_gates, -1), preact_h, (h.to(dtype),), own, 1.0)
        gates.append(torch.cat(kept, -1))
    return joined(gates, -1).to(output.dtype).unflatten(0, output.shape[:-1])
