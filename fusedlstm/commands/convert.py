"""Convert weights between PyTorch, ONNX and other libraries.

A file of torch.save or .safetensors is read as `python -m fusedlstm inspect`
does: every recurrent layer in it is found by the names and shapes of its
parameters. An ONNX model gives a layer for every node LSTM, GRU and RNN. With
--from, the file has the weights of another library, by the names that they
have there: a file of torch.save, .safetensors, or numpy.savez (.npz). Several
files, or a name that ends with a number, are the layers of one stack. Names
that end with forward and backward are the two directions of a layer.

The result is a state_dict, which torch.nn and this package can load, or with
--to the weights of another library under the same names. If there is only one
layer, it is written without its name. docs/migrate.md and docs/onnx.md say
what agrees and what does not.
"""

import argparse
import io
import textwrap
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusedlstm import checks, commands, onnx, weights
from fusedlstm.conversion import convert
from fusedlstm.inspect import checkpoint
from fusedlstm.plan.choice import table

EXAMPLES = f"""\
examples:
  python -m fusedlstm convert model.onnx --out lstm.pt
  python -m fusedlstm convert checkpoint.pt --name encoder --out encoder.pt
  python -m fusedlstm convert lstm.pt --to keras.LSTM --out keras.npz
  python -m fusedlstm convert 1.npz 2.npz --from keras.GRU --out gru.pt
      # of two layers, each saved by numpy.savez("1.npz", *layer.get_weights())

kinds:
{textwrap.fill(", ".join(weights.KINDS), 78, initial_indent="  ", subsequent_indent="  ")}"""
DIRECTIONS = ("forward", "backward")


def add_arguments(add: commands.Add) -> None:
    add("files", type=Path, nargs="+", metavar="FILE", help="file of torch, .safetensors, .onnx, or .npz with --from")
    add("--from", dest="kind", choices=weights.KINDS, metavar="KIND", help="kind of layer whose weights the file has")
    add("--to", choices=weights.KINDS, metavar="KIND", help="kind of layer to write (default: a state_dict)")
    commands.add_cell(add, "cell of the layers, where names and shapes leave it open")
    add("--name", help="name of the one layer to convert (default: all)")
    add("--out", type=Path, required=True, help="file to write: .safetensors, .npz, or any other by torch.save")
    add("--force", action="store_true", help="write over a file that exists")
    add("--trust", action="store_true", help="read a file with objects, whose code runs then")


def run(args: argparse.Namespace) -> None:
    try:
        if args.out.suffix == ".onnx":
            text = "--out: expected a file of torch, .safetensors or .npz, got .onnx"
            args.parser.error(text, "torch.onnx.export writes those.")
        with commands.working(f"reading {args.files[0]}"):
            modules = read(args)
        chosen = commands.chosen_layers(args, modules)
        found = [parameters(module, "" if len(chosen) == 1 else name, args.to) for name, module in chosen.items()]
        tensors = {name: tensor for own in found for name, tensor in own.items()}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write(args.out, tensors, args.force)
    except FileExistsError:
        args.parser.error(f"--out: expected a new file, got {args.out}, which exists", "Pass --force to write over it.")
    except (OSError, ValueError, TypeError, RuntimeError, ModuleNotFoundError) as error:
        args.parser.error(str(error), commands.what_next(error))
    rows = [
        (name or "layer", module, f"{sum(p.numel() for p in module.parameters()):,}") for name, module in chosen.items()
    ]
    commands.say(table(["layer", "module", "numbers"], rows))
    first, *_, last = tensors
    what = f"weights of {args.to}" if args.to else "a state_dict"
    commands.say(f"\n{args.out}: {what}, {len(tensors)} arrays from {first} to {last}")


def read(args: argparse.Namespace) -> dict[str, nn.RNNBase]:
    """The layers of the files, by name."""
    first, *more = args.files
    if args.kind:
        return of_kind(args)
    if more:
        raise ValueError(f"expected one file without --from, got {len(args.files)}")
    if first.suffix == ".npz":
        raise ValueError(f"{first}: expected --from with a file of numpy, which does not tell what its arrays are")
    if first.suffix != ".onnx":
        return checkpoint.layers(first, args.cell, args.trust)
    checks.needs("onnx", "onnx")
    from google.protobuf.message import DecodeError

    try:
        return dict(onnx.load(first))
    except DecodeError:
        raise ValueError(f"{first}: expected a model in the ONNX format, got another file") from None


