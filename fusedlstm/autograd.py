"""One layer over time, both directions, as PyTorch sees it.

Two custom ops hold what must be done step by step; around them an `autograd.Function` does the large products: the
input product before the loop, and those of the weights, biases and input after it (`fusedlstm.gradients`). A third
recomputes what the forward did not keep. G gates, K kept blocks, V vectors and S states beside h are those of the cell
(`fusedlstm.cells`). An op runs on the engine "triton", the kernels; "torch", a loop of torch operations; or "auto", the kernels,
and that loop where they cannot be launched (`fusedlstm.engines.failures`): it then returns what the kernels would have, so that a
backward may follow the forward of the other. Sequences have rows, [T, B] or packed [R] (`fusedlstm.layout`), and then directions and features on one
axis, so that both directions share each product. A recurrent weight [G*H, DH] has H / DH heads (`fusedlstm.products`).
"""

import functools
import itertools
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fusedlstm import cells, transforms
from fusedlstm.engines import failures, reference, torch_loop
from fusedlstm.gradients import ParameterGradients, of_first_steps
from fusedlstm.layout import DENSE, Layout
from fusedlstm.noise import NO_NOISE, Noise, entering
from fusedlstm.products import add_recurrent_product, joined, normalised, product

KERNELS = ("triton", "auto")  # engines that run them, if they can

# Blocks of steps with save="states": with more of them the borders grow as the buffers shrink. A product of fewer rows is slow, and
# what it saves is little.
MOST_BLOCKS, FEWEST_STEPS, FEWEST_ROWS = 10, 4, 256


