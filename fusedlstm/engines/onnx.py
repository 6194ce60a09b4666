"""How a layer is written while `torch.onnx.export` traces it: as operators of ONNX.

| layer | operators |
|---|---|
| LSTM, PeepholeLSTM, CoupledLSTM, GRU, ResetBeforeGRU, RNN | one node LSTM, GRU or RNN, with both directions |
| every other cell, and `num_heads`, `proj_size`, zoneout, `resets`, states of every step, other dtypes | one Scan |

The body of the Scan is the step of the specification, so no equation is written twice. The operators are for float32
and float16, because ONNX Runtime 1.32 has no others on a CPU.

The operators of ONNX have the gates of an LSTM in the order i, o, f, c, and those of a GRU in the order z, r, h:
https://onnx.ai/onnx/operators/onnx__LSTM.html and the pages beside it.
"""

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedlstm import products, transforms
from fusedlstm.cells import Cell
from fusedlstm.engines import reference
from fusedlstm.layout import Layout
from fusedlstm.noise import Noise

States = tuple[Tensor, ...]  # h first, each [D, B, H]


class Operator(NamedTuple):
    """An operator of ONNX: its name, our gates in its order, and the attributes that differ from its defaults."""

    name: str
    gates: tuple[str, ...]
    attributes: dict[str, int]
    # What each direction computes instead of a sigmoid and two tanh. Empty are the defaults.
    activations: tuple[str, ...] = ()


OPERATORS = {
    "lstm": Operator("LSTM", ("i", "o", "f", "g"), {}),
    "peephole": Operator("LSTM", ("i", "o", "f", "g"), {}),
    "coupled": Operator("LSTM", ("i", "o", "-i", "g"), {"input_forget": 1}),
    "gru": Operator("GRU", ("z", "r", "n"), {"linear_before_reset": 1}),
    "gru_reset_before": Operator("GRU", ("z", "r", "n"), {}),
    "rnn_tanh": Operator("RNN", ("h",), {}, ("Tanh",)),
    "rnn_relu": Operator("RNN", ("h",), {}, ("Relu",)),
}
DTYPES = (torch.float32, torch.float16)
# P of an LSTM has the peepholes in this order.
PEEPHOLES = ("weight_ci", "weight_co", "weight_cf")


def exporting() -> bool:
    """Whether `torch.onnx.export(dynamo=True)` traces the call."""
    return torch.compiler.is_exporting() and _in_onnx_export()


@transforms.constant
def _in_onnx_export() -> bool:
    """Dynamo, with which the exporter can trace, takes torch's function for false."""
    return torch.onnx.is_in_onnx_export()


def layer(
    cell: Cell,
    x: Tensor,  # [T, B, I]
    layout: Layout,
    states: States,  # h [D, B, P], the others [D, B, H]
    parameters: list[list[Tensor]],  # per direction: weight_ih, weight_hh (, bias_ih, bias_hh) (, weight_hr), vectors
    projected: bool,
    noise: Noise,
    wants_c_seq: bool,
) -> tuple[Tensor, States, Tensor | None]:
    """One layer. Returns the output [T, B, D * P] and the final states, and if wanted the c of every step."""
    heads = not projected and parameters[0][1].size(1) < states[0].size(-1)
    more = projected or heads or noise.rates or wants_c_seq or layout.resets is not None
    if cell.name in OPERATORS and not more and x.dtype in DTYPES:
        return *_node(cell, x, layout, states, parameters), None
    return _scan(cell, x, layout, states, parameters, projected, noise, wants_c_seq)


def _node(
    cell: Cell, x: Tensor, layout: Layout, states: States, parameters: list[list[Tensor]]
) -> tuple[Tensor, States]:
    """`layer` as one operator."""
    operator, (T, B, _), (D, _, H) = OPERATORS[cell.name], x.shape, states[0].shape
    lengths = None if layout.lengths is None else layout.lengths.clamp(0, T).to(torch.int32)
    weight_ih, weight_hh = (_by_gate(cell, [own[k] for own in parameters], D) for k in (0, 1))
    biases = None
    if cell.has_bias(parameters[0]):
        biases = _by_gate(cell, [b for own in parameters for b in own[2:4]], D)  # [D, 2*G*H]
    inputs = [x, weight_ih, weight_hh, biases, lengths, *states]
    if cell.vectors:  # always after their biases, by name
        place = [cell.vectors.index(name) - len(cell.vectors) for name in PEEPHOLES]
        inputs.append(products.stacked([torch.cat([own[k] for k in place]) for own in parameters]))  # [D, 3*H]
    attributes: dict[str, Any] = {"hidden_size": H, **operator.attributes}
    if D == 2:
        attributes["direction"] = "bidirectional"
    if operator.activations:
        attributes["activations"] = operator.activations * D
    shapes = [(T, D, B, H), *[(D, B, H)] * len(states)]
    dtypes = [x.dtype] * len(shapes)
    found = torch.onnx.ops.symbolic_multi_out(operator.name, inputs, attributes, dtypes=dtypes, shapes=shapes)
    # What stands for the results while the exporter traces is on the CPU.
    output, *finals = (y.to(x.device) for y in found)
    if layout.lengths is not None:  # of a sequence without steps ONNX has zeros
        has_steps = (layout.lengths > 0).unsqueeze(1)
        finals = [torch.where(has_steps, y, s) for y, s in zip(finals, states, strict=True)]
    return output.transpose(1, 2).flatten(2), tuple(finals)


