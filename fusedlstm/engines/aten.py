"""ATen's recurrent layers: oneDNN and loops on a CPU, cuDNN on a GPU."""

import contextlib
import functools
import warnings

import torch
from torch import Tensor

from fusedlstm.cells import Cell
from fusedlstm.layout import Layout

CUDNN_STEPS = 65535  # cuDNN takes no more

# Packed sequences of an LSTM on a CPU. If there are on average SHORTEST_RUN steps or more between two ends, oneDNN gets
# one call for every run of steps that the same sequences have. Otherwise it gets one call for every stretch in which at
# most a third of them end. But in training with large weights, each call spends a long time on preparing the weights
# and summing their gradients, and `torch_loop` is faster.
SHORTEST_RUN, HELD, WIDEST_STRETCH = 8, 2 / 3, 256
SHUT = 1e8  # saturates a gate whatever else is added
# A single step of an LSTM on a CPU: ATen's cells are faster than oneDNN for up to as many sequences without gradients,
# and for any number with gradients.
STEP_OF_INFERENCE = 8
# oneDNN has no other cell, so ATen loops over the steps of the others. Its forward is as fast as `torch_loop`. But
# autograd sums the gradients of the weights step by step, and from as many steps on that costs more than the set-up of
# our loop.
SHORTEST_LOOP = 32
HAS_ONEDNN = torch.backends.mkldnn.is_available()  # asked once, because a compiler cannot ask

IN_WORDS = {
    "stack": "ATen's layers take the stack whole",
    "runs": "ATen's layers take runs of steps that the same sequences have",
    "stretches": "ATen's layers take stretches of steps in which few sequences end",
    "step": "ATen's cells take the only step",
    "loop": "a loop of torch operations with the backward written out takes it",
}


def compute_dtype(cell: Cell, device: torch.device, dtype: torch.dtype, schedule: str, dense: bool) -> torch.dtype:
    """The dtype in which to compute. It is float32 if ATen's code for half precision is slow or inexact.

    `dense` says that the sequences are not packed.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return dtype
    if schedule == "loop":
        return torch.float32
    if device.type == "cpu":
        fused = cell.aten == "lstm" and dtype == torch.bfloat16 and dense and _onednn_has_bfloat16()
        return dtype if fused else torch.float32
    return dtype


def schedule(
    cell: Cell,
    input: Tensor,
    dtype: torch.dtype,
    batch_sizes: Tensor | None,
    batch_first: bool,
    hidden: int,
    proj_size: int = 0,
    draws: bool = False,
) -> str:
    """How a stack runs: "stack", "runs", "stretches", "step", "onednn" or "loop".

    `dtype` is that of the results. `draws` says whether there is dropout between the layers.

    With "stack" ATen takes the whole stack. With "runs" and "stretches" it takes some steps at a time. With "step" its
    cells take the only step. With "onednn" our op around its layer takes it. With "loop" `torch_loop` takes it.

    On a CPU oneDNN is slow with a single step. ATen is slow with packed sequences of different lengths, and with the
    gradients of cells that oneDNN does not have.
    """
    if cell.aten is None:
        return "loop"
    # Where torch takes layers apart, it forgets the dropout between them.
    forgets = draws and torch.compiler.is_compiling()
    if torch.jit.is_tracing() or (dtype.is_complex and not forgets):
        return "stack"  # a trace is for any lengths, and the written-out backward of the loop is for real numbers
    steps = len(batch_sizes) if batch_sizes is not None else input.size(1 if batch_first else 0)
    if forgets and (dtype.is_complex or not input.is_cpu):
        return "loop"
    if input.is_cuda:
        return "runs" if batch_sizes is None and steps > CUDNN_STEPS else "stack"
    if input.device.type != "cpu":
        return "stack"
    if torch.compiler.is_compiling():
        # A graph is for any sizes. torch takes ATen's layers apart step by step, but for oneDNN's without gradients.
        # With them it has no rule for oneDNN's. Our ops around both are taken whole.
        if torch.compiler.is_exporting():
            # A program of ATen's layers runs without this package, for one number of steps. A strict export does not
            # say whether there is one.
            says = not torch.compiler.is_dynamo_compiling()
            fixed = says and batch_sizes is None and not isinstance(steps, torch.SymInt)
            return "stack" if fixed and not draws else "loop"
        if batch_sizes is not None or dtype not in (torch.float32, torch.float64):
            return "loop"
        if input.numel() == 0:
            return "loop"  # oneDNN's layer would end the process
        fused = cell.aten == "lstm" and dtype == torch.float32
        if not (is_followed(input) or draws):
            return "stack" if fused or cell.aten != "lstm" else "loop"
        return "onednn" if fused and HAS_ONEDNN and proj_size == 0 else "loop"
    if cell.aten != "lstm":
        return "loop" if torch.is_grad_enabled() and steps >= SHORTEST_LOOP else "stack"
    if batch_sizes is None:
        batch = input.size(0 if batch_first else 1)
        few = batch <= STEP_OF_INFERENCE or torch.is_grad_enabled()
        return "step" if steps == 1 and few and proj_size == 0 else "stack"
    if proj_size > 0:
        return "stack"
    if dtype == torch.float64:  # oneDNN has none
        return "loop"
    if steps >= SHORTEST_RUN * len(torch.unique_consecutive(batch_sizes)):
        return "runs"
    return "stretches" if hidden <= WIDEST_STRETCH or not torch.is_grad_enabled() else "loop"


def is_followed(input: Tensor) -> bool:
    """Whether a compiler may ask for gradients of a call."""
    return torch.is_grad_enabled() or input.requires_grad


@contextlib.contextmanager
def _weights_as_they_lie():
    """Hide cuDNN's warning about weights that are not one piece of memory: `flatten_parameters` would not help here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous chunk")
        yield


