"""Launches of the kernels of one step: a sequence as one launch a step (`stepped`), or a stack at a single step.

Nothing here waits for the device, so a CUDA graph of the caller's captures it. What a launch costs the host without
one, of a sequence and of a single step, `python -m bench.overhead` measures.
"""

import functools

import torch
from torch import Tensor

from fusedlstm import cells
from fusedlstm.cells import Grads, Saved, State, Weights
from fusedlstm.engines.bound import Bound, on, words
from fusedlstm.kernels.cells import STEPS
from fusedlstm.kernels.product import StreamedDot
from fusedlstm.kernels.step_bwd import step_bwd_kernel
from fusedlstm.kernels.step_fwd import step_fwd_kernel
from fusedlstm.plan import Plan

KERNELS = {"fwd": step_fwd_kernel, "bwd": step_bwd_kernel}
FLAGS = {
    "fwd": ("HAS_INPUT", "HAS_BIAS", "HAS_BIAS_HH", "SAVE_GATES", "SAVE_STATES"),
    "bwd": ("CLIP", "HAS_GRAD_C_SEQ"),
}


def constants(plan: Plan, input_size: int = 0, **flags: bool) -> dict:
    """The compile-time arguments of the plan's kernel; `flags` are those of `FLAGS` that are on."""
    assert flags.keys() <= set(FLAGS[plan.pass_]), f"flags: expected some of {FLAGS[plan.pass_]}, got {[*flags]}"
    cell = cells.CELLS[plan.cell]
    return {
        **({"I": input_size} if plan.pass_ == "fwd" else {}),
        "H": plan.hidden,
        "DH": plan.hidden // plan.heads,
        "G": cell.num_gates,
        "KEPT": cell.num_kept,
        "V": cell.num_vectors,
        "S": cell.num_cell_states,
        "STEP": STEPS[plan.cell][0 if plan.pass_ == "fwd" else 1],
        "BLOCK_B": plan.block_b,
        "BLOCK_H": plan.block_h,
        "DOT": dot_of(plan),
        **{name: flags.get(name, False) for name in FLAGS[plan.pass_]},
    }


def dot_of(plan: Plan) -> StreamedDot:
    """The products of the plan's kernel."""
    return StreamedDot(
        N=plan.columns,
        BLOCK_B=plan.block_b,
        BLOCK_K=plan.block_k,
        TRANSPOSED=plan.transposed,
        PRECISION=plan.precision,
        STAGES=plan.stages,
    )


def signature(plan: Plan, has_input: bool) -> dict[str, str]:
    """The types of the arguments that are not compile-time constants."""
    names = KERNELS[plan.pass_].arg_names
    types = {name: "*" + plan.dtype if name.endswith("_ptr") else "i32" for name in names}
    float32 = ("c_seq_ptr", "grad_c_seq_ptr", "dstate_ptr") + (() if has_input else ("cx_ptr",))
    return types | {name: "*fp32" for name in float32 if name in types} | {"clip": "fp32"}


def options(plan: Plan) -> dict:
    """What the compiler is told beside the arguments: programs that never wait need not be on the device at once."""
    return {"num_warps": plan.num_warps, "num_stages": 1, "launch_cooperative_grid": False}


def recurrence_fwd(
    plan: Plan,
    preact_x: Tensor,  # [D, T, B, G*H]; rows of G*H contiguous
    weights: Weights,
    state: State,
    saved: Saved,  # is written; gates and c_seq [S, T, B, D*H] float32 are empty if they are not saved
) -> None:
    """All steps of a dense sequence, one launch each."""
    D, T, B, GH = preact_x.shape
    output, h_n, c_n, gates, c_seq = saved
    save_gates, save_states = gates.numel() > 0, c_seq.numel() > 0
    cx = state.cx.float().contiguous()
    if not save_states:
        c_seq = torch.empty(cx.size(0), 2, B, output.size(-1), dtype=torch.float32, device=cx.device)
    weight_hh = [w.contiguous() for w in weights.weight_hh]
    arguments = dict(
        **dict.fromkeys(_OF_INPUT, preact_x),
        preact_x_ptr=preact_x,
        vectors_ptr=preact_x if weights.vectors is None else weights.vectors.contiguous(),
        weight_hh_ptr=weight_hh[0],
        weight_hh_reverse_ptr=weight_hh[-1],
        hx_ptr=state.hx.contiguous(),
        cx_ptr=cx,
        output_ptr=output,
        h_n_ptr=h_n,
        c_n_ptr=c_n,
        gates_ptr=gates,
        c_seq_ptr=c_seq,
        T=T,
        B=B,
        D=D,
        first_state=0,
        rows_states=D * B,
        rows_input_b=0,
        rows_preact_d=preact_x.stride(0) // GH,
        rows_preact_t=preact_x.stride(1) // GH,
        rows_preact_b=preact_x.stride(2) // GH,
        step=0,
    )
    with on(output.device, waits=False):
        launch = _bound(plan, 0, SAVE_GATES=save_gates, SAVE_STATES=save_states).launcher(arguments, "step")
        for step in range(T):
            launch(step)