def _by_gate(cell: Cell, tensors: list[Tensor], D: int) -> Tensor:
    """Weights [G * H, I] or biases [G * H] as one tensor [D, ..., I] or [D, ...], by gates in the order of ONNX.

    -i stands for the forget gate that is coupled to i, since sigmoid(-x) = 1 - sigmoid(x). So the node is right in a
    runtime that does not know `input_forget` too. Few operations do this, because an export takes its time for each.
    """
    gates, H = OPERATORS[cell.name].gates, len(tensors[0]) // cell.num_gates
    per_direction = len(tensors) // D
    first = [(k * cell.num_gates + cell.gates.index(g.strip("-"))) * H for k in range(per_direction) for g in gates]
    rows = torch.tensor([row + u for row in first for u in range(H)], device=tensors[0].device)
    joined = torch.cat(tensors).unflatten(0, (D, -1)).index_select(1, rows)
    if "-i" not in gates:
        return joined
    signs = torch.tensor([-1.0 if g == "-i" else 1.0 for g in gates], dtype=joined.dtype, device=joined.device)
    return joined * signs.repeat_interleave(H).repeat(per_direction).view(-1, *[1] * (joined.dim() - 2))


def _scan(
    cell: Cell,
    x: Tensor,
    layout: Layout,
    states: States,
    parameters: list[list[Tensor]],
    projected: bool,
    noise: Noise,
    wants_c_seq: bool,
) -> tuple[Tensor, States, Tensor]:
    """`layer` as one Scan over the steps. The reverse direction goes through reversed rows."""
    D, S = len(states[0]), len(states)
    x, states = x.detach(), tuple(s.detach() for s in states)  # else torch traces the backward of the Scan too
    parameters = [[w.detach() for w in own] for own in parameters]
    weight_hr = [own.pop() for own in parameters] if projected else []
    preact_x = reference.input_part(cell, x, parameters)  # [D, T, B, G*H]
    rows = [_in_order(d, {"x": preact_x[d]} | _masks(layout, x.size(0), d)) for d in range(D)]
    vectors = cell.step_vectors(parameters)
    masks = noise.of_rows(0, 0, 0, x)  # numbers, because this is no training

    def body(*tensors):
        """One step of all directions. Takes the states, rows and weights, and returns the states and results."""
        rest = iter(tensors)
        entering = [tuple(itertools.islice(rest, S)) for _ in range(D)]
        of_step = [dict(zip(own, itertools.islice(rest, len(own)), strict=True)) for own in rows]
        weight_hh, projections = [*itertools.islice(rest, D)], [*itertools.islice(rest, len(weight_hr))] or [None] * D
        own_vectors = [()] * D if vectors is None else [tuple(own) for own in next(rest)]
        leaving, results = [], []
        for own, row, weight, own_vector, projection in zip(
            entering, of_step, weight_hh, own_vectors, projections, strict=True
        ):
            lives = row.get("lives")
            entered = reference.where(~row["cut"], own, 0.0) if "cut" in row else own
            product = reference.product_with(cell, weight)
            now = reference.step(cell, row["x"], entered, product, own_vector, masks, projection)[1]
            leaving += reference.where(lives, now, own)
            results += reference.where(lives, now if wants_c_seq else now[:1], 0.0)
        return *leaving, *(y.clone() for y in results)  # no two results may be one tensor

    found = torch.ops.higher_order.scan(
        body,
        [s[d].clone() for d in range(D) for s in states],
        [x for own in rows for x in own.values()],
        (*(own[1] for own in parameters), *weight_hr, *([] if vectors is None else [vectors])),
    )
    finals, results = found[: D * S], found[D * S :]
    count = len(results) // D
    by_direction = [_in_order(d, dict(enumerate(results[d * count :][:count]))) for d in range(D)]
    output, *cells = (products.joined([own[k] for own in by_direction], -1) for k in range(count))
    finals = tuple(products.stacked([*finals[k::S]]) for k in range(S))
    return output, finals, torch.stack(cells) if cells else output.new_empty(0, *output.shape)


def _in_order(direction: int, tensors: dict[Any, Tensor]) -> dict[Any, Tensor]:
    """Tensors [T, ...] in the order in which a direction visits the steps."""
    return {name: x.flip(0) if direction == 1 else x for name, x in tensors.items()}


def _masks(layout: Layout, T: int, direction: int) -> dict[str, Tensor]:
    """Which sequences have a step, and which enter it with a state of zero, each [T, B, 1] bool."""
    masks = {}
    if layout.lengths is not None:
        masks["lives"] = torch.arange(T, device=layout.lengths.device).unsqueeze(1) < layout.lengths
    if layout.resets is not None:
        cut = layout.resets
        if direction == 1:
            later = cut & masks["lives"] if masks else cut
            cut = torch.cat([later[1:], torch.zeros_like(later[:1])])
        masks["cut"] = cut
    return {name: mask.unsqueeze(2) for name, mask in masks.items()}
