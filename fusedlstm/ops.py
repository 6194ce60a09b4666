"""The custom ops: what must be done step by step, as PyTorch sees it, and the input product that comes before.

| op | what it does |
|---|---|
| `recurrence_fwd`, `recurrence_bwd` | the time loop of one layer in all directions |
| `wave_fwd`, `wave_bwd` | the same of several layers in one launch, each a step behind the one below |
| `step_fwd` | one step of a stack, its input products included |
| `recompute` | what the forward did not keep, from its output |
| `onednn_fwd`, `onednn_bwd` | one direction of an LSTM by oneDNN, on a CPU under a compiler |
| `aten_fwd` | a stack by ATen without gradients, on a CPU under a compiler |

An op runs on the engine "triton", the kernels; "torch", a loop of torch operations; or "auto", the kernels, and that
loop where they cannot be launched (`fusedlstm.engines.failures`). It then returns what the kernels would have, so that
a backward may follow the forward of the other. G gates, K kept blocks, V vectors and S states beside h are those of the
cell (`fusedlstm.cells`). Sequences have rows, [T, B] or packed [R] (`fusedlstm.layout`), and then directions and
features on one axis, so that both directions share each product. A recurrent weight [G*H, DH] has H / DH heads
(`fusedlstm.products`).
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fusedlstm import engines, transforms
from fusedlstm.cells import CELLS, Cell, Grads, Recurrence, Saved, State, Weights
from fusedlstm.engines import aten, failures, reference, torch_loop
from fusedlstm.layout import DENSE, Layout
from fusedlstm.noise import EVERY_ROW, Batch
from fusedlstm.products import joined, product, with_samples
from fusedlstm.samples import Axes

KERNELS = ("triton", "auto")  # engines that run them, if they can

# Where the samples of `torch.vmap` go (`fusedlstm.transforms`). Of the tables, lengths and resets may differ.
_TABLES = (0, None, 1, None)


def _fwd_units(arguments: dict[str, Any], samples: int) -> Axes | None:
    cell, D = CELLS[arguments["cell"]], len(arguments["weight_hh"])
    own = {"preact_x": cell.num_gates, "weight_hh": -cell.num_gates, "vectors": 1, "hx": 1, "cx": 1}
    return Axes(own, (D, 1, 1, D * cell.num_kept, D)) if _can_be_heads(arguments, samples) else None


def _bwd_units(arguments: dict[str, Any], samples: int) -> Axes | None:
    cell, D = CELLS[arguments["cell"]], len(arguments["weight_hh"])
    gates = D * cell.num_kept
    own = {"grads": (D, D, 1, 1), "weight_hh": -cell.num_gates, "vectors": 1, "hx": 1, "cx": 1, "saved": (D, gates, D)}
    return Axes(own, (gates, 1, 1)) if _can_be_heads(arguments, samples) else None


def _can_be_heads(arguments: dict[str, Any], samples: int) -> bool:
    """Whether the units of all samples fit a layer: norms would be over all of them, and kernels have limits."""
    cell, hx, weight_hh = CELLS[arguments["cell"]], arguments["hx"], arguments["weight_hh"]
    if cell.norms or arguments["engine"] not in KERNELS:
        return not cell.norms
    hidden, (_, first_row, *_) = hx.size(-1) * samples, arguments["tables"]
    layout = "dense" if first_row is None else "packed"
    sizes = (cell.name, hidden, len(weight_hh), False, layout, hidden // weight_hh[0].size(-1))
    return engines.why_not_triton(hx.device, weight_hh[0].dtype, *sizes) is None


@transforms.op(
    "recurrence_fwd",
    as_sequences=Axes({"preact_x": 2, "hx": 1, "cx": 2, "tables": _TABLES}, (1, 1, 2, 1, 2)),
    as_units=_fwd_units,
)
def recurrence_fwd(
    cell: str,
    engine: str,
    preact_x: Tensor,  # [D, T, B, G*H] or packed [D, R, G*H]
    weight_hh: list[Tensor],  # D times [G*H, DH]
    vectors: Tensor | None,  # [D, V, H]
    hx: Tensor,  # [D, B, H]
    cx: Tensor,  # [S, D, B, H]
    tables: list[Tensor | None],  # these three: `Batch.flat`
    rates: list[float],
    place: list[int],
    save_gates: bool,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """output [T, B, D*H], h_n [D, B, H], c_n [S, D, B, H], gates [T, B, D*K*H], c_seq [S, T, B, D*H]; [R, ...] if
    packed.

    gates and c_seq are empty unless saved; of padding, output and c_seq are zero, and gates have no meaning.
    """
    spec, batch = Recurrence(CELLS[cell], None, save_gates, save_states), Batch.of(tables, rates, place)
    given = (spec, preact_x, Weights(weight_hh, vectors), State(hx, cx), batch)

    def kernels():
        from fusedlstm.engines import launch

        return launch.recurrence_fwd(*given)

    at = partial(failures.where, hx.device, cell, preact_x.dtype, weight_hh, hx, batch.layout)
    return failures.attempt(engine, at, kernels, lambda: loop_fwd(engine, *given))


def loop_fwd(
    engine: str, spec: Recurrence, preact_x: Tensor, weights: Weights, state: State, batch: Batch = EVERY_ROW
) -> Saved:
    """`recurrence_fwd` by torch operations; in the place of kernels computed in float32, as they do."""
    dtypes = (preact_x.dtype, *(s.dtype for s in state), preact_x.dtype, c_seq_dtype(engine, preact_x))
    serves = reference if batch.noise.rates else torch_loop
    saved = serves.recurrence_fwd(spec, *_widened(engine, (preact_x, weights, state)), batch)
    return Saved(*(x.to(dtype) for x, dtype in zip(saved, dtypes, strict=True)))


@torch.library.register_fake(recurrence_fwd)
def _(cell, engine, preact_x, weight_hh, vectors, hx, cx, tables, rates, place, save_gates, save_states):
    D, *rows, _ = preact_x.shape
    S, H = cx.size(0), hx.size(-1)
    gates = preact_x.new_empty((*rows, D * CELLS[cell].num_kept * H) if save_gates else 0)
    c_seq = preact_x.new_empty((S, *rows, D * H) if save_states else 0, dtype=c_seq_dtype(engine, preact_x))
    return preact_x.new_empty(*rows, D * H), hx.new_empty(hx.shape), cx.new_empty(cx.shape), gates, c_seq


@transforms.op(
    "recurrence_bwd",
    as_sequences=Axes({"grads": (1, 2, 1, 2), "hx": 1, "cx": 2, "saved": (1, 1, 2), "tables": _TABLES}, (1, 1, 2)),
    as_units=_bwd_units,
)
def recurrence_bwd(
    cell: str,
    engine: str,
    grads: list[Tensor | None],  # of output and c_seq, or None, and of h_n and c_n; each of its shape
    weight_hh: list[Tensor],  # D times [G*H, DH]
    vectors: Tensor | None,  # [D, V, H]
    hx: Tensor,  # [D, B, H]
    cx: Tensor,  # [S, D, B, H]
    saved: list[Tensor],  # output, gates and c_seq of `recurrence_fwd`
    tables: list[Tensor | None],  # these three: `Batch.flat`
    rates: list[float],
    place: list[int],
    clip: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_preact like gates, grad_hx [D, B, H], grad_cx [S, D, B, H].

    `clip`: the largest element of the gradient of a state that enters a step.
    """
    spec, batch = Recurrence(CELLS[cell], clip), Batch.of(tables, rates, place)
    given = (spec, Grads(*grads), _as_saved(saved, grads), Weights(weight_hh, vectors), State(hx, cx), batch)

    def kernels():
        from fusedlstm.engines import launch

        return launch.recurrence_bwd(*given)

    at = partial(failures.where, hx.device, cell, saved[1].dtype, weight_hh, hx, batch.layout)
    return failures.attempt(engine, at, kernels, lambda: loop_bwd(engine, *given))


