"""From a plan and tensors to a kernel launch: allocation, arguments, and what the compiler is told."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fusedlstm import cells, products
from fusedlstm import plan as planning
from fusedlstm.engines import failures, stepping
from fusedlstm.engines.bound import Bound, on, words
from fusedlstm.kernels import exchange
from fusedlstm.kernels.cells import STEPS
from fusedlstm.kernels.exchange import Exchange
from fusedlstm.kernels.noise import NoiseKinds
from fusedlstm.kernels.norms import row_statistics_kernel
from fusedlstm.kernels.product import Dot
from fusedlstm.kernels.recompute import recompute_kernel
from fusedlstm.kernels.recurrence_bwd import recurrence_bwd_kernel
from fusedlstm.kernels.recurrence_fwd import recurrence_fwd_kernel
from fusedlstm.kernels.rows import RowLayout
from fusedlstm.layout import DENSE, Layout
from fusedlstm.noise import NO_NOISE, Noise, scale, threshold
from fusedlstm.plan import Plan, devices, tuned
from fusedlstm.plan.tuned import Problem

DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
KERNELS = {"fwd": recurrence_fwd_kernel, "bwd": recurrence_bwd_kernel}
FLOAT32_POINTERS = ("cx_ptr", "c_seq_ptr", "grad_c_seq_ptr", "statistics_ptr")
RECOMPUTED_UNITS = 128  # a program of `recompute`; a thread has one: the loop waits for memory, and wants many programs
LAYOUTS = ("PACKED", "RAGGED", "RESETS")
NOISES = ("HOLDS", "DROPS_CANDIDATE", "DROPS_H", "TRAINING")
# Compile-time switches beyond what a plan says.
FLAGS = {
    "fwd": (*LAYOUTS, *NOISES, "SAVE_GATES", "SAVE_STATES"),
    "bwd": (*LAYOUTS, *NOISES, "CLIP", "HAS_GRAD_C_SEQ"),
}

INTERPRETED = bool(triton.knobs.runtime.interpret)  # Triton has decided by now
if INTERPRETED:
    from fusedlstm.engines import interpreter

    interpreter.repair_bfloat16()


class Stack(NamedTuple):
    """What the layers of a stack above the first make of the h of the layer below, in the launch of all of them."""

    weight_ih: Tensor  # [D - 1, G*H, H]
    bias: Tensor | None = None  # [D - 1, G*H], of the forward


def constants(plan: Plan, **flags: bool) -> dict:
    """The compile-time arguments of the plan's kernel; `flags` are those of `FLAGS` that are on."""
    assert flags.keys() <= set(FLAGS[plan.pass_]), f"flags: expected some of {FLAGS[plan.pass_]}, got {[*flags]}"
    cell = cells.CELLS[plan.cell]
    dot = dot_of(plan)
    return {
        "H": plan.hidden,
        "HP": plan.aligned_hidden,
        "DH": plan.hidden // plan.heads,
        "G": cell.num_gates,
        "KEPT": cell.num_kept,
        "V": cell.num_vectors,
        "S": cell.num_cell_states,
        "NORMS": cell.norms,
        "STEP": STEPS[plan.cell][0 if plan.pass_ == "fwd" else 1],
        **({"UPDATE": STEPS[plan.cell][2]} if plan.pass_ == "bwd" else {}),
        "BLOCK_B": plan.block_b,
        "BLOCK_H": plan.block_h,
        "DOT": dot,
        "DOT_X": dot,  # with layers as recurrences there are no heads, and both products are of one form
        "EXCHANGE": exchange_of(plan),
        "LAYOUT": row_layout(flags, plan.stack),
        "NOISE": noise_kinds(flags),
        **{name: flags.get(name, False) for name in FLAGS[plan.pass_] if name not in (*LAYOUTS, *NOISES)},
    }


def row_layout(flags: dict[str, bool], stack: bool = False) -> RowLayout:
    """Of the flags those that say which rows there are."""
    return RowLayout(*(flags.get(name, False) for name in LAYOUTS), STACK=stack)


