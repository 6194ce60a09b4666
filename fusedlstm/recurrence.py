"""One layer over time, both directions, as PyTorch sees it.

Two custom ops hold what must be done step by step; around them an `autograd.Function` does the large products: the
input product before the loop, and those of the weights, biases and input after it. In sequences the axes are
[T, B, directions and features], so that both directions share each of these products.
"""

import torch
from torch import Tensor

from fusedlstm import engines, reference


@torch.library.custom_op("fusedlstm::recurrence_fwd", mutates_args=())
def recurrence_fwd(
    cell: str,
    preact_x: Tensor,  # [D, T, B, G*H]
    weight_hh: list[Tensor],  # D times [G*H, H]
    hx: Tensor,  # [D, B, H]
    cx: Tensor,  # [S, D, B, H]
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """output [T, B, D*H], h_n [D, B, H], c_n [S, D, B, H], gates [T, B, D*G*H], c_seq [S, T, B, D*H].

    On a GPU, or interpreted, the kernel; on other CPU tensors the specification. gates and c_seq are empty unless `save`.
    """
    if preact_x.is_cuda or engines.interpreting():
        from fusedlstm import launch

        return launch.recurrence_fwd(cell, preact_x, weight_hh, hx, cx, save)
    output, h_n, c_n, gates, c_seq = reference.recurrence_fwd(cell, preact_x, weight_hh, hx, cx)
    if not save:
        gates, c_seq = gates.new_empty(0), c_seq.new_empty(0)
    return output, h_n, c_n, gates, c_seq.to(_state_dtype(preact_x.dtype))


@recurrence_fwd.register_fake
def _(cell, preact_x, weight_hh, hx, cx, save):
    D, T, B, GH = preact_x.shape
    S, H = cx.size(0), hx.size(-1)
    gates = preact_x.new_empty((T, B, D * GH) if save else 0)
    c_seq = preact_x.new_empty((S, T, B, D * H) if save else 0, dtype=_state_dtype(preact_x.dtype))
    return preact_x.new_empty(T, B, D * H), preact_x.new_empty(D, B, H), preact_x.new_empty(S, D, B, H), gates, c_seq


@torch.library.custom_op("fusedlstm::recurrence_bwd", mutates_args=())
def recurrence_bwd(
    cell: str,
    grad_output: Tensor | None,  # [T, B, D*H]
    grad_h_n: Tensor,  # [D, B, H]
    grad_c_n: Tensor,  # [S, D, B, H]
    weight_hh: list[Tensor],  # D times [G*H, H]
    hx: Tensor,  # [D, B, H]
    cx: Tensor,  # [S, D, B, H]
    output: Tensor,  # [T, B, D*H]
    gates: Tensor,  # [T, B, D*G*H]
    c_seq: Tensor,  # [S, T, B, D*H]
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_preact [T, B, D*G*H], grad_hx [D, B, H], grad_cx [S, D, B, H]; where it runs as `recurrence_fwd`."""
    if gates.is_cuda or engines.interpreting():
        from fusedlstm import launch

        return launch.recurrence_bwd(cell, grad_output, grad_h_n, grad_c_n, weight_hh, hx, cx, output, gates, c_seq)
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    return reference.recurrence_bwd(
        cell, grad_output, grad_h_n, grad_c_n, weight_hh, hx, cx, output, gates, c_seq.to(gates.dtype)
    )


@recurrence_bwd.register_fake
def _(cell, grad_output, grad_h_n, grad_c_n, weight_hh, hx, cx, output, gates, c_seq):
    return gates.new_empty(gates.shape), hx.new_empty(hx.shape), cx.new_empty(cx.shape)


class RecurrenceFunction(torch.autograd.Function):
    """A layer with its gradients. `parameters`: per direction weight_ih, weight_hh (, bias_ih, bias_hh)."""

    @staticmethod
    def forward(cell, directions, input, hx, cx, *parameters):
        """input [T, B, I], hx [D, B, H], cx [S, D, B, H]; returns what `recurrence_fwd` does."""
        per_direction = _per_direction(parameters, directions)
        preact_x = _input_product(input, per_direction)
        return recurrence_fwd(cell, preact_x, [p[1] for p in per_direction], hx, cx, save=True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.cell, ctx.directions, input, hx, cx, *parameters = inputs
        h, _, _, gates, c_seq = output
        ctx.mark_non_differentiable(gates, c_seq)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, hx, cx, h, gates, c_seq, *parameters)

    @staticmethod
    def backward(ctx, grad_output, grad_h_n, grad_c_n, _grad_gates, _grad_c_seq):
        input, hx, cx, output, gates, c_seq, *parameters = ctx.saved_tensors
        needs = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():  # create_graph=True: the gradients themselves must be differentiable
            tensors = (input, hx, cx, *parameters)
            return None, None, *_differentiable_gradients(ctx, tensors, needs, (grad_output, grad_h_n, grad_c_n))
        per_direction = _per_direction(parameters, ctx.directions)
        weight_ih, weight_hh = [p[0] for p in per_direction], [p[1] for p in per_direction]
        grad_preact, grad_hx, grad_cx = recurrence_bwd(
            ctx.cell,
            grad_output,
            torch.zeros_like(hx) if grad_h_n is None else grad_h_n,
            torch.zeros_like(cx) if grad_c_n is None else grad_c_n,
            weight_hh,
            hx,
            cx,
            output,
            gates,
            c_seq,
        )
        grad_input = grad_preact @ _cat(weight_ih) if needs[0] else None  # [T, B, D*G*H] @ [D*G*H, I]
        grad_parameters = [None] * len(parameters)
        needs_parameter = _per_direction(needs[3:], ctx.directions)
        count = len(per_direction[0])
        rows = grad_preact.flatten(0, 1)  # [T*B, D*G*H]
        if any(n[0] for n in needs_parameter):
            grad_weight_ih = rows.t() @ input.flatten(0, 1)  # [D*G*H, I]
            grad_parameters[0::count] = grad_weight_ih.chunk(ctx.directions)
        if any(n[1] for n in needs_parameter):
            grad_parameters[1::count] = [
                _recurrent_weight_gradient(g, h, hx[d], d)
                for d, (g, h) in enumerate(
                    zip(grad_preact.chunk(ctx.directions, -1), output.chunk(ctx.directions, -1), strict=True)
                )
            ]
        if count == 4 and any(n[2] or n[3] for n in needs_parameter):
            grad_bias = rows.sum(0)  # [D*G*H], the same for both biases
            grad_parameters[2::count] = grad_bias.chunk(ctx.directions)
            grad_parameters[3::count] = grad_bias.clone().chunk(ctx.directions)
        return None, None, grad_input, grad_hx, grad_cx, *grad_parameters


def layer(
    cell: str,
    input: Tensor,  # [T, B, I]
    state: tuple[Tensor, ...],  # h first, each [D, B, H]
    parameters: list[list[Tensor]],  # per direction: weight_ih, weight_hh (, bias_ih, bias_hh)
    engine: str,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One layer over a sequence, differentiable in every tensor: output [T, B, D*H] and the final states.

    Args:
        cell: a name of `fusedlstm.cells.CELLS`.
        engine: "triton" (the custom ops) or "reference".
    """
    hx, cx = state[0], torch.stack(state[1:]) if len(state) > 2 else state[1].unsqueeze(0)
    if engine == "reference":
        output, h_n, c_n = reference.layer(cell, input, hx, cx, parameters)
    else:
        flat = [p for direction in parameters for p in direction]
        if torch.is_grad_enabled() and any(x.requires_grad for x in (input, hx, cx, *flat)):
            output, h_n, c_n, _, _ = RecurrenceFunction.apply(cell, len(parameters), input, hx, cx, *flat)
        else:
            preact_x = _input_product(input, parameters)
            output, h_n, c_n, _, _ = recurrence_fwd(cell, preact_x, [p[1] for p in parameters], hx, cx, save=False)
    return output, (h_n, *c_n.unbind(0))


def _state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which states beside h are saved."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _per_direction(parameters, directions: int) -> list:
    count = len(parameters) // directions
    return [parameters[k * count : (k + 1) * count] for k in range(directions)]


def _cat(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _input_product(input: Tensor, parameters: list) -> Tensor:
    """preact_x [D, T, B, G*H] of all steps and directions: one product, its rows in the order of `input` in memory."""
    T, B, _ = input.shape
    D, GH = len(parameters), parameters[0][0].size(0)
    batch_major = input.stride(0) < input.stride(1)
    rows = (input.transpose(0, 1) if batch_major else input).flatten(0, 1)
    weight_ih = _cat([p[0] for p in parameters])  # [D*G*H, I]
    if len(parameters[0]) == 4:
        preact = torch.addmm(_cat([p[2] + p[3] for p in parameters]), rows, weight_ih.t())
    else:
        preact = rows @ weight_ih.t()
    if batch_major:
        return preact.view(B, T, D, GH).permute(2, 1, 0, 3)
    return preact.view(T, B, D, GH).permute(2, 0, 1, 3)


def _recurrent_weight_gradient(grad_preact: Tensor, output: Tensor, hx: Tensor, direction: int) -> Tensor:
    """sum over t of grad_preact_t^T h_{t-1}: [G*H, H]. grad_preact [T, B, G*H], output [T, B, H], hx [B, H]."""
    first, later, earlier = (
        (0, slice(1, None), slice(None, -1)) if direction == 0 else (-1, slice(None, -1), slice(1, None))
    )
    from_hx = grad_preact[first].t() @ hx
    return torch.addmm(from_hx, grad_preact[later].flatten(0, 1).t(), output[earlier].flatten(0, 1))


def _differentiable_gradients(ctx, tensors, needs, grads):
    """The gradients through the specification, in operations that autograd can differentiate again."""
    with torch.enable_grad():
        input, hx, cx, *parameters = tensors
        outputs = reference.layer(ctx.cell, input, hx, cx, _per_direction(parameters, ctx.directions))
        pairs = [(y, g) for y, g in zip(outputs, grads, strict=True) if g is not None]
        wanted = [x for x, need in zip(tensors, needs, strict=True) if need]
        found = iter(
            torch.autograd.grad(
                [y for y, _ in pairs], wanted, [g for _, g in pairs], create_graph=True, allow_unused=True
            )
        )
    return [next(found) if need else None for need in needs]
