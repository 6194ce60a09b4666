"""One layer over time, both directions, as PyTorch sees it.

Two custom ops hold what must be done step by step; around them an `autograd.Function` does the large products: the
input product before the loop, and those of the weights, biases and input after it. Sequences have rows, [T, B] or packed
[R] (`fusedlstm.packing`), and then directions and features on one axis, so that both directions share each product.
"""

import torch
from torch import Tensor

from fusedlstm import reference, torch_loop
from fusedlstm.packing import Packing, begin_rows
from fusedlstm.precision import product


@torch.library.custom_op("fusedlstm::recurrence_fwd", mutates_args=())
def recurrence_fwd(
    cell: str,
    engine: str,
    preact_x: Tensor,  # [D, T, B, G*H] or packed [D, R, G*H]
    weight_hh: list[Tensor],  # D times [G*H, H]
    hx: Tensor,  # [D, B, H]
    cx: Tensor,  # [S, D, B, H]
    lengths: Tensor | None,  # [B] int32, and
    first_row: Tensor | None,  # [T + 1] int64 if packed
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """output [T, B, D*H], h_n [D, B, H], c_n [S, D, B, H], gates [T, B, D*G*H], c_seq [S, T, B, D*H]; [R, ...] if packed.

    `engine` is "triton", the kernel, or "torch", a loop of torch operations. gates and c_seq are empty unless `save`.
    """
    if engine == "triton":
        from fusedlstm import launch

        return launch.recurrence_fwd(cell, preact_x, weight_hh, hx, cx, lengths, first_row, save=save)
    return torch_loop.recurrence_fwd(cell, preact_x, weight_hh, hx, cx, first_row, save)


@recurrence_fwd.register_fake
def _(cell, engine, preact_x, weight_hh, hx, cx, lengths, first_row, save):
    D, *rows, GH = preact_x.shape
    S, H = cx.size(0), hx.size(-1)
    gates = preact_x.new_empty((*rows, D * GH) if save else 0)
    c_seq = preact_x.new_empty((S, *rows, D * H) if save else 0, dtype=_state_dtype(preact_x.dtype))
    return preact_x.new_empty(*rows, D * H), hx.new_empty(hx.shape), hx.new_empty(cx.shape), gates, c_seq


@torch.library.custom_op("fusedlstm::recurrence_bwd", mutates_args=())
def recurrence_bwd(
    cell: str,
    engine: str,
    grad_output: Tensor | None,  # [T, B, D*H] or packed [R, D*H]
    grad_h_n: Tensor,  # [D, B, H]
    grad_c_n: Tensor,  # [S, D, B, H]
    weight_hh: list[Tensor],  # D times [G*H, H]
    hx: Tensor,  # [D, B, H]
    cx: Tensor,  # [S, D, B, H]
    output: Tensor,  # [T, B, D*H] or [R, D*H]
    gates: Tensor,  # [T, B, D*G*H] or [R, D*G*H]
    c_seq: Tensor,  # [S, T, B, D*H] or [S, R, D*H]
    lengths: Tensor | None,  # [B] int32, and
    first_row: Tensor | None,  # [T + 1] int64 if packed
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_preact like gates, grad_hx [D, B, H], grad_cx [S, D, B, H]; `engine` as in `recurrence_fwd`."""
    if engine == "triton":
        from fusedlstm import launch

        return launch.recurrence_bwd(
            cell, grad_output, grad_h_n, grad_c_n, weight_hh, hx, cx, output, gates, c_seq, lengths, first_row
        )
    return torch_loop.recurrence_bwd(
        cell, grad_output, grad_h_n, grad_c_n, weight_hh, hx, cx, output, gates, c_seq, first_row
    )


@recurrence_bwd.register_fake
def _(cell, engine, grad_output, grad_h_n, grad_c_n, weight_hh, hx, cx, output, gates, c_seq, lengths, first_row):
    return gates.new_empty(gates.shape), hx.new_empty(hx.shape), cx.new_empty(cx.shape)


class RecurrenceFunction(torch.autograd.Function):
    """A layer with its gradients. `parameters`: per direction weight_ih, weight_hh (, bias_ih, bias_hh)."""

    @staticmethod
    def forward(cell, engine, directions, lengths, first_row, input, hx, cx, preact_0, *parameters):
        """input [T, B, I] or [R, I], hx [D, B, H], cx [S, D, B, H]; returns what `recurrence_fwd` does."""
        per_direction = _per_direction(parameters, directions)
        preact_x = _input_product(input, per_direction, preact_0, _packing(lengths, first_row))
        weight_hh = [p[1] for p in per_direction]
        return recurrence_fwd(cell, engine, preact_x, weight_hh, hx, cx, lengths, first_row, save=True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.cell, ctx.engine, ctx.directions, lengths, first_row, input, hx, cx, preact_0, *parameters = inputs
        h, _, _, gates, c_seq = output
        ctx.mark_non_differentiable(gates, c_seq)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, hx, cx, preact_0, h, gates, c_seq, lengths, first_row, *parameters)

    @staticmethod
    def backward(ctx, grad_output, grad_h_n, grad_c_n, _grad_gates, _grad_c_seq):
        input, hx, cx, preact_0, output, gates, c_seq, lengths, first_row, *parameters = ctx.saved_tensors
        packing = _packing(lengths, first_row)
        needs = ctx.needs_input_grad[5:]
        if torch.is_grad_enabled():  # create_graph=True: the gradients themselves must be differentiable
            tensors = (input, hx, cx, preact_0, *parameters)
            grads = _differentiable_gradients(ctx, tensors, needs, (grad_output, grad_h_n, grad_c_n), packing)
            return None, None, None, None, None, *grads
        per_direction = _per_direction(parameters, ctx.directions)
        weight_ih, weight_hh = [p[0] for p in per_direction], [p[1] for p in per_direction]
        grad_preact, grad_hx, grad_cx = recurrence_bwd(
            ctx.cell,
            ctx.engine,
            grad_output,
            torch.zeros_like(hx) if grad_h_n is None else grad_h_n,
            torch.zeros_like(cx) if grad_c_n is None else grad_c_n,
            weight_hh,
            hx,
            cx,
            output,
            gates,
            c_seq,
            lengths,
            first_row,
        )
        rows = grad_preact.flatten(0, -2)  # [R, D*G*H]
        grad_input = grad_preact_0 = None
        if needs[0]:
            grad_input = product(rows, _cat(weight_ih)).view(input.shape)  # [R, D*G*H] @ [D*G*H, I]
        if needs[3]:
            by_direction = zip(rows.chunk(ctx.directions, -1), _begin_rows(packing, input, ctx.directions), strict=True)
            grad_preact_0 = torch.stack([g[begin] for g, begin in by_direction])
        grad_parameters = [None] * len(parameters)
        needs_parameter = _per_direction(needs[4:], ctx.directions)
        count = len(per_direction[0])
        if any(n[0] for n in needs_parameter):
            grad_weight_ih = product(rows.t(), input.flatten(0, -2))  # [D*G*H, I]
            grad_parameters[0::count] = grad_weight_ih.chunk(ctx.directions)
        if any(n[1] for n in needs_parameter):
            by_direction = zip(grad_preact.chunk(ctx.directions, -1), output.chunk(ctx.directions, -1), strict=True)
            grad_parameters[1::count] = [
                _recurrent_weight_gradient(g, h, hx[d], d, packing) for d, (g, h) in enumerate(by_direction)
            ]
        if count == 4 and any(n[2] or n[3] for n in needs_parameter):
            grad_bias = rows.sum(0)  # [D*G*H], the same for both biases
            grad_parameters[2::count] = grad_bias.chunk(ctx.directions)
            grad_parameters[3::count] = grad_bias.clone().chunk(ctx.directions)
        return None, None, None, None, None, grad_input, grad_hx, grad_cx, grad_preact_0, *grad_parameters


def layer(
    cell: str,
    input: Tensor,  # [T, B, I] or packed [R, I]
    state: tuple[Tensor, ...],  # h first, each [D, B, H]
    parameters: list[list[Tensor]],  # per direction: weight_ih, weight_hh (, bias_ih, bias_hh)
    engine: str,
    packing: Packing | None = None,
    preact_0: Tensor | None = None,  # [D, B, G*H]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One layer over a sequence, differentiable in every tensor: output [T, B, D*H] or [R, D*H], and the final states.

    Args:
        cell: a name of `fusedlstm.cells.CELLS`.
        engine: "triton" (the kernels) or "torch" (a loop of torch operations).
        packing: tells where the rows lie, if the input is packed.
        preact_0: added to the preactivations of every sequence's first step.
    """
    hx, cx = state[0], torch.stack(state[1:]) if len(state) > 2 else state[1].unsqueeze(0)
    lengths, first_row = packing or (None, None)
    flat = [p for direction in parameters for p in direction]
    tensors = (input, hx, cx, *flat) if preact_0 is None else (input, hx, cx, preact_0, *flat)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        output, h_n, c_n, _, _ = RecurrenceFunction.apply(
            cell, engine, len(parameters), lengths, first_row, input, hx, cx, preact_0, *flat
        )
    else:
        preact_x = _input_product(input, parameters, preact_0, packing)
        weight_hh = [p[1] for p in parameters]
        output, h_n, c_n, _, _ = recurrence_fwd(
            cell, engine, preact_x, weight_hh, hx, cx, lengths, first_row, save=False
        )
    return output, (h_n, *c_n.unbind(0))


def _state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which states beside h are saved."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _packing(lengths: Tensor | None, first_row: Tensor | None) -> Packing | None:
    return None if first_row is None else Packing(lengths, first_row)


def _per_direction(parameters, directions: int) -> list:
    count = len(parameters) // directions
    return [parameters[k * count : (k + 1) * count] for k in range(directions)]


def _cat(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _begin_rows(packing: Packing | None, input: Tensor, directions: int) -> list[Tensor]:
    return [begin_rows(packing, input.shape[:-1], d, input.device) for d in range(directions)]


def _input_product(input: Tensor, parameters: list, preact_0: Tensor | None, packing: Packing | None) -> Tensor:
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
        for d, begin in enumerate(_begin_rows(packing, input, D)):
            if packing is None:
                preact[d, -d] += preact_0[d]  # step 0, and in reverse the last one
            else:
                preact[d].index_add_(0, begin, preact_0[d])
    return preact


def _recurrent_weight_gradient(
    grad_preact: Tensor,  # [T, B, G*H] or [R, G*H]
    output: Tensor,  # [T, B, H] or [R, H]
    hx: Tensor,  # [B, H]
    direction: int,
    packing: Packing | None,
) -> Tensor:
    """sum over t of grad_preact_t^T h_{t-1}: [G*H, H]."""
    if packing is not None:
        previous = packing.previous_rows(len(output), direction)
        return product(grad_preact.t(), torch.cat([output, hx])[previous])
    first, later, earlier = (
        (0, slice(1, None), slice(None, -1)) if direction == 0 else (-1, slice(None, -1), slice(1, None))
    )
    from_hx = product(grad_preact[first].t(), hx)
    return product(grad_preact[later].flatten(0, 1).t(), output[earlier].flatten(0, 1), from_hx)


def _differentiable_gradients(ctx, tensors, needs, grads, packing):
    """The gradients through the specification, in operations that autograd can differentiate again."""
    with torch.enable_grad():
        input, hx, cx, preact_0, *parameters = tensors
        per_direction = _per_direction(parameters, ctx.directions)
        preact_x = _input_product(input, per_direction, preact_0, packing)
        first_row = None if packing is None else packing.first_row
        outputs = reference.recurrence_fwd(ctx.cell, preact_x, [p[1] for p in per_direction], hx, cx, first_row)
        pairs = [(y, g) for y, g in zip(outputs[:3], grads, strict=True) if g is not None]
        wanted = [x for x, need in zip(tensors, needs, strict=True) if need]
        found = iter(
            torch.autograd.grad(
                [y for y, _ in pairs], wanted, [g for _, g in pairs], create_graph=True, allow_unused=True
            )
        )
    return [next(found) if need else None for need in needs]
