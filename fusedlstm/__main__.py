"""Train a demo model, describe this machine, explain how the kernels would run a layer, tune them on a GPU, or look
inside of the layers of a file.
"""

import argparse
import importlib
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
from torch.utils import collect_env

import fusedlstm
from fusedlstm import cells, checks, engines, inspect, plan, train
from fusedlstm.inspect import checkpoint
from fusedlstm.inspect.measures import place_name
from fusedlstm.inspect.monitor import file_name
from fusedlstm.plan import tuned
from fusedlstm.plan.choice import table

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DISTANCES = (1, 10, 100)  # steps before the last one, at which `inspect` prints the norms


class Parser(argparse.ArgumentParser):
    """A parser whose errors have two lines: the first says what is wrong, the second says what to do next."""

    def error(self, message: str, then: str = "") -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n{then or f'{self.prog} --help lists what it takes.'}\n")


def positive(text: str) -> int:
    value = int(text) if text.isascii() and text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return value


def device(text: str) -> str:
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError, ValueError) as error:  # torch built without it, no driver, no such number
        raise argparse.ArgumentTypeError(f"no device {text!r} here: {str(error).splitlines()[0]}") from None
    return text


def parser() -> Parser:
    main = Parser(prog="python -m fusedlstm", description=__doc__)
    main.add_argument("--version", action="version", version=f"fusedlstm {fusedlstm.__version__}")
    commands = main.add_subparsers(dest="command", required=True)

    def command(name: str, run: Callable, help: str) -> Callable:
        made = commands.add_parser(name, help=help, description=help)
        made.set_defaults(run=run, parser=made)
        return made.add_argument

    here = "cuda" if torch.cuda.is_available() else "cpu"
    where = {"type": device, "default": here, "help": "cpu, cuda or a GPU such as cuda:1 (default here: %(default)s)"}

    add = command(
        "train", run_train, "Train a model that reads handwritten digits, and compare its time with torch.nn."
    )
    add("--epochs", type=positive, default=50, help="number of passes over the data (default: %(default)s)")
    add("--hidden", type=positive, default=128, help="number of hidden units (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of the weights, batches and noise (default: %(default)s)")
    add("--backend", choices=engines.BACKENDS, default="auto", help="engine of the LSTM (default: %(default)s)")
    add("--device", **where)
    add("--out", type=Path, default=Path("out"), help="folder for digits.png (default: %(default)s)")

    command("info", run_info, "Print versions, devices and settings for a bug report, and which engine runs here.")

    def add_layer(add: Callable) -> None:
        """The arguments that `plan` and `tune` share."""
        add(
            "--cell",
            choices=[*cells.CELLS],
            default=next(iter(cells.CELLS)),
            help="name of the cell (default: %(default)s)",
        )
        add("--batch", type=positive, default=32, help="number of sequences (default: %(default)s)")
        add("--steps", type=positive, default=100, help="number of steps per sequence (default: %(default)s)")
        add("--dtype", choices=DTYPES, default="fp32", help="dtype of input and weights (default: %(default)s)")
        add(
            "--directions",
            type=int,
            choices=(1, 2),
            default=1,
            help="1, or 2 for a bidirectional layer (default: %(default)s)",
        )

    add = command("plan", run_plan, "Explain how the kernels would run a layer, and why. This needs no GPU.")
    add("--hidden", type=positive, required=True, help="number of hidden units (required)")
    add_layer(add)
    add("--heads", type=positive, default=1, help="number of heads (default: %(default)s)")
    add("--arch", default="sm_90", help="GPU, such as h100, a100, 4090, l4, mi300x or sm_89 (default: %(default)s)")

    add = command("tune", run_tune, "Measure the best plans and cuDNN on this GPU, and store the fastest.")
    add("--hidden", type=positive, help="number of hidden units (required, except with --show and --clear)")
    add_layer(add)
    add("--input", type=positive, help="number of input features (default: that of --hidden)")
    add("--layers", type=positive, default=1, help="number of layers (default: %(default)s)")
    add("--seconds", type=float, default=20.0, help="time to measure, without compiling (default: %(default)s)")
    add("--device", **where)
    add("--show", action="store_true", help="only print the stored choices")
    add("--clear", action="store_true", help="only delete all stored choices")

    add = command("inspect", run_inspect, "Show gates, idle units and gradients through time of the layers of a file.")
    add("checkpoint", type=Path, help="file of torch.save: a state_dict, a dictionary with one, or a module")
    add("--name", help="name of the one layer to look at (default: all)")
    add("--cell", choices=[*cells.CELLS], help="cell of the layers, where names and shapes leave it open")
    add("--input", type=Path, help="file of torch.save with an input [T, B, I] or [T, I] (default: random numbers)")
    add("--zeros", action="store_true", help="take zeros in place of random numbers")
    add("--steps", type=positive, default=100, help="number of steps of the random input (default: %(default)s)")
    add("--batch", type=positive, default=4, help="number of sequences of the random input (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of the random input (default: %(default)s)")
    add("--probes", type=positive, default=16, help="random vectors that estimate a norm (default: %(default)s)")
    add("--trust", action="store_true", help="read a file with objects, whose code runs then")
    add("--out", type=Path, default=Path("out"), help="folder for the pictures (default: %(default)s)")
    return main


