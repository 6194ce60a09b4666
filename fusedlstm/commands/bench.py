"""Time a layer on this device, beside that of torch.nn.

A cell that torch.nn lacks is timed beside a loop of torch operations. Both
sides have the same weights and input, and their results are compared first.
They run in turns, in one process. The rival runs a second time in each turn:
how far that is from 1 is the noise. On a machine that does other things too,
only the numbers of a long run mean something.
"""

import argparse
import copy
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear, logsigmoid

import fusedlstm
from fusedlstm import cells, commands, engines, timing
from fusedlstm.base import Recurrent
from fusedlstm.commands import info
from fusedlstm.plan.choice import table

EXAMPLES = """\
examples:
  python -m fusedlstm bench --hidden 256
  python -m fusedlstm bench --cell gru --hidden 128 --batch 1 --pass inference
  python -m fusedlstm bench --cell layernorm --hidden 64 --seconds 20
  python -m fusedlstm bench --hidden 512 --dtype bf16 --device cuda:1"""
WRONG_ABOVE = 0.1  # of relative error: the tests check the precision
Forward = Callable[[Tensor], Tensor]  # from x [T, B, I] to h of every step, [T, B, D * H]
States = tuple[Tensor, ...]  # h first, each [B, H]


def add_arguments(add: commands.Add) -> None:
    add("--hidden", type=commands.positive, required=True, help="number of hidden units (required)")
    commands.add_layer(add)
    commands.add_stack(add)
    add(
        "--pass",
        dest="pass_",
        choices=("training", "inference"),
        default="training",
        help="forward and backward, or a forward without gradients (default: %(default)s)",
    )
    add("--backend", choices=engines.BACKENDS, default="auto", help="engine of our layer (default: %(default)s)")
    add("--seconds", type=commands.seconds, default=5.0, help="time to measure (default: %(default)s)")
    commands.add_device(add)


def run(args: argparse.Namespace) -> None:
    where = commands.chosen_device(args)
    index = torch.device(where).index or 0
    known, processor = info.facts(), f"cuda:{index}" if where.startswith("cuda") else "CPU"
    for name in ("fusedlstm", "torch", "Triton", processor, "threads", "environment"):
        commands.say(f"{name:14} {info.told(known[name])}")
    try:
        layer, x = commands.layer_and_input(args)
        layer.backend = args.backend
        how = fusedlstm.explain(layer, x)
        with commands.working("measuring") as tell:
            apart, samples = measured(layer, x, args.pass_ == "training", args.seconds, tell)
    except (RuntimeError, ValueError) as error:
        args.parser.error(str(error), "python -m fusedlstm info says what serves here.")
    ours, theirs, again = samples.ms
    commands.say(f"{'engine':14} {how.engine}: {how.why}; {how.how}")
    commands.say(f"{'layer':14} {layer}, {args.pass_}, T={args.steps}, B={args.batch}, {args.dtype}, {where}")
    commands.say(f"{'difference':14} at most {apart:.1e} of the norm of a result or gradient\n")
    commands.say(table(["", "ms", "20% to 80%", "speed-up", "20% to 80%"], rows(samples)))
    speed, low, high = timing.percentiles(timing.ratios(samples, theirs, ours))
    _, slowest, fastest = timing.percentiles(timing.ratios(samples, theirs, again))
    if min(slowest, 1) <= speed <= max(fastest, 1):
        commands.say(f"\n{ours} is as fast as {theirs}: the difference is within the noise.")
    elif speed > 1:
        commands.say(f"\n{ours} is {speed:.2f} times as fast as {theirs} ({low:.2f} to {high:.2f}).")
    else:
        commands.say(f"\n{ours} takes {1 / speed:.2f} times as long as {theirs} ({1 / high:.2f} to {1 / low:.2f}).")


def measured(
    layer: Recurrent,
    x: Tensor,  # [T, B, I]
    training: bool,
    seconds: float,
    tell: Callable[[str], None] = lambda text: None,
) -> tuple[float, timing.Samples]:
    """Compare and time a layer, its rival, and the rival again. Returns the relative error, and times in this order.

    Raises:
        RuntimeError: The results differ by more than 10%.
    """
    layer.train(training)
    name, forward, parameters = rival(layer)
    grad = torch.randn_like(forward(x))
    ours = call(lambda x: layer(x)[0], list(layer.parameters()), x, grad, training)
    theirs = call(forward, parameters, x, grad, training)
    with torch.no_grad():
        apart = max(_relative(a.double(), b.double()) for a, b in zip(ours(), theirs(), strict=True))
    if not apart <= WRONG_ABOVE:
        raise RuntimeError(f"expected the results of {name}, got others: relative error {apart:.2g}")
    calls = {f"fusedlstm.{layer._get_name()}": ours, name: theirs, f"{name} again": theirs}
    return apart, timing.take(calls, seconds, x.device, lambda done, rounds: tell(f"round {done + 1} of {rounds}"))


def _relative(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm().clamp_min(1e-300))


