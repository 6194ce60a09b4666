"""ATen's LSTM: oneDNN on a CPU, cuDNN on a GPU. The embedded default without a GPU."""

import contextlib
import functools
import warnings

import torch
from torch import Tensor

from fusedlstm.layout import Layout

CUDNN_STEPS = 65535  # cuDNN takes no more


# Packed sequences on a CPU: from as many steps on between two ends, on average, oneDNN gets a call for every run of steps
# that the same sequences have; below, a call for every stretch in which no more than a third of them end; but where the
# weights are large, training spends more on preparing and summing them for every call than `torch_loop` does.
SHORTEST_RUN, HELD, WIDEST_STRETCH = 8, 2 / 3, 256
SHUT = 1e8  # saturates a gate whatever else is added
# A single step on a CPU: up to as many sequences ATen's cells are faster than oneDNN without gradients, and always with.
STEP_OF_INFERENCE = 8


def compute_dtype(device: torch.device, dtype: torch.dtype, schedule: str, dense: bool) -> torch.dtype:
    """The dtype in which to compute: float32 for half precision where there is only slow code, or inexact.

    `dense`: the sequences are not packed.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return dtype
    if schedule == "loop":
        return torch.float32
    if device.type == "cpu":
        return dtype if dtype == torch.bfloat16 and dense and _onednn_has_bfloat16() else torch.float32
    return dtype


def schedule(
    input: Tensor, dtype: torch.dtype, batch_sizes: Tensor | None, batch_first: bool, hidden: int, proj_size: int
) -> str:
    """How a stack runs: "stack", ATen takes it whole; "runs" or "stretches", ATen takes some steps at a time; "step", ATen's
    cells take its only step; "loop", `torch_loop` takes it. `dtype` is that of the results.

    On a CPU oneDNN is slow with a single step, and ATen with packed sequences of different lengths.
    """
    if batch_sizes is None:
        steps, batch = input.size(1 if batch_first else 0), input.size(0 if batch_first else 1)
        if input.is_cuda:
            return "runs" if steps > CUDNN_STEPS else "stack"
        few = batch <= STEP_OF_INFERENCE or torch.is_grad_enabled()
        return "step" if steps == 1 and few and proj_size == 0 and input.device.type == "cpu" else "stack"
    if input.device.type != "cpu" or proj_size > 0:
        return "stack"
    if dtype == torch.float64 or torch.compiler.is_compiling():  # oneDNN has none; no graph is for some lengths
        return "loop"
    if len(batch_sizes) >= SHORTEST_RUN * len(torch.unique_consecutive(batch_sizes)):
        return "runs"
    return "stretches" if hidden <= WIDEST_STRETCH or not torch.is_grad_enabled() else "loop"


@contextlib.contextmanager
def _weights_as_they_lie():
    """cuDNN copies weights that are not one piece of memory, and warns that `flatten_parameters` would help: not ours."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous chunk")
        yield