def run_train(args: argparse.Namespace) -> None:
    try:
        engines.choose(args.backend, torch.device(args.device), torch.float32)
    except (RuntimeError, ValueError) as error:
        args.parser.error(
            str(error), "--backend auto takes what serves here; python -m fusedlstm info says what that is."
        )
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        args.parser.error(f"--out: {error}", "Name another folder by --out.")
    settings = train.Settings(
        epochs=args.epochs, hidden_size=args.hidden, seed=args.seed, backend=args.backend, device=args.device
    )
    try:
        train.run(settings, args.out, say=print)
    except ModuleNotFoundError as error:
        args.parser.error(str(error), "Install it and run the same command again.")


def run_info(args: argparse.Namespace) -> None:
    for name, ask in facts().items():
        print(f"{name:14} {told(ask)}")
    print("engine         that backend='auto' takes for a default layer")
    for where in ["cpu", *(f"cuda:{k}" for k in gpus())]:
        by_line: dict[str, list[str]] = {}
        for name, dtype in DTYPES.items():
            line = told(lambda where=where, dtype=dtype: engine_line(torch.device(where), dtype))
            by_line.setdefault(line, []).append(name)
        for line, names in by_line.items():
            print(f"  {where}, {', '.join(names)}: {line}")


def facts() -> dict[str, Callable[[], object]]:
    """The facts of a bug report, each with a function that finds it out."""
    return {
        "fusedlstm": lambda: fusedlstm.__version__,
        "Python": platform.python_version,
        "torch": lambda: f"{torch.__version__}, {built_for()}",
        "Triton": lambda: version("triton"),
        "numpy": lambda: version("numpy"),
        "platform": platform.platform,
        "threads": torch.get_num_threads,
        **{f"cuda:{k}": lambda k=k: gpu(k) for k in gpus()},
        **({} if gpus() else {"GPU": lambda: "none that torch can use"}),
        "driver": lambda: collect_env.get_nvidia_driver_version(collect_env.run) or "no NVIDIA driver found",
        "cuDNN": cudnn,
        "environment": environment,
        "tuning file": tuning_file,
    }


def told(ask: Callable[[], object]) -> str:
    """The answer, or the error, because people write a report when something is broken."""
    try:
        return str(ask())
    except Exception as error:
        return f"unknown, {type(error).__name__}: {error}"


def built_for() -> str:
    if torch.version.hip:
        return f"HIP {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA and HIP"


def version(package: str) -> str:
    try:
        return importlib.import_module(package).__version__
    except ModuleNotFoundError:
        return "not installed"


def gpus() -> range:
    """The indices of the GPUs that torch can use."""
    return range(torch.cuda.device_count() if torch.cuda.is_available() else 0)


