"""Show gates, idle units and gradients through time of the layers of a file.

The file is a checkpoint of torch.save. It may hold a state_dict, a dictionary
that has one at any depth, or a module. Every recurrent layer in it gets tables
here and pictures in --out. The names and shapes of the parameters tell what
the layers are, and --cell says it where they leave it open.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from fusedlstm import checks, commands, inspect
from fusedlstm.inspect import checkpoint
from fusedlstm.inspect.measures import place_name
from fusedlstm.inspect.monitor import file_name
from fusedlstm.plan.choice import table

DISTANCES = (1, 10, 100)  # steps before the last one, for which the norms are printed
EXAMPLES = """\
examples:
  python -m fusedlstm inspect checkpoint.pt --out pictures
  python -m fusedlstm inspect checkpoint.pt --name encoder.lstm --steps 500
  python -m fusedlstm inspect checkpoint.pt --input batch.pt   # [T, B, I]
  python -m fusedlstm inspect layer.pt --cell coupled"""


def add_arguments(add: commands.Add) -> None:
    positive = commands.positive
    add("checkpoint", type=Path, help="file of torch.save or .safetensors: a state_dict, or what holds one")
    add("--name", help="name of the one layer to look at (default: all)")
    commands.add_cell(add, "cell of the layers, where names and shapes leave it open")
    add("--input", type=Path, help="file of torch.save with an input [T, B, I] or [T, I] (default: random numbers)")
    add("--zeros", action="store_true", help="take zeros in place of random numbers")
    add("--steps", type=positive, default=100, help="number of steps of the random input (default: %(default)s)")
    add("--batch", type=positive, default=4, help="number of sequences of the random input (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of the random input (default: %(default)s)")
    add("--probes", type=positive, default=16, help="random vectors that estimate a norm (default: %(default)s)")
    add("--trust", action="store_true", help="read a file with objects, whose code runs then")
    add("--out", type=Path, default=Path("out"), help="folder for the pictures (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    try:
        checks.needs("matplotlib.figure", "demo")
        with commands.working(f"reading {args.checkpoint}"):
            modules = checkpoint.layers(args.checkpoint, args.cell, args.trust)
        chosen = commands.chosen_layers(args, modules)
        given = None if args.input is None else checkpoint.read(args.input)
        args.out.mkdir(parents=True, exist_ok=True)
        for name, module in chosen.items():
            look_inside(name, module, given, args)
    except (OSError, ValueError, TypeError, RuntimeError, ModuleNotFoundError) as error:
        args.parser.error(str(error), commands.what_next(error))


def look_inside(name: str, module: torch.nn.RNNBase, given: Any, args: argparse.Namespace) -> None:
    """Print the tables of a layer and write its pictures."""
    label, features = name or "layer", module.input_size
    like: Any = {"dtype": module.weight_ih_l0.dtype}
    if given is not None:
        checks.dense("--input", given)
        x, what = given.to(**like), f"the input of {args.input}"
    elif args.zeros:
        x, what = torch.zeros(args.steps, args.batch, features, **like), "zeros"
    else:
        numbers = torch.randn(args.steps, args.batch, features, generator=torch.Generator().manual_seed(args.seed))
        x, what = numbers.to(**like), f"random numbers, seed {args.seed}"
    if x.dim() == 3 and module.batch_first:
        x = x.transpose(0, 1)
    commands.say(f"{label}: {module}, with {what}, {tuple(x.shape)}\n")
    with commands.working(f"gates of {label}"):
        found = inspect.saturation(module, [x])
    commands.say(f"{found}\n")
    flows, rows = {}, []
    for place in found.units:
        which = place_name(*place)
        layer, direction = place
        with commands.working(f"gradients of {label}, layer {which}"):
            trace = inspect.gates(module, x, layer=layer, direction=direction)
            flow = flows[f"layer {which}"] = inspect.gradient_flow(
                module, x, layer=layer, direction=direction, probes=args.probes
            )
            path = save(inspect.plot_gates(trace), args.out, f"{label} layer {which} gates")
        commands.say(f"picture: {path}")
        for state in flow.norms:
            norm = flow.by_distance(state)
            far = [f"{norm[k]:.2g}" if k < len(norm) else "" for k in DISTANCES]
            rows.append((which, state, f"{flow.per_step(state):.3f}", *far))
    commands.say(f"\n{table(['layer', 'gradient of', 'per step', *(f'after {k}' for k in DISTANCES)], rows)}\n")
    with commands.working(f"pictures of {label}"):
        paths = [
            save(inspect.plot_gradient_flow(flows), args.out, f"{label} gradient flow"),
            save(inspect.plot_saturation(found), args.out, f"{label} saturation"),
        ]
    commands.say("\n".join(f"picture: {path}" for path in paths))


def save(figure: Any, folder: Path, name: str) -> Path:
    path = folder / f"{file_name(name)}.png"
    figure.savefig(path, dpi=130)
    return path
