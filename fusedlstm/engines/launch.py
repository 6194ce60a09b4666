"""From a plan and tensors to a kernel launch: allocation, arguments, and what the compiler is told."""

import dataclasses
import functools
import math
from collections.abc import Callable

import torch
import triton
from torch import Tensor

from fusedlstm import cells, products, transforms
from fusedlstm import plan as planning
from fusedlstm.cells import Cell, Grads, Recurrence, Saved, State, Weights
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
from fusedlstm.layout import Layout
from fusedlstm.noise import EVERY_ROW, Batch, Noise, scale, threshold
from fusedlstm.plan import Plan, devices, tuned
from fusedlstm.plan.problem import Problem

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
    interpreter.repair_speed()
    interpreter.repair_launches()


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
@transforms.constant
def why_not(
    cell: str | None,
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
    return measured or planning.candidates(problem._replace(device_limits=limits))[0]


def recurrence_fwd(
    spec: Recurrence,
    preact_x: Tensor,  # [D, T, B, G*H] or packed [D, R, G*H]; rows of G*H contiguous; of a wave layer 0's, [1, ...]
    weights: Weights,  # with `weight_ih` the D recurrences are the layers of a wave
    state: State,
    batch: Batch = EVERY_ROW,
    *,
    plan: Plan | None = None,
) -> Saved:
    """Launch the forward kernel. c_n has the dtype of cx; c_seq is float32.

    Of a wave, D is an axis of its own: output [D, T, B, H], gates [D, T, B, K*H], c_seq [S, D, T, B, H].
    """
    _, *rows, GH = preact_x.shape
    layout, hx, is_wave = batch.layout, state.hx, weights.weight_ih is not None
    saved, T = _new_results(spec, preact_x, state, layout, is_wave)
    D, B, H = hx.shape
    if B == 0:
        return saved
    plan = plan or plan_for(spec.cell.name, preact_x, weights.weight_hh, hx, "fwd", layout.name, is_wave)
    if plan.schedule == "stepped":
        _only_dense(batch, is_wave)
        stepping.recurrence_fwd(plan, preact_x, weights, state, saved)
        return saved
    counters = _counters(plan, hx.device)
    factor = batch.noise.of_sequences(D, B, H, torch.float32)
    aligned = plan.aligned_hidden
    # Whether the group reads something else of a step than its output: rows that are dropped, or aligned.
    apart = factor is not None or aligned > H
    entering = _exchanged(preact_x.new_empty(_sequence(is_wave, rows, D, aligned)), plan) if apart else saved.output
    _launch(
        plan,
        preact_x_ptr=preact_x,
        **_weights(weights, plan, preact_x),
        bias_ptr=weights.bias.contiguous() if is_wave else preact_x,
        hx_ptr=hx.contiguous(),
        cx_ptr=state.cx.float().contiguous(),
        **_tables(layout, counters),
        **_noise(batch.noise, factor, hx, counters),
        hx_entering_ptr=_padded(hx if factor is None else (hx * factor).to(hx.dtype), aligned),
        entering_ptr=entering,
        output_ptr=saved.output if apart else _exchanged(saved.output, plan),
        h_n_ptr=saved.h_n,
        c_n_ptr=saved.c_n,
        gates_ptr=saved.gates,
        c_seq_ptr=saved.c_seq,
        arrived_ptr=counters,
        sums_ptr=_sums(plan, counters),
        T=T,
        B=B,
        D=D,
        R=math.prod(rows),
        rows_preact_d=preact_x.stride(0) // GH,
        rows_preact_t=0 if layout.name == "packed" else preact_x.stride(1) // GH,
        rows_preact_b=preact_x.stride(-2) // GH,
        flags={
            **_flags(layout),
            **_noises(batch.noise),
            "SAVE_GATES": spec.save_gates,
            "SAVE_STATES": spec.save_states,
        },
    )
    return saved


def _sequence(is_wave: bool, rows: list[int], D: int, width: int) -> tuple[int, ...]:
    """The shape of a sequence of `width` features a recurrence."""
    return (D, *rows, width) if is_wave else (*rows, D * width)


def _new_results(spec: Recurrence, preact_x: Tensor, state: State, layout: Layout, is_wave: bool) -> tuple[Saved, int]:
    """What a forward writes, and T."""
    _, *rows, _ = preact_x.shape
    (D, B, H), S = state.hx.shape, state.cx.size(0)
    new = functools.partial(torch.empty, dtype=preact_x.dtype, device=preact_x.device)
    sequence = functools.partial(_sequence, is_wave, rows, D)
    saved = Saved(
        output=new(sequence(H)),
        h_n=new(D, B, H),
        c_n=new(S, D, B, H, dtype=state.cx.dtype),
        gates=new(sequence(spec.cell.num_kept * H) if spec.save_gates else 0),
        c_seq=new((S, *sequence(H)) if spec.save_states else 0, dtype=torch.float32),
    )
    return saved, rows[0] if layout.first_row is None else len(layout.first_row) - 1


def recurrence_bwd(
    spec: Recurrence,
    grads: Grads,  # output and c_seq of a wave: the last layer's
    saved: Saved,  # as `recurrence_fwd` returns it
    weights: Weights,
    state: State,
    batch: Batch = EVERY_ROW,
    *,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward kernel. Returns grad_preact like gates, grad_hx and grad_cx."""
    layout, (hx, cx), is_wave = batch.layout, state, weights.weight_ih is not None
    output, gates, c_seq = saved.output, saved.gates, saved.c_seq
    D, B, H = hx.shape
    grad_preact, grad_hx, grad_cx = torch.empty_like(gates), hx.new_empty(D, B, H), cx.new_empty(cx.shape)
    if B == 0:
        return grad_preact, grad_hx, grad_cx
    plan = plan or plan_for(spec.cell.name, gates, weights.weight_hh, hx, "bwd", layout.name, is_wave)
    rows, width = output.shape[is_wave:-1], output.size(-1)
    grad_output = _readable(grads.output, rows, output)
    grads = grads._replace(output=grad_output, c_seq=grads.c_seq if len(cx) else None)
    if plan.schedule == "stepped":
        _only_dense(batch, is_wave)
        stepping.recurrence_bwd(plan, spec.clip, grads, saved, weights, state, grad_preact, grad_hx, grad_cx)
        return grad_preact, grad_hx, grad_cx
    counters = _counters(plan, output.device)
    aligned = plan.aligned_hidden
    exchanged = grad_preact
    if aligned > H:
        exchanged = gates.new_empty(*gates.shape[:-1], gates.size(-1) // H * aligned)
    _exchanged(exchanged, plan)
    _launch(
        plan,
        grad_output_ptr=grad_output,
        grad_c_seq_ptr=c_seq if grads.c_seq is None else grads.c_seq.float().contiguous(),
        grad_h_n_ptr=grads.h_n.contiguous(),
        grad_c_n_ptr=grads.c_n.contiguous(),
        **_weights(weights, plan, gates),
        hx_ptr=hx.contiguous(),
        cx_ptr=cx.float().contiguous(),
        **_tables(layout, counters),
        **_noise(batch.noise, batch.noise.of_sequences(D, B, H, torch.float32), hx, counters),
        output_ptr=output.contiguous(),
        gates_ptr=gates,
        c_seq_ptr=c_seq,
        statistics_ptr=_row_statistics(spec.cell, gates, c_seq, D, H) if spec.cell.norms else c_seq,
        grad_preact_ptr=grad_preact,
        exchanged_ptr=exchanged,
        grad_hx_ptr=grad_hx,
        grad_cx_ptr=grad_cx,
        arrived_ptr=counters,
        sums_ptr=_sums(plan, counters),
        T=rows[0] if layout.first_row is None else len(layout.first_row) - 1,
        B=B,
        D=D,
        R=math.prod(rows),
        rows_grad_output_t=0 if layout.name == "packed" else grad_output.stride(0) // width,
        rows_grad_output_b=grad_output.stride(-2) // width,
        clip=0.0 if spec.clip is None else spec.clip,
        flags={
            **_flags(layout),
            **_noises(batch.noise),
            "CLIP": spec.clip is not None,
            "HAS_GRAD_C_SEQ": grads.c_seq is not None,
        },
    )
    return grad_preact, grad_hx, grad_cx


def _readable(grad_output: Tensor | None, rows: torch.Size, output: Tensor) -> Tensor:
    """The gradient of the output as the kernel reads it; without one, a row of zeros stands for all."""
    width = output.size(-1)
    if grad_output is None:
        return output.new_zeros(width).expand(*rows, width)
    return grad_output if _rows_of(grad_output, width) else grad_output.contiguous()


def step_fwd(
    spec: Recurrence,
    input: Tensor,  # [B, I]
    state: State,  # hx [L*D, B, H], cx [S, L*D, B, H]
    parameters: list[list[Tensor]],  # per layer and direction, as in `fusedlstm.cells.cell`
    directions: int,
) -> Saved:
    """One step of a stack, one launch a layer: output [B, D*H], h_n and c_n like `state`, and of the last layer gates
    [B, D*K*H] and c_seq [S, B, D*H].
    """
    (_, B, H), D, S = state.hx.shape, directions, state.cx.size(0)
    new = functools.partial(torch.empty, dtype=input.dtype, device=input.device)
    outputs = [new(B, D * H) for _ in parameters[::D]]
    saved = Saved(
        output=outputs[-1],
        h_n=new(state.hx.shape),
        c_n=new(state.cx.shape, dtype=state.cx.dtype),
        gates=new((B, D * spec.cell.num_kept * H) if spec.save_gates else 0),
        c_seq=new((S, B, D * H) if spec.save_states else 0, dtype=torch.float32),
    )
    if B > 0:
        heads = H // parameters[0][1].size(1)
        plans = [step_plan_for(spec.cell.name, input, H, D, heads, p[0].size(1)) for p in parameters[::D]]
        stepping.single_step(plans, input, state, parameters, outputs, saved)
    return saved


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


def _only_dense(batch: Batch, is_wave: bool) -> None:
    got = "a stack" if is_wave else "zoneout or dropout" if batch.noise.rates else batch.layout.name
    if got != "dense":
        raise ValueError(f"plan: the schedule 'stepped' runs dense batches of one layer, got {got}")


def recompute(
    spec: Recurrence,
    preact: Tensor,  # [D, T, B, G*H] or packed [D, R, G*H]; rows of G*H contiguous, one distance from row to row
    vectors: Tensor | None,  # [D, V, H]
    state: State,
    batch: Batch = EVERY_ROW,
) -> tuple[Tensor, Tensor]:
    """Launch the kernel that needs no product. Returns gates and c_seq as `recurrence_fwd` does."""
    layout, noise, (hx, cx) = *batch, state
    D, *rows, GH = preact.shape
    B, H, S = hx.size(1), hx.size(2), cx.size(0)
    gates = torch.empty(*rows, D * GH, dtype=preact.dtype, device=preact.device)
    c_seq = torch.empty(S, *rows, D * H, dtype=torch.float32, device=preact.device)
    if B == 0:
        return gates, c_seq
    unread = torch.empty(2, dtype=torch.int32, device=preact.device)
    sizes = {"H": H, "G": GH // H, "V": 0 if vectors is None else vectors.size(1), "S": S, "BLOCK_H": RECOMPUTED_UNITS}
    of_step = {"LAYOUT": row_layout(_flags(layout)), "NOISE": noise_kinds(_noises(noise))}
    launch = Bound(
        recompute_kernel,
        (B, triton.cdiv(H, RECOMPUTED_UNITS), D),  # the first axis of a grid is the long one
        {**sizes, "STEP": STEPS[spec.cell.name][0], **of_step},
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


def _weights(weights: Weights, plan: Plan, unread: Tensor) -> dict[str, Tensor]:
    """The weights of all recurrences in one tensor each, with aligned rows; a single one is taken as it lies if it has
    these. `unread` stands where the kernel never looks.
    """
    weight_hh, vectors = weights.weight_hh, weights.vectors
    weight_hh = weight_hh[0].contiguous() if len(weight_hh) == 1 else torch.stack(weight_hh)
    weight_ih = weight_hh if weights.weight_ih is None else weights.weight_ih.contiguous()
    H, aligned = plan.hidden, plan.aligned_hidden
    if aligned > H:
        weight_hh, weight_ih = (_padded(w.unflatten(-2, (-1, H)), aligned, rows=True) for w in (weight_hh, weight_ih))
    return {
        "weight_hh_ptr": weight_hh,
        "weight_ih_ptr": weight_ih,
        "vectors_ptr": unread if vectors is None else vectors.contiguous(),
    }


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


def _row_statistics(cell: Cell, gates: Tensor, c_seq: Tensor, D: int, H: int) -> Tensor:
    """Of every row and direction what the backward of n norms needs, [R, D, 2 n] float32 (`kernels.norms`)."""
    R = gates.numel() // gates.size(-1)
    found = torch.empty(R, D, 2 * cell.norms, dtype=torch.float32, device=gates.device)
    if R:
        told = row_statistics_constants(cell, H)
        options = {"num_warps": told.pop("num_warps")}
        with on(gates.device):
            launch = Bound(row_statistics_kernel, (R, D), told, options)
            launch(gates_ptr=gates, c_seq_ptr=c_seq, statistics_ptr=found, D=D)
    return found


def row_statistics_constants(cell: Cell, H: int) -> dict:
    """The compile-time arguments of `row_statistics_kernel`, and its warps: a thread has 32 numbers or less."""
    block = triton.next_power_of_2(cell.num_gates * H)
    return {
        "H": H,
        "G": cell.num_gates,
        "KEPT": cell.num_kept,
        "NORMS": cell.norms,
        "BLOCK_GH": block,
        "BLOCK_H": triton.next_power_of_2(H),
        "num_warps": max(1, min(32, block // 1024)),
    }


def _rows_of(x: Tensor, width: int) -> bool:
    """Whether every row of the last axis is contiguous and starts at a multiple of `width` from the first."""
    return x.stride(-1) == 1 and all(stride > 0 and stride % width == 0 for stride in x.stride()[:-1])
