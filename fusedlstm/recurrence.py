"""One layer over time, both directions, as PyTorch sees it.

Two custom ops hold what must be done step by step; around them an `autograd.Function` does the large products: the
input product before the loop, and those of the weights, biases and input after it. Sequences have rows, [T, B] or packed
[R] (`fusedlstm.layout`), and then directions and features on one axis, so that both directions share each product.
A recurrent weight [G*H, DH] has H / DH heads (`fusedlstm.heads`).
"""

import torch
from torch import Tensor

from fusedlstm import heads, reference, torch_loop
from fusedlstm.layout import DENSE, Layout
from fusedlstm.precision import product


@torch.library.custom_op("fusedlstm::recurrence_fwd", mutates_args=())
def recurrence_fwd(
    cell: str,
    engine: str,
    preact_x: Tensor,  # [D, T, B, G*H] or packed [D, R, G*H]
    weight_hh: list[Tensor],  # D times [G*H, DH]
    hx: Tensor,  # [D, B, H]
    cx: Tensor,  # [S, D, B, H]
    lengths: Tensor | None,  # these three: a `Layout`
    first_row: Tensor | None,
    resets: Tensor | None,
    save_gates: bool,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """output [T, B, D*H], h_n [D, B, H], c_n [S, D, B, H], gates [T, B, D*G*H], c_seq [S, T, B, D*H]; [R, ...] if packed.

    `engine` is "triton", the kernel, or "torch", a loop of torch operations. gates and c_seq are empty unless saved; of
    padding, output and c_seq are zero, and gates have no meaning.
    """
    layout = Layout(lengths, first_row, resets)
    if engine == "triton":
        from fusedlstm import launch

        return launch.recurrence_fwd(
            cell, preact_x, weight_hh, hx, cx, layout, save_gates=save_gates, save_states=save_states
        )
    return torch_loop.recurrence_fwd(cell, preact_x, weight_hh, hx, cx, layout, save_gates, save_states)


@recurrence_fwd.register_fake
def _(cell, engine, preact_x, weight_hh, hx, cx, lengths, first_row, resets, save_gates, save_states):
    D, *rows, GH = preact_x.shape
    S, H = cx.size(0), hx.size(-1)
    gates = preact_x.new_empty((*rows, D * GH) if save_gates else 0)
    c_seq = preact_x.new_empty((S, *rows, D * H) if save_states else 0, dtype=_state_dtype(preact_x.dtype))
    return preact_x.new_empty(*rows, D * H), hx.new_empty(hx.shape), hx.new_empty(cx.shape), gates, c_seq


@torch.library.custom_op("fusedlstm::recurrence_bwd", mutates_args=())
def recurrence_bwd(
    cell: str,
    engine: str,
    grad_output: Tensor | None,  # [T, B, D*H] or packed [R, D*H]
    grad_c_seq: Tensor | None,  # [S, T, B, D*H] or [S, R, D*H]
    grad_h_n: Tensor,  # [D, B, H]
    grad_c_n: Tensor,  # [S, D, B, H]
    weight_hh: list[Tensor],  # D times [G*H, DH]
    hx: Tensor,  # [D, B, H]
    cx: Tensor,  # [S, D, B, H]
    output: Tensor,  # [T, B, D*H] or [R, D*H]
    gates: Tensor,  # [T, B, D*G*H] or [R, D*G*H]
    c_seq: Tensor,  # [S, T, B, D*H] or [S, R, D*H]
    lengths: Tensor | None,  # these three: a `Layout`
    first_row: Tensor | None,
    resets: Tensor | None,
    clip: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_preact like gates, grad_hx [D, B, H], grad_cx [S, D, B, H]; `engine` as in `recurrence_fwd`.

    `clip`: the largest element of the gradient of a state that enters a step.
    """
    layout = Layout(lengths, first_row, resets)
    if engine == "triton":
        from fusedlstm import launch

        return launch.recurrence_bwd(
            cell, grad_output, grad_c_seq, grad_h_n, grad_c_n, weight_hh, hx, cx, output, gates, c_seq, layout, clip
        )
    return torch_loop.recurrence_bwd(
        cell, grad_output, grad_c_seq, grad_h_n, grad_c_n, weight_hh, hx, cx, output, gates, c_seq, layout, clip
    )


@recurrence_bwd.register_fake
def _(cell, engine, grad_output, grad_c_seq, grad_h_n, grad_c_n, weight_hh, hx, cx, output, gates, c_seq, *_):
    return gates.new_empty(gates.shape), hx.new_empty(hx.shape), cx.new_empty(cx.shape)


@torch.library.custom_op("fusedlstm::step_fwd", mutates_args=())
def step_fwd(
    cell: str,
    input: Tensor,  # [B, I]
    hx: Tensor,  # [L*D, B, H]
    cx: Tensor,  # [S, L*D, B, H]
    parameters: list[Tensor],  # layer by layer and direction by direction: weight_ih, weight_hh (, bias_ih, bias_hh)
    directions: int,
    save_gates: bool,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One step of a stack on the engine "triton", input products and all: one launch a layer.

    output [B, D*H], h_n [L*D, B, H], c_n [S, L*D, B, H] in the dtype of cx; of the last layer gates [B, D*G*H] and c_seq
    [S, B, D*H], empty unless saved.
    """
    from fusedlstm import launch

    parameters = _per_direction(parameters, len(hx))
    return launch.step_fwd(cell, input, hx, cx, parameters, directions, save_gates=save_gates, save_states=save_states)


@step_fwd.register_fake
def _(cell, input, hx, cx, parameters, directions, save_gates, save_states):
    (_, B, H), D = hx.shape, directions
    gates = input.new_empty((B, D * parameters[0].size(0)) if save_gates else 0)
    c_seq = input.new_empty((cx.size(0), B, D * H) if save_states else 0, dtype=_state_dtype(input.dtype))
    return input.new_empty(B, D * H), input.new_empty(hx.shape), cx.new_empty(cx.shape), gates, c_seq


class RecurrenceFunction(torch.autograd.Function):
    """A layer with its gradients. `parameters`: per direction weight_ih, weight_hh (, bias_ih, bias_hh)."""

    @staticmethod
    def forward(
        cell, engine, directions, clip, wants_c_seq, lengths, first_row, resets, input, hx, cx, preact_0, *parameters
    ):
        """input [T, B, I] or [R, I], hx [D, B, H], cx [S, D, B, H]; returns what `recurrence_fwd` does."""
        layout = Layout(lengths, first_row, resets)
        return _layer_fwd(
            cell, engine, input, _per_direction(parameters, directions), preact_0, layout, hx, cx, True, True
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.cell, ctx.engine, ctx.directions, ctx.clip, wants_c_seq, *layout, input, hx, cx, preact_0 = inputs[:12]
        h, _, _, gates, c_seq = output
        ctx.mark_non_differentiable(*([gates] if wants_c_seq else [gates, c_seq]))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*layout, input, hx, cx, preact_0, h, gates, c_seq, *inputs[12:])

    @staticmethod
    def backward(ctx, grad_output, grad_h_n, grad_c_n, _grad_gates, grad_c_seq):
        *tables, input, hx, cx, preact_0, output, gates, c_seq = ctx.saved_tensors[:10]
        parameters, layout = ctx.saved_tensors[10:], Layout(*tables)
        needs = ctx.needs_input_grad[8:]
        if torch.is_grad_enabled():  # create_graph=True: the gradients themselves must be differentiable
            tensors = (input, hx, cx, preact_0, *parameters)
            results = (grad_output, grad_h_n, grad_c_n, grad_c_seq)
            return *[None] * 8, *_differentiable_gradients(ctx, tensors, needs, results, layout)
        per_direction = _per_direction(parameters, ctx.directions)
        weight_ih, weight_hh = [p[0] for p in per_direction], [p[1] for p in per_direction]
        grad_preact, grad_hx, grad_cx = recurrence_bwd(
            ctx.cell,
            ctx.engine,
            grad_output,
            grad_c_seq,
            torch.zeros_like(hx) if grad_h_n is None else grad_h_n,
            torch.zeros_like(cx) if grad_c_n is None else grad_c_n,
            weight_hh,
            hx,
            cx,
            output,
            gates,
            c_seq,
            *layout,
            ctx.clip,
        )
        rows = grad_preact.flatten(0, -2)  # [R, D*G*H]
        grad_input = grad_preact_0 = None
        if needs[0]:
            grad_input = product(rows, _cat(weight_ih)).view(input.shape)  # [R, D*G*H] @ [D*G*H, I]
        if needs[3]:
            grad_preact_0 = torch.stack(
                [_of_first_steps(g, d, layout) for d, g in enumerate(grad_preact.chunk(ctx.directions, -1))]
            )
        grad_parameters = [None] * len(parameters)
        needs_parameter = _per_direction(needs[4:], ctx.directions)
        count = len(per_direction[0])
        if any(n[0] for n in needs_parameter):
            grad_weight_ih = product(rows.t(), input.flatten(0, -2))  # [D*G*H, I]
            grad_parameters[0::count] = grad_weight_ih.chunk(ctx.directions)
        if any(n[1] for n in needs_parameter):
            by_direction = zip(grad_preact.chunk(ctx.directions, -1), output.chunk(ctx.directions, -1), strict=True)
            grad_parameters[1::count] = [
                _recurrent_weight_gradient(g, h, hx[d], d, layout, hx.size(-1) // weight_hh[d].size(1))
                for d, (g, h) in enumerate(by_direction)
            ]
        if count == 4 and any(n[2] or n[3] for n in needs_parameter):
            grad_bias = rows.sum(0)  # [D*G*H], the same for both biases
            grad_parameters[2::count] = grad_bias.chunk(ctx.directions)
            grad_parameters[3::count] = grad_bias.clone().chunk(ctx.directions)
        return *[None] * 8, grad_input, grad_hx, grad_cx, grad_preact_0, *grad_parameters


def layer(
    cell: str,
    input: Tensor,  # [T, B, I] or packed [R, I]
    state: tuple[Tensor, ...],  # h first, each [D, B, H]
    parameters: list[list[Tensor]],  # per direction: weight_ih, weight_hh (, bias_ih, bias_hh)
    engine: str,
    layout: Layout = DENSE,
    clip: float | None = None,
    wants_c_seq: bool = False,
    preact_0: Tensor | None = None,  # [D, B, G*H]
) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
    """One layer over a sequence, differentiable in every tensor.

    Args:
        cell: a name of `fusedlstm.cells.CELLS`.
        engine: "triton" (the kernels) or "torch" (a loop of torch operations).
        clip: the largest element of the gradient of a state that enters a step.
        wants_c_seq: whether the states beside h are wanted of every step.
        preact_0: added to the preactivations of every sequence's first step, unless a reset drops its initial state.

    Returns:
        output [T, B, D*H] or [R, D*H], the final states, and c_seq [S, T, B, D*H] or [S, R, D*H] in the dtype of `input`.
    """
    hx, cx = state[0], torch.stack(state[1:]) if len(state) > 2 else state[1].unsqueeze(0)
    flat = [p for direction in parameters for p in direction]
    tensors = (input, hx, cx, *flat) if preact_0 is None else (input, hx, cx, preact_0, *flat)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        output, h_n, c_n, _, c_seq = RecurrenceFunction.apply(
            cell, engine, len(parameters), clip, wants_c_seq, *layout, input, hx, cx, preact_0, *flat
        )
    else:
        output, h_n, c_n, _, c_seq = _layer_fwd(
            cell, engine, input, parameters, preact_0, layout, hx, cx, False, wants_c_seq
        )
    return output, (h_n, *c_n.unbind(0)), c_seq.to(output.dtype) if wants_c_seq else None


def is_one_step(engine: str, input: Tensor, layout: Layout) -> bool:
    """Whether one kernel can take an input [T, B, I] whole: a single step, without masks."""
    return engine == "triton" and layout.name == "dense" and input.size(0) == 1 and input.size(2) > 0


def _layer_fwd(
    cell: str,
    engine: str,
    input: Tensor,  # [T, B, I] or packed [R, I]
    parameters: list,  # per direction: weight_ih, weight_hh (, bias_ih, bias_hh)
    preact_0: Tensor | None,  # [D, B, G*H]
    layout: Layout,
    hx: Tensor,  # [D, B, H]
    cx: Tensor,  # [S, D, B, H]
    save_gates: bool,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A layer with its input product; returns what `recurrence_fwd` does."""
    if preact_0 is None and is_one_step(engine, input, layout):
        flat = [p for direction in parameters for p in direction]
        output, h_n, c_n, gates, c_seq = step_fwd(
            cell, input[0], hx, cx, flat, len(parameters), save_gates, save_states
        )
        gates, c_seq = gates.unsqueeze(0) if save_gates else gates, c_seq.unsqueeze(1) if save_states else c_seq
        return output.unsqueeze(0), h_n, c_n, gates, c_seq
    preact_x = _input_product(input, parameters, preact_0, layout)
    weight_hh = [p[1] for p in parameters]
    return recurrence_fwd(cell, engine, preact_x, weight_hh, hx, cx, *layout, save_gates, save_states)


def _state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which states beside h are saved."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _per_direction(parameters, directions: int) -> list:
    count = len(parameters) // directions
    return [parameters[k * count : (k + 1) * count] for k in range(directions)]


def _cat(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _of_first_steps(seq: Tensor, direction: int, layout: Layout) -> Tensor:
    """Of every sequence the row of its first step, [B, features] of [T, B, features] or [R, features].

    Zeros where a reset drops its hx.
    """
    if layout.lengths is None:
        found = seq[-direction]
    else:
        found = seq.flatten(0, -2)[layout.begin_rows(seq.shape[:-1], direction, seq.device)]
    dropped = layout.drops_hx(seq.shape[:-1], direction)
    return found if dropped is None else found.masked_fill(dropped.unsqueeze(1), 0)


def _input_product(input: Tensor, parameters: list, preact_0: Tensor | None, layout: Layout) -> Tensor:
    """preact_x [D, T, B, G*H] or [D, R, G*H] of all steps and directions: one product, in the order of `input` in memory."""
    D, GH = len(parameters), parameters[0][0].size(0)
    batch_major = input.dim() == 3 and input.stride(0) < input.stride(1)
    ordered = input.transpose(0, 1) if batch_major else input
    weight_ih = _cat([p[0] for p in parameters])  # [D*G*H, I]
    bias = _cat([p[2] + p[3] for p in parameters]) if len(parameters[0]) == 4 else None
    preact = product(ordered.flatten(0, -2), weight_ih.t(), bias)
    preact = preact.view(*ordered.shape[:-1], D, GH).movedim(-2, 0)
    preact = preact.transpose(1, 2) if batch_major else preact
    if preact_0 is not None:
        for d in range(D):
            added, dropped = preact_0[d], layout.drops_hx(input.shape[:-1], d)
            if dropped is not None:
                added = added.masked_fill(dropped.unsqueeze(1), 0)
            if layout.lengths is None:
                preact[d, -d] += added  # step 0, and in reverse the last one
            else:
                begin = layout.begin_rows(input.shape[:-1], d, input.device)
                if layout.first_row is None:
                    preact[d, begin // input.size(1), begin % input.size(1)] += added
                else:
                    preact[d].index_add_(0, begin, added)
    return preact


def _recurrent_weight_gradient(
    grad_preact: Tensor,  # [T, B, G*H] or [R, G*H]
    output: Tensor,  # [T, B, H] or [R, H]
    hx: Tensor,  # [B, H]
    direction: int,
    layout: Layout,
    num_heads: int,
) -> Tensor:
    """sum over t of grad_preact_t^T h_{t-1}, within heads: [G*H, DH]."""
    # Else the states before are views: output is zero where a sequence has no later step, grad_preact where it has no step.
    if layout.first_row is not None or layout.resets is not None:
        before = layout.states_before(output, hx, direction)
        return heads.weight_gradient(grad_preact.flatten(0, -2), before, num_heads)
    later, earlier = (slice(1, None), slice(None, -1)) if direction == 0 else (slice(None, -1), slice(1, None))
    from_hx = heads.weight_gradient(_of_first_steps(grad_preact, direction, layout), hx, num_heads)
    return heads.weight_gradient(
        grad_preact[later].flatten(0, 1), output[earlier].flatten(0, 1), num_heads, added=from_hx
    )


def _differentiable_gradients(ctx, tensors, needs, grads, layout):
    """The gradients through the specification, in operations that autograd can differentiate again."""
    with torch.enable_grad():
        input, hx, cx, preact_0, *parameters = tensors
        per_direction = _per_direction(parameters, ctx.directions)
        preact_x = _input_product(input, per_direction, preact_0, layout)
        weight_hh = [p[1] for p in per_direction]
        output, h_n, c_n, _, c_seq = reference.recurrence_fwd(
            ctx.cell, preact_x, weight_hh, hx, cx, layout, clip=ctx.clip
        )
        results = (output, h_n, c_n, c_seq.to(_state_dtype(c_seq.dtype)))
        pairs = [(y, g) for y, g in zip(results, grads, strict=True) if g is not None]
        wanted = [x for x, need in zip(tensors, needs, strict=True) if need]
        found = iter(
            torch.autograd.grad(
                [y for y, _ in pairs], wanted, [g for _, g in pairs], create_graph=True, allow_unused=True
            )
        )
    return [next(found) if need else None for need in needs]