def noise_kinds(flags: dict[str, bool]) -> NoiseKinds:
    """Of the flags those that say what regularises the steps."""
    return NoiseKinds(*(flags.get(name, False) for name in NOISES))


def dot_of(plan: Plan) -> Dot:
    """The recurrent product of the plan's kernel."""
    padded = plan.aligned_hidden // plan.heads
    forward = plan.pass_ == "fwd"
    K = plan.reduction
    # A head's columns are a part of every gate's, and a program that has all units has them gate by gate.
    segment = plan.hidden // plan.heads if not forward and (plan.local or plan.heads > 1) else K
    return Dot(
        N=plan.columns,
        K=K,
        SEGMENT=segment,
        SEGMENT_STRIDE=plan.aligned_hidden,
        STRIDE_K=1 if forward else padded,
        BLOCK_B=plan.block_b,
        BLOCK_K=plan.block_k,
        RESIDENT=plan.resident,
        TRANSPOSED=plan.transposed,
        SPLIT=plan.split,
        AHEAD=plan.ahead,
        PRECISION=plan.precision,
        STAGES=plan.stages,
    )


def exchange_of(plan: Plan) -> Exchange:
    """How the programs of a group exchange; on AMD, and interpreted, an assertion ends a wait, and nothing is
    prefetched.
    """
    by_instruction = not (triton.knobs.runtime.interpret or plan.arch.startswith("gfx"))
    by_data = plan.protocol == "data"
    return Exchange(
        GROUP=plan.group,
        PROTOCOL=plan.protocol,
        LIMIT=planning.ATTEMPT_LIMIT if by_data else planning.SPIN_LIMIT,
        TRAP=exchange.NVIDIA_TRAP if by_instruction else "",
        PREFETCH="prefetch.global.L2 [$1]; mov.b32 $0, 0;" if by_instruction and by_data else "",
        ACQUIRES=plan.arch.startswith("gfx"),
    )


def signature(plan: Plan) -> dict[str, str]:
    """The types of the arguments that are not compile-time constants."""
    names = KERNELS[plan.pass_].arg_names
    types = {name: "*" + plan.dtype for name in names if name.endswith("_ptr")}
    types |= {name: "*fp32" for name in FLOAT32_POINTERS if name in types}
    types |= {
        "arrived_ptr": "*i32",
        "sums_ptr": "*i64",
        "lengths_ptr": "*i32",
        "first_row_ptr": "*i64",
        "resets_ptr": "*i8",
        "seed_ptr": "*i64",
        "factor_ptr": "*fp32",
        "first_row_of_all": "i64",
        "clip": "fp32",
        **dict.fromkeys(("rate_h", "rate_c", "scale_candidate"), "fp32"),
    }
    others = ("first_recurrence", "below_h", "below_c", "below_candidate")
    return types | {name: "i32" for name in names if name in (*"TBDR", *others) or name.startswith("rows_")}


def options(plan: Plan) -> dict:
    """What the compiler is told beside the arguments. `debug` is what keeps the assertion of a bounded wait on AMD."""
    told = {
        "num_warps": plan.num_warps,
        "num_stages": 1,
        "launch_cooperative_grid": not plan.local,
        "debug": plan.arch.startswith("gfx"),
        "sanitize_overflow": False,
    }
    # One program has the multiprocessor to itself; left alone, ptxas spills to make room for a second.
    return told if plan.arch.startswith("gfx") else told | {"maxnreg": 255}


def device_limits(index: int | None) -> devices.DeviceLimits:
    """What a plan may use of a device by its index; None is the interpreter, which plays an sm_90.

    Raises:
        UnsupportedDevice: the kernels do not serve it.
    """
    return _device_limits(index, devices.sms())


@functools.cache
def _device_limits(index: int | None, sms: int | None) -> devices.DeviceLimits:
    if index is None:
        limits = devices.DEVICES["sm_90"]
    else:
        limits = devices.of_properties(torch.cuda.get_device_properties(index), bool(torch.version.hip))
    return devices.capped(limits, sms)


