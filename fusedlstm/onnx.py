"""Layers from ONNX models. The other way is `torch.onnx.export`, which takes every layer of this package.

docs/onnx.md tells both. `load` needs the package onnx: pip install ".[onnx]".
"""

import os
from typing import Any

import torch
from torch import Tensor

from fusedlstm import checks
from fusedlstm.base import Recurrent
from fusedlstm.cells import CELLS, Cell
from fusedlstm.engines.onnx import OPERATORS, PEEPHOLES
from fusedlstm.modules import GRU, LSTM, RNN, CoupledLSTM, PeepholeLSTM, ResetBeforeGRU

_CLASSES: dict[str, type[Recurrent]] = {
    "lstm": LSTM,
    "peephole": PeepholeLSTM,
    "coupled": CoupledLSTM,
    "gru": GRU,
    "gru_reset_before": ResetBeforeGRU,
    "rnn_tanh": RNN,
    "rnn_relu": RNN,
}
_ACTIVATIONS = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh"), "RNN": ("Tanh",)}


def load(model: Any) -> dict[str, Recurrent]:
    """Build a layer for every node LSTM, GRU and RNN of an ONNX model.

    Example::

        program = torch.onnx.export(lstm.eval(), (torch.randn(5, 3, 10),), dynamo=True)
        (loaded,) = fusedlstm.onnx.load(program.model_proto).values()
        output, (h_n, c_n) = loaded(torch.randn(5, 3, 10))

    Args:
        model: The path of a file, its bytes, or an `onnx.ModelProto`. Every weight must follow from constants of the
            model.

    Returns:
        For every node a module with its weights, on the CPU, in the dtype of the weights. The key is the name of the
        node, or that of its first output if it has none. The order is that of the nodes. An LSTM becomes a
        `PeepholeLSTM` if P is not zero, a `CoupledLSTM` if `input_forget` is 1, and otherwise an `LSTM`. A GRU becomes
        a `GRU` if `linear_before_reset` is 1, and otherwise a `ResetBeforeGRU`. `layout=1` becomes `batch_first`. Nodes
        inside of other nodes are not looked at.

    The call: X is `input`, and Y [T, D, B, H] is `output` [T, B, D * H]. `initial_h` and `initial_c` are `hx`, each
        [D, B, H]. `sequence_lens` is `lengths`. For a sequence of length 0 the final states of the module are the
        initial ones, and those of ONNX are zero.

    Raises:
        ModuleNotFoundError: The package onnx is not installed.
        TypeError: `model` is none of the three.
        ValueError: There is no such node, or no layer of this package computes what a node does. The text names the
            attribute or input.
    """
    onnx = checks.needs("onnx", "onnx")
    if isinstance(model, (str, os.PathLike)):
        model = onnx.load(model)
    elif isinstance(model, bytes):
        model = onnx.load_model_from_string(model)
    elif not isinstance(model, onnx.ModelProto):
        raise TypeError(f"model: expected a path, bytes or an onnx.ModelProto, got {type(model).__name__}")
    nodes = [n for n in model.graph.node if n.op_type in _ACTIVATIONS and n.domain in ("", "ai.onnx")]
    if not nodes:
        raise ValueError("model: expected a node LSTM, GRU or RNN in its graph, got none")
    return {name: _layer(model, node, name) for node in nodes for name in [node.name or node.output[0]]}


def _layer(model: Any, node: Any, name: str) -> Recurrent:
    onnx = checks.needs("onnx", "onnx")
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    attributes = {k: _text(v) for k, v in attributes.items()}
    inputs = dict(zip(_input_names(node.op_type), node.input, strict=False))
    wanted = [inputs[k] for k in ("W", "R", "B", "P") if inputs.get(k)]
    values = _constants(model, name, wanted)
    W, R, B, P = (values.get(inputs.get(k, "")) for k in ("W", "R", "B", "P"))
    assert W is not None and R is not None  # the checker of ONNX asks for them
    cell = _cell(name, node.op_type, attributes, P is not None and bool(P.any()), len(W))
    options: dict[str, Any] = {"nonlinearity": "relu"} if cell == "rnn_relu" else {}
    module = _CLASSES[cell](
        W.size(2),
        R.size(2),
        bias=B is not None,
        batch_first=attributes.get("layout", 0) == 1,
        bidirectional=len(W) == 2,
        dtype=W.dtype,
        **options,
    )
    _fill(module, W, R, B, P)
    return module


def _input_names(operator: str) -> tuple[str, ...]:
    states = ("initial_h", "initial_c", "P") if operator == "LSTM" else ("initial_h",)
    return ("X", "W", "R", "B", "sequence_lens", *states)