def gpu(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    kind = properties.gcnArchName if torch.version.hip else f"compute capability {properties.major}.{properties.minor}"
    return f"{properties.name}, {kind}, {properties.multi_processor_count} multiprocessors"


def cudnn() -> str:
    if not torch.backends.cudnn.is_available():
        return "none in this torch"
    return f"{torch.backends.cudnn.version()}, {'enabled' if torch.backends.cudnn.enabled else 'switched off'}"


def environment() -> str:
    names = sorted(name for name in os.environ if name.startswith("FUSEDLSTM_") or name == "TRITON_INTERPRET")
    return " ".join(f"{name}={os.environ[name]}" for name in names) or "no FUSEDLSTM_* and no TRITON_INTERPRET"


def tuning_file() -> str:
    kept = tuned.everything()
    places = {tuned.words(tuned.place(k)) for k in gpus() or [None]}
    return f"{tuned.path()}, {sum(len(kept.get(place, {})) for place in places)} choices for this machine"


def engine_line(where: torch.device, dtype: torch.dtype) -> str:
    """The engine that `auto` chooses, and why."""
    try:
        engine, why = engines.choice("auto", where, dtype)
    except (RuntimeError, ValueError) as error:  # FUSEDLSTM_BACKEND asks for what cannot be
        return f"error: {error}"
    return f"{engine}: {why}"


def run_plan(args: argparse.Namespace) -> None:
    try:
        checks.num_heads(args.heads, args.hidden)
        text = plan.explain(
            hidden=args.hidden,
            batch=args.batch,
            steps=args.steps,
            dtype=args.dtype,
            arch=args.arch,
            directions=args.directions,
            heads=args.heads,
            cell=args.cell,
        )
    except plan.PlanError as error:
        args.parser.error(str(error), "Fewer hidden units, or another --arch, may fit.")
    except (ValueError, RuntimeError, NotImplementedError) as error:
        args.parser.error(str(error))
    print(text)


def run_tune(args: argparse.Namespace) -> None:
    try:
        file = tuned.path()
    except RuntimeError as error:
        args.parser.error(str(error), "Set FUSEDLSTM_CACHE to a folder that you can write to.")
    if args.clear:
        print(f"{file}: {'removed' if tuned.clear() else 'there was none'}")
    elif args.show:
        print(kept_choices() or f"{file}: no choices")
    elif args.hidden is None:
        args.parser.error("--hidden: expected a number of units, got none", "Or ask for --show or --clear.")
    else:
        measure(args)
        print(f"kept in {file}")


def kept_choices() -> str:
    text = []
    for place, choices in tuned.everything().items():
        rows = []
        for what, choice in choices.items():
            ms = choice.get("ms", {})
            fastest = min(ms, key=ms.get, default="")
            rows.append((what, fastest, f"{ms[fastest]:.3g}" if ms else ""))
        text.append(f"{place}\n{table(['what', 'fastest', 'ms'], rows)}")
    return "\n\n".join(text)


def measure(args: argparse.Namespace) -> None:
    """Tune a module with random weights and input, and print what was found."""

    class Layers(fusedlstm.Recurrent):
        cell = args.cell

    features, like = args.input or args.hidden, {"device": args.device, "dtype": DTYPES[args.dtype]}
    try:
        module = Layers(features, args.hidden, args.layers, bidirectional=args.directions == 2, **like)
        found = fusedlstm.tune(module, torch.randn(args.steps, args.batch, features, **like), seconds=args.seconds)
    except (OSError, RuntimeError, ValueError) as error:
        args.parser.error(str(error), "python -m fusedlstm plan shows the plans without a GPU.")
    for measured in found:
        kind = "engine" if isinstance(measured.what, tuned.Call) else f"plan {measured.what.pass_}"
        print(f"\n{kind}: {measured.chosen} (predicted: {measured.predicted})")
        rows = [(name, f"{ms:.3f}") for name, ms in sorted(measured.ms.items(), key=lambda item: item[1])]
        print(table(["tried", "ms"], rows))


def run_inspect(args: argparse.Namespace) -> None:
    try:
        checks.needs("matplotlib.figure", "demo")
        modules = checkpoint.layers(args.checkpoint, args.cell, args.trust)
        chosen = {name: module for name, module in modules.items() if args.name in (None, name)}
        if not chosen:
            args.parser.error(f"--name: expected one of {', '.join(modules)}, got {args.name!r}")
        given = None if args.input is None else checkpoint.read(args.input)
        args.out.mkdir(parents=True, exist_ok=True)
        for name, module in chosen.items():
            look_inside(name, module, given, args)
    except (OSError, ValueError, TypeError, RuntimeError, ModuleNotFoundError) as error:
        text = " ".join(str(error).split())
        then = "Pass --trust if you trust whoever made the file." if "objects whose code runs" in text else ""
        args.parser.error(text, then)


def look_inside(name: str, module: torch.nn.RNNBase, given: object, args: argparse.Namespace) -> None:
    """Print the tables of a layer and write its pictures."""
    label, features = name or "layer", module.input_size
    like = {"dtype": module._flat_weights[0].dtype}
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
    print(f"{label}: {module}, with {what}, {tuple(x.shape)}\n")
    found = inspect.saturation(module, [x])
    print(f"{found}\n")
    flows, rows = {}, []
    for place in found.units:
        which = place_name(*place)
        layer, direction = place
        trace = inspect.gates(module, x, layer=layer, direction=direction)
        save(inspect.plot_gates(trace), args.out, f"{label} layer {which} gates")
        flow = flows[f"layer {which}"] = inspect.gradient_flow(
            module, x, layer=layer, direction=direction, probes=args.probes
        )
        for state in flow.norms:
            norm = flow.by_distance(state)
            far = [f"{norm[k]:.2g}" if k < len(norm) else "" for k in DISTANCES]
            rows.append((which, state, f"{flow.per_step(state):.3f}", *far))
    print(table(["layer", "gradient of", "per step", *(f"after {k}" for k in DISTANCES)], rows))
    print()
    save(inspect.plot_gradient_flow(flows), args.out, f"{label} gradient flow")
    save(inspect.plot_saturation(found), args.out, f"{label} saturation")


def save(figure, folder: Path, name: str) -> None:
    path = folder / f"{file_name(name)}.png"
    figure.savefig(path, dpi=130)
    print(f"picture: {path}")


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main()