@transforms.op("fusedlstm::recurrence_fwd")
def recurrence_fwd(
    cell: str,
    engine: str,
    preact_x: Tensor,  # [D, T, B, G*H] or packed [D, R, G*H]
    weight_hh: list[Tensor],  # D times [G*H, DH]
    vectors: Tensor | None,  # [D, V, H]
    hx: Tensor,  # [D, B, H]
    cx: Tensor,  # [S, D, B, H]
    lengths: Tensor | None,  # these three: a `Layout`
    first_row: Tensor | None,
    resets: Tensor | None,
    seed: Tensor | None,  # these three: a `Noise`
    rates: list[float],
    place: list[int],
    save_gates: bool,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """output [T, B, D*H], h_n [D, B, H], c_n [S, D, B, H], gates [T, B, D*K*H], c_seq [S, T, B, D*H]; [R, ...] if packed.

    gates and c_seq are empty unless saved; of padding, output and c_seq are zero, and gates have no meaning.
    """
    layout, noise = Layout(lengths, first_row, resets), Noise(seed, rates, place)
    given = (preact_x, weight_hh, hx, cx, layout, vectors, noise)

    def kernels():
        from fusedlstm.engines import launch

        return launch.recurrence_fwd(cell, *given, save_gates=save_gates, save_states=save_states)

    at = partial(failures.where, hx.device, cell, preact_x.dtype, weight_hh, hx, layout)
    return failures.attempt(engine, at, kernels, lambda: loop_fwd(cell, engine, *given, save_gates, save_states))


def loop_fwd(cell, engine, preact_x, weight_hh, hx, cx, layout, vectors, noise, save_gates, save_states):
    """`recurrence_fwd` by torch operations; in the place of kernels computed in float32, as they do."""
    dtypes = (preact_x.dtype, hx.dtype, cx.dtype, preact_x.dtype, _c_seq_dtype(engine, preact_x))
    preact_x, weight_hh, hx, cx, vectors = _widened(engine, (preact_x, weight_hh, hx, cx, vectors))
    if noise.rates:
        found = reference.recurrence_fwd(cell, preact_x, weight_hh, hx, cx, layout, vectors=vectors, noise=noise)
        *results, gates, c_seq = found
        found = *results, gates if save_gates else gates.new_empty(0), c_seq if save_states else c_seq.new_empty(0)
    else:
        found = torch_loop.recurrence_fwd(cell, preact_x, weight_hh, hx, cx, layout, save_gates, save_states, vectors)
    return tuple(x.to(dtype) for x, dtype in zip(found, dtypes, strict=True))


@recurrence_fwd.register_fake
def _(cell, engine, preact_x, weight_hh, vectors, hx, cx, lengths, first_row, resets, seed, rates, place, *saves):
    save_gates, save_states = saves
    D, *rows, _ = preact_x.shape
    S, H = cx.size(0), hx.size(-1)
    gates = preact_x.new_empty((*rows, D * cells.CELLS[cell].num_kept * H) if save_gates else 0)
    c_seq = preact_x.new_empty((S, *rows, D * H) if save_states else 0, dtype=_c_seq_dtype(engine, preact_x))
    return preact_x.new_empty(*rows, D * H), hx.new_empty(hx.shape), cx.new_empty(cx.shape), gates, c_seq


@transforms.op("fusedlstm::recurrence_bwd")
def recurrence_bwd(
    cell: str,
    engine: str,
    grad_output: Tensor | None,  # [T, B, D*H] or packed [R, D*H]
    grad_c_seq: Tensor | None,  # [S, T, B, D*H] or [S, R, D*H]
    grad_h_n: Tensor,  # [D, B, H]
    grad_c_n: Tensor,  # [S, D, B, H]
    weight_hh: list[Tensor],  # D times [G*H, DH]
    vectors: Tensor | None,  # [D, V, H]
    hx: Tensor,  # [D, B, H]
    cx: Tensor,  # [S, D, B, H]
    output: Tensor,  # [T, B, D*H] or [R, D*H]
    gates: Tensor,  # [T, B, D*K*H] or [R, D*K*H]
    c_seq: Tensor,  # [S, T, B, D*H] or [S, R, D*H]
    lengths: Tensor | None,  # these three: a `Layout`
    first_row: Tensor | None,
    resets: Tensor | None,
    seed: Tensor | None,  # these three: a `Noise`
    rates: list[float],
    place: list[int],
    clip: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_preact like gates, grad_hx [D, B, H], grad_cx [S, D, B, H].

    `clip`: the largest element of the gradient of a state that enters a step.
    """
    layout, noise = Layout(lengths, first_row, resets), Noise(seed, rates, place)
    grads, states = (grad_output, grad_c_seq, grad_h_n, grad_c_n), (weight_hh, hx, cx, output, gates, c_seq)

    def kernels():
        from fusedlstm.engines import launch

        return launch.recurrence_bwd(cell, *grads, *states, layout, clip, vectors, noise)

    at = partial(failures.where, hx.device, cell, gates.dtype, weight_hh, hx, layout)
    own = (cell, engine, grads, states, layout, clip, vectors, noise)
    return failures.attempt(engine, at, kernels, lambda: loop_bwd(*own))


def loop_bwd(cell, engine, grads, states, layout, clip, vectors, noise):
    """`recurrence_bwd` by torch operations, from what either engine saved; as `loop_fwd`."""
    _, hx, cx, _, gates, _ = states
    dtypes = (gates.dtype, hx.dtype, cx.dtype)
    grads, states, vectors = _widened(engine, (grads, states, vectors))
    if noise.rates:
        of = zip(grads, (states[3], states[5]), strict=False)
        none = (torch.zeros_like(x) if g is None else g for g, x in of)
        found = reference.recurrence_bwd(cell, *none, *grads[2:], *states, layout, clip, vectors, noise)
    else:
        found = torch_loop.recurrence_bwd(cell, *grads, *states, layout, clip, vectors)
    return tuple(x.to(dtype) for x, dtype in zip(found, dtypes, strict=True))


@recurrence_bwd.register_fake
def _(cell, engine, grad_output, grad_c_seq, grad_h_n, grad_c_n, weight_hh, vectors, hx, cx, output, gates, *_):
    return gates.new_empty(gates.shape), hx.new_empty(hx.shape), cx.new_empty(cx.shape)


@transforms.op("fusedlstm::step_fwd")
def step_fwd(
    cell: str,
    input: Tensor,  # [B, I]
    hx: Tensor,  # [L*D, B, H]
    cx: Tensor,  # [S, L*D, B, H]
    parameters: list[Tensor],  # layer by layer and direction by direction, as in `fusedlstm.products`
    directions: int,
    save_gates: bool,
    save_states: bool,
    engine: str = "triton",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One step of a stack by kernels, input products and all: one launch a layer.

    output [B, D*H], h_n [L*D, B, H], c_n [S, L*D, B, H] in the dtype of cx; of the last layer gates [B, D*K*H] and c_seq
    [S, B, D*H], empty unless saved.
    """
    parameters = _per_direction(parameters, len(hx))

    def kernels():
        from fusedlstm.engines import launch

        saves = {"save_gates": save_gates, "save_states": save_states}
        return launch.step_fwd(cell, input, hx, cx, parameters, directions, **saves)

    def loop():
        h_n, c_n, x = [], [], input.unsqueeze(0)
        for k in range(0, len(hx), directions):
            own, rows = parameters[k : k + directions], slice(k, k + directions)
            preact_x = _input_product(cell, x, own, None, DENSE)
            given = (
                preact_x,
                [p[1] for p in own],
                hx[rows],
                cx[:, rows],
                DENSE,
                cells.CELLS[cell].step_vectors(own),
                NO_NOISE,
            )
            x, h, c, gates, c_seq = loop_fwd(cell, engine, *given, save_gates, save_states)
            h_n.append(h)
            c_n.append(c)
        gates, c_seq = gates.squeeze(0) if save_gates else gates, c_seq.squeeze(1) if save_states else c_seq
        return x.squeeze(0), torch.cat(h_n), torch.cat(c_n, 1), gates, c_seq

    at = partial(failures.where, hx.device, cell, input.dtype, [parameters[0][1]] * directions, hx, DENSE)
    return failures.attempt(engine, at, kernels, loop)


@step_fwd.register_fake
def _(cell, input, hx, cx, parameters, directions, save_gates, save_states, engine="triton"):
    (_, B, H), D = hx.shape, directions
    gates = input.new_empty((B, D * cells.CELLS[cell].num_kept * hx.size(-1)) if save_gates else 0)
    c_seq = input.new_empty((cx.size(0), B, D * H) if save_states else 0, dtype=_state_dtype(input.dtype))
    return input.new_empty(B, D * H), input.new_empty(hx.shape), cx.new_empty(cx.shape), gates, c_seq


@transforms.op("fusedlstm::recompute")
def recompute(
    cell: str,
    engine: str,
    preact: Tensor,  # [D, T, B, G*H] or packed [D, R, G*H], the recurrent part included
    vectors: Tensor | None,  # [D, V, H]
    hx: Tensor,  # [D, B, H]
    cx: Tensor,  # [S, D, B, H]
    lengths: Tensor | None,  # these three: a `Layout`
    first_row: Tensor | None,
    resets: Tensor | None,
    seed: Tensor | None,  # these three: a `Noise`
    rates: list[float],
    place: list[int],
) -> tuple[Tensor, Tensor]:
    """gates and c_seq as `recurrence_fwd` saves them, from its output: elementwise, so that nothing is waited for.

    Of cells that add both parts of a preactivation.
    """
    layout, noise = Layout(lengths, first_row, resets), Noise(seed, rates, place)

    def kernels():
        from fusedlstm.engines import launch

        return launch.recompute(cell, preact, hx, cx, layout, vectors, noise)

    def loop():
        nothing = [preact.new_zeros(preact.size(-1), hx.size(-1))] * len(hx) if rates else []
        return loop_fwd(cell, engine, preact, nothing, hx, cx, layout, vectors, noise, True, True)[3:]

    # A launch of its own: nothing waits in it, and what fails here says nothing about the loops.
    at = partial(failures.where, hx.device, f"{cell}, recomputed", preact.dtype, [], hx, layout)
    return failures.attempt(engine, at, kernels, loop)


@recompute.register_fake
def _(cell, engine, preact, vectors, hx, cx, *_):
    D, *rows, GH = preact.shape
    c_seq = preact.new_empty(len(cx), *rows, D * hx.size(-1), dtype=_c_seq_dtype(engine, preact))
    return preact.new_empty(*rows, D * GH), c_seq


class RecurrenceFunction(torch.autograd.Function):
    """A layer with its gradients. `parameters`: those of `fusedlstm.products`, per direction.

    It runs over blocks of steps (`begins_of_blocks`). With `save` "gates" that is one block, which keeps gates and c_seq. With
    "states" a block keeps the c that enters it, and the backward recomputes the rest from the output.
    """

    @staticmethod
    def forward(
        cell,
        engine,
        directions,
        clip,
        save,
        wants_c_seq,
        lengths,
        first_row,
        resets,
        seed,
        rates,
        place,
        input,
        hx,
        cx,
        preact_0,
        *parameters,
    ):
        """input [T, B, I] or [R, I], hx [D, B, H], cx [S, D, B, H]; returns what `recurrence_fwd` does.

        And c of all steps that begin a block but the first, [blocks - 1, S, D, B, H], and the products of `_block_fwd`.
        """
        layout, noise = Layout(lengths, first_row, resets), Noise(seed, rates, place)
        per_direction = _per_direction(parameters, directions)
        blocks = _blocks(save, directions, input, layout)
        keeps_gates, saves_states = save == "gates", save == "gates" or wants_c_seq
        output, c_seq, borders = None, None, []
        h, c = hx, cx if keeps_gates else cx.to(_state_dtype(input.dtype))
        for k, steps in enumerate(blocks):
            x, (own, drawn) = input[steps], _of_block(layout, noise, steps, h.size(1))
            first = preact_0 if k == 0 else None
            part, h, c, gates, c_part, products = _block_fwd(
                cell, engine, x, per_direction, h, c, first, own, drawn, keeps_gates, saves_states
            )
            output = _placed(output, part, steps, len(input))
            c_seq = _placed(c_seq, c_part, steps, len(input), dim=1) if saves_states else c_part
            borders.append(c)
            del part, c_part  # or they would live beside those of the next block
        borders = torch.stack(borders[:-1]) if len(blocks) > 1 else c.new_empty(0)
        return output, h, c.to(cx.dtype), gates, c_seq, borders, products

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return transforms.by_sample(functools.partial(transforms.apply, RecurrenceFunction), info, in_dims, *arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.cell, ctx.engine, ctx.directions, ctx.clip, ctx.save, wants_c_seq = inputs[:6]
        *layout, seed, ctx.rates, ctx.place, input, hx, cx, preact_0 = inputs[6:16]
        h, _, _, gates, c_seq, borders, products = output
        ctx.wants_c_seq = wants_c_seq
        ctx.mark_non_differentiable(gates, borders, products, *(() if wants_c_seq else (c_seq,)))
        ctx.set_materialize_grads(False)
        kept = (gates, c_seq, products) if ctx.save == "gates" else (borders, None, None)
        ctx.save_for_backward(*layout, seed, input, hx, cx, preact_0, h, *kept, *inputs[16:])
        ctx.save_for_forward(*layout, seed, input, hx, cx, preact_0, *inputs[16:])

    @staticmethod
    def tangents(ctx, *tangents):
        *tables, seed = ctx.saved_tensors[:4]
        call = _specified(ctx, Layout(*tables), Noise(seed, ctx.rates, ctx.place), clip=None)
        output, h_n, c_n, c_seq = transforms.tangents(call, ctx.saved_tensors[4:], tangents[12:])
        return output, h_n, c_n, None, c_seq if ctx.wants_c_seq else None, None, None

    @staticmethod
    def backward(ctx, grad_output, grad_h_n, grad_c_n, _grad_gates, grad_c_seq, *_):
        saved = ctx.saved_tensors  # once: a checkpoint gives them once
        *tables, seed, input, hx, cx, preact_0, output, kept, c_kept, products = saved[:12]
        parameters, layout, noise = saved[12:], Layout(*tables), Noise(seed, ctx.rates, ctx.place)
        needs = ctx.needs_input_grad[12:]
        if not ctx.wants_c_seq:
            grad_c_seq = None  # a compiler gives one for every result
        grads = (grad_output, grad_h_n, grad_c_n, grad_c_seq)
        if transforms.wanted(grads):
            tensors, call = (input, hx, cx, preact_0, *parameters), _specified(ctx, layout, noise, ctx.clip)
            return *[None] * 12, *transforms.gradients(call, tensors, needs, grads)
        per_direction = _per_direction(parameters, ctx.directions)
        weight_hh, taken = [p[1] for p in per_direction], cells.CELLS[ctx.cell].step_vectors(per_direction)
        gradients = ParameterGradients(ctx.cell, per_direction, _per_direction(needs[4:], ctx.directions))

        blocks = _blocks(ctx.save, ctx.directions, input, layout)
        state_dtype = cx.dtype if ctx.save == "gates" else _state_dtype(input.dtype)
        grad_h = torch.zeros_like(hx) if grad_h_n is None else grad_h_n
        grad_c = torch.zeros_like(cx, dtype=state_dtype) if grad_c_n is None else grad_c_n.to(state_dtype)
        grad_input = grad_preact_0 = None
        for k, steps in reversed([*enumerate(blocks)]):
            own, drawn = _of_block(layout, noise, steps, hx.size(1))
            h, c = (hx, cx.to(state_dtype)) if k == 0 else (output[steps.start - 1].unsqueeze(0), kept[k - 1])
            x, y = input[steps], output[steps]
            if ctx.save == "gates":
                gates, c_seq = kept, c_kept
            else:
                first = preact_0 if k == 0 else None
                gates, c_seq = _recomputed(ctx.cell, ctx.engine, x, per_direction, first, h, c, y, own, drawn)
            grad_preact, grad_h, grad_c = recurrence_bwd(
                ctx.cell,
                ctx.engine,
                None if grad_output is None else grad_output[steps],
                None if grad_c_seq is None else grad_c_seq[:, steps],
                grad_h,
                grad_c,
                weight_hh,
                taken,
                h,
                c,
                y,
                gates,
                c_seq,
                *own,
                *drawn,
                ctx.clip,
            )
            gradients.add(grad_preact, x, y, gates, c_seq, h, c, own, drawn, products)
            del gates, c_seq  # what a block needs does not live beside the next one's
            if needs[0]:
                grad_input = _placed(grad_input, gradients.of_input(grad_preact, x), steps, len(input))
            if needs[3] and k == 0:
                by_direction = enumerate(grad_preact.chunk(ctx.directions, -1))
                grad_preact_0 = torch.stack([of_first_steps(g, d, own) for d, g in by_direction])
            grad_preact = by_direction = None
        return *[None] * 12, grad_input, grad_h, grad_c.to(cx.dtype), grad_preact_0, *gradients.flat()


def layer(
    cell: str,
    input: Tensor,  # [T, B, I] or packed [R, I]
    state: tuple[Tensor, ...],  # h first, each [D, B, H]
    parameters: list[list[Tensor]],  # per direction, as in `fusedlstm.products`
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
        cell: a name of `fusedlstm.cells.CELLS`.
        engine: of the ops, see above.
        clip: the largest element of the gradient of a state that enters a step.
        wants_c_seq: whether the states beside h are wanted of every step.
        preact_0: added to the preactivations of every sequence's first step, unless a reset drops its initial state.
        save: what is kept for the backward beside input and output: "gates" and c of every step, or "states", c between
            blocks of steps, from which the backward recomputes the others.
        noise: zoneout and dropouts inside of the steps.

    Returns:
        output [T, B, D*H] or [R, D*H], the final states, and c_seq [S, T, B, D*H] or [S, R, D*H] in the dtype of `input`.
    """
    hx, cx = state[0], _stacked(state)
    flat = [p for direction in parameters for p in direction]
    tensors = (input, hx, cx, *flat) if preact_0 is None else (input, hx, cx, preact_0, *flat)
    if transforms.followed(tensors):
        output, h_n, c_n, _, c_seq, *_ = transforms.apply(
            RecurrenceFunction,
            cell,
            engine,
            len(parameters),
            clip,
            save,
            wants_c_seq,
            *layout,
            *noise,
            input,
            hx,
            cx,
            preact_0,
            *flat,
        )
    else:
        output, h_n, c_n, _, c_seq, _ = _block_fwd(
            cell, engine, input, parameters, hx, cx, preact_0, layout, noise, False, wants_c_seq
        )
    return output, (h_n, *c_n.unbind(0)), c_seq.to(output.dtype) if wants_c_seq else None


def _stacked(state: tuple[Tensor, ...]) -> Tensor:
    """The states beside h as one tensor, [S, D, B, H]."""
    if len(state) == 2:
        return state[1].unsqueeze(0)
    return torch.stack(state[1:]) if len(state) > 2 else state[0].new_empty(0, *state[0].shape)


def is_one_step(cell: str, engine: str, input: Tensor, layout: Layout) -> bool:
    """Whether one kernel can take an input [T, B, I] whole: a single step, without masks, in which no program waits."""
    waits = cells.CELLS[cell].norms
    return engine in KERNELS and not waits and layout.name == "dense" and input.size(0) == 1 and input.size(2) > 0


def _c_seq_dtype(engine: str, like: Tensor) -> torch.dtype:
    """Of the states beside h of every step: the loop of torch operations keeps one dtype."""
    return _state_dtype(like.dtype) if engine in KERNELS else like.dtype


def _widened(engine: str, tree):
    """Tensors in nested tuples and lists; in float32 if they come from kernels, or go where these would."""
    if engine != "auto" or tree is None:
        return tree
    if isinstance(tree, Tensor):
        return tree.float()
    return type(tree)(_widened(engine, x) for x in tree)


def _state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which states beside h are saved."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _per_direction(parameters, directions: int) -> list:
    count = len(parameters) // directions
    return [parameters[k * count : (k + 1) * count] for k in range(directions)]


def _batch_major(input: Tensor) -> bool:
    return input.dim() == 3 and input.stride(0) < input.stride(1)


def _input_product(cell: str, input: Tensor, parameters: list, preact_0: Tensor | None, layout: Layout) -> Tensor:
    """preact_x [D, T, B, G*H] or [D, R, G*H] of all steps and directions: one product, in the order of `input` in memory."""
    return _preact_x(cell, input, _products(cell, input, parameters), parameters, preact_0, layout)


def _products(cell: str, input: Tensor, parameters: list) -> Tensor:
    """W x of all directions, [T, B, D, G*H] or [R, D, G*H], in the order of `input` in memory; with biases unless norms follow."""
    batch_major = _batch_major(input)
    ordered = input.transpose(0, 1) if batch_major else input
    weight_ih = joined([p[0] for p in parameters])  # [D*G*H, I]
    adds_bias = cells.CELLS[cell].has_bias(parameters[0]) and not cells.CELLS[cell].norms
    bias = joined([cells.CELLS[cell].input_bias(p) for p in parameters]) if adds_bias else None
    products = product(ordered.flatten(0, -2), weight_ih.t(), bias)
    products = products.view(*ordered.shape[:-1], len(parameters), parameters[0][0].size(0))
    return products.transpose(0, 1) if batch_major else products


def _preact_x(
    cell: str, input: Tensor, products: Tensor, parameters: list, preact_0: Tensor | None, layout: Layout
) -> Tensor:
    """preact_x from the products: normed where the cell has norms, else the products themselves, of which the first steps' change."""
    preact = products
    if cells.CELLS[cell].norms:
        batch_major = _batch_major(input)
        preact = cells.CELLS[cell].normed(products.transpose(0, 1) if batch_major else products, parameters)
        preact = preact.transpose(0, 1) if batch_major else preact
    preact = preact.movedim(-2, 0)
    for d in range(0 if preact_0 is None else len(parameters)):
        added, dropped = preact_0[d], layout.drops_hx(input.shape[:-1], d)
        if dropped is not None:
            added = added.masked_fill(dropped.unsqueeze(1), 0)
        if d == 0 and layout.first_row is not None:
            preact[d, : len(added)].add_(added)
        elif d == 0 or layout.lengths is None:
            preact[d, -d].add_(added)  # step 0, and in reverse the last one
        else:
            begin = layout.begin_rows(input.shape[:-1], d, input.device)
            if layout.first_row is None:
                preact[d, begin // input.size(1), begin % input.size(1)] += added
            else:
                preact[d].index_add_(0, begin, added)
    return preact


def _block_fwd(
    cell: str,
    engine: str,
    input: Tensor,  # [T, B, I] or [R, I]
    parameters: list,
    hx: Tensor,  # [D, B, H]
    cx: Tensor,  # [S, D, B, H]
    preact_0: Tensor | None,  # [D, B, G*H]
    layout: Layout,
    noise: Noise,
    save_gates: bool,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Input product and time loop, in one kernel if there is a single step; returns what `recurrence_fwd` does.

    And the products [T, B, D, G*H] or [R, D, G*H] that the backward of input norms takes; empty unless gates are saved.
    """
    if preact_0 is None and not noise.rates and is_one_step(cell, engine, input, layout):
        flat = [p for direction in parameters for p in direction]
        output, h_n, c_n, gates, c_seq = step_fwd(
            cell, input[0], hx, cx, flat, len(parameters), save_gates, save_states, engine
        )
        gates, c_seq = gates.unsqueeze(0) if save_gates else gates, c_seq.unsqueeze(1) if save_states else c_seq
        return output.unsqueeze(0), h_n, c_n, gates, c_seq, input.new_empty(0)
    products = _products(cell, input, parameters)
    preact_x = _preact_x(cell, input, products, parameters, preact_0, layout)
    if not (cells.CELLS[cell].norms and save_gates):
        products = input.new_empty(0)
    own = ([p[1] for p in parameters], cells.CELLS[cell].step_vectors(parameters), hx, cx, *layout, *noise)
    return *recurrence_fwd(cell, engine, preact_x, *own, save_gates, save_states), products


def begins_of_blocks(T: int, B: int) -> list[int]:
    """The steps at which the blocks of a batch begin, and T: blocks of as equal a length as can be."""
    count = max(1, min(MOST_BLOCKS, T // FEWEST_STEPS, T * B // FEWEST_ROWS))
    return [k * T // count for k in range(count + 1)]


def _blocks(save: str, directions: int, input: Tensor, layout: Layout) -> list[slice]:
    """The steps of every block, all there are in one where they cannot be told apart by the rows."""
    if save == "gates" or directions == 2 or layout.first_row is not None:
        return [slice(None)]
    begins = begins_of_blocks(*input.shape[:2])
    return [slice(begin, end) for begin, end in itertools.pairwise(begins)]


def _placed(whole: Tensor | None, part: Tensor, steps: slice, size: int, dim: int = 0) -> Tensor:
    """`part` put at `steps` of a whole that has `size` of them, made when its first part comes; `part` if it is all."""
    if part.size(dim) == size:
        return part
    if whole is None:
        whole = part.new_empty(*part.shape[:dim], size, *part.shape[dim + 1 :])
    whole.narrow(dim, steps.start, part.size(dim)).copy_(part)
    return whole


def _recomputed(
    cell: str,
    engine: str,
    input: Tensor,  # [T, B, I] or [R, I]
    parameters: list,
    preact_0: Tensor | None,  # [D, B, G*H]
    hx: Tensor,  # [D, B, H]
    cx: Tensor,  # [S, D, B, H]
    output: Tensor,  # [T, B, D*H] or [R, D*H]
    layout: Layout,
    noise: Noise,
) -> tuple[Tensor, Tensor]:
    """gates and c_seq of a forward: since its output is known, the recurrent products are one product of all steps."""
    preact = _input_product(cell, input, parameters, preact_0, layout)
    if _batch_major(input):
        preact = preact.contiguous()
    taken, factor = cells.CELLS[cell].step_vectors(parameters), noise.of_sequences(*hx.shape, hx.dtype)
    by_direction = output.chunk(len(parameters), -1)

    def before(d: int) -> Tensor:
        """The h that enters the recurrent product, [R, H]."""
        y, h_0 = by_direction[d], hx[d]
        return layout.states_before(*((y, h_0) if factor is None else entering(y, h_0, factor[d], layout)), d)

    if cells.CELLS[cell].norms:
        return _recomputed_with_norms(engine, preact, parameters, taken, before, hx, cx, output, layout, noise)
    if not cells.CELLS[cell].adds:
        gates = _recomputed_at_once(cell, preact, parameters, taken, before, output)
        return gates, output.new_empty(0, *output.shape, dtype=_c_seq_dtype(engine, output))
    for d, p in enumerate(parameters):
        add_recurrent_product(preact[d].view(-1, preact.size(-1)), before(d), p[1])
    return recompute(cell, engine, preact, taken, hx, cx, *layout, *noise)


def _recomputed_with_norms(
    engine: str,
    preact_x: Tensor,  # [D, T, B, 4*H] or [D, R, 4*H]
    parameters: list,
    vectors: Tensor,  # [D, 6, H]
    before: Callable[[int], Tensor],  # from a direction to the h that enters its recurrent product, [R, H]
    hx: Tensor,  # [D, B, H]
    cx: Tensor,  # [1, D, B, H]
    output: Tensor,  # [T, B, D*H] or [R, D*H]
    layout: Layout,
    noise: Noise,
) -> tuple[Tensor, Tensor]:
    """Of the LSTM with layer normalisation: with the recurrent products normalised too, gates and c are those of an LSTM."""
    D, H = len(parameters), hx.size(-1)
    recurrent = [product(before(d), p[1].t()) for d, p in enumerate(parameters)]  # [R, 4*H]
    for x, u, own in zip(preact_x, recurrent, vectors, strict=True):
        x += (normalised(u) * own[:4].flatten()).view(x.shape)
    gates, c_seq = recompute("lstm", engine, preact_x, None, hx, cx, *layout, *noise)
    kept = []
    for d, (u, own) in enumerate(zip(recurrent, vectors, strict=True)):
        of_d, c = gates.chunk(D, -1)[d].flatten(0, -2), c_seq[0].chunk(D, -1)[d]
        if noise.holds:  # the c that the step itself made
            drop = noise.of_rows(len(u), d, H, hx)[2]
            c = cells.CELLS["lstm"].equations.update(
                of_d.chunk(4, -1), (None, layout.states_before(c, cx[0, d], d)), drop
            )[1]
        m = torch.tanh(own[4] * normalised(c.flatten(0, -2)) + own[5]).to(output.dtype)
        kept += [of_d, m, u]
    return torch.cat(kept, -1).unflatten(0, output.shape[:-1]), c_seq


def _recomputed_at_once(
    cell: str,
    preact_x: Tensor,  # [D, T, B, G*H] or [D, R, G*H]
    parameters: list,
    vectors: Tensor | None,  # [D, V, H]
    before: Callable[[int], Tensor],  # from a direction to the h that enters its recurrent product, [R, H]
    output: Tensor,  # [T, B, D*H] or [R, D*H]
) -> Tensor:
    """gates of a cell without states beside h: every step is known at once."""
    of, gates = cells.CELLS[cell], []
    dtype = _state_dtype(preact_x.dtype)
    for d, p in enumerate(parameters):
        h = before(d)
        preact_h = torch.zeros_like(preact_x[d].reshape(len(h), -1))
        add_recurrent_product(preact_h, h, p[1])
        parts = (x.reshape(len(h), -1).to(dtype).chunk(of.num_gates, -1) for x in (preact_x[d], preact_h))
        own = () if vectors is None else vectors[d].to(dtype).unbind(0)
        kept, _ = cells.CELLS[cell].equations.step(*parts, (h.to(dtype),), own, 1.0)
        gates.append(torch.cat(kept, -1))
    return joined(gates, -1).to(output.dtype).unflatten(0, output.shape[:-1])


def _of_block(layout: Layout, noise: Noise, steps: slice, batch: int) -> tuple[Layout, Noise]:
    """Of a block of steps."""
    if steps.start is None:  # the only one
        return layout, noise
    return layout.of_steps(steps.start, steps.stop), noise.of_steps(steps.start * batch)


def _specified(ctx, layout: Layout, noise: Noise, clip: float | None) -> Callable[..., tuple[Tensor, ...]]:
    """The specification, in operations that autograd can differentiate again; returns what has gradients."""

    def call(input, hx, cx, preact_0, *parameters):
        per_direction = _per_direction(parameters, ctx.directions)
        preact_x = _input_product(ctx.cell, input, per_direction, preact_0, layout)
        weight_hh, taken = [p[1] for p in per_direction], cells.CELLS[ctx.cell].step_vectors(per_direction)
        output, h_n, c_n, _, c_seq = reference.recurrence_fwd(
            ctx.cell, preact_x, weight_hh, hx, cx, layout, clip=clip, vectors=taken, noise=noise
        )
        return output, h_n, c_n, c_seq.to(_state_dtype(c_seq.dtype))

    return call
