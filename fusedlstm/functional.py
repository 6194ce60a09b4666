"""Run a call of a module, by an engine that is chosen once.

    run: bring the call into one form -> choose an engine -> compute layer by layer, or by ATen -> restore the form

`Spec` has the settings of the module, which are the same for every call. `Rows` says how the sequences of a call lie in
memory.
"""

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import dropout as dropout_fn

from fusedlstm import autograd, engines, noise, ops, transforms
from fusedlstm.cells import CELLS, Cell
from fusedlstm.engines import aten, onnx
from fusedlstm.layout import Layout, Pieces
from fusedlstm.noise import NO_RATES, Rates
from fusedlstm.plan import tuned
from fusedlstm.products import autocasts, joined, product, stacked, without_autocast

Results = tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]  # output, final states, states of every step


class Spec(NamedTuple):
    """The settings of a module, which are the same for every call."""

    cell: Cell
    num_layers: int = 1
    bidirectional: bool = False
    # P, the size of a projected h of an LSTM; 0 is none, and P is then H.
    proj_size: int = 0
    # The probability of zeroing an element of every layer's output but the last, and those of noise inside of the
    # steps; both in training.
    dropout: float = 0.0
    rates: Rates = NO_RATES
    training: bool = False
    # The states that are wanted of every step: "cells" of the last layer, which are those beside h, or "all" of every
    # layer, or "".
    sequences: str = ""
    # The largest element of the gradient of a state that enters a step; None: any.
    grad_clip: float | None = None
    # What our own loops keep for the backward, "gates" or "states". Where ATen or the specification serves the call,
    # they decide.
    save: str = "gates"
    backend: str = "auto"

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def in_steps(self) -> tuple[float, ...]:
        """The rates of noise inside of the steps, as in `Noise`. Empty if there is no noise."""
        return self.rates.in_steps(self.training)

    @property
    def between_layers(self) -> float:
        """The rate of dropout between layers. 0 if there is none in this call."""
        return self.dropout if self.training and self.num_layers > 1 else 0.0


class Rows(NamedTuple):
    """How the sequences of a call lie in memory."""

    # Whether `input` is [B, T, I], and `resets` and the results are alike. Packed input has no such axes.
    batch_first: bool = False
    # [T] int64 on the CPU: how many sequences have a step t, as in a PackedSequence. `input`, `states` and the results
    # are then in its sorted order.
    batch_sizes: Tensor | None = None
    # [B] integers: the number of steps of each sequence, 0 to T. Lower numbers count as 0 and higher ones as T. Later
    # steps are padding.
    lengths: Tensor | None = None
    # Whether the padding is before the steps and not after them.
    padded_left: bool = False
    # bool, the leading axes of `input`: where a sequence is cut, see `fusedlstm.layout`.
    resets: Tensor | None = None

    @property
    def masked(self) -> bool:
        return self.lengths is not None or self.resets is not None

    @property
    def name(self) -> str:
        """The name of the layout in a plan."""
        return "packed" if self.batch_sizes is not None else "ragged" if self.masked else "dense"


DENSE_ROWS = Rows()


class _Call(NamedTuple):
    """A call: `input` is [T, B, I], [B, T, I] or packed [R, I]. Every state is [L * D, B, P or H], with h first."""

    spec: Spec
    input: Tensor
    states: tuple[Tensor, ...]
    weights: list[Tensor]
    rows: Rows
    dtype: torch.dtype  # of the results
    autocast: bool  # whether the tensors may have several dtypes

    @property
    def hidden(self) -> int:
        return self.states[-1].size(-1)  # h is projected with c beside it only

    @property
    def heads(self) -> int:
        return 1 if self.spec.proj_size else self.hidden // self.weights[1].size(1)

    @property
    def steps(self) -> int:
        sizes = self.rows.batch_sizes
        return len(sizes) if sizes is not None else self.input.size(1 if self.rows.batch_first else 0)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.input, *self.states, *self.weights