def _as_saved(saved: list[Tensor], grads: list[Tensor | None]) -> Saved:
    """Of output, gates and c_seq; no backward looks at the final states."""
    output, gates, c_seq = saved
    return Saved(output, grads[2], grads[3], gates, c_seq)


def loop_bwd(
    engine: str,
    spec: Recurrence,
    grads: Grads,
    saved: Saved,
    weights: Weights,
    state: State,
    batch: Batch = EVERY_ROW,
) -> tuple[Tensor, Tensor, Tensor]:
    """`recurrence_bwd` by torch operations, from what either engine saved; as `loop_fwd`."""
    dtypes = (saved.gates.dtype, *(s.dtype for s in state))
    serves = reference if batch.noise.rates else torch_loop
    found = serves.recurrence_bwd(spec, *_widened(engine, (grads, saved, weights, state)), batch)
    return tuple(x.to(dtype) for x, dtype in zip(found, dtypes, strict=True))


@torch.library.register_fake(recurrence_bwd)
def _(cell, engine, grads, weight_hh, vectors, hx, cx, saved, *_):
    return saved[1].new_empty(saved[1].shape), hx.new_empty(hx.shape), cx.new_empty(cx.shape)


@transforms.op("step_fwd", as_sequences=Axes({"input": 0, "hx": 1, "cx": 2}, (0, 1, 2, 0, 1)))
def step_fwd(
    cell: str,
    input: Tensor,  # [B, I]
    hx: Tensor,  # [L*D, B, H]
    cx: Tensor,  # [S, L*D, B, H]
    parameters: list[Tensor],  # layer by layer and direction by direction, as in `fusedlstm.cells.cell`
    directions: int,
    save_gates: bool,
    save_states: bool,
    engine: str = "triton",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One step of a stack by kernels, input products and all: one launch a layer.

    output [B, D*H], h_n [L*D, B, H], c_n [S, L*D, B, H] in the dtype of cx; of the last layer gates [B, D*K*H] and
    c_seq [S, B, D*H], empty unless saved.
    """
    spec, parameters = Recurrence(CELLS[cell], None, save_gates, save_states), grouped(parameters, len(hx))

    def kernels():
        from fusedlstm.engines import launch

        return launch.step_fwd(spec, input, State(hx, cx), parameters, directions)

    def loop():
        h_n, c_n, x = [], [], input.unsqueeze(0)
        for k in range(0, len(hx), directions):
            own, rows = parameters[k : k + directions], slice(k, k + directions)
            weights = Weights([p[1] for p in own], spec.cell.step_vectors(own))
            preact_x = input_product(spec.cell, x, own, None, DENSE)
            x, h, c, gates, c_seq = loop_fwd(engine, spec, preact_x, weights, State(hx[rows], cx[:, rows]))
            h_n.append(h)
            c_n.append(c)
        gates, c_seq = gates.squeeze(0) if save_gates else gates, c_seq.squeeze(1) if save_states else c_seq
        return x.squeeze(0), torch.cat(h_n), torch.cat(c_n, 1), gates, c_seq

    at = partial(failures.where, hx.device, cell, input.dtype, [parameters[0][1]] * directions, hx, DENSE)
    return failures.attempt(engine, at, kernels, loop)


@torch.library.register_fake(step_fwd)
def _(cell, input, hx, cx, parameters, directions, save_gates, save_states, engine="triton"):
    (_, B, H), D = hx.shape, directions
    gates = input.new_empty((B, D * CELLS[cell].num_kept * hx.size(-1)) if save_gates else 0)
    c_seq = input.new_empty((cx.size(0), B, D * H) if save_states else 0, dtype=state_dtype(input.dtype))
    return input.new_empty(B, D * H), input.new_empty(hx.shape), cx.new_empty(cx.shape), gates, c_seq


@transforms.op("recompute", as_sequences=Axes({"preact": 2, "hx": 1, "cx": 2, "tables": _TABLES}, (1, 2)))
def recompute(
    cell: str,
    engine: str,
    preact: Tensor,  # [D, T, B, G*H] or packed [D, R, G*H], the recurrent part included
    vectors: Tensor | None,  # [D, V, H]
    hx: Tensor,  # [D, B, H]
    cx: Tensor,  # [S, D, B, H]
    tables: list[Tensor | None],  # these three: `Batch.flat`
    rates: list[float],
    place: list[int],
) -> tuple[Tensor, Tensor]:
    """gates and c_seq as `recurrence_fwd` saves them, from its output: elementwise, so that nothing is waited for.

    Of cells that add both parts of a preactivation.
    """
    spec, batch, state = Recurrence(CELLS[cell]), Batch.of(tables, rates, place), State(hx, cx)

    def kernels():
        from fusedlstm.engines import launch

        return launch.recompute(spec, preact, vectors, state, batch)

    def loop():
        nothing = [preact.new_zeros(preact.size(-1), hx.size(-1))] * len(hx) if rates else []
        saved = loop_fwd(engine, spec, preact, Weights(nothing, vectors), state, batch)
        return saved.gates, saved.c_seq

    # A launch of its own: nothing waits in it, and what fails here says nothing about the loops.
    at = partial(failures.where, hx.device, f"{cell}, recomputed", preact.dtype, [], hx, batch.layout)
    return failures.attempt(engine, at, kernels, loop)


@torch.library.register_fake(recompute)
def _(cell, engine, preact, vectors, hx, cx, *_):
    D, *rows, GH = preact.shape
    c_seq = preact.new_empty(len(cx), *rows, D * hx.size(-1), dtype=c_seq_dtype(engine, preact))
    return preact.new_empty(*rows, D * GH), c_seq


@transforms.op("wave_fwd", as_sequences=Axes({"preact_x": 2, "hx": 1, "cx": 2, "tables": _TABLES}, (2, 1, 2, 2, 3)))
def wave_fwd(
    cell: str,
    preact_x: Tensor,  # [1, T, B, G*H] or packed [1, R, G*H]: the first layer's
    weight_ih: Tensor,  # [L-1, G*H, H] of the layers above the first
    bias: Tensor,  # [L-1, G*H]
    weight_hh: list[Tensor],  # L times [G*H, H]
    vectors: Tensor | None,  # [L, V, H]
    hx: Tensor,  # [L, B, H]
    cx: Tensor,  # [S, L, B, H]
    tables: list[Tensor | None],  # of `Batch.flat`: there is no noise
    save_gates: bool,
    save_states: bool,
    engine: str = "triton",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """output [L, T, B, H], h_n [L, B, H], c_n [S, L, B, H], gates [L, T, B, K*H], c_seq [S, L, T, B, H]; [R] if packed.

    `engine` is "triton" or "auto", as in `recurrence`.
    """
    spec, batch = Recurrence(CELLS[cell], None, save_gates, save_states), Batch.of(tables)

    def kernels():
        from fusedlstm.engines import launch

        weights = Weights(weight_hh, vectors, weight_ih, bias)
        return launch.recurrence_fwd(spec, preact_x, weights, State(hx, cx), batch)

    def loop():
        found, x = [], preact_x
        for k in range(len(weight_hh)):
            if k > 0:
                x = product(found[-1][0].flatten(0, -2), weight_ih[k - 1].t(), bias[k - 1]).view(preact_x.shape)
            found.append(loop_fwd(engine, spec, x, *_of_layer(k, weight_hh, vectors, hx, cx), batch))
        output, h_n, c_n, gates, c_seq = zip(*found, strict=True)
        gates = torch.stack(gates) if save_gates else gates[0]
        c_seq = torch.stack(c_seq, 1) if save_states else c_seq[0]
        return torch.stack(output), torch.cat(h_n), torch.cat(c_n, 1), gates, c_seq

    at = partial(failures.where, hx.device, failures.as_wave(cell), preact_x.dtype, weight_hh[:1], hx, batch.layout)
    return failures.attempt(engine, at, kernels, loop)


def _of_layer(k: int, weight_hh: list[Tensor], vectors: Tensor | None, hx: Tensor, cx: Tensor) -> tuple[Weights, State]:
    """What layer k of a wave has of its own."""
    own = slice(k, k + 1)
    return Weights(weight_hh[own], None if vectors is None else vectors[own]), State(hx[own], cx[:, own])


@torch.library.register_fake(wave_fwd)
def _(cell, preact_x, weight_ih, bias, weight_hh, vectors, hx, cx, tables, save_gates, save_states, *_):
    _, *rows, _ = preact_x.shape
    L, H, S = len(weight_hh), hx.size(-1), cx.size(0)
    gates = preact_x.new_empty((L, *rows, CELLS[cell].num_kept * H) if save_gates else 0)
    c_seq = preact_x.new_empty((S, L, *rows, H) if save_states else 0, dtype=state_dtype(preact_x.dtype))
    return preact_x.new_empty(L, *rows, H), hx.new_empty(hx.shape), cx.new_empty(cx.shape), gates, c_seq


@transforms.op(
    "wave_bwd",
    as_sequences=Axes({"grads": (1, 2, 1, 2), "hx": 1, "cx": 2, "saved": (2, 2, 3), "tables": _TABLES}, (2, 1, 2)),
)
def wave_bwd(
    cell: str,
    grads: list[Tensor | None],  # of output and c_seq of the last layer, or None, and of h_n and c_n of all
    weight_ih: Tensor,  # [L-1, G*H, H] of the layers above the first, gates in the order of their gradients
    weight_hh: list[Tensor],  # L times [G*H, H]
    vectors: Tensor | None,  # [L, V, H]
    hx: Tensor,  # [L, B, H]
    cx: Tensor,  # [S, L, B, H]
    saved: list[Tensor],  # output, gates and c_seq of `wave_fwd`
    tables: list[Tensor | None],  # of `Batch.flat`: there is no noise
    clip: float | None,
    engine: str = "triton",
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_preact like gates, grad_hx [L, B, H], grad_cx [S, L, B, H]; `engine` as in `wave_fwd`."""
    spec, batch = Recurrence(CELLS[cell], clip), Batch.of(tables)
    output, gates, c_seq = saved

    def kernels():
        from fusedlstm.engines import launch

        weights = Weights(weight_hh, vectors, weight_ih)
        return launch.recurrence_bwd(spec, Grads(*grads), _as_saved(saved, grads), weights, State(hx, cx), batch)

    def loop():
        found, (*of_rows, grad_h_n, grad_c_n) = [], grads
        for k in reversed(range(len(weight_hh))):
            own = slice(k, k + 1)
            of_layer = Grads(*of_rows, grad_h_n[own], grad_c_n[:, own])
            kept = _as_saved([output[k], gates[k], c_seq[:, k]], of_layer)
            found.append(loop_bwd(engine, spec, of_layer, kept, *_of_layer(k, weight_hh, vectors, hx, cx), batch))
            if k > 0:  # the gradient of the input's preactivations comes first (`ParameterGradients`)
                of_x = found[-1][0][..., : weight_ih.size(1)]
                of_rows = product(of_x.flatten(0, -2), weight_ih[k - 1]).view(output[k].shape), None
        grad_preact, grad_hx, grad_cx = zip(*reversed(found), strict=True)
        return torch.stack(grad_preact), torch.cat(grad_hx), torch.cat(grad_cx, 1)

    at = partial(failures.where, hx.device, failures.as_wave(cell), gates.dtype, weight_hh[:1], hx, batch.layout)
    return failures.attempt(engine, at, kernels, loop)


@torch.library.register_fake(wave_bwd)
def _(cell, grads, weight_ih, weight_hh, vectors, hx, cx, saved, *_):
    return saved[1].new_empty(saved[1].shape), hx.new_empty(hx.shape), cx.new_empty(cx.shape)


# ATen's LSTM on a CPU is oneDNN's layer. A compiler cannot differentiate it, because what it keeps has a size that
# nobody knows before. These ops hide that in the storage of an empty tensor.

LSTM_OF_ATEN = 2  # its number among ATen's recurrent layers


def _keep_for_onednn(ctx, inputs, output):
    input, hx, cx, parameters, ctx.reverse = inputs
    y, _, c_n, workspace = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(y, c_n, workspace, input, hx, cx, *parameters)


def _through_onednn(ctx, grad_output, grad_h_n, grad_c_n, _):
    y, c_n, workspace, input, hx, cx, *parameters = ctx.saved_tensors
    given = (input, hx, cx, parameters, ctx.reverse, y, c_n, workspace)
    *gradients, of_weight_ih, of_weight_hh, of_bias = onednn_bwd([grad_output, grad_h_n, grad_c_n], *given)
    return *gradients, [of_weight_ih, of_weight_hh, *[of_bias] * (len(parameters) - 2)], None


@transforms.op("onednn_fwd", _through_onednn, _keep_for_onednn)
def onednn_fwd(
    input: Tensor,  # [T, B, I]
    hx: Tensor,  # [1, B, H]
    cx: Tensor,  # [1, B, H]
    parameters: list[Tensor],  # weight_ih, weight_hh (, bias_ih, bias_hh)
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """output [T, B, H], h_n [1, B, H], c_n [1, B, H], and an empty tensor whose storage has what the backward needs."""
    output, h_n, c_n, workspace = _onednn(input, hx, cx, parameters, reverse)
    return output, h_n, c_n, workspace[:0]


@torch.enable_grad()  # without it, oneDNN keeps nothing
def _onednn(input: Tensor, hx: Tensor, cx: Tensor, parameters: list[Tensor], reverse: bool):
    tensors = (x.contiguous() for x in (input, *_with_biases(parameters), hx, cx))
    options = (reverse, [], LSTM_OF_ATEN, hx.size(-1), 1, len(parameters) == 4, False, False, True)
    return torch.ops.aten.mkldnn_rnn_layer(*tensors, *options)


def _with_biases(parameters: list[Tensor]) -> list[Tensor]:
    """The four parameters that oneDNN takes. It does not read the biases if there are none."""
    weight_hh = parameters[1]
    return [*parameters, *[weight_hh.new_zeros(len(weight_hh))] * (4 - len(parameters))]


@torch.library.register_fake(onednn_fwd)
def _(input, hx, cx, parameters, reverse):
    output = input.new_empty(*input.shape[:2], hx.size(-1))
    return output, hx.new_empty(hx.shape), cx.new_empty(cx.shape), input.new_empty(0, dtype=torch.uint8)


@transforms.op("onednn_bwd")
def onednn_bwd(
    grads: list[Tensor | None],  # of output, h_n and c_n
    input: Tensor,  # these five: as in the forward
    hx: Tensor,
    cx: Tensor,
    parameters: list[Tensor],
    reverse: bool,
    output: Tensor,  # [T, B, H]
    c_n: Tensor,  # [1, B, H]
    workspace: Tensor,  # the empty tensor of the forward, or a copy of it
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of input, hx, cx, weight_ih and weight_hh, and of either bias [4*H]."""
    if storage := workspace.untyped_storage().nbytes():
        kept = workspace.new_empty(0).set_(workspace.untyped_storage(), 0, (storage,))
    else:  # whoever copies an empty tensor copies nothing
        kept = _onednn(input, hx, cx, parameters, reverse)[-1]
    output, h_n = output.contiguous(), output[:1] if reverse else output[-1:]
    tensors = (x.contiguous() for x in (input, *_with_biases(parameters), hx, cx, output, h_n, c_n))
    grads = (None if g is None else g.contiguous() for g in grads)
    options = (reverse, LSTM_OF_ATEN, hx.size(-1), 1, len(parameters) == 4, True, False, [], False)
    found = torch.ops.aten.mkldnn_rnn_layer_backward(*tensors, *grads, *options, kept)
    grad_input, grad_weight_ih, grad_weight_hh, grad_bias, _, grad_hx, grad_cx = found
    return grad_input, grad_hx.view(hx.shape), grad_cx.view(cx.shape), grad_weight_ih, grad_weight_hh, grad_bias


@torch.library.register_fake(onednn_bwd)
def _(grads, input, hx, cx, parameters, *_):
    made = [x.new_empty(x.shape) for x in (input, hx, cx, *parameters[:2])]
    return *made, hx.new_empty(len(parameters[1]))


def onednn_layer(
    input: Tensor,  # [T, B, I]
    states: tuple[Tensor, ...],  # h and c, each [D, B, H]
    parameters: list[list[Tensor]],  # per direction
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output [T, B, D*H] and the final states of one layer in all its directions."""
    each = zip(*(s.split(1) for s in states), parameters, strict=True)
    found = [onednn_fwd(input, h, c, [*own], d == 1)[:3] for d, (h, c, own) in enumerate(each)]
    output, h_n, c_n = zip(*found, strict=True)
    # Users change results in place, and the backward needs c_n.
    return joined(output, -1), (joined(h_n), joined([c.clone() for c in c_n]))


@transforms.op("aten_fwd")
def aten_fwd(
    cell: str,
    input: Tensor,  # [T, B, I], or [B, T, I] with batch_first
    hx: Tensor,  # [L * D, B, H]
    weights: list[Tensor],
    bias: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor]:
    """output [T, B, D * H] or [B, T, D * H], and h_n, of a cell without a state beside h."""
    options = (bias, num_layers, 0.0, False, bidirectional, batch_first)
    output, (h_n,) = aten.stack(CELLS[cell], "stack", input, None, (hx,), weights, *options)
    return output.contiguous(), h_n


@torch.library.register_fake(aten_fwd)
def _(cell, input, hx, weights, bias, num_layers, bidirectional, batch_first):
    features = hx.size(-1) * (2 if bidirectional else 1)
    return input.new_empty(*input.shape[:2], features), hx.new_empty(hx.shape)


def is_one_step(cell: Cell, engine: str, input: Tensor, layout: Layout) -> bool:
    """Whether one kernel can take an input [T, B, I] whole: a single step, without masks, in which no program waits."""
    return engine in KERNELS and not cell.norms and layout.name == "dense" and input.size(0) == 1 and input.size(2) > 0


def states_beside_h(state: tuple[Tensor, ...]) -> Tensor:
    """The states beside h as one tensor, [S, D, B, H]."""
    if len(state) == 2:
        return state[1].unsqueeze(0)
    return torch.stack(state[1:]) if len(state) > 2 else state[0].new_empty(0, *state[0].shape)


def one_by_one(states: Tensor) -> list[Tensor]:
    """The states [S, ...] beside h. Each may be changed in place, so none is a view of the same tensor as another."""
    # Not by `unbind`, which gives an empty list for an h alone: torch cannot load a program with one.
    return [states[0]] if states.size(0) == 1 else [states[k].clone() for k in range(states.size(0))]


def c_seq_dtype(engine: str, like: Tensor) -> torch.dtype:
    """Of the states beside h of every step: the loop of torch operations keeps one dtype."""
    return state_dtype(like.dtype) if engine in KERNELS else like.dtype


def _widened(engine: str, tree):
    """Tensors in nested tuples and lists; in float32 if they come from kernels, or go where these would."""
    if engine != "auto" or tree is None:
        return tree
    if isinstance(tree, Tensor):
        return tree.float()
    values = [_widened(engine, x) for x in tree]
    return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which states beside h are saved."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def grouped(parameters, directions: int) -> list:
    count = len(parameters) // directions
    return [parameters[k * count : (k + 1) * count] for k in range(directions)]


# The input product.


def is_batch_major(input: Tensor) -> bool:
    """Whether sequence after sequence lies in memory. The stride of an axis with one element means nothing."""
    return input.dim() == 3 and min(input.shape[:2]) > 1 and input.stride(0) < input.stride(1)


def input_product(cell: Cell, input: Tensor, parameters: list, preact_0: Tensor | None, layout: Layout) -> Tensor:
    """preact_x [D, T, B, G*H] or [D, R, G*H] of all steps and directions: one product, in the order of `input` in
    memory.
    """
    return preact_from(cell, input, input_products(cell, input, parameters), parameters, preact_0, layout)


def input_products(cell: Cell, input: Tensor, parameters: list) -> Tensor:
    """W x of all directions, [T, B, D, G*H] or [R, D, G*H], in the order of `input` in memory; with biases unless norms
    follow.
    """
    by_batch = is_batch_major(input)
    ordered = input.transpose(0, 1) if by_batch else input
    weight_ih = joined([p[0] for p in parameters])  # [D*G*H, I]
    adds_bias = cell.has_bias(parameters[0]) and not cell.norms
    bias = joined([cell.input_bias(p) for p in parameters]) if adds_bias else None
    products = product(ordered.flatten(0, -2), weight_ih.t(), bias)
    products = products.view(*ordered.shape[:-1], len(parameters), parameters[0][0].size(0))
    return products.transpose(0, 1) if by_batch else products


def preact_from(
    cell: Cell, input: Tensor, products: Tensor, parameters: list, preact_0: Tensor | None, layout: Layout
) -> Tensor:
    """preact_x from the products: normed where the cell has norms, else the products themselves, of which the first
    steps' change.
    """
    preact = products
    if cell.norms:
        by_batch = is_batch_major(input)
        preact = cell.normed(products.transpose(0, 1) if by_batch else products, parameters)
        preact = preact.transpose(0, 1) if by_batch else preact
    preact = preact.movedim(-2, 0)
    if preact_0 is not None:
        preact = with_samples(preact, preact_0)
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


# What torch's counter of operations (`torch.utils.flop_counter`) counts for an op: two for each element of a recurrent
# weight and each row. It gets shapes in the place of tensors.


@register_flop_formula(torch.ops.fusedlstm.recurrence_fwd)
def _(cell, engine, preact_x, weight_hh, *_, **__) -> int:
    return operations(preact_x[1:-1], weight_hh)


@register_flop_formula(torch.ops.fusedlstm.recurrence_bwd)
def _(cell, engine, grads, weight_hh, vectors, hx, cx, saved, *_, **__) -> int:
    return operations(saved[0][:-1], weight_hh)


@register_flop_formula(torch.ops.fusedlstm.onednn_fwd)
def _(input, hx, cx, parameters, *_, **__) -> int:
    return operations(input[:-1], parameters[:2])


# torch's counter does not know the layer of oneDNN either.
@register_flop_formula(torch.ops.aten.mkldnn_rnn_layer)
def _(input, weight_ih, weight_hh, *_, **__) -> int:
    return operations(input[:-1], [weight_ih, weight_hh])


@register_flop_formula(torch.ops.aten.mkldnn_rnn_layer_backward)
def _(input, weight_ih, weight_hh, *_, **__) -> int:
    return 2 * operations(input[:-1], [weight_ih, weight_hh])


@register_flop_formula(torch.ops.fusedlstm.aten_fwd)
def _(cell, input, hx, weights, *_, **__) -> int:
    return operations(input[:2], [p for p in weights if len(p) == 2])


@register_flop_formula(torch.ops.fusedlstm.onednn_bwd)
def _(grads, input, hx, cx, parameters, *_, **__) -> int:
    return 2 * operations(input[:-1], parameters[:2])


@register_flop_formula(torch.ops.fusedlstm.step_fwd)
def _(cell, input, hx, cx, parameters, *_, **__) -> int:
    return operations(input[:1], [p for p in parameters if len(p) == 2])


@register_flop_formula(torch.ops.fusedlstm.wave_fwd)
def _(cell, preact_x, weight_ih, bias, weight_hh, *_, **__) -> int:
    return operations(preact_x[1:-1], [weight_ih, *weight_hh])


@register_flop_formula(torch.ops.fusedlstm.wave_bwd)
def _(cell, grads, weight_ih, weight_hh, vectors, hx, cx, saved, *_, **__) -> int:
    return operations(saved[0][1:-1], [weight_ih, *weight_hh])


def operations(rows, weights) -> int:
    return 2 * math.prod(rows) * sum(map(math.prod, weights))