def stack(
    cell: Cell,
    schedule: str,
    input: Tensor,  # [T, B, I], or [B, T, I] with batch_first, or packed [R, I]
    batch_sizes: Tensor | None,  # [T] on the CPU if packed
    states: tuple[Tensor, ...],  # h [L * D, B, P] and what the cell has beside it, each [L * D, B, H]
    weights: list[Tensor],
    bias: bool,
    num_layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run a stack by ATen. Returns output and final states. `schedule` is not "loop"."""
    dropout = dropout if training else 0.0
    if input.is_cuda:
        states = tuple(s.contiguous() for s in states)
        training = training or torch.is_grad_enabled()  # cuDNN keeps what backward needs only in training mode
    if schedule == "stack":
        warns = input.is_cuda and not torch.compiler.is_compiling()
        order = (bidirectional,) if batch_sizes is not None else (bidirectional, batch_first)
        with _weights_as_they_lie() if warns else contextlib.nullcontext():
            return layers(cell, input, batch_sizes, states, weights, bias, num_layers, dropout, training, *order)
    options = (num_layers, dropout, bidirectional)
    if schedule == "step":
        output, states = _step(cell, input.squeeze(1 if batch_first else 0), states, weights, bias, *options)
        return output.unsqueeze(1 if batch_first else 0), states
    if schedule == "stretches":
        return _by_direction(_by_stretches(cell, batch_sizes, training), input, states, weights, *options)
    if batch_sizes is not None:
        runs = _runs_of_sequences(batch_sizes)
        return _by_direction(_by_runs(cell, runs, training), input, states, weights, *options)
    x = input.transpose(0, 1) if batch_first else input
    T, B, _ = x.shape
    runs = [(t * B, min(CUDNN_STEPS, T - t), B) for t in range(0, T, CUDNN_STEPS)]
    output, states = _by_direction(_by_runs(cell, runs, training), x.reshape(T * B, -1), states, weights, *options)
    output = output.unflatten(0, (T, B))
    return output.transpose(0, 1) if batch_first else output, states


def cell(
    cell: Cell,
    input: Tensor,  # [B, I]
    states: tuple[Tensor, ...],  # h first, each [B, H]
    weight_ih: Tensor,  # [G*H, I]
    weight_hh: Tensor,  # [G*H, H]
    bias_ih: Tensor | None = None,  # [G*H]
    bias_hh: Tensor | None = None,  # [G*H]
) -> tuple[Tensor, ...]:
    """Run one step by ATen. Returns the states after it, each [B, H]."""
    biases = () if bias_ih is None else (bias_ih, bias_hh)
    new = getattr(torch._VF, f"{cell.aten}_cell")(input, _given(states), weight_ih, weight_hh, *biases)
    return new if len(states) == 2 else (new,)


def _given(states: tuple[Tensor, ...]) -> tuple[Tensor, ...] | Tensor:
    """States as ATen takes them: a tensor if there is only one."""
    return states if len(states) == 2 else states[0]


def layers(cell: Cell, input: Tensor, batch_sizes: Tensor | None, states: tuple[Tensor, ...], weights, *options):
    """Call ATen's function of the cell for whole layers."""
    sizes = () if batch_sizes is None else (batch_sizes,)
    output, *states = getattr(torch._VF, cell.aten)(input, *sizes, _given(states), weights, *options)
    return output, tuple(states)


def _step(
    name: str,
    x: Tensor,  # [B, I]
    states: tuple[Tensor, ...],  # each [L * D, B, H]
    weights: list[Tensor],
    bias: bool,
    num_layers: int,
    dropout: float,
    bidirectional: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run one step of a stack, with one cell for every layer and direction."""
    directions = 2 if bidirectional else 1
    count = 4 if bias else 2
    found = []
    for k in range(num_layers * directions):
        if k % directions == 0 and k > 0:
            x = _output(found, directions)
            x = torch.nn.functional.dropout(x, dropout) if dropout > 0 else x
        own = weights[k * count : (k + 1) * count]
        found.append(cell(name, x, tuple(s[k] for s in states), *own))
    return _output(found, directions), tuple(torch.stack(s) for s in zip(*found, strict=True))


def _output(found: list[tuple[Tensor, ...]], directions: int) -> Tensor:
    """h of a layer, with both directions side by side."""
    return found[-1][0] if directions == 1 else torch.cat([s[0] for s in found[-directions:]], -1)


def _by_direction(
    recurrence,
    rows: Tensor,  # [R, I]
    states: tuple[Tensor, ...],  # each [L * D, B, H]
    weights: list[Tensor],
    num_layers: int,
    dropout: float,
    bidirectional: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run a stack. `recurrence(rows, states, weights, reverse)` runs one layer and direction, with states [1, B, H]."""
    directions = 2 if bidirectional else 1
    count = len(weights) // (num_layers * directions)
    found = []
    for layer in range(num_layers):
        if layer > 0 and dropout > 0:
            rows = torch.nn.functional.dropout(rows, dropout)
        outputs = []
        for k in range(layer * directions, (layer + 1) * directions):
            own = weights[k * count : (k + 1) * count]
            output, final = recurrence(rows, tuple(s[k : k + 1] for s in states), own, k % directions == 1)
            outputs.append(output)
            found.append(final)
        rows = torch.cat(outputs, -1)
    return rows, tuple(torch.cat(s) for s in zip(*found, strict=True))


def _dense(
    cell: Cell, x: Tensor, states: tuple[Tensor, ...], weights: list[Tensor], training: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run one layer forward in time, with x [T, B, I] and states [1, B, H]."""
    states = tuple(s.contiguous() for s in states)
    return layers(cell, x, None, states, weights, len(weights) == 4, 1, 0.0, training, False, False)


def _by_runs(cell: Cell, runs: list[tuple[int, int, int]], training: bool):
    """A recurrence with one dense call for every run. The final state of a run is the initial state of the next.

    `runs` has the first row, the number of steps and the number of sequences of every run, in order of time. The
    sequences are the first ones of the batch.
    """

    def recurrence(rows, states, weights, reverse):
        pieces = []
        for first, steps, n in reversed(runs) if reverse else runs:
            x = rows[first : first + steps * n].view(steps, n, -1)
            x = x.flip(0) if reverse else x
            output, final = _dense(cell, x, tuple(s[:, :n] for s in states), weights, training)
            states = tuple(torch.cat([new, old[:, n:]], 1) for new, old in zip(final, states, strict=True))
            pieces.append((output.flip(0) if reverse else output).flatten(0, 1))
        return torch.cat(pieces[::-1] if reverse else pieces), states

    return recurrence


def _by_stretches(cell: Cell, batch_sizes: Tensor, training: bool):
    """A recurrence of an LSTM with a dense call for every stretch of steps in which few of the sequences end.

    A sequence that has ended is held until the end of its stretch by one more input feature. It shuts the input gate
    and opens the forget gate, so c and its gradient pass unchanged. The output of these steps is not used. In reverse,
    each sequence is reversed by itself.
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
            row = layout.first_row[start:t].unsqueeze(1) + torch.arange(n, device=batch_sizes.device)
            lives = torch.arange(n, device=batch_sizes.device) < batch_sizes[start:t].unsqueeze(1)  # [steps, n]
            stretches.append((t - start, n, torch.where(lives, row, R).flatten(), lives.flatten().nonzero()[:, 0]))
            start = t

    def recurrence(rows, states, weights, reverse):
        h, c = states
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
            output, (h, c) = _dense(cell, x, (h[:, :n], c[:, :n]), weights, training)
            outputs.append(output.flatten(0, 1).index_select(0, living))
        output = torch.cat(outputs)
        h_n = output.index_select(0, ends).unsqueeze(0)
        output = output.index_select(0, turned) if reverse else output
        return output, (h_n, torch.cat([c, *final_c[::-1]], 1))

    return recurrence


def _runs_of_sequences(batch_sizes: Tensor) -> list[tuple[int, int, int]]:
    """The runs of steps that the same sequences have: first row, number of steps, number of sequences."""
    sizes, counts = torch.unique_consecutive(batch_sizes, return_counts=True)
    first = torch.cumsum(sizes * counts, 0) - sizes * counts
    return list(zip(first.tolist(), counts.tolist(), sizes.tolist(), strict=True))


@functools.cache
def _onednn_has_bfloat16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
