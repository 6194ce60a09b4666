"""The layers of a stack as a wave: one launch in which layer l does step t beside layer l + 1 doing step t - 1.

So a stack of L layers waits T + L - 1 times for an exchange and not L * T times, where the device has room for all of them
(`fusedlstm.plan.wave`). The numbers are those of one layer after another, but that what a layer takes from the one below
is not rounded in between. Kernels only; one direction, and nothing between the layers.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fusedlstm import cells, transforms
from fusedlstm.autograd import _input_product, _stacked, _state_dtype, loop_bwd, loop_fwd
from fusedlstm.engines import failures, reference
from fusedlstm.gradients import ParameterGradients
from fusedlstm.layout import Layout
from fusedlstm.noise import NO_NOISE
from fusedlstm.products import product, stacked


@transforms.op("fusedlstm::wave_fwd")
def wave_fwd(
    cell: str,
    preact_x: Tensor,  # [1, T, B, G*H] or packed [1, R, G*H]: the first layer's
    weight_ih: Tensor,  # [L-1, G*H, H] of the layers above the first
    bias: Tensor,  # [L-1, G*H]
    weight_hh: list[Tensor],  # L times [G*H, H]
    vectors: Tensor | None,  # [L, V, H]
    hx: Tensor,  # [L, B, H]
    cx: Tensor,  # [S, L, B, H]
    lengths: Tensor | None,  # these three: a `Layout`
    first_row: Tensor | None,
    resets: Tensor | None,
    save_gates: bool,
    save_states: bool,
    engine: str = "triton",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """output [L, T, B, H], h_n [L, B, H], c_n [S, L, B, H], gates [L, T, B, K*H], c_seq [S, L, T, B, H]; [R] if packed.

    `engine` is "triton" or "auto", as in `recurrence`.
    """
    layout = Layout(lengths, first_row, resets)

    def kernels():
        from fusedlstm.engines import launch

        stack, saves = launch.Stack(weight_ih, bias), {"save_gates": save_gates, "save_states": save_states}
        return launch.recurrence_fwd(cell, preact_x, weight_hh, hx, cx, layout, vectors, **saves, stack=stack)

    def loop():
        found, x = [], preact_x
        for k, w in enumerate(weight_hh):
            own = slice(k, k + 1)
            if k > 0:
                x = product(found[-1][0].flatten(0, -2), weight_ih[k - 1].t(), bias[k - 1]).view(preact_x.shape)
            given = (x, [w], hx[own], cx[:, own], layout, None if vectors is None else vectors[own], NO_NOISE)
            found.append(loop_fwd(cell, engine, *given, save_gates, save_states))
        output, h_n, c_n, gates, c_seq = zip(*found, strict=True)
        gates = torch.stack(gates) if save_gates else gates[0]
        c_seq = torch.stack(c_seq, 1) if save_states else c_seq[0]
        return torch.stack(output), torch.cat(h_n), torch.cat(c_n, 1), gates, c_seq

    at = functools.partial(failures.where, hx.device, failures.as_wave(cell), preact_x.dtype, weight_hh[:1], hx, layout)
    return failures.attempt(engine, at, kernels, loop)


@wave_fwd.register_fake
def _(cell, preact_x, weight_ih, bias, weight_hh, vectors, hx, cx, lengths, first_row, resets, *saves):
    save_gates, save_states, *_ = saves
    _, *rows, _ = preact_x.shape
    L, H, S = len(weight_hh), hx.size(-1), cx.size(0)
    gates = preact_x.new_empty((L, *rows, cells.CELLS[cell].num_kept * H) if save_gates else 0)
    c_seq = preact_x.new_empty((S, L, *rows, H) if save_states else 0, dtype=_state_dtype(preact_x.dtype))
    return preact_x.new_empty(L, *rows, H), hx.new_empty(hx.shape), cx.new_empty(cx.shape), gates, c_seq


@transforms.op("fusedlstm::wave_bwd")
def wave_bwd(
    cell: str,
    grad_output: Tensor | None,  # [T, B, H] or packed [R, H]: of the last layer
    grad_c_seq: Tensor | None,  # [S, T, B, H] or [S, R, H]: the same
    grad_h_n: Tensor,  # [L, B, H]
    grad_c_n: Tensor,  # [S, L, B, H]
    weight_ih: Tensor,  # [L-1, G*H, H] of the layers above the first, gates in the order of their gradients
    weight_hh: list[Tensor],  # L times [G*H, H]
    vectors: Tensor | None,  # [L, V, H]
    hx: Tensor,  # [L, B, H]
    cx: Tensor,  # [S, L, B, H]
    output: Tensor,  # [L, T, B, H] or [L, R, H]
    gates: Tensor,  # [L, T, B, K*H] or [L, R, K*H]
    c_seq: Tensor,  # [S, L, T, B, H] or [S, L, R, H]
    lengths: Tensor | None,  # these three: a `Layout`
    first_row: Tensor | None,
    resets: Tensor | None,
    clip: float | None,
    engine: str = "triton",
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_preact like gates, grad_hx [L, B, H], grad_cx [S, L, B, H]; `engine` as in `wave_fwd`."""
    layout = Layout(lengths, first_row, resets)

    def kernels():
        from fusedlstm.engines import launch

        return launch.recurrence_bwd(
            cell, grad_output, grad_c_seq, grad_h_n, grad_c_n, weight_hh, hx, cx, output, gates, c_seq, layout, clip, vectors,
            stack=launch.Stack(weight_ih),
        )  # fmt: skip

    def loop():
        found, grads = [], (grad_output, grad_c_seq)
        for k in reversed(range(len(weight_hh))):
            own = slice(k, k + 1)
            states = ([weight_hh[k]], hx[own], cx[:, own], output[k], gates[k], c_seq[:, k])
            arguments = (layout, clip, None if vectors is None else vectors[own], NO_NOISE)
            found.append(loop_bwd(cell, engine, (*grads, grad_h_n[own], grad_c_n[:, own]), states, *arguments))
            if k > 0:  # the gradient of the input's preactivations comes first (`ParameterGradients`)
                of_x = found[-1][0][..., : weight_ih.size(1)]
                grads = product(of_x.flatten(0, -2), weight_ih[k - 1]).view(output[k].shape), None
        grad_preact, grad_hx, grad_cx = zip(*reversed(found), strict=True)
        return torch.stack(grad_preact), torch.cat(grad_hx), torch.cat(grad_cx, 1)

    at = functools.partial(failures.where, hx.device, failures.as_wave(cell), gates.dtype, weight_hh[:1], hx, layout)
    return failures.attempt(engine, at, kernels, loop)