def run(
    spec: Spec,
    input: Tensor,  # [T, B, I], or [B, T, I] with batch_first, or packed [R, I] with batch_sizes
    states: tuple[Tensor, ...],  # h [L * D, B, P] first, the others [L * D, B, H]
    weights: list[Tensor],  # per layer and direction: weight_ih, weight_hh (, bias_ih, bias_hh) (, weight_hr), vectors
    rows: Rows = DENSE_ROWS,
) -> Results:
    """Run a stack of recurrent layers over a batch of sequences. All tensor arguments are differentiable.

    Args:
        spec: The settings of the module.
        input: The sequences, with any strides.
        states: The states before the first step, in the order of `Cell.states`.
        weights: The parameters of each layer and direction, in the order of `torch.nn.LSTM._flat_weights`, and then the
            vectors of the cell [H]. The rows are in the order of `Cell.gates`. A weight_hh [G*H, DH] with fewer columns
            than h has H / DH heads (`fusedlstm.products`).
        rows: How the sequences lie in memory.

    Returns:
        Three results, in the dtype of `input`, or in the dtype of autocast if it is on. The first is the output,
        [T, B, D * P], or [B, T, D * P], or packed [R, D * P]. It is zero in padding. The second is the final states.
        For a sequence without steps they are the given ones. The third is the states of every step that
        `spec.sequences` asks for, each in the form of the output: [T, B, D * H] of "cells", or of "all" h
        [T, B, L * D * P] and the others [T, B, L * D * H].

    Raises:
        RuntimeError: The engine that the user named cannot serve the call. The text says why.

    Precision: Products have the dtype of the results. On a CPU float16 is computed in float32, and so is bfloat16 if
        the CPU has no instructions for it.
    """
    if spec.grad_clip is not None and not torch.is_grad_enabled():
        spec = spec._replace(grad_clip=None)
    autocast = autocasts(input)
    call = _Call(spec, input, states, weights, rows, _result_dtype(input, autocast), autocast)
    if transforms.wants_grad_samples(weights):
        return _with_grad_samples(call)
    if not autocast:
        return _run(call)
    with without_autocast(input):
        return _run(call)


def _run(call: _Call) -> Results:
    """`run`, without autocast."""
    spec = call.spec
    call, restore = _padded_right(call) if call.rows.padded_left else _dense_if_equal(call)
    engine, why = _engine(call)
    if not torch.compiler.is_compiling() and engines.LOGGER.isEnabledFor(logging.DEBUG):
        engines.LOGGER.debug("%s, %s: engine %s: %s", spec.cell.name, call.rows.name, engine, why)
    if engine == "torch" and call.rows.masked and not spec.in_steps and _has_steps(call.input, call.rows.lengths):
        call, restore_pieces = _in_pieces(call)
        call, restore_equal = _dense_if_equal(call)
        restore = _after(restore_equal, restore_pieces, restore)
    return restore(*_computed(call, engine))


def _with_grad_samples(call: _Call) -> Results:
    """The results of a call by ATen, whose layers torch takes apart into what gives gradients for every sample."""
    spec, rows = call.spec, call.rows
    asked = {"lengths or resets": rows.masked, "states of every step": spec.sequences, "grad_clip": spec.grad_clip}
    asked |= {"noise inside of steps": spec.in_steps, f"the cell {spec.cell.name}": spec.cell.aten is None}
    if what := [name for name, value in asked.items() if value]:
        raise RuntimeError(
            f"call_for_per_sample_grads: expected a layer and a call that torch.nn has, got {what[0]}; "
            "torch.func.vmap of torch.func.grad gives the gradients of every sample"
        )
    with torch.backends.mkldnn.flags(enabled=False):  # oneDNN's layer is not among what torch takes apart
        return *_by_aten(call, "stack"), ()


