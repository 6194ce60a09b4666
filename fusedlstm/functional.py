"""How a stack is made of recurrences: layers, directions, dropout, projections, packing, batch_first, autocast."""

import contextlib

import torch
from torch import Tensor
from torch.nn.functional import dropout as dropout_fn

from fusedlstm import autograd, cells, engines, noise, transforms, wave
from fusedlstm.engines import aten, reference
from fusedlstm.layout import Layout, Pieces
from fusedlstm.noise import NO_RATES, Rates
from fusedlstm.plan import tuned
from fusedlstm.products import joined, product, stacked


def stack(
    cell: str,
    input: Tensor,  # [T, B, I], or [B, T, I] with batch_first, or packed [R, I] with batch_sizes
    states: tuple[Tensor, ...],  # h [L * D, B, P] first, the others [L * D, B, H]
    weights: list[Tensor],  # per layer and direction: weight_ih, weight_hh (, bias_ih, bias_hh) (, weight_hr), vectors
    *,
    batch_sizes: Tensor | None = None,  # [T] int64 on the CPU
    lengths: Tensor | None = None,  # [B] integers
    resets: Tensor | None = None,  # bool, the leading axes of `input`
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    proj_size: int = 0,
    cell_states: bool = False,
    grad_clip: float | None = None,
    save: str = "gates",
    backend: str = "auto",
    rates: Rates = NO_RATES,
) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
    """Run a stack of recurrent layers over a sequence; differentiable in every tensor argument.

    Args:
        cell: a name of `fusedlstm.cells.CELLS`.
        input: any strides.
        states: before the first step, as `Cell.states` has them.
        weights: in the order of `torch.nn.LSTM._flat_weights`, then the cell's own vectors [H]; rows in the order of
            `Cell.gates`. A weight_hh [G*H, DH] with fewer columns than h has H / DH heads (`fusedlstm.products`).
        batch_sizes: how many sequences have a step t, as in a PackedSequence; `input`, `states` and the results are then in
            its sorted order, and `batch_first` is ignored.
        lengths: steps of every sequence, 0 to T, and a number beyond these counts as the nearer; what follows is padding. Not
            with `batch_sizes`.
        resets: where a sequence is cut, see `fusedlstm.layout`.
        dropout: probability of zeroing an element of every layer's output but the last, if `training`.
        proj_size: P, the size of a projected h of an LSTM; 0 is none, and P is then H.
        cell_states: whether the states beside h are wanted of every step, of the last layer.
        grad_clip: the largest element of the gradient of a state that enters a step.
        save: what the custom ops keep for the backward, "gates" or "states"; see `fusedlstm.memory`. Where ATen or the
            specification serves the call, they decide.
        backend: see `fusedlstm.engines`.
        rates: of zoneout and dropouts inside of the steps, with masks if `training`; see `fusedlstm.noise`. Not with
            `proj_size`.

    Returns:
        output [T, B, D * P] (or [B, T, D * P], or [R, D * P]), zero in padding; the final states, the given ones
        of a sequence without steps; the S states beside h of every step [S, T, B, D * H] or the like, zero in padding, or
        None. In the dtype of `input`, under autocast in that of autocast.

    Precision: products in the dtype of the results; on a CPU float16, and bfloat16 where the CPU has no instructions
        for it, are computed in float32.
    """
    dtype = _result_dtype(input)
    directions = 2 if bidirectional else 1
    if not torch.is_grad_enabled():
        grad_clip = None
    clips_projection = grad_clip is not None and proj_size > 0
    masked = lengths is not None or resets is not None
    rows = "packed" if batch_sizes is not None else "ragged" if masked else "dense"
    hidden = states[-1].size(-1)  # h is projected with c beside it only
    heads = 1 if proj_size else hidden // weights[1].size(1)
    in_steps = rates.in_steps(training)
    engine = engines.choose(backend, input.device, dtype, cell, hidden, directions, clips_projection, rows, heads)
    if transforms.has_tangents((input, *states, *weights)):
        engine = "reference"  # forward-mode AD: neither kernels nor ATen's layers know of tangents
    if (
        engine == "triton"
        and input.is_cuda
        and aten.has(cell)  # else there is no rival
        and engines.requested(backend) == "auto"
        and save == "gates"  # else memory is asked for, and not time
        and torch.backends.cudnn.enabled
        and not (dropout * training and num_layers > 1)  # cuDNN draws its own masks
        and not (masked or in_steps or cell_states or grad_clip is not None or torch.compiler.is_compiling())
        and not transforms.transformed()  # ATen's layers have no rules for them
    ):
        sizes = (batch_sizes, masked, num_layers, directions, proj_size)
        call = tuned_call(cell, input, states, weights, dtype, *sizes)
        steps = input.size(1 if batch_first else 0) if batch_sizes is None else len(batch_sizes)
        if call is not None and 1 < steps <= aten.CUDNN_STEPS:
            engine, _ = engines.fastest(call, input.device.index)
    options = {
        "bias": bias,
        "num_layers": num_layers,
        "dropout": dropout,
        "training": training,
        "bidirectional": bidirectional,
        "proj_size": proj_size,
        "cell_states": cell_states,
        "grad_clip": grad_clip,
        "save": save,
        "backend": backend,
        "rates": rates,
    }
    if engine == "torch" and masked and not in_steps and _has_steps(input, lengths):
        return _in_pieces(cell, input, states, weights, batch_sizes, lengths, resets, batch_first, options)
    if batch_sizes is not None and _equal_lengths(batch_sizes):
        input, resets = (None if x is None else x.unflatten(0, (len(batch_sizes), -1)) for x in (input, resets))
        output, states, c_seq = stack(cell, input, states, weights, resets=resets, **options)
        return output.flatten(0, 1), states, c_seq if c_seq is None else c_seq.flatten(1, 2)

    seed, count = None, len(weights) // (num_layers * directions)
    if training and any(rates):
        seed = noise.draw(input.device)
        if rates.weight:
            weights = [
                noise.drop_weight(w, rates.weight, seed, k // count) if k % count == 1 else w
                for k, w in enumerate(weights)
            ]
    batch_first = batch_first and batch_sizes is None
    # The ops know that nobody asked for the kernels by name, and go on without them where a launch fails.
    ops = "auto" if engine == "triton" and engines.requested(backend) == "auto" else engine
    schedule, compute_dtype = "loop", dtype
    if engine == "torch":
        transformed = transforms.transformed()
        if not (
            masked or in_steps or cell_states or grad_clip is not None or heads > 1 or transformed
        ):  # which ATen does not serve
            schedule = aten.schedule(cell, input, dtype, batch_sizes, batch_first, hidden, proj_size)
        compute_dtype = aten.compute_dtype(cell, input.device, dtype, schedule, dense=batch_sizes is None)
    if compute_dtype != input.dtype or _autocasts(input):  # else all of them have it
        input, states, weights = _cast((input, states, weights), compute_dtype)
    c_seq = None
    with _autocast_off(input):
        if schedule != "loop":
            output, states = aten.stack(
                cell,
                schedule,
                input,
                batch_sizes,
                states,
                weights,
                bias,
                num_layers,
                dropout,
                training,
                bidirectional,
                batch_first,
            )
        else:
            if batch_first:
                input, resets = (None if x is None else x.transpose(0, 1) for x in (input, resets))
            layout = _layout(input, states[0].size(1), batch_sizes, lengths, resets)
            parameters = [weights[k : k + count] for k in range(0, len(weights), count)]  # per layer and direction
            between = dropout * training
            one_step = autograd.is_one_step(cell, engine, input, layout)
            if one_step and not (
                proj_size or in_steps or cell_states or between or transforms.followed((input, *states, *weights))
            ):
                h, cx = states[0], autograd._stacked(states)
                output, h_n, c_n, _, _ = autograd.step_fwd(
                    cell, input[0], h, cx, weights, directions, False, False, ops
                )
                output, states = output.unsqueeze(0), (h_n, *c_n.unbind(0))
            else:
                layer = _layer_of(
                    cell,
                    ops,
                    directions,
                    proj_size,
                    grad_clip,
                    cell_states,
                    save,
                    noise.Noise(seed if in_steps else None, in_steps),
                )
                together = 1
                alone = one_step or num_layers == 1 or directions == 2 or proj_size or between or in_steps
                if engine == "triton" and save == "gates" and not alone:
                    together = wave.layers_together(cell, input, states, weights, num_layers, layout)
                output, states, c_seq = _layers(
                    layer, input, layout, states, parameters, directions * together, between
                )
            if batch_first:
                output = output.transpose(0, 1)
                c_seq = None if c_seq is None else c_seq.transpose(1, 2)
    results = (output, states, c_seq)
    return results if compute_dtype == dtype else _cast(results, dtype)


def tuned_call(
    cell: str,
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
    """What an engine is chosen for, of arguments of `stack` and the dtype of its results; None if ATen does not serve it."""
    _, batch, hidden = states[-1].shape
    if batch == 0 or not aten.has(cell) or (not proj_size and weights[1].size(1) < hidden):  # heads
        return None
    from fusedlstm.engines import launch

    return tuned.Call(
        cell=cell,
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


def step(
    cell: str,
    input: Tensor,  # [B, I]
    states: tuple[Tensor, ...],  # each [B, H]
    weights: list[Tensor],  # weight_ih, weight_hh (, bias_ih, bias_hh), vectors
    *,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    """Run one step of one layer; differentiable in every tensor argument. Returns the states. Dtypes as in `stack`."""
    dtype, hidden = _result_dtype(input), states[0].size(-1)
    heads = hidden // weights[1].size(1) if hidden else 1
    engine = engines.choose(backend, input.device, dtype, cell, hidden, heads=heads)
    derived = transforms.transformed() or transforms.has_tangents((input, *states, *weights))
    if engine == "torch" and heads == 1 and aten.has(cell) and not derived:
        compute_dtype = aten.compute_dtype(cell, input.device, dtype, "cell", dense=False)
        input, states, weights = _cast((input, states, weights), compute_dtype)
        with _autocast_off(input):
            return _cast(aten.cell(cell, input, states, *weights), dtype)
    states = tuple(s.unsqueeze(0) for s in states)
    options = {"bias": cells.CELLS[cell].has_bias(weights), "backend": backend}
    _, states, _ = stack(cell, input.unsqueeze(0), states, weights, **options)
    return tuple(s.squeeze(0) for s in states)


def _in_pieces(
    cell: str,
    input: Tensor,  # [T, B, I], or [B, T, I] with batch_first, or packed [R, I] with batch_sizes
    states: tuple[Tensor, ...],
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    batch_first: bool,
    options: dict,
) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
    """A batch with lengths and resets as the packed batch of its uncut pieces: so all that serves packed batches serves it."""
    if batch_first and batch_sizes is None:
        input, resets = (None if x is None else x.transpose(0, 1) for x in (input, resets))
    leading, directions = input.shape[:-1], 2 if options["bidirectional"] else 1
    layout = _layout(input, states[0].size(1), batch_sizes, lengths, resets)
    pieces = Pieces.of(layout, tuple(leading), input.device)
    own = tuple(torch.stack([pieces.enter(s, k % directions) for k, s in enumerate(state)]) for state in states)
    rows = pieces.gather(input.flatten(0, -2))
    output, own, c_seq = stack(cell, rows, own, weights, batch_sizes=pieces.batch_sizes, **options)

    def leave(state, initial):
        final = zip(state, initial.to(state.dtype), strict=True)
        return torch.stack([pieces.leave(s, i, k % directions) for k, (s, i) in enumerate(final)])

    def scatter(x):
        return pieces.scatter(x, leading.numel()).unflatten(0, leading)

    output, states = scatter(output), tuple(leave(s, i) for s, i in zip(own, states, strict=True))
    c_seq = None if c_seq is None else torch.stack([scatter(c) for c in c_seq])
    if batch_first and batch_sizes is None:
        output = output.transpose(0, 1)
        c_seq = None if c_seq is None else c_seq.transpose(1, 2)
    return output, states, c_seq


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
        engines.not_captured(
            "input", input.device, "a packed batch, whose tables are copied from the host at every call"
        )
        return Layout.of_packed(batch_sizes, batch, input.device, resets)
    if lengths is not None:
        dtype = lengths.dtype if lengths.dtype == torch.int64 else torch.int32  # these two the kernels read
        lengths = _moved("lengths", lengths, input.device, dtype)
    return Layout(lengths, None, resets)


def _moved(name: str, x: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """`x` there, in that type. To a GPU without waiting for it, but for pinned memory: the caller may write that again."""
    if x.device == device:
        return x.to(dtype)
    engines.not_captured(name, device, f"a tensor on {x.device}, which is copied at every call")
    unpinned = not torch.compiler.is_compiling() and not x.is_pinned()
    return x.to(device, dtype, non_blocking=device.type == "cuda" and unpinned)


def _layers(
    layer,
    x: Tensor,  # [T, B, I] or packed [R, I]
    layout: Layout,
    states: tuple[Tensor, ...],  # each [L * D, B, P or H]
    parameters: list[list[Tensor]],  # per layer and direction
    at_once: int,
    dropout: float,
) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
    """A stack of which `layer(x, layout, states, parameters, first, is_last)` does `at_once` directions or layers."""
    finals, c_seq = [], None
    for k in range(0, len(parameters), at_once):
        if k > 0 and dropout > 0:
            x = dropout_fn(x, dropout)
        rows, is_last = slice(k, k + at_once), k + at_once >= len(parameters)
        x, final, c_seq = layer(x, layout, tuple(s[rows] for s in states), parameters[rows], k, is_last)
        finals.append(final)
    return x, finals[0] if len(finals) == 1 else tuple(torch.cat(s) for s in zip(*finals, strict=True)), c_seq


def _layer_of(
    cell: str,
    engine: str,
    directions: int,
    proj_size: int,
    clip: float | None,
    cell_states: bool,
    save: str,
    regularised: noise.Noise,
):
    """What does one layer, or a wave of them, for `_layers`."""

    def fused(x, layout, states, parameters, first, is_last):
        wants_c_seq = cell_states and is_last
        if proj_size:
            return _projected_layer(x, states, parameters, engine, layout, wants_c_seq, save)
        if len(parameters) > directions:
            return wave.stack(cell, engine, x, states, parameters, layout, clip, wants_c_seq)
        drawn = regularised._replace(place=(first, 0))
        return autograd.layer(cell, x, states, parameters, engine, layout, clip, wants_c_seq, save=save, noise=drawn)

    def specified(x, layout, states, parameters, first, is_last):
        """The specification, projection and all; plain autograd differentiates it."""
        weight_hr = [p[-1] for p in parameters] if proj_size else None
        parameters = [p[:-1] for p in parameters] if proj_size else parameters
        output, h_n, c_n, c_seq = reference.layer(
            cell,
            x,
            states[0],
            autograd._stacked(states),
            parameters,
            layout,
            weight_hr,
            clip,
            regularised._replace(place=(first, 0)),
        )
        return output, (h_n, *c_n.unbind(0)), c_seq if cell_states and is_last else None

    # The loop over o tanh(c) has no gradient of a projected h to clip.
    return specified if engine == "reference" or (proj_size and clip is not None) else fused


def _projected_layer(
    x: Tensor,  # [T, B, I] or packed [R, I]
    state: tuple[Tensor, Tensor],  # [D, B, P] and [D, B, H]
    parameters: list[
        list[Tensor]
    ],  # per direction: weight_ih, weight_hh [4H, P] (, bias_ih, bias_hh), weight_hr [P, H]
    engine: str,
    layout: Layout,
    wants_c_seq: bool,
    save: str,
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None]:
    """h_t = weight_hr y_t of a recurrence over y, whose recurrent weight is weight_hh weight_hr.

    So the loop has one product and one wait a step, as without a projection, and the projection is one product of all
    steps after it. h_0 is no projection of anything: its part of the first preactivation is added by itself.
    """
    weight_hr = [p[-1] for p in parameters]
    over_y = [[p[0], product(p[1], p[-1]), *p[2:-1]] for p in parameters]
    preact_0 = stacked([product(h, p[1].t()) for h, p in zip(state[0], parameters, strict=True)])
    no_y = torch.zeros_like(state[1])
    y, (y_n, c_n), c_seq = autograd.layer(
        "lstm", x, (no_y, state[1]), over_y, engine, layout, wants_c_seq=wants_c_seq, save=save, preact_0=preact_0
    )
    by_direction = zip(y.chunk(len(parameters), -1), weight_hr, strict=True)
    output = joined([product(y_d.flatten(0, -2), w.t()) for y_d, w in by_direction], -1)
    h_n = stacked([product(y_d, w.t()) for y_d, w in zip(y_n, weight_hr, strict=True)])
    if layout.name == "ragged" and layout.lengths is not None:
        h_n = torch.where((layout.lengths <= 0).unsqueeze(1), state[0], h_n)
    return output.unflatten(0, y.shape[:-1]), (h_n, c_n), c_seq


def _result_dtype(input: Tensor) -> torch.dtype:
    """The dtype of the results: that of the input, or of autocast where it is on, which leaves float64 alone."""
    if _autocasts(input) and input.dtype != torch.float64:
        return torch.get_autocast_dtype(input.device.type)
    return input.dtype


def _autocasts(input: Tensor) -> bool:
    return torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(input.device.type)


def _autocast_off(input: Tensor):
    # What is to be cast is cast: ATen's own rules for LSTMs differ from device to device, and from dtype to dtype.
    return torch.autocast(input.device.type, enabled=False) if _autocasts(input) else contextlib.nullcontext()


def _cast(tree, dtype: torch.dtype):
    """Tensors in nested tuples and lists, in `dtype`."""
    if tree is None:
        return None
    if isinstance(tree, Tensor):
        return tree if tree.dtype == dtype else tree.to(dtype)
    return type(tree)([_cast(x, dtype) for x in tree])


def _has_steps(input: Tensor, lengths: Tensor | None) -> bool:
    """Whether a sequence is known to have a step: a compiler may not ask."""
    if _traced(input):
        return False
    if lengths is not None:
        engines.not_captured("lengths", lengths.device, "the engine 'torch', which looks at their values")
    return input.numel() > 0 and (lengths is None or bool((lengths > 0).any()))


def _traced(input: Tensor) -> bool:
    """Whether the values of tensors are not to be had."""
    return torch.compiler.is_compiling() or input.is_meta


def _equal_lengths(batch_sizes: Tensor) -> bool:
    # A graph is for any lengths, so a compiler may not ask.
    return not torch.compiler.is_compiling() and bool(batch_sizes[0] == batch_sizes[-1])