def lstm(
    schedule: str,
    input: Tensor,  # [T, B, I], or [B, T, I] with batch_first, or packed [R, I]
    batch_sizes: Tensor | None,  # [T] on the CPU if packed
    hx: tuple[Tensor, Tensor],  # each [L * D, B, P] and [L * D, B, H]
    weights: list[Tensor],
    bias: bool,
    num_layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """A stack by ATen; `schedule` is one of its own."""
    options = (bias, num_layers, dropout if training else 0.0)
    if input.is_cuda:
        hx = (hx[0].contiguous(), hx[1].contiguous())
        training = training or torch.is_grad_enabled()  # cuDNN keeps what backward needs only in training mode
    if schedule == "stack":
        warns = input.is_cuda and not torch.compiler.is_compiling()
        with _weights_as_they_lie() if warns else contextlib.nullcontext():
            if batch_sizes is not None:
                return torch._VF.lstm(input, batch_sizes, hx, weights, *options, training, bidirectional)
            return torch._VF.lstm(input, hx, weights, *options, training, bidirectional, batch_first)
    if schedule == "step":
        output, h_n, c_n = _lstm_step(input.squeeze(1 if batch_first else 0), hx, weights, *options, bidirectional)
        return output.unsqueeze(1 if batch_first else 0), h_n, c_n
    options = (num_layers, options[2], bidirectional)
    if schedule == "stretches":
        return _by_direction(_by_stretches(batch_sizes, training), input, hx, weights, *options)
    if batch_sizes is not None:
        return _by_direction(_by_runs(_runs_of_sequences(batch_sizes), training), input, hx, weights, *options)
    x = input.transpose(0, 1) if batch_first else input
    T, B, _ = x.shape
    runs = [(t * B, min(CUDNN_STEPS, T - t), B) for t in range(0, T, CUDNN_STEPS)]
    output, h_n, c_n = _by_direction(_by_runs(runs, training), x.reshape(T * B, -1), hx, weights, *options)
    output = output.unflatten(0, (T, B))
    return output.transpose(0, 1) if batch_first else output, h_n, c_n


def lstm_cell(
    input: Tensor,  # [B, I]
    hx: tuple[Tensor, Tensor],  # each [B, H]
    weight_ih: Tensor,  # [4H, I]
    weight_hh: Tensor,  # [4H, H]
    bias_ih: Tensor | None = None,  # [4H]
    bias_hh: Tensor | None = None,  # [4H]
) -> tuple[Tensor, Tensor]:
    """One step."""
    return torch._VF.lstm_cell(input, hx, weight_ih, weight_hh, bias_ih, bias_hh)


def _lstm_step(
    x: Tensor,  # [B, I]
    hx: tuple[Tensor, Tensor],  # each [L * D, B, H]
    weights: list[Tensor],
    bias: bool,
    num_layers: int,
    dropout: float,
    bidirectional: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of a stack, a cell for every layer and direction."""
    directions = 2 if bidirectional else 1
    count = 4 if bias else 2
    h_n, c_n = [], []
    for k in range(num_layers * directions):
        if k % directions == 0 and k > 0:
            x = h_n[-1] if directions == 1 else torch.cat(h_n[-directions:], -1)
            x = torch.nn.functional.dropout(x, dropout) if dropout > 0 else x
        h, c = torch._VF.lstm_cell(x, (hx[0][k], hx[1][k]), *weights[k * count : (k + 1) * count])
        h_n.append(h)
        c_n.append(c)
    output = h_n[-1] if directions == 1 else torch.cat(h_n[-directions:], -1)
    return output, torch.stack(h_n), torch.stack(c_n)


def _by_direction(
    recurrence,
    rows: Tensor,  # [R, I]
    hx: tuple[Tensor, Tensor],  # each [L * D, B, H]
    weights: list[Tensor],
    num_layers: int,
    dropout: float,
    bidirectional: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """A stack of which `recurrence(rows, h, c, weights, reverse)` does a layer in one direction; h and c [1, B, H]."""
    directions = 2 if bidirectional else 1
    count = len(weights) // (num_layers * directions)
    h_n, c_n = [], []
    for layer in range(num_layers):
        if layer > 0 and dropout > 0:
            rows = torch.nn.functional.dropout(rows, dropout)
        outputs = []
        for k in range(layer * directions, (layer + 1) * directions):
            own = weights[k * count : (k + 1) * count]
            output, h, c = recurrence(rows, hx[0][k : k + 1], hx[1][k : k + 1], own, k % directions == 1)
            outputs.append(output)
            h_n.append(h)
            c_n.append(c)
        rows = torch.cat(outputs, -1)
    return rows, torch.cat(h_n), torch.cat(c_n)


def _dense(x: Tensor, h: Tensor, c: Tensor, weights: list[Tensor], training: bool) -> tuple[Tensor, Tensor, Tensor]:
    """One layer forward in time: x [T, B, I], h and c [1, B, H]."""
    bias = len(weights) == 4
    return torch._VF.lstm(x, (h.contiguous(), c.contiguous()), weights, bias, 1, 0.0, training, False, False)


def _by_runs(runs: list[tuple[int, int, int]], training: bool):
    """A recurrence with one dense call for every run; a run's final state is the next one's initial state.

    `runs`: first row, number of steps and number of sequences (the first ones) of every run, in order of time.
    """

    def recurrence(rows, h, c, weights, reverse):
        pieces = []
        for first, steps, n in reversed(runs) if reverse else runs:
            x = rows[first : first + steps * n].view(steps, n, -1)
            x = x.flip(0) if reverse else x
            output, h_run, c_run = _dense(x, h[:, :n], c[:, :n], weights, training)
            h, c = torch.cat([h_run, h[:, n:]], 1), torch.cat([c_run, c[:, n:]], 1)
            pieces.append((output.flip(0) if reverse else output).flatten(0, 1))
        return torch.cat(pieces[::-1] if reverse else pieces), h, c

    return recurrence


def _by_stretches(batch_sizes: Tensor, training: bool):
    """A recurrence with a dense call for every stretch of steps in which few of the sequences end.

    A sequence that has ended is held to the end of its stretch by one more input feature, which shuts its input gate and
    opens its forget gate: c and its gradient pass unchanged, and what it puts out is not looked at. In reverse every
    sequence is turned round by itself.
    """
    sizes = batch_sizes.tolist()
    layout = Layout.of_packed(batch_sizes, sizes[0], batch_sizes.device)
    R = sum(sizes)
    step, sequence = layout.positions(R)
    turned = layout.first_row[layout.lengths[sequence] - 1 - step] + sequence  # [R]
    ends = layout.begin_rows((R,), 1, batch_sizes.device)  # [B]
    stretches, start = [], 0
    for t in range(1, len(sizes) + 1):
        if t == len(sizes) or sizes[t] < HELD * sizes[start]:
            n = sizes[start]
            row = layout.first_row[start:t].unsqueeze(1) + torch.arange(n)
            lives = torch.arange(n) < batch_sizes[start:t].unsqueeze(1)  # [steps, n]
            stretches.append((t - start, n, torch.where(lives, row, R).flatten(), lives.flatten().nonzero()[:, 0]))
            start = t

    def recurrence(rows, h, c, weights, reverse):
        hidden = h.size(-1)
        shut = rows.new_zeros(4 * hidden, 8)  # eight features and not one: oneDNN likes even rows
        shut[:hidden, 0], shut[hidden : 2 * hidden, 0] = -SHUT, SHUT
        weights = [torch.cat([weights[0], shut], 1), *weights[1:]]
        rows = rows.index_select(0, turned) if reverse else rows
        held = rows.new_zeros(1, rows.size(1) + 8)
        held[0, -8] = 1.0
        rows = torch.cat([torch.nn.functional.pad(rows, (0, 8)), held])  # [R + 1, I + 8]
        outputs, final_c = [], []
        for steps, n, source, living in stretches:
            final_c.append(c[:, n:])
            x = rows.index_select(0, source).view(steps, n, -1)
            output, h, c = _dense(x, h[:, :n], c[:, :n], weights, training)
            outputs.append(output.flatten(0, 1).index_select(0, living))
        output = torch.cat(outputs)
        h_n = output.index_select(0, ends).unsqueeze(0)
        output = output.index_select(0, turned) if reverse else output
        return output, h_n, torch.cat([c, *final_c[::-1]], 1)

    return recurrence


def _runs_of_sequences(batch_sizes: Tensor) -> list[tuple[int, int, int]]:
    """Stretches of steps that the same sequences have: first row, number of steps, number of sequences."""
    sizes, counts = torch.unique_consecutive(batch_sizes, return_counts=True)
    first = torch.cumsum(sizes * counts, 0) - sizes * counts
    return list(zip(first.tolist(), counts.tolist(), sizes.tolist(), strict=True))


@functools.cache
def _onednn_has_bfloat16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