def recurrence_bwd(
    plan: Plan,
    clip: float | None,
    grads: Grads,  # output: rows of D*H contiguous, and a stride of 0 is one row for all
    saved: Saved,
    weights: Weights,
    state: State,
    grad_preact: Tensor,  # [T, B, D*K*H]  these are written
    grad_hx: Tensor,  # [D, B, H]
    grad_cx: Tensor,  # [S, D, B, H]
) -> None:
    """All steps of a dense sequence, one launch each, and one for the gradients of the initial states."""
    (T, B, DH), (hx, cx) = saved.output.shape, state
    assert grads.output is not None
    dstate = torch.empty(2, 1 + cx.size(0), *hx.shape, dtype=torch.float32, device=hx.device)
    dstate[0, 0], dstate[0, 1:] = grads.h_n, grads.c_n
    weight_hh = [w.contiguous() for w in weights.weight_hh]
    arguments = {
        "grad_output_ptr": grads.output,
        "grad_c_seq_ptr": saved.c_seq if grads.c_seq is None else grads.c_seq.float().contiguous(),
        "weight_hh_ptr": weight_hh[0],
        "weight_hh_reverse_ptr": weight_hh[-1],
        "vectors_ptr": saved.gates if weights.vectors is None else weights.vectors.contiguous(),
        "hx_ptr": hx.contiguous(),
        "cx_ptr": cx.float().contiguous(),
        "output_ptr": saved.output.contiguous(),
        "gates_ptr": saved.gates,
        "c_seq_ptr": saved.c_seq,
        "grad_preact_ptr": grad_preact,
        "dstate_ptr": dstate,
        "T": T,
        "B": B,
        "D": hx.size(0),
        "clip": 0.0 if clip is None else clip,
        "rows_grad_output_t": grads.output.stride(0) // DH,
        "rows_grad_output_b": grads.output.stride(1) // DH,
        "step": 0,
    }
    with on(saved.output.device, waits=False):
        bound = _bound(plan, 0, CLIP=clip is not None, HAS_GRAD_C_SEQ=grads.c_seq is not None)
        launch = bound.launcher(arguments, "step")
        for step in range(T + 1):
            launch(step)
    left = dstate[(T + 1) % 2]
    grad_hx.copy_(left[0])
    grad_cx.copy_(left[1:])


def single_step(
    plans: list[Plan],  # a layer
    input: Tensor,  # [B, I]
    state: State,  # hx [L*D, B, H], cx [S, L*D, B, H]
    parameters: list[list[Tensor]],  # per layer and direction, as in `fusedlstm.cells.cell`
    outputs: list[Tensor],  # a layer [B, D*H]  is written
    saved: Saved,  # is written: h_n, c_n, and of the last layer gates [B, D*K*H] and c_seq [S, B, D*H], or empty
) -> None:
    """One step of a stack, one launch a layer."""
    B, D = input.size(0), len(parameters) // len(plans)
    hx, cx = state.hx.contiguous(), state.cx.contiguous()
    with on(input.device, waits=False):
        for layer, plan in enumerate(plans):
            if input.stride(1) != 1 or input.stride(0) % input.size(1):
                input = input.contiguous()
            own = parameters[layer * D : (layer + 1) * D]
            cell = cells.CELLS[plan.cell]
            has_bias, vectors = cell.has_bias(own[0]), cell.step_vectors(own)
            # weight_ih, weight_hh (, bias_ih, bias_hh), each of both directions
            both = list(zip(*(p[: 4 if has_bias else 2] for p in own), strict=True))
            both = [tuple(p.contiguous() for p in pair) for pair in both]
            weight_ih, weight_hh, bias_ih, bias_hh = both if has_bias else (*both, both[0], both[0])
            launch = _bound(
                plan,
                input.size(1),
                HAS_INPUT=True,
                HAS_BIAS=has_bias,
                HAS_BIAS_HH=has_bias and not cell.bias_in_step,
                SAVE_GATES=saved.gates.numel() > 0,
                SAVE_STATES=saved.c_seq.numel() > 0,
            )
            launch(
                input_ptr=input,
                weight_ih_ptr=weight_ih[0],
                weight_ih_reverse_ptr=weight_ih[-1],
                bias_ih_ptr=bias_ih[0],
                bias_ih_reverse_ptr=bias_ih[-1],
                bias_hh_ptr=bias_hh[0],
                bias_hh_reverse_ptr=bias_hh[-1],
                preact_x_ptr=input,
                weight_hh_ptr=weight_hh[0],
                weight_hh_reverse_ptr=weight_hh[-1],
                vectors_ptr=input if vectors is None else vectors,
                hx_ptr=hx,
                cx_ptr=cx,
                output_ptr=outputs[layer],
                h_n_ptr=saved.h_n,
                c_n_ptr=saved.c_n,
                gates_ptr=saved.gates,
                c_seq_ptr=saved.c_seq,
                step=0,
                T=1,
                B=B,
                D=D,
                first_state=layer * D * B,
                rows_states=hx.size(0) * B,
                rows_input_b=input.stride(0) // input.size(1),
                rows_preact_d=0,
                rows_preact_t=0,
                rows_preact_b=0,
            )
            input = outputs[layer]


# Arguments of the forward kernel that it reads only with HAS_INPUT.
_OF_INPUT = (
    "input_ptr",
    "weight_ih_ptr",
    "weight_ih_reverse_ptr",
    "bias_ih_ptr",
    "bias_ih_reverse_ptr",
    "bias_hh_ptr",
    "bias_hh_reverse_ptr",
)


def _bound(plan: Plan, input_size: int, **flags: bool) -> Bound:
    return _cached_bound(KERNELS[plan.pass_], plan, input_size, tuple(flags.items()))


@functools.lru_cache(maxsize=4096)
def _cached_bound(kernel, plan: Plan, input_size: int, flags: tuple[tuple[str, bool], ...]) -> Bound:
    arguments = (constants(plan, input_size, **dict(flags)), options(plan), words(plan))
    return Bound(kernel, plan.grid, *arguments)
