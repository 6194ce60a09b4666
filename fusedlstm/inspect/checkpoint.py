"""Find the recurrent layers of a file of `torch.save` or of safetensors."""

import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusedlstm import checks
from fusedlstm.base import Recurrent
from fusedlstm.cells import CELLS, PARAMETERS
from fusedlstm.modules import (
    GRU,
    LSTM,
    RNN,
    SLSTM,
    CoupledLSTM,
    LayerNormGRU,
    LayerNormLSTM,
    PeepholeLSTM,
    ResetBeforeGRU,
)

_NAME = re.compile(r"(?P<layer>(?:.*\.)?)(?P<parameter>\w+)_l(?P<number>\d+)(?P<reverse>_reverse)?")
_CLASSES: dict[str, type[Recurrent]] = {
    made.cell: made
    for made in (LSTM, GRU, PeepholeLSTM, CoupledLSTM, SLSTM, LayerNormLSTM, ResetBeforeGRU, LayerNormGRU)
}


def layers(path: str | Path, cell: str | None = None, trust: bool = False) -> dict[str, nn.RNNBase]:
    """Return the recurrent layers of a file, by their names.

    Args:
        path: A file that `torch.save` wrote: a state_dict, a dictionary that has one at any depth, or a module. Or a
            file of safetensors with a state_dict, whose name ends with .safetensors.
        cell: The name of the cell, for a state_dict. The names and shapes of parameters leave open whether a layer is
            an LSTM or an SLSTM, which of both GRUs or a coupled LSTM, and which nonlinearity an RNN has. Without a
            name, the layer is an LSTM, a GRU, or an RNN with tanh. With heads, a name is needed.
        trust: Whether a file may run code when it is read. A module needs this, and a state_dict does not.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is no such file, or has no recurrent layer, or its shapes are not those of the cell.
    """
    found = read(path, trust)
    if isinstance(found, nn.Module):
        modules = {name: m for name, m in found.named_modules() if isinstance(m, nn.RNNBase)}
    else:
        modules = dict(_of_tensors(found, cell))
    if not modules:
        raise ValueError(f"{path}: expected a recurrent layer, got none: no parameter is named weight_ih_l0")
    return modules


def read(path: str | Path, trust: bool = False) -> Any:
    """Return what a file of `torch.save` or of safetensors holds. The errors are those of `layers`."""
    if Path(path).suffix == ".safetensors":
        return _safetensors(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=not trust)
    except (pickle.UnpicklingError, RuntimeError, EOFError, AttributeError, ImportError, KeyError) as error:
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            raise ValueError(f"{path}: expected tensors, got objects whose code runs when they are read") from None
        if isinstance(error, AttributeError | ImportError):
            raise ValueError(f"{path}: expected objects whose code is here, got others: {error}") from None
        raise ValueError(f"{path}: expected a file of torch.save, got one that torch cannot read") from None


def _safetensors(path: str | Path) -> dict[str, Tensor]:
    library = checks.needs("safetensors.torch", "safetensors")
    try:
        return library.load(Path(path).read_bytes())
    except checks.needs("safetensors", "safetensors").SafetensorError as error:
        raise ValueError(f"{path}: expected a file of safetensors, got another: {error}") from None


def _of_tensors(found: Any, cell: str | None) -> Iterator[tuple[str, nn.RNNBase]]:
    """The layers of nested dictionaries."""
    if not isinstance(found, Mapping):
        return
    own: dict[str, dict[str, Tensor]] = {}
    for key, value in found.items():
        if isinstance(value, Tensor) and (match := _NAME.fullmatch(str(key))):
            own.setdefault(match["layer"].rstrip("."), {})[str(key)[len(match["layer"]) :]] = value
        else:
            yield from _of_tensors(value, cell)
    for name, parameters in own.items():
        if "weight_ih_l0" in parameters and "weight_hh_l0" in parameters:
            yield name, _layer(name or "the layer", parameters, cell)


def _layer(name: str, parameters: dict[str, Tensor], cell: str | None) -> nn.RNNBase:
    places = [_NAME.fullmatch(key) for key in parameters]
    names = {place["parameter"] for place in places if place}
    rows, input_size = parameters["weight_ih_l0"].shape
    columns = parameters["weight_hh_l0"].size(1)
    proj_size = columns if "weight_hr" in names else 0
    vectors = names - {*PARAMETERS}
    fits = {
        known: rows // of.num_gates
        for known, of in CELLS.items()
        if {*of.vectors} == vectors and rows % of.num_gates == 0 and cell in (None, known)
    }
    dense = [known for known, size in fits.items() if proj_size or size == columns]
    if not dense and cell is None:
        raise ValueError(
            f"{name}: expected the shapes of a cell without heads, got weight_ih_l0 [{rows}, {input_size}] and "
            f"weight_hh_l0 [{rows}, {columns}]; --cell names a cell with heads"
        )
    chosen = dense[0] if dense else cell
    if chosen not in fits or (fits[chosen] % columns and not proj_size):
        raise ValueError(
            f"{name}: expected the parameters of the cell {cell}, got weight_ih_l0 [{rows}, {input_size}], "
            f"weight_hh_l0 [{rows}, {columns}]{', ' if vectors else ''}{', '.join(sorted(vectors))}"
        )
    hidden_size = fits[chosen]
    options = {
        "num_layers": 1 + max(int(place["number"]) for place in places if place),
        "bias": "bias_ih" in names,
        "bidirectional": any(place["reverse"] for place in places if place),
        "dtype": parameters["weight_ih_l0"].dtype,
    }
    if not proj_size:
        options["num_heads"] = hidden_size // columns
    module = made(chosen, input_size, hidden_size, proj_size, **options)
    try:
        module.load_state_dict(parameters)
    except RuntimeError as error:
        text = str(error).splitlines()[-1].strip()
        raise ValueError(f"{name}: expected the parameters of the cell {chosen}: {text}") from None
    return module


def made(cell: str, input_size: int, hidden_size: int, proj_size: int = 0, **options: Any) -> Recurrent:
    """Build a layer of any cell, a user's own too. The options are those of the constructor."""
    if cell.startswith("rnn_"):
        return RNN(input_size, hidden_size, nonlinearity=cell.removeprefix("rnn_"), **options)
    if proj_size:
        options["proj_size"] = proj_size

    class Layers(Recurrent): ...

    Layers.cell = cell
    return _CLASSES.get(cell, Layers)(input_size, hidden_size, **options)