def step(
    spec: Spec,
    input: Tensor,  # [B, I]
    states: tuple[Tensor, ...],  # each [B, H]
    weights: list[Tensor],  # weight_ih, weight_hh (, bias_ih, bias_hh), vectors
) -> tuple[Tensor, ...]:
    """Run one step of one layer. All tensor arguments are differentiable.

    Returns:
        The states after the step, each [B, H]. Their dtype is that of the results of `run`.
    """
    cell, dtype, hidden = spec.cell, _result_dtype(input, autocasts(input)), states[0].size(-1)
    heads = hidden // weights[1].size(1) if hidden else 1
    engine = engines.choose(spec.backend, input.device, dtype, cell.name, hidden, heads=heads)
    derived = transforms.transformed() or transforms.has_tangents((input, *states, *weights))
    if engine == "torch" and heads == 1 and cell.aten is not None and not derived:
        compute_dtype = aten.compute_dtype(cell, input.device, dtype, "cell", dense=False)
        input, states, weights = _cast((input, states, weights), compute_dtype)
        with without_autocast(input):
            return _cast(aten.cell(cell, input, states, *weights), dtype)
    if hidden == 0:  # torch.nn has cells without units, and layers without any are an error
        return tuple(_cast(s, dtype).clone() for s in states)
    states = tuple(s.unsqueeze(0) for s in states)
    _, states, _ = run(spec, input.unsqueeze(0), states, weights)
    return tuple(s.squeeze(0) for s in states)


class Explanation(NamedTuple):
    """Which engine runs a call, why, and how, as three texts."""

    engine: str
    why: str
    how: str

    def __str__(self) -> str:
        return f"engine {self.engine}: {self.why}; {self.how}"