@wave_bwd.register_fake
def _(cell, grad_output, grad_c_seq, grad_h_n, grad_c_n, weight_ih, weight_hh, vectors, hx, cx, output, gates, *_):
    return gates.new_empty(gates.shape), hx.new_empty(hx.shape), cx.new_empty(cx.shape)


class WaveFunction(torch.autograd.Function):
    """A stack with its gradients. `parameters`: those of `fusedlstm.products`, per layer."""

    @staticmethod
    def forward(cell, engine, layers, clip, wants_c_seq, lengths, first_row, resets, input, hx, cx, *parameters):
        """input [T, B, I] or [R, I], hx [L, B, H], cx [S, L, B, H]; returns what `wave_fwd` does."""
        layout = Layout(lengths, first_row, resets)
        return _forward(cell, engine, input, hx, cx, _per_layer(parameters, layers), layout, True)

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return transforms.by_sample(functools.partial(transforms.apply, WaveFunction), info, in_dims, *arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.cell, ctx.engine, ctx.layers, ctx.clip, ctx.wants_c_seq, *layout, input, hx, cx = inputs[:11]
        h, _, _, gates, c_seq = output
        ctx.mark_non_differentiable(*([gates] if ctx.wants_c_seq else [gates, c_seq]))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*layout, input, hx, cx, h, gates, c_seq, *inputs[11:])
        ctx.save_for_forward(*layout, input, hx, cx, *inputs[11:])

    @staticmethod
    def tangents(ctx, *tangents):
        call = _specified(ctx, Layout(*ctx.saved_tensors[:3]), clip=None)
        output, h_n, c_n, c_seq = transforms.tangents(call, ctx.saved_tensors[3:], tangents[8:])
        # Of every layer but the last nothing is returned.
        output, c_seq = (_of_last(x, dim, ctx.layers) for dim, x in ((0, output), (1, c_seq)))
        return output, h_n, c_n, None, c_seq if ctx.wants_c_seq else None

    @staticmethod
    def backward(ctx, grad_output, grad_h_n, grad_c_n, _grad_gates, grad_c_seq):
        saved = ctx.saved_tensors  # once: a checkpoint gives them once
        *tables, input, hx, cx, output, gates, c_seq = saved[:9]
        layout, parameters = Layout(*tables), _per_layer(saved[9:], ctx.layers)
        needs = ctx.needs_input_grad[8:]
        # Of every layer but the last nothing is returned.
        grad_output, grad_c_seq = (
            grad_output if grad_output is None else grad_output[-1],
            grad_c_seq if grad_c_seq is None else grad_c_seq[:, -1],
        )
        grads = (grad_output, grad_h_n, grad_c_n, grad_c_seq)
        if transforms.wanted(grads):
            call = _specified(ctx, layout, ctx.clip)
            return *[None] * 8, *transforms.gradients(call, (input, hx, cx, *saved[9:]), needs, grads)
        layers = [
            ParameterGradients(ctx.cell, [p], [n])
            for p, n in zip(parameters, _per_layer(needs[3:], ctx.layers), strict=True)
        ]
        grad_preact, grad_hx, grad_cx = wave_bwd(
            ctx.cell,
            grad_output,
            grad_c_seq,
            torch.zeros_like(hx) if grad_h_n is None else grad_h_n,
            torch.zeros_like(cx) if grad_c_n is None else grad_c_n,
            stacked([layers[0].in_blocks(p[0]) for p in parameters[1:]]),
            [p[1] for p in parameters],
            cells.CELLS[ctx.cell].step_vectors(parameters),
            hx,
            cx,
            output,
            gates,
            c_seq,
            *layout,
            ctx.clip,
            ctx.engine,
        )
        grad_input = None
        if needs[0]:
            grad_input = layers[0].of_input(grad_preact[0], input)
        gradients = []
        for k, layer in enumerate(layers):
            x = input if k == 0 else output[k - 1]
            layer.add(grad_preact[k], x, output[k], gates[k], c_seq[:, k], hx[k : k + 1], cx[:, k : k + 1], layout)
            gradients += layer.flat()
        return *[None] * 8, grad_input, grad_hx, grad_cx, *gradients


