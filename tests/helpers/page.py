"""Writes out and imports the files of docs/add_a_cell.md, and computes the results of a layer of that cell."""

import contextlib
import importlib
import re
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

from fusedlstm import cells
from fusedlstm.cells.cell import EQUATIONS

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "add_a_cell.md").read_text()
FILES = dict(re.findall(r"^`(\w+\.py)`\n\n```python\n(.*?)^```", TEXT, re.S | re.M))

LENGTHS = [3, 5, 0, 2]
SEQUENCES = ("dense", "packed", "lengths, resets")


@contextlib.contextmanager
def forgotten():
    """Cells that are registered inside are not known afterwards."""
    kernels = importlib.import_module("fusedlstm.kernels.cells")
    tables = (cells.CELLS, EQUATIONS, kernels.STEPS)
    before = [dict(table) for table in tables]
    try:
        yield
    finally:
        for table, known in zip(tables, before, strict=True):
            table.clear()
            table.update(known)


@contextlib.contextmanager
def imported(folder: Path):
    """The module `ugrnn`, imported as a user would from `folder`, where all files of the page are."""
    for name, code in FILES.items():
        (folder / name).write_text(code)
    sys.path.insert(0, str(folder))
    with forgotten():
        try:
            yield importlib.import_module("ugrnn")
        finally:
            sys.path.remove(str(folder))
            for name in FILES:
                sys.modules.pop(name.removesuffix(".py"), None)


def outcome(layer, sequence: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Results and every gradient of a layer; the values are rounded to `dtype`, and the same for every engine."""
    generator = torch.Generator().manual_seed(3)
    T, B, like = max(LENGTHS), len(LENGTHS), layer.weight_hh_l0
    directions = 2 if layer.bidirectional else 1

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).to(like)

    x, h_0 = randn(T, B, layer.input_size), randn(layer.num_layers * directions, B, layer.hidden_size)
    resets = (torch.rand(T, B, generator=generator) < 0.3).to(like.device)
    x.requires_grad_(), h_0.requires_grad_()
    input, masks = x, {}
    if sequence == "packed":
        input = pack_padded_sequence(x, [max(n, 1) for n in LENGTHS], enforce_sorted=False)
    elif sequence != "dense":
        masks = {"lengths": torch.tensor(LENGTHS), "resets": resets}
    torch.manual_seed(4)
    output, h_n = layer(input, h_0, **masks)
    results = [output.data if sequence == "packed" else output, h_n]
    leaves = {"input": x, "h_0": h_0, **dict(layer.named_parameters())}
    found = torch.autograd.grad(results, [*leaves.values()], [randn(*y.shape) for y in results])
    named = zip(("output", "h_n", *(f"grad of {name}" for name in leaves)), [*results, *found], strict=True)
    return {name: y.detach() for name, y in named}