def of_kind(args: argparse.Namespace) -> dict[str, nn.RNNBase]:
    """The layers whose weights are those of another library."""
    kind = weights.KINDS[args.kind]
    recurrent = kind.recurrent().name
    stacks: dict[str, list[Any]] = {}
    for file in args.files:
        arrays = arrays_of(file, args.trust)
        if kind.listed and "arr_0" in arrays:  # numpy's names of a list
            stacks.setdefault("", []).append([*arrays.values()])
            continue
        prefixes = [name.removesuffix(recurrent) for name in arrays if f".{name}".endswith(f".{recurrent}")]
        if not prefixes:
            raise ValueError(f"{file}: expected an array {recurrent} of {args.kind}, got {', '.join(arrays) or 'none'}")
        layers: dict[tuple[str, int], dict[str, dict[str, Tensor]]] = {}
        for prefix in prefixes:
            own = {a.name: arrays[prefix + a.name] for a in kind.arrays if prefix + a.name in arrays}
            *path, _ = prefix.split(".")
            direction = path.pop() if path and path[-1] in DIRECTIONS else ""
            number = int(path.pop()) if path and path[-1].isdigit() else 0
            layers.setdefault((".".join(path), number), {})[direction] = own
        for (name, _), directions in sorted(layers.items()):
            parts = [directions[direction] for direction in ("", *DIRECTIONS) if direction in directions]
            of_list = [array for part in parts for array in part.values()]
            stacks.setdefault(name, []).append(of_list if kind.listed else parts[0] if len(parts) == 1 else parts)
    options: dict[str, Any] = {"nonlinearity": "relu"} if args.cell == "rnn_relu" else {}
    return {name: weights.load(args.kind, *stack, **options) for name, stack in stacks.items()}


def arrays_of(file: Path, trust: bool) -> dict[str, Tensor]:
    """All arrays of a file, by their names with dots."""
    if file.suffix != ".npz":
        found = checkpoint.read(file, trust)
        if isinstance(found, nn.Module):
            found = found.state_dict()
        return dict(weights._leaves(found)) if isinstance(found, Mapping) else {}
    numpy = checks.needs("numpy", "interpret")
    try:
        with numpy.load(file) as archive:
            return {name: torch.from_numpy(archive[name]) for name in archive.files}
    except (ValueError, AttributeError, EOFError, zipfile.BadZipFile):  # pickled objects, one array, nothing, no zip
        raise ValueError(f"{file}: expected a file of numpy.savez with numbers, got another") from None


def parameters(module: nn.RNNBase, name: str, to: str | None) -> dict[str, Tensor]:
    """What to write of a layer."""
    if to is None:
        return {".".join(filter(None, (name, key))): value for key, value in module.state_dict().items()}
    kind, found = weights.KINDS[to], {}
    for number, layer in enumerate(weights.dump(to, convert(module))):  # type: ignore[arg-type]
        if kind.listed:
            parts = [layer[: len(layer) // 2], layer[len(layer) // 2 :]] if module.bidirectional else [layer]
            directions = [dict(zip([a.name for a in kind.arrays], part, strict=False)) for part in parts]
        else:
            directions = [dict(weights._leaves(part)) for part in (layer if module.bidirectional else [layer])]
        for direction, arrays in zip(DIRECTIONS, directions, strict=False):
            path = (name, str(number) * (module.num_layers > 1), direction * bool(module.bidirectional))
            for key, value in arrays.items():
                found[".".join(filter(None, (*path, key)))] = torch.as_tensor(value)
    return found


def write(path: Path, tensors: dict[str, Tensor], force: bool) -> None:
    content = io.BytesIO()  # first, so that nothing is written over by what cannot be written
    if path.suffix == ".npz":
        # NumPy has no bfloat16.
        arrays = {k: (x.float() if x.dtype == torch.bfloat16 else x).numpy() for k, x in tensors.items()}
        checks.needs("numpy", "interpret").savez(content, **arrays)
    elif path.suffix == ".safetensors":
        whole = {k: x.detach().contiguous() for k, x in tensors.items()}
        # Other libraries ask for the format.
        content.write(checks.needs("safetensors.torch", "safetensors").save(whole, {"format": "pt"}))
    else:
        torch.save(tensors, content)
    with path.open("wb" if force else "xb") as file:
        file.write(content.getvalue())