def layers_together(
    cell: str,
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
    return launch.layers_together(cell, input, hx, layers, layout.name, training)


def stack(
    cell: str,
    engine: str,  # "triton" or "auto"
    input: Tensor,  # [T, B, I] or packed [R, I]
    state: tuple[Tensor, ...],  # h first, each [L, B, H]
    parameters: list[list[Tensor]],  # per layer, as in `fusedlstm.products`
    layout: Layout,
    clip: float | None = None,
    wants_c_seq: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
    """All layers over a sequence, differentiable in every tensor; returns as `recurrence.layer` does, of the last layer."""
    hx, cx = state[0], _stacked(state)
    flat = [p for layer in parameters for p in layer]
    if transforms.followed((input, hx, cx, *flat)):
        output, h_n, c_n, _, c_seq = transforms.apply(
            WaveFunction, cell, engine, len(parameters), clip, wants_c_seq, *layout, input, hx, cx, *flat
        )
    else:
        output, h_n, c_n, _, c_seq = _forward(cell, engine, input, hx, cx, parameters, layout, False, wants_c_seq)
    return output[-1], (h_n, *c_n.unbind(0)), c_seq[:, -1].to(output.dtype) if wants_c_seq else None


def _forward(cell, engine, input, hx, cx, parameters, layout, save_gates, save_states=True):
    preact_x = _input_product(cell, input, parameters[:1], None, layout)
    weights = (
        *_above_first(cell, parameters, input),
        [p[1] for p in parameters],
        cells.CELLS[cell].step_vectors(parameters),
    )
    return wave_fwd(cell, preact_x, *weights, hx, cx, *layout, save_gates, save_states, engine)


def _per_layer(parameters, layers: int) -> list:
    count = len(parameters) // layers
    return [parameters[k * count : (k + 1) * count] for k in range(layers)]


def _of_last(x: Tensor, dim: int, layers: int) -> Tensor:
    """`x` as the last along an axis of layers, of which the others are zero."""
    return torch.stack([*[torch.zeros_like(x)] * (layers - 1), x], dim)


def _above_first(cell: str, parameters: list, like: Tensor) -> tuple[Tensor, Tensor]:
    """weight_ih [L-1, G*H, H] and what is added to its product [L-1, G*H] of the layers above the first."""
    weight_ih = stacked([p[0] for p in parameters[1:]])
    if not cells.CELLS[cell].has_bias(parameters[0]):
        return weight_ih, like.new_zeros(weight_ih.shape[:2])
    return weight_ih, stacked([cells.CELLS[cell].input_bias(p) for p in parameters[1:]])


def _specified(ctx, layout: Layout, clip: float | None) -> Callable[..., tuple[Tensor, ...]]:
    """The specification, in operations that autograd can differentiate again; returns what has gradients, of the last layer."""

    def call(x, hx, cx, *flat):
        h_n, c_n = [], []
        for k, own in enumerate(_per_layer(flat, ctx.layers)):
            x, h, c, c_seq = reference.layer(ctx.cell, x, hx[k : k + 1], cx[:, k : k + 1], [own], layout, clip=clip)
            h_n.append(h)
            c_n.append(c)
        return x, torch.cat(h_n), torch.cat(c_n, 1), c_seq.to(_state_dtype(c_seq.dtype))

    return call