def explain(spec: Spec, input: Tensor, states: tuple[Tensor, ...], weights: list[Tensor], rows: Rows) -> Explanation:
    """Say what `run` would do with these arguments. This computes nothing."""
    autocast = autocasts(input)
    call, _ = _dense_if_equal(_Call(spec, input, states, weights, rows, _result_dtype(input, autocast), autocast))
    engine, why = _engine(call)
    if engine == "reference":
        return Explanation(engine, why, "the specification in plain torch, step by step")
    if engine == "torch":
        if call.rows.masked and not spec.in_steps and _has_steps(call.input, call.rows.lengths):
            call, _ = _dense_if_equal(_in_pieces(call)[0])
        return Explanation(engine, why, aten.IN_WORDS[_ways(_as_lstm(call, engine), engine)[0]])
    from fusedlstm.engines import launch

    like_weight_hh = [call.input.new_empty(0, call.hidden // call.heads)]
    like_hx = call.states[-1][: spec.directions]
    plan = launch.plan_for(spec.cell.name, call.input, like_weight_hh, like_hx, "fwd", call.rows.name)
    return Explanation(engine, why, f"forward {plan.schedule}, {plan.why}")


# The form of a call, and back.


def _same(*results):
    return results


def _after(*steps: Callable) -> Callable:
    """A function that runs the steps one after another, each on the results of the one before."""

    def restore(*results):
        for step in steps:
            results = step(*results)
        return results

    return restore


def _dense_if_equal(call: _Call) -> tuple[_Call, Callable[..., Results]]:
    """Turn a packed batch of equal lengths into a dense one. Returns it and a function that turns the results back."""
    sizes = call.rows.batch_sizes
    # A graph is for any lengths, so a compiler may not ask, nor a tracer.
    if sizes is None or torch.compiler.is_compiling() or torch.jit.is_tracing() or sizes[0] != sizes[-1]:
        return call, _same
    input, resets = (None if x is None else x.unflatten(0, (len(sizes), -1)) for x in (call.input, call.rows.resets))

    def restore(output, states, sequences):
        return output.flatten(0, 1), states, tuple(x.flatten(0, 1) for x in sequences)

    return call._replace(input=input, rows=Rows(resets=resets)), restore


def _padded_right(call: _Call) -> tuple[_Call, Callable[..., Results]]:
    """Turn a batch with padding on the left into one with padding on the right. Returns it and the way back."""
    rows = call.rows
    input, resets = _time_major(rows, call.input, rows.resets)
    lengths = _moved("lengths", rows.lengths, input.device, torch.int64).clamp(0, input.size(0))

    def restore(output, states, sequences):
        output, *sequences = (rolled(x, -lengths) for x in (output, *sequences))
        return _as_given(rows, output, states, tuple(sequences))

    resets = None if resets is None else rolled(_moved("resets", resets, input.device, torch.bool), lengths)
    rows_right = Rows(lengths=lengths, resets=resets)
    return call._replace(input=rolled(input, lengths), rows=rows_right), restore


def rolled(
    x: Tensor,  # [T, B, ...]
    shift: Tensor,  # [B] integers, -T to T
) -> Tensor:
    """Every sequence moved by its own number of steps. What leaves at one end comes in at the other."""
    T, B = x.shape[:2]
    step = torch.arange(T, device=x.device).unsqueeze(1) - shift
    # Without `%`, which the ONNX exporter does not translate for a T that varies.
    step = torch.where(step < 0, step + T, torch.where(step < T, step, step - T))
    return x.gather(0, step.view(T, B, *[1] * (x.dim() - 2)).expand(x.shape))


def _in_pieces(call: _Call) -> tuple[_Call, Callable[..., Results]]:
    """Turn a batch with lengths and resets into the packed batch of its pieces, each of which has no cut.

    Everything that serves packed batches then serves it. Returns it and a function that turns the results back.
    """
    spec, rows = call.spec, call.rows
    transforms.not_traced("lengths and resets")
    input, resets = _time_major(rows, call.input, rows.resets)
    leading, initial = input.shape[:-1], call.states
    layout = _layout(input, initial[0].size(1), rows.batch_sizes, rows.lengths, resets)
    pieces = Pieces.of(layout, tuple(leading), input.device)

    def enter(state):
        return torch.stack([pieces.enter(s, k % spec.directions) for k, s in enumerate(state)])

    def leave(state, initial):
        final = zip(state, initial.to(state.dtype), strict=True)
        return torch.stack([pieces.leave(s, i, k % spec.directions) for k, (s, i) in enumerate(final)])

    def scatter(x):
        return pieces.scatter(x, leading.numel()).unflatten(0, leading)

    def restore(output, states, sequences):
        states = tuple(leave(s, i) for s, i in zip(states, initial, strict=True))
        return _as_given(rows, scatter(output), states, tuple(map(scatter, sequences)))

    input, states = pieces.gather(input.flatten(0, -2)), tuple(map(enter, initial))
    return call._replace(input=input, states=states, rows=Rows(batch_sizes=pieces.batch_sizes)), restore


def _time_major(rows: Rows, *tensors: Tensor | None) -> list[Tensor | None]:
    """Tensors with the axes of `input` as [T, B, ...]. Packed ones stay as they are."""
    if not rows.batch_first or rows.batch_sizes is not None:
        return [*tensors]
    return [None if x is None else x.transpose(0, 1) for x in tensors]


def _as_given(rows: Rows, output: Tensor, states: tuple[Tensor, ...], sequences: tuple[Tensor, ...]) -> Results:
    """The reverse of `_time_major`."""
    if not rows.batch_first or rows.batch_sizes is not None:
        return output, states, sequences
    return output.transpose(0, 1), states, tuple(x.transpose(0, 1) for x in sequences)


def _layout(
    input: Tensor,  # [T, B, I] or packed [R, I]
    batch: int,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,  # [T, B] or [R]
) -> Layout:
    if resets is not None:
        resets = _moved("resets", resets, input.device, torch.bool)
    if batch_sizes is not None:
        transforms.not_traced("input")
        transforms.not_captured(
            "input", input.device, "a packed batch, whose tables are copied from the host at every call"
        )
        return Layout.of_packed(batch_sizes, batch, input.device, resets)
    if lengths is not None:
        dtype = lengths.dtype if lengths.dtype == torch.int64 else torch.int32  # these two the kernels read
        lengths = _moved("lengths", lengths, input.device, dtype)
    return Layout(lengths, None, resets)


def _moved(name: str, x: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Move `x` to a device and dtype.

    The copy to a GPU does not wait for it, except from pinned memory, because the caller may overwrite that.
    """
    if x.device == device:
        return x.to(dtype)
    transforms.not_captured(name, device, f"a tensor on {x.device}, which is copied at every call")
    unpinned = not torch.compiler.is_compiling() and not x.is_pinned()
    return x.to(device, dtype, non_blocking=device.type == "cuda" and unpinned)


# Which engine.


def _engine(call: _Call) -> tuple[str, str]:
    """The engine that serves a call ("triton", "torch" or "reference", or "onnx" in an export), and why, as text."""
    spec, rows = call.spec, call.rows
    if onnx.exporting():
        if spec.training and any(spec.rates):
            raise RuntimeError(f"module: expected eval() before torch.onnx.export, got training with {spec.rates}")
        return "onnx", "torch.onnx.export traces the call"
    cell, clips_projection = spec.cell, spec.grad_clip is not None and spec.proj_size > 0
    layer = (cell.name, call.hidden, spec.directions, clips_projection, rows.name, call.heads)
    engine, why = engines.choice(spec.backend, call.input.device, call.dtype, *layer)
    if engine == "torch" and cell.equations.step_backward is None:
        return "reference", f"the cell {cell.name} has no step_backward, so autograd differentiates its specification"
    if transforms.loses_rules():
        return "reference", "a transform of torch.func in a compiled graph, where torch loses the rules of our ops"
    if transforms.has_tangents(call.tensors):
        return "reference", "forward-mode AD, of whose tangents neither the kernels nor ATen's layers know"
    if engine == "torch" and call.dtype.is_complex and _ways(call, engine)[0] == "loop":
        return "reference", "complex numbers, which the loop's written-out backward does not serve"
    if engine == "triton" and _has_rival(call) and 1 < call.steps <= aten.CUDNN_STEPS:
        sizes = (rows.batch_sizes, rows.masked, spec.num_layers, spec.directions, spec.proj_size)
        asked = tuned_call(cell, call.input, call.states, call.weights, call.dtype, *sizes)
        if asked is not None:
            return engines.fastest(asked, call.input.device.index)
    return engine, why


def _has_rival(call: _Call) -> bool:
    """Whether cuDNN could serve a call in place of the kernels, and the user did not name an engine."""
    spec = call.spec
    return (
        call.input.is_cuda
        and spec.cell.aten is not None
        and engines.requested(spec.backend) == "auto"
        and spec.save == "gates"  # else memory is asked for, and not time
        and torch.backends.cudnn.enabled
        and not spec.between_layers  # cuDNN draws its own masks
        and not (call.rows.masked or spec.in_steps or spec.sequences or spec.grad_clip is not None)
        and not torch.compiler.is_compiling()
        and not transforms.transformed()  # ATen's layers have no rules for them
    )


def tuned_call(
    cell: Cell,
    input: Tensor,
    states: tuple[Tensor, ...],  # h first, each [L * D, B, H]
    weights: list[Tensor],
    dtype: torch.dtype,
    batch_sizes: Tensor | None,
    masked: bool,
    num_layers: int,
    directions: int,
    proj_size: int,
) -> tuned.Call | None:
    """The sizes for which an engine is chosen, from arguments of `run`. None if ATen does not serve the call."""
    _, batch, hidden = states[-1].shape
    if batch == 0 or cell.aten is None or (not proj_size and weights[1].size(1) < hidden):  # heads
        return None
    from fusedlstm.engines import launch

    return tuned.Call(
        cell=cell.name,
        batch=batch,
        input_size=input.size(-1),
        hidden=hidden,
        proj_size=proj_size,
        layers=num_layers,
        directions=directions,
        dtype=launch.DTYPES[dtype],
        precision=launch.precision_of(dtype),
        layout="packed" if batch_sizes is not None else "ragged" if masked else "dense",
        training=torch.is_grad_enabled() and any(x.requires_grad for x in (input, *states, *weights)),
    )


def _ways(call: _Call, engine: str) -> tuple[str, torch.dtype]:
    """The schedule of ATen that runs a call, or "loop", and the dtype in which to compute."""
    if engine != "torch":
        return "loop", call.dtype
    spec, rows, cell = call.spec, call.rows, call.spec.cell
    asks_more = rows.masked or spec.in_steps or spec.sequences or spec.grad_clip is not None or call.heads > 1
    schedule = "loop"
    if not asks_more and not transforms.transformed():
        sizes = (rows.batch_sizes, rows.batch_first, call.hidden, spec.proj_size)
        schedule = aten.schedule(cell, call.input, call.dtype, *sizes, spec.between_layers > 0)
    dense = rows.batch_sizes is None
    return schedule, aten.compute_dtype(cell, call.input.device, call.dtype, schedule, dense=dense)


def _as_lstm(call: _Call, engine: str) -> _Call:
    """The call as that of an LSTM, if the cell is one with other parameters and ATen serves it then."""
    cell = call.spec.cell
    if not cell.as_lstm:
        return call
    lstm = call._replace(spec=call.spec._replace(cell=CELLS["lstm"]))
    if _ways(lstm, engine)[0] == "loop":
        return call
    return lstm._replace(weights=[cell.rows_of_lstm(w) for w in call.weights])


# The computation.


def _computed(call: _Call, engine: str) -> Results:
    """The results of a call, computed by an engine, in the form of the call."""
    drawn, call = _with_noise(call)
    call = _as_lstm(call, engine)
    schedule, compute_dtype = _ways(call, engine)
    if compute_dtype != call.input.dtype or call.autocast:  # else all of them have it
        input, states, weights = _cast((call.input, call.states, call.weights), compute_dtype)
        call = call._replace(input=input, states=states, weights=weights)
    if schedule == "loop":
        results = _by_layers(call, engine, drawn)
    else:
        output, states = _by_aten(call, schedule)
        results = (output, states, ())
    return results if compute_dtype == call.dtype else _cast(results, call.dtype)


def _by_aten(call: _Call, schedule: str) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output and final states of a call that ATen serves."""
    spec, rows = call.spec, call.rows
    first = rows.batch_first and rows.batch_sizes is None
    options = (spec.num_layers, spec.dropout, spec.training, spec.bidirectional, first)
    bias = _has_bias(call)
    if schedule == "onednn" or _is_hidden(spec.cell):
        sizes = (bias, spec.num_layers, spec.between_layers, spec.bidirectional, first)
        return run_compiled(spec.cell, call.input, call.states, call.weights, *sizes)
    arguments = (call.input, rows.batch_sizes, call.states, call.weights, bias)
    return aten.stack(spec.cell, schedule, *arguments, *options)


def run_compiled(
    cell: Cell,
    input: Tensor,  # [T, B, I], or [B, T, I] with batch_first
    states: tuple[Tensor, ...],  # each [L * D, B, H]
    weights: list[Tensor],
    bias: bool,
    num_layers: int,
    dropout: float,  # between layers, of an LSTM
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`run` by our ops around ATen's layers, on a CPU in a compiled graph. Returns output and final states.

    `Recurrent.forward` calls it for a plain call. Before each call of a graph, torch checks that every function in it
    is still the one that was traced. So they are few.
    """
    if cell.aten != "lstm":
        output, h_n = ops.aten_fwd(cell.name, input, *states, weights, bias, num_layers, bidirectional, batch_first)
        return output, (h_n,)
    if not (aten.is_followed(input) or dropout):
        options = (bias, num_layers, 0.0, False, bidirectional, batch_first)
        return aten.layers(cell, input, None, states, weights, *options)
    input = input.transpose(0, 1) if batch_first else input
    D = 2 if bidirectional else 1
    parameters, finals = ops.grouped(weights, num_layers * D), []
    for k in range(0, num_layers * D, D):
        if k > 0 and dropout > 0:
            input = dropout_fn(input, dropout)
        own = slice(k, k + D)
        input, final = ops.onednn_layer(input, tuple(s[own] for s in states), parameters[own])
        finals.append(final)
    h_n, c_n = (joined([*of_layers]) for of_layers in zip(*finals, strict=True))
    return input.transpose(0, 1) if batch_first else input, (h_n, c_n)


def _is_hidden(cell: Cell) -> bool:
    """Whether a compiler gets an op of ours in place of ATen's layers, which it would unroll."""
    return cell.aten != "lstm" and torch.compiler.is_compiling() and not torch.compiler.is_exporting()


def _has_bias(call: _Call) -> bool:
    own = call.weights[: len(call.weights) // (call.spec.num_layers * call.spec.directions)]
    return call.spec.cell.has_bias(own[:-1] if call.spec.proj_size else own)


def _per_layer_and_direction(call: _Call) -> list[list[Tensor]]:
    count = len(call.weights) // (call.spec.num_layers * call.spec.directions)
    return [call.weights[k : k + count] for k in range(0, len(call.weights), count)]


def _with_noise(call: _Call) -> tuple[noise.Noise, _Call]:
    """The noise of the steps, and the call with the weights that weight dropout leaves."""
    spec, seed = call.spec, None
    if spec.training and any(spec.rates):
        seed = noise.draw(call.input.device)
        if spec.rates.weight:
            weights = _per_layer_and_direction(call)
            for k, (_, weight_hh, *_) in enumerate(weights):
                weights[k][1] = noise.drop_weight(weight_hh, spec.rates.weight, seed, k)
            call = call._replace(weights=[w for own in weights for w in own])
    rates = spec.in_steps
    return noise.Noise(seed if rates else None, rates), call


def _by_layers(call: _Call, engine: str, drawn: noise.Noise) -> Results:
    """The results of our own loops, which run layer by layer, or several layers in one launch."""
    spec, cell = call.spec, call.spec.cell
    # The ops know that nobody asked for the kernels by name, and go on without them where a launch fails.
    of_ops = "auto" if engine == "triton" and engines.requested(spec.backend) == "auto" else engine
    input, resets = _time_major(call.rows, call.input, call.rows.resets)
    states, parameters = call.states, _per_layer_and_direction(call)
    layout = _layout(input, states[0].size(1), call.rows.batch_sizes, call.rows.lengths, resets)
    alone = spec.proj_size or spec.in_steps or spec.between_layers
    one_step = ops.is_one_step(cell, engine, input, layout)
    if one_step and not (alone or spec.sequences or transforms.followed((input, *states, *call.weights))):
        saves = (False, False)
        cx = ops.states_beside_h(states)
        output, h_n, c_n, _, _ = ops.step_fwd(
            cell.name, input[0], states[0], cx, call.weights, spec.directions, *saves, of_ops
        )
        return _as_given(call.rows, output.unsqueeze(0), (h_n, *ops.one_by_one(c_n)), ())
    if engine in ("triton", "torch") or cell.equations.step_backward is None:
        transforms.not_traced("input", "a call that ATen computes", f"one of our own loop over the cell {cell.name}")
    together = spec.directions
    if (
        engine == "triton"
        and spec.save == "gates"
        and spec.num_layers > 1
        and together == 1
        and spec.sequences != "all"
        and not (alone or one_step)
    ):
        together = autograd.layers_together(cell, input, states, call.weights, spec.num_layers, layout)
    layer = _layer_of(spec, of_ops, drawn)
    finals, sequences = [], []
    for k in range(0, len(parameters), together):
        if k > 0 and spec.between_layers > 0:
            input = dropout_fn(input, spec.between_layers)
        own, is_last = slice(k, k + together), k + together >= len(parameters)
        wants_c_seq = spec.sequences == "all" or (spec.sequences == "cells" and is_last)
        input, final, c_seq = layer(input, layout, tuple(s[own] for s in states), parameters[own], k, wants_c_seq)
        finals.append(final)
        if wants_c_seq:
            sequences.append(ops.one_by_one(c_seq))
            if spec.sequences == "all":
                sequences[-1].insert(0, input.clone() if is_last else input)  # users change output in place
    states = finals[0] if len(finals) == 1 else tuple(torch.cat(s) for s in zip(*finals, strict=True))
    return _as_given(call.rows, input, states, tuple(joined(own, -1) for own in zip(*sequences, strict=True)))


def _layer_of(spec: Spec, engine: str, drawn: noise.Noise):
    """A function that runs one layer, or a wave of layers.

    Its arguments are x, layout, states, parameters, the number of the first layer, and whether the states beside h are
    wanted of every step.
    """
    cell, clip = spec.cell, spec.grad_clip

    def fused(x, layout, states, parameters, first, wants_c_seq):
        if spec.proj_size:
            return _projected_layer(cell, x, states, parameters, engine, layout, wants_c_seq, spec.save)
        if len(parameters) > spec.directions:
            return autograd.wave(cell, engine, x, states, parameters, layout, clip, wants_c_seq)
        own = drawn._replace(place=(first, 0))
        return autograd.layer(cell, x, states, parameters, engine, layout, clip, wants_c_seq, save=spec.save, noise=own)

    def specified(x, layout, states, parameters, first, wants_c_seq):
        """The specification, including a projection."""
        projected = spec.proj_size > 0
        batch = noise.Batch(layout, drawn._replace(place=(first, 0)))
        cx = ops.states_beside_h(states)
        output, h_n, c_n, c_seq = autograd.specified_layer(
            cell, x, states[0], cx, parameters, batch, clip, wants_c_seq, projected
        )
        return output, (h_n, *ops.one_by_one(c_n)), c_seq if wants_c_seq else None

    def exported(x, layout, states, parameters, first, wants_c_seq):
        return onnx.layer(cell, x, layout, states, parameters, spec.proj_size > 0, drawn, wants_c_seq)

    if engine == "onnx":
        return exported
    # The loop over o tanh(c) has no gradient of a projected h to clip.
    return specified if engine == "reference" or (spec.proj_size and clip is not None) else fused


def _projected_layer(
    cell: Cell,
    x: Tensor,  # [T, B, I] or packed [R, I]
    state: tuple[Tensor, Tensor],  # [D, B, P] and [D, B, H]
    # Per direction: weight_ih, weight_hh [4H, P] (, bias_ih, bias_hh), weight_hr [P, H].
    parameters: list[list[Tensor]],
    engine: str,
    layout: Layout,
    wants_c_seq: bool,
    save: str,
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None]:
    """A layer with a projection, h_t = weight_hr y_t.

    The recurrence runs over y, with the product weight_hh weight_hr as its recurrent weight. So the loop has one
    product and one wait per step, as without a projection. The projection of all steps is one product after it. h_0 is
    not a projection of any y, so its part of the first preactivation is added separately.
    """
    weight_hr = [p[-1] for p in parameters]
    over_y = [[p[0], product(p[1], p[-1]), *p[2:-1]] for p in parameters]
    preact_0 = stacked([product(h, p[1].t()) for h, p in zip(state[0], parameters, strict=True)])
    no_y = torch.zeros_like(state[1])
    y, (y_n, c_n), c_seq = autograd.layer(
        cell, x, (no_y, state[1]), over_y, engine, layout, wants_c_seq=wants_c_seq, save=save, preact_0=preact_0
    )
    by_direction = zip(y.chunk(len(parameters), -1), weight_hr, strict=True)
    output = joined([product(y_d.flatten(0, -2), w.t()) for y_d, w in by_direction], -1)
    h_n = stacked([product(y_d, w.t()) for y_d, w in zip(y_n, weight_hr, strict=True)])
    if layout.name == "ragged" and layout.lengths is not None:
        h_n = torch.where((layout.lengths <= 0).unsqueeze(1), state[0], h_n)
    return output.unflatten(0, y.shape[:-1]), (h_n, c_n), c_seq


# Dtypes.


def _result_dtype(input: Tensor, autocast: bool) -> torch.dtype:
    """The dtype of the results: that of autocast if it is on and the input is not float64, else that of the input."""
    if autocast and input.dtype != torch.float64:
        return torch.get_autocast_dtype(input.device.type)
    return input.dtype


def _cast(tree, dtype: torch.dtype):
    """Tensors in nested tuples and lists, in `dtype`."""
    if tree is None:
        return None
    if isinstance(tree, Tensor):
        return tree if tree.dtype == dtype else tree.to(dtype)
    return type(tree)([_cast(x, dtype) for x in tree])


def _has_steps(input: Tensor, lengths: Tensor | None) -> bool:
    """Whether a sequence is known to have a step. A compiler and a transform may not ask, so the answer is then no."""
    if _traced(input) or transforms.transformed():
        return False
    if lengths is not None:
        transforms.not_captured("lengths", lengths.device, "the engine 'torch', which looks at their values")
    return input.numel() > 0 and (lengths is None or bool((lengths > 0).any()))


def _traced(input: Tensor) -> bool:
    """Whether the values of tensors cannot be read."""
    return torch.compiler.is_compiling() or input.is_meta