# While `fusedlstm.tune` measures: from a problem to the plan that is to be tried for it, or None.
trial: Callable[[Problem], Plan | None] | None = None


def plan_for(
    cell: str,
    like: Tensor,
    weight_hh: list[Tensor],  # D times [G*H, H / heads]
    hx: Tensor,  # [D, B, H]
    pass_: str,
    layout: str,
    stack: bool = False,
) -> Plan:
    """The plan for tensors of the dtype and on the device of `like`."""
    index = like.device.index if like.device.type == "cuda" else None
    D, B, H = hx.shape
    heads = H // weight_hh[0].size(1)
    problem = Problem(cell, B, H, DTYPES[like.dtype], D, pass_, precision_of(like.dtype), layout, heads, stack)
    return (trial and trial(problem)) or _cached_plan(problem, index, tuned.generation(), devices.sms())


def layers_together(cell: str, like: Tensor, hx: Tensor, layers: int, layout: str, training: bool) -> int:
    """See `plan.wave`; for tensors of the dtype and on the device of `like`, and hx [L, B, H]."""
    index = like.device.index if like.device.type == "cuda" else None
    B, H = hx.shape[1:]
    if failures.reason(like.device, failures.as_wave(cell), H, like.dtype, 1, layout, 1):
        return 1
    sizes = (cell, layers, B, H, like.dtype)
    return _cached_wave(*sizes, index, precision_of(like.dtype), layout, training, devices.sms())


@functools.lru_cache(maxsize=4096)
def _cached_wave(cell, layers, B, H, dtype, index, precision, layout, training, sms) -> int:
    limits = device_limits(index)
    return planning.wave(cell, layers, B, H, DTYPES[dtype], limits, precision, layout, training) if B else 1


# For a compiler an answer and no code: it is a constant of a layer, and the way to it leads through caches and files.
@torch.compiler.assume_constant_result
def why_not(
    cell: str,
    hidden: int | None,
    dtype: torch.dtype,
    directions: int,
    device: torch.device,
    layout: str = "dense",
    heads: int = 1,
) -> str | None:
    """Why a layer of this size and layout cannot run on this GPU, or None if it can. `hidden` None: any size."""
    index = torch.cuda.current_device() if device.index is None else device.index
    try:
        device_limits(index)
        for pass_ in ("fwd", "bwd") if hidden is not None else ():
            problem = Problem(cell, 1, hidden, DTYPES[dtype], directions, pass_, precision_of(dtype), layout, heads)
            _cached_plan(problem, index, tuned.generation(), devices.sms())
    except (devices.UnsupportedDevice, planning.PlanError) as error:
        return str(error)
    return None


def precision_of(dtype: torch.dtype) -> str:
    """Of the products: a plan's `precision`, which only float32 asks."""
    return "tf32" if dtype != torch.float32 or products.tf32() else "ieee"


@functools.lru_cache(maxsize=4096)
def _cached_plan(problem: Problem, index: int | None, generation: int, sms: int | None) -> Plan:
    """What was measured on this device, else what is predicted. T has no part in the choice."""
    limits = device_limits(index)
    measured = tuned.plan(problem, index, limits) if generation else None
    return measured or tuned.candidates(problem, limits)[0]