def _short(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"


def rows(samples: timing.Samples) -> list[tuple[str, ...]]:
    """The rows of a table: the times, and the time of the rival over each."""
    _, baseline, _ = samples.ms
    found: list[tuple[str, ...]] = []
    for name, ms in samples.ms.items():
        time, low, high = timing.percentiles(ms)
        row = (name, _short(time), f"{_short(low)} to {_short(high)}")
        speed, low, high = timing.percentiles(timing.ratios(samples, baseline, name))
        found.append((*row, f"{speed:.2f}", "" if name == baseline else f"{low:.2f} to {high:.2f}"))
    return found


def call(forward: Forward, parameters: list[Tensor], x: Tensor, grad: Tensor, training: bool) -> Callable[[], States]:
    """A function that runs a layer, and in training its backward. It returns the output and all gradients."""
    x = x.detach().requires_grad_(training)

    def run() -> States:
        with torch.set_grad_enabled(training):
            output = forward(x)
            return output, *(torch.autograd.grad(output, [x, *parameters], grad) if training else ())

    return run


def rival(layer: Recurrent) -> tuple[str, Forward, list[Tensor]]:
    """What a layer is compared with: its name, the function, and its parameters in the order of the layer's."""
    stock = fusedlstm.restore(copy.deepcopy(layer))
    if isinstance(stock, Recurrent):
        if layer.cell not in STEPS:
            raise ValueError(f"--cell: expected {', '.join(STEPS)} or a cell of torch.nn, got {layer.cell}")
        return "a loop", functools.partial(looped, layer), list(layer.parameters())
    stock.flatten_parameters()
    return f"torch.nn.{stock._get_name()}", lambda x: stock(x)[0], list(stock.parameters())


def looped(layer: Recurrent, x: Tensor) -> Tensor:
    """A stack of any cell for which there is a `loop`, from x [T, B, I] to h of every step."""
    for k in range(layer.num_layers):
        per_direction = layer.all_weights[k * layer._directions : (k + 1) * layer._directions]
        runs = [loop(layer.cell, parameters) for parameters in per_direction]
        x = torch.cat([runs[0](x), *(run(x.flip(0)).flip(0) for run in runs[1:])], -1)
    return x


# Loops of torch operations under autograd, with the input product before the loop: what people write without such a
# layer. `bench/loops.py` measures these too.


def loop(cell: str, parameters: Sequence[Tensor], indexed: bool = False) -> Forward:
    """One layer and direction, from its parameters.

    With `indexed`, step t is written as `preact_x[t] + linear(h, weight_hh)`. The gradient of indexing is slow.
    """
    step, of = STEPS[cell], cells.CELLS[cell]
    weight_ih, weight_hh, bias_ih, bias_hh, *vectors = parameters
    weight_t = weight_hh.t()
    if of.norms:
        gain_ih, gain_hh, *vectors = vectors

    def recurrent(preact_x: Tensor, h: Tensor) -> Tensor:
        if of.norms:
            return preact_x + layer_norm(h @ weight_t, gain_hh.shape, gain_hh)
        return preact_x + linear(h, weight_hh) if indexed else torch.addmm(preact_x, h, weight_t)

    def forward(x: Tensor) -> Tensor:
        bias = bias_ih + bias_hh
        if of.norms:
            preact_x = layer_norm(x @ weight_ih.t(), gain_ih.shape, gain_ih, bias)
        else:
            preact_x = linear(x, weight_ih, bias)
        size = x.size(1), weight_hh.size(1)
        state = tuple(x.new_full(size, float("-inf") if name == "m" else 0.0) for name in of.states)
        by_step = preact_x if indexed else preact_x.unbind()
        hs = []
        for t in range(len(x)):
            state = step(recurrent(by_step[t], state[0]), state, *vectors)
            hs.append(state[0])
        return torch.stack(hs)

    return forward


def _peephole(preact: Tensor, state: States, p_i: Tensor, p_f: Tensor, p_o: Tensor) -> States:
    (i, f, g, o), (_, c) = preact.chunk(4, -1), state
    c = torch.sigmoid(f + p_f * c) * c + torch.sigmoid(i + p_i * c) * torch.tanh(g)
    return torch.sigmoid(o + p_o * c) * torch.tanh(c), c


def _coupled(preact: Tensor, state: States) -> States:
    (i, g, o), (_, c) = preact.chunk(3, -1), state
    c = c + torch.sigmoid(i) * (torch.tanh(g) - c)
    return torch.sigmoid(o) * torch.tanh(c), c


def _layernorm(preact: Tensor, state: States, gain_c: Tensor, bias_c: Tensor) -> States:
    (i, f, g, o), (_, c) = preact.chunk(4, -1), state
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(layer_norm(c, c.shape[1:], gain_c, bias_c)), c


def _slstm(preact: Tensor, state: States) -> States:
    (i, f, g, o), (_, c, n, m_prev) = preact.chunk(4, -1), state
    carried = logsigmoid(f) + m_prev
    m = torch.maximum(carried, i)
    i, f = torch.exp(i - m), torch.exp(carried - m)
    c, n = f * c + i * torch.tanh(g), f * n + i
    return torch.sigmoid(o) * c / n, c, n, m


STEPS: dict[str, Callable[..., States]] = {
    "peephole": _peephole,
    "coupled": _coupled,
    "layernorm": _layernorm,
    "slstm": _slstm,
}