def _text(value: Any) -> Any:
    """An attribute with str in place of bytes."""
    if isinstance(value, list):
        return [_text(v) for v in value]
    return value.decode() if isinstance(value, bytes) else value


def _cell(name: str, operator: str, attributes: dict[str, Any], has_peepholes: bool, directions: int) -> str:
    """The name of the cell that computes what a node does."""

    def refuse(attribute: str, expected: str, came: Any) -> None:
        raise ValueError(f"{name}: expected the attribute {attribute} of {operator} to be {expected}, got {came}")

    if (direction := attributes.get("direction", "forward")) == "reverse":
        refuse("direction", "forward or bidirectional", f"{direction}; flip the input and output of a forward one")
    if "clip" in attributes:
        refuse("clip", "absent", f"{attributes['clip']:g}, which limits the preactivations")
    came = attributes.get("activations", [*_ACTIVATIONS[operator]] * directions)
    first = came[: len(_ACTIVATIONS[operator])]
    allowed = [_ACTIVATIONS[operator], ("Relu",)] if operator == "RNN" else [_ACTIVATIONS[operator]]
    if tuple(first) not in allowed or came != first * directions:
        refuse("activations", " or ".join(str([*a]) for a in allowed) + " in every direction", came)
    if operator == "RNN":
        return f"rnn_{first[0].lower()}"
    if operator == "GRU":
        return "gru" if attributes.get("linear_before_reset", 0) else "gru_reset_before"
    if attributes.get("input_forget", 0):
        if has_peepholes:
            refuse("input_forget", "0 with peepholes (input P)", attributes["input_forget"])
        return "coupled"
    return "peephole" if has_peepholes else "lstm"


def _fill(module: Recurrent, W: Tensor, R: Tensor, B: Tensor | None, P: Tensor | None) -> None:
    """Copy the inputs of a node, [D, ...], into the parameters of a module."""
    cell = CELLS[module.cell]
    with torch.no_grad():
        for d, suffix in enumerate(("", "_reverse")[: len(W)]):
            weights = {"weight_ih": W[d], "weight_hh": R[d]}
            if B is not None:
                weights["bias_ih"], weights["bias_hh"] = B[d].chunk(2)
            parameters = {k: _our_rows(cell, w) for k, w in weights.items()}
            if cell.vectors:
                assert P is not None  # else it were another cell
                parameters |= dict(zip(PEEPHOLES, P[d].chunk(3), strict=True))
            for k, value in parameters.items():
                getattr(module, f"{k}_l0{suffix}").copy_(value)


def _our_rows(cell: Cell, x: Tensor) -> Tensor:
    """The reverse of what the export does to the rows of a weight or bias."""
    by_gate = dict(zip(OPERATORS[cell.name].gates, x.chunk(len(OPERATORS[cell.name].gates)), strict=True))
    return torch.cat([by_gate[g] for g in cell.gates])


def _constants(model: Any, name: str, wanted: list[str]) -> dict[str, Tensor]:
    """The values of tensors that follow from constants of the model. torch's exporter computes weights in the graph."""
    onnx = checks.needs("onnx", "onnx")
    makers = {output: node for node in model.graph.node for output in node.output}
    initializers = {i.name: i for i in model.graph.initializer}
    needed, nodes, pending = {}, {}, [*wanted]
    while pending:
        tensor = pending.pop()
        if tensor in initializers:
            needed[tensor] = initializers[tensor]
        elif tensor in makers:
            nodes[id(makers[tensor])] = makers[tensor]
            pending += [t for t in makers[tensor].input if t and t not in needed]
        else:
            raise ValueError(f"{name}: expected weights that follow from constants, got the model's input {tensor!r}")
    values = {k: onnx.numpy_helper.to_array(t) for k, t in needed.items()}
    if nodes:
        in_order = [node for node in model.graph.node if id(node) in nodes]
        outputs = [onnx.helper.make_empty_tensor_value_info(t) for t in wanted]
        graph = onnx.helper.make_graph(in_order, "weights", [], outputs, [*needed.values()])
        part = onnx.helper.make_model(graph, opset_imports=model.opset_import, functions=model.functions)
        evaluator = checks.needs("onnx.reference", "onnx").ReferenceEvaluator(part)
        values = dict(zip(wanted, evaluator.run(None, {}), strict=True))
    return {k: _tensor(values[k]) for k in wanted}


def _tensor(array: Any) -> Tensor:
    if str(array.dtype) == "bfloat16":  # of the package ml_dtypes, which torch does not know
        return torch.from_numpy(array.astype("float32")).bfloat16()
    return torch.from_numpy(array.copy())