def recurrence_fwd(
    cell: str,
    preact_x: Tensor,  # [D, T, B, G*H] or packed [D, R, G*H]; rows of G*H contiguous; of a stack layer 0's, [1, ...]
    weight_hh: list[Tensor],  # D times [G*H, H / heads]
    hx: Tensor,  # [D, B, H]
    cx: Tensor,  # [S, D, B, H]; c_n has its dtype
    layout: Layout = DENSE,
    vectors: Tensor | None = None,  # [D, V, H]
    noise: Noise = NO_NOISE,
    *,
    save_gates: bool,
    save_states: bool,
    stack: Stack | None = None,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the forward kernel. Returns output, h_n, c_n, gates, c_seq as `recurrence.recurrence_fwd` does.

    With `stack` the D recurrences are the layers of a stack, and D is an axis of its own: output [D, T, B, H], gates
    [D, T, B, K*H], c_seq [S, D, T, B, H].
    """
    _, *rows, GH = preact_x.shape
    (D, B, H), S = hx.shape, cx.size(0)
    packed = layout.first_row is not None
    T = len(layout.first_row) - 1 if packed else rows[0]
    sequence = (lambda width: (D, *rows, width)) if stack else (lambda width: (*rows, D * width))
    new = functools.partial(torch.empty, dtype=preact_x.dtype, device=preact_x.device)
    output, h_n, c_n = new(sequence(H)), new(D, B, H), new(S, D, B, H, dtype=cx.dtype)
    gates = new(sequence(cells.CELLS[cell].num_kept * H) if save_gates else 0)
    c_seq = new((S, *sequence(H)) if save_states else 0, dtype=torch.float32)
    if B == 0:
        return output, h_n, c_n, gates, c_seq
    plan = plan or plan_for(cell, preact_x, weight_hh, hx, "fwd", layout.name, stack is not None)
    if plan.schedule == "stepped":
        _only_dense(layout, stack, noise)
        stepping.recurrence_fwd(plan, preact_x, weight_hh, vectors, hx, cx, output, h_n, c_n, gates, c_seq)
        return output, h_n, c_n, gates, c_seq
    counters = _counters(plan, output.device)
    factor = noise.of_sequences(D, B, H, torch.float32)
    aligned = plan.aligned_hidden
    # Whether the group reads something else of a step than its output: rows that are dropped, or aligned.
    apart = factor is not None or aligned > H
    _launch(
        plan,
        preact_x_ptr=preact_x,
        **_weights(weight_hh, stack, plan),
        vectors_ptr=preact_x if vectors is None else vectors.contiguous(),
        bias_ptr=stack.bias.contiguous() if stack else preact_x,
        hx_ptr=hx.contiguous(),
        cx_ptr=cx.float().contiguous(),
        **_tables(layout, counters),
        **_noise(noise, factor, hx, counters),
        hx_entering_ptr=_padded(hx if factor is None else (hx * factor).to(hx.dtype), aligned),
        entering_ptr=_exchanged(new(sequence(aligned)), plan) if apart else output,
        output_ptr=output if apart else _exchanged(output, plan),
        h_n_ptr=h_n,
        c_n_ptr=c_n,
        gates_ptr=gates,
        c_seq_ptr=c_seq,
        arrived_ptr=counters,
        sums_ptr=_sums(plan, counters),
        T=T,
        B=B,
        D=D,
        R=math.prod(rows),
        rows_preact_d=preact_x.stride(0) // GH,
        rows_preact_t=0 if packed else preact_x.stride(1) // GH,
        rows_preact_b=preact_x.stride(-2) // GH,
        flags={**_flags(layout), **_noises(noise), "SAVE_GATES": save_gates, "SAVE_STATES": save_states},
    )
    return output, h_n, c_n, gates, c_seq


def recurrence_bwd(
    cell: str,
    grad_output: Tensor | None,  # [T, B, D*H] or packed [R, D*H]; of a stack the last layer's, [T, B, H] or [R, H]
    grad_c_seq: Tensor | None,  # [S, T, B, D*H] or [S, R, D*H]; the same
    grad_h_n: Tensor,  # [D, B, H]
    grad_c_n: Tensor,  # [S, D, B, H]
    weight_hh: list[Tensor],  # D times [G*H, H / heads]
    hx: Tensor,  # [D, B, H]
    cx: Tensor,  # [S, D, B, H]
    output: Tensor,  # [T, B, D*H] or [R, D*H]; these three as `recurrence_fwd` returns them
    gates: Tensor,  # [T, B, D*K*H] or [R, D*K*H]
    c_seq: Tensor,  # [S, T, B, D*H] or [S, R, D*H]
    layout: Layout = DENSE,
    clip: float | None = None,
    vectors: Tensor | None = None,  # [D, V, H]
    noise: Noise = NO_NOISE,
    *,
    stack: Stack | None = None,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward kernel. Returns grad_preact like gates, grad_hx, grad_cx as `recurrence.recurrence_bwd`
    does.
    """
    rows, width = output.shape[bool(stack) : -1], output.size(-1)
    D, B, H = hx.shape
    packed = layout.first_row is not None
    T = len(layout.first_row) - 1 if packed else rows[0]
    grad_preact, grad_hx, grad_cx = torch.empty_like(gates), hx.new_empty(D, B, H), cx.new_empty(cx.shape)
    if B == 0:
        return grad_preact, grad_hx, grad_cx
    plan = plan or plan_for(cell, gates, weight_hh, hx, "bwd", layout.name, stack is not None)
    grad_c_seq = grad_c_seq if cx.size(0) else None
    if grad_output is None:  # one row of zeros stands for all
        grad_output = output.new_zeros(width).expand(*rows, width)
    elif not _rows_of(grad_output, width):
        grad_output = grad_output.contiguous()
    if plan.schedule == "stepped":
        _only_dense(layout, stack, noise)
        given = (grad_output, grad_c_seq, grad_h_n, grad_c_n, weight_hh, vectors, hx, cx, output, gates, c_seq, clip)
        stepping.recurrence_bwd(plan, *given, grad_preact, grad_hx, grad_cx)
        return grad_preact, grad_hx, grad_cx
    counters = _counters(plan, output.device)
    aligned = plan.aligned_hidden
    _launch(
        plan,
        grad_output_ptr=grad_output,
        grad_c_seq_ptr=c_seq if grad_c_seq is None else grad_c_seq.float().contiguous(),
        grad_h_n_ptr=grad_h_n.contiguous(),
        grad_c_n_ptr=grad_c_n.contiguous(),
        **_weights(weight_hh, stack, plan),
        vectors_ptr=gates if vectors is None else vectors.contiguous(),
        hx_ptr=hx.contiguous(),
        cx_ptr=cx.float().contiguous(),
        **_tables(layout, counters),
        **_noise(noise, noise.of_sequences(D, B, H, torch.float32), hx, counters),
        output_ptr=output.contiguous(),
        gates_ptr=gates,
        c_seq_ptr=c_seq,
        statistics_ptr=_row_statistics(cell, gates, c_seq, D, H) if cells.CELLS[cell].norms else c_seq,
        grad_preact_ptr=grad_preact if aligned > H else _exchanged(grad_preact, plan),
        exchanged_ptr=_exchanged(gates.new_empty(*gates.shape[:-1], gates.size(-1) // H * aligned), plan)
        if aligned > H
        else grad_preact,
        grad_hx_ptr=grad_hx,
        grad_cx_ptr=grad_cx,
        arrived_ptr=counters,
        sums_ptr=_sums(plan, counters),
        T=T,
        B=B,
        D=D,
        R=math.prod(rows),
        rows_grad_output_t=0 if packed else grad_output.stride(0) // width,
        rows_grad_output_b=grad_output.stride(-2) // width,
        clip=0.0 if clip is None else clip,
        flags={
            **_flags(layout),
            **_noises(noise),
            "CLIP": clip is not None,
            "HAS_GRAD_C_SEQ": grad_c_seq is not None,
        },
    )
    return grad_preact, grad_hx, grad_cx


def step_fwd(
    cell: str,
    input: Tensor,  # [B, I]
    hx: Tensor,  # [L*D, B, H]
    cx: Tensor,  # [S, L*D, B, H]
    parameters: list[list[Tensor]],  # per layer and direction, as in `fusedlstm.products`
    directions: int,
    *,
    save_gates: bool,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One step of a stack, one launch a layer. Returns output, h_n, c_n, gates, c_seq as `recurrence.step_fwd` does."""
    (_, B, H), D, S = hx.shape, directions, cx.size(0)
    new = functools.partial(torch.empty, dtype=input.dtype, device=input.device)
    output = [new(B, D * H) for _ in parameters[::D]]
    h_n, c_n = new(hx.shape), new(cx.shape, dtype=cx.dtype)
    gates = new((B, D * cells.CELLS[cell].num_kept * H) if save_gates else 0)
    c_seq = new((S, B, D * H) if save_states else 0, dtype=torch.float32)
    if B > 0:
        heads = H // parameters[0][1].size(1)
        plans = [step_plan_for(cell, input, H, D, heads, p[0].size(1)) for p in parameters[::D]]
        stepping.single_step(plans, input, hx, cx, parameters, output, h_n, c_n, gates, c_seq)
    return output[-1], h_n, c_n, gates, c_seq


def step_plan_for(cell: str, like: Tensor, H: int, D: int, heads: int, input_size: int) -> Plan:
    """The plan of a step for an input [B, ...] of the dtype and on the device of `like`."""
    index = like.device.index if like.device.type == "cuda" else None
    sizes = (cell, like.size(0), H, like.dtype, D)
    return _cached_step_plan(*sizes, index, precision_of(like.dtype), heads, input_size, devices.sms())


@functools.lru_cache(maxsize=4096)
def _cached_step_plan(
    cell: str,
    B: int,
    H: int,
    dtype: torch.dtype,
    D: int,
    index: int | None,
    precision: str,
    heads: int,
    input_size: int,
    sms: int | None,
) -> Plan:
    limits = device_limits(index)
    return planning.step_plan(cell, B, H, DTYPES[dtype], D, limits, "fwd", precision, heads, input_size)


def _only_dense(layout: Layout, stack: Stack | None, noise: Noise) -> None:
    got = "a stack" if stack else "zoneout or dropout" if noise.rates else layout.name
    if got != "dense":
        raise ValueError(f"plan: the schedule 'stepped' runs dense batches of one layer, got {got}")


def recompute(
    cell: str,
    preact: Tensor,  # [D, T, B, G*H] or packed [D, R, G*H]; rows of G*H contiguous, one distance from row to row
    hx: Tensor,  # [D, B, H]
    cx: Tensor,  # [S, D, B, H]
    layout: Layout = DENSE,
    vectors: Tensor | None = None,  # [D, V, H]
    noise: Noise = NO_NOISE,
) -> tuple[Tensor, Tensor]:
    """Launch the kernel that needs no product. Returns gates and c_seq as `recurrence.recompute` does."""
    D, *rows, GH = preact.shape
    B, H, S = hx.size(1), hx.size(2), cx.size(0)
    gates = torch.empty(*rows, D * GH, dtype=preact.dtype, device=preact.device)
    c_seq = torch.empty(S, *rows, D * H, dtype=torch.float32, device=preact.device)
    if B == 0:
        return gates, c_seq
    unread = torch.empty(2, dtype=torch.int32, device=preact.device)
    sizes = {"H": H, "G": GH // H, "V": 0 if vectors is None else vectors.size(1), "S": S, "BLOCK_H": RECOMPUTED_UNITS}
    launch = Bound(
        recompute_kernel,
        (B, triton.cdiv(H, RECOMPUTED_UNITS), D),  # the first axis of a grid is the long one
        {**sizes, "STEP": STEPS[cell][0], "LAYOUT": row_layout(_flags(layout)), "NOISE": noise_kinds(_noises(noise))},
        {"num_warps": RECOMPUTED_UNITS // 32, "sanitize_overflow": False},
    )
    with on(preact.device):
        launch(
            preact_ptr=preact,
            vectors_ptr=preact if vectors is None else vectors.contiguous(),
            hx_ptr=hx.contiguous(),
            cx_ptr=cx.float().contiguous(),
            **_tables(layout, unread),
            **{name: x for name, x in _noise(noise, None, hx, unread).items() if name != "factor_ptr"},
            gates_ptr=gates,
            c_seq_ptr=c_seq,
            T=rows[0] if layout.first_row is None else len(layout.first_row) - 1,
            B=B,
            D=D,
            R=math.prod(rows),
            rows_preact_d=preact.stride(0) // GH,
            rows_preact=preact.stride(-2) // GH,
        )
    return gates, c_seq


def _weights(weight_hh: list[Tensor], stack: Stack | None, plan: Plan) -> dict[str, Tensor]:
    """The weights of all recurrences in one tensor each, with aligned rows; a single one is taken as it lies if it has
    these.
    """
    weight_hh = weight_hh[0].contiguous() if len(weight_hh) == 1 else torch.stack(weight_hh)
    weight_ih = stack.weight_ih.contiguous() if stack else weight_hh
    H, aligned = plan.hidden, plan.aligned_hidden
    if aligned == H:
        return {"weight_hh_ptr": weight_hh, "weight_ih_ptr": weight_ih}
    weights = (_padded(w.unflatten(-2, (-1, H)), aligned, rows=True) for w in (weight_hh, weight_ih))
    return dict(zip(("weight_hh_ptr", "weight_ih_ptr"), weights, strict=True))


def _padded(x: Tensor, width: int, *, rows: bool = False) -> Tensor:
    """`x` with zeros up to a width of its last axis, and of the one before with `rows`; contiguous."""
    more = width - x.size(-1)
    return torch.nn.functional.pad(x, (0, more, 0, more * rows)) if more else x.contiguous()


def _exchanged(x: Tensor, plan: Plan) -> Tensor:
    """A new tensor that the group writes and reads: filled for the protocol of `exchange` that needs it."""
    if plan.protocol == "data":
        x.view(torch.int16 if x.element_size() == 2 else torch.int32).fill_(exchange.ABSENT.value)
    return x


def _tables(layout: Layout, unread: Tensor) -> dict[str, Tensor]:
    """The arguments that tell a kernel how the rows lie; `unread`, two int32 or more, stands where it never looks."""
    return {
        "lengths_ptr": unread if layout.lengths is None else layout.lengths.contiguous(),
        "first_row_ptr": unread.view(torch.int64) if layout.first_row is None else layout.first_row,
        "resets_ptr": (unread if layout.resets is None else layout.resets.contiguous()).view(torch.int8),
    }


def _noise(noise: Noise, factor: Tensor | None, hx: Tensor, unread: Tensor) -> dict:
    """The arguments that tell a kernel what regularises the steps; `factor` is that of the h that enters the
    product.
    """
    rate_h, rate_c, candidate = noise.rates[:3] or (0.0, 0.0, 0.0)
    return {
        "seed_ptr": unread.view(torch.int64) if noise.seed is None else noise.seed,
        "factor_ptr": hx if factor is None else factor,
        "first_recurrence": noise.place[0],
        "first_row_of_all": noise.place[1],
        "below_h": threshold(rate_h),
        "below_c": threshold(rate_c),
        "below_candidate": threshold(candidate),
        "rate_h": rate_h,
        "rate_c": rate_c,
        "scale_candidate": scale(candidate),
    }


def _noises(noise: Noise) -> dict[str, bool]:
    return {
        "HOLDS": noise.holds,
        "DROPS_CANDIDATE": noise.drops_candidate,
        "DROPS_H": noise.drops_h,
        "TRAINING": noise.seed is not None and noise.in_steps,
    }


def _flags(layout: Layout) -> dict[str, bool]:
    packed = layout.first_row is not None
    return {
        "PACKED": packed,
        "RAGGED": layout.lengths is not None and not packed,
        "RESETS": layout.resets is not None,
    }


def _launch(plan: Plan, flags: dict[str, bool], **arguments) -> None:
    device = arguments["hx_ptr"].device
    with on(device):
        _without_spills(plan, tuple(flags.items()), device.index, arguments).launcher(arguments)()


# Of kernels that were compiled and looked at: in what their launches differ from their plans.
_variants: dict[tuple, dict] = {}


def _without_spills(plan: Plan, flags: tuple[tuple[str, bool], ...], index: int | None, arguments: dict) -> Bound:
    """The kernel of a plan, or of the next variant of its tiles if the compiler spills it.

    What spills is known of the sizes that `make kernels` compiles. Of others it shows when they are compiled here.
    """
    key = plan.code, flags, index
    differs = _variants.get(key)
    if differs is None:
        differs = _variants[key] = _first_clean(plan, flags, index, arguments)
    return _bound(KERNELS[plan.pass_], dataclasses.replace(plan, **differs) if differs else plan, flags)


def _first_clean(plan: Plan, flags: tuple[tuple[str, bool], ...], index: int | None, arguments: dict) -> dict:
    """The fields in which the first variant that does not spill differs from `plan`, or if all do the first that can be
    launched.

    Raises:
        LaunchError: none can be launched; the error of the plan itself.
    """
    chosen = refused = None
    for p in [plan, *planning.variants(plan, device_limits(index))]:
        try:
            bound = _bound(KERNELS[p.pass_], p, flags)
            bound.launcher(arguments)  # compiles it
        except failures.LaunchError as error:
            refused = refused or error
            continue
        if bound.spill_bytes <= planning.allowed_bytes(plan.arch):
            chosen = p
            break
        chosen = chosen or p
    if chosen is None:
        raise refused
    fields = [field.name for field in dataclasses.fields(plan)]
    return {name: getattr(chosen, name) for name in fields if getattr(chosen, name) != getattr(plan, name)}


@functools.lru_cache(maxsize=4096)
def _bound(kernel, plan: Plan, flags: tuple[tuple[str, bool], ...]) -> Bound:
    return Bound(kernel, plan.grid, constants(plan, **dict(flags)), options(plan), words(plan))


def _counters(plan: Plan, device: torch.device) -> Tensor:
    """One counter a recurrence, head and batch tile, at zero; else something that is not read."""
    if plan.protocol != "counter" and not (cells.CELLS[plan.cell].norms and exchange_of(plan).ACQUIRES):
        return torch.empty(2, dtype=torch.int32, device=device)
    shape = (plan.grid[2], plan.heads, plan.tiles_b, planning.COUNTER_STRIDE)
    return torch.zeros(shape, dtype=torch.int32, device=device)


def _sums(plan: Plan, unread: Tensor) -> Tensor:
    """Two slots of two numbers a row and program, for the norms of a cell in which programs wait for each other;
    zeros.
    """
    if plan.local or not cells.CELLS[plan.cell].norms:
        return unread.view(torch.int64)
    sums = triton.cdiv(plan.group, plan.block_h) * plan.block_h
    shape = (plan.grid[2], plan.tiles_b, 4, plan.block_b, sums)
    return torch.zeros(shape, dtype=torch.int64, device=unread.device)


def _row_statistics(cell: str, gates: Tensor, c_seq: Tensor, D: int, H: int) -> Tensor:
    """Of every row and direction what the backward of both norms needs, [R, D, 4] float32 (`kernels.norms`)."""
    R = gates.numel() // gates.size(-1)
    found = torch.empty(R, D, 4, dtype=torch.float32, device=gates.device)
    if R:
        told = row_statistics_constants(cell, H)
        options = {"num_warps": told.pop("num_warps")}
        with on(gates.device):
            launch = Bound(row_statistics_kernel, (R, D), told, options)
            launch(gates_ptr=gates, c_seq_ptr=c_seq, statistics_ptr=found, D=D)
    return found


def row_statistics_constants(cell: str, H: int) -> dict:
    """The compile-time arguments of `row_statistics_kernel`, and its warps: a thread has 32 numbers or less."""
    of = cells.CELLS[cell]
    block = triton.next_power_of_2(of.num_gates * H)
    return {
        "H": H,
        "G": of.num_gates,
        "KEPT": of.num_kept,
        "BLOCK_GH": block,
        "BLOCK_H": triton.next_power_of_2(H),
        "num_warps": max(1, min(32, block // 1024)),
    }


def _rows_of(x: Tensor, width: int) -> bool:
    """Whether every row of the last axis is contiguous and starts at a multiple of `width` from the first."""
    return x.stride(-1) == 1 and all(stride > 0 and stride % width == 0 for stride in x.stride()[:-1])
