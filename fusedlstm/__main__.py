"""`python -m fusedlstm`: train the demo, say what runs here, explain a plan, measure the best one."""

import argparse
import platform
import sys
from importlib import metadata, util
from pathlib import Path

ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
PLAN_DTYPES = ("fp32", "fp16", "bf16")
LAYERS = {  # by the name of the cell
    "lstm": ("LSTM", {}),
    "gru": ("GRU", {}),
    "rnn_tanh": ("RNN", {"nonlinearity": "tanh"}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
    "peephole": ("PeepholeLSTM", {}),
    "coupled": ("CoupledLSTM", {}),
    "layernorm": ("LayerNormLSTM", {}),
    "slstm": ("SLSTM", {}),
}


def positive(text: str) -> int:
    value = int(text) if text.isascii() and text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return value


def device(text: str) -> str:
    import torch

    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError, ValueError) as error:  # torch built without it, no driver, no such number
        raise argparse.ArgumentTypeError(f"no device {text!r} here: {str(error).splitlines()[0]}") from None
    return text


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(prog="python -m fusedlstm", description=__doc__)
    commands = main.add_subparsers(dest="command", required=True)

    train = commands.add_parser("train", help="train an LSTM on handwritten digits, and time it beside torch.nn.LSTM")
    train.add_argument("--epochs", type=positive, default=50, help="passes over the data (50)")
    train.add_argument("--hidden", type=positive, default=128, help="units (128)")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--backend", choices=("auto", "triton", "torch", "reference"), default="auto")
    train.add_argument("--device", type=device, help="cuda if there is one, else cpu")
    train.add_argument("--out", type=Path, default=Path("out"), help="folder for digits.png (out)")
    train.set_defaults(run=run_train)

    info = commands.add_parser("info", help="versions, devices, and which engine serves them")
    info.set_defaults(run=run_info)

    plan = commands.add_parser("plan", help="how the kernels would run a recurrence, and why; needs no GPU")
    plan.add_argument("--cell", choices=LAYERS, default="lstm")
    plan.add_argument("--hidden", type=positive, required=True)
    plan.add_argument("--batch", type=positive, default=32)
    plan.add_argument("--steps", type=positive, default=100)
    plan.add_argument("--dtype", choices=PLAN_DTYPES, default="fp32")
    plan.add_argument("--arch", choices=ARCHS, default="sm_90")
    plan.add_argument("--directions", type=int, choices=(1, 2), default=1)
    plan.add_argument("--heads", type=positive, default=1, help="blocks of a block-diagonal weight_hh (1)")
    plan.set_defaults(run=run_plan)

    tune = commands.add_parser("tune", help="measure the best plans and cuDNN on this GPU, and keep the choice")
    tune.add_argument("--cell", choices=LAYERS, default="lstm")
    tune.add_argument("--hidden", type=positive, help="units; needed but for --show and --clear")
    tune.add_argument("--batch", type=positive, default=32)
    tune.add_argument("--steps", type=positive, default=100)
    tune.add_argument("--input", type=positive, help="input size (that of --hidden)")
    tune.add_argument("--layers", type=positive, default=1)
    tune.add_argument("--directions", type=int, choices=(1, 2), default=1)
    tune.add_argument("--dtype", choices=PLAN_DTYPES, default="fp32")
    tune.add_argument("--seconds", type=float, default=20.0, help="to measure for (20); compiling comes on top")
    tune.add_argument("--device", type=device, help="cuda if there is one, else cpu")
    tune.add_argument("--show", action="store_true", help="print the choices that are kept, and nothing else")
    tune.add_argument("--clear", action="store_true", help="forget all choices, and nothing else")
    tune.set_defaults(run=run_tune)
    return main


def run_train(args: argparse.Namespace) -> None:
    import torch

    from fusedlstm import engines, train

    where = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        engines.choose(args.backend, torch.device(where), torch.float32)
        args.out.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError, ValueError) as error:
        fail(error)
    settings = train.Settings(
        epochs=args.epochs, hidden_size=args.hidden, seed=args.seed, backend=args.backend, device=where
    )
    try:
        train.run(settings, args.out, say=print)
    except ModuleNotFoundError as error:
        fail(error)


def run_info(args: argparse.Namespace) -> None:
    import torch

    import fusedlstm
    from fusedlstm import engines

    triton = metadata.version("triton") if util.find_spec("triton") else "not installed"
    print(f"fusedlstm {fusedlstm.__version__}, torch {torch.__version__}, triton {triton}, ", end="")
    print(f"Python {platform.python_version()}")
    devices = [("cpu", f"{torch.get_num_threads()} threads")]
    if torch.cuda.is_available():
        devices += [(f"cuda:{k}", torch.cuda.get_device_name(k)) for k in range(torch.cuda.device_count())]
    for name, words in devices:
        print(f"{name} ({words})")
        for dtype in engines.TRITON_DTYPES:
            print(f"  {str(dtype).removeprefix('torch.'):9} {engine_line(torch.device(name), dtype)}")


def engine_line(where, dtype) -> str:
    """What `auto` picks, and why not the kernels."""
    from fusedlstm import engines

    try:
        engine = engines.choose("auto", where, dtype)
    except (RuntimeError, ValueError) as error:  # FUSEDLSTM_BACKEND asks for what cannot be
        return f"error: {error}"
    if engine == "triton":
        return engine
    reason = engines.why_not_triton(where, dtype) or "the kernels serve only when asked for: backend='triton'"
    return f"{engine}: {reason}"


def run_plan(args: argparse.Namespace) -> None:
    from fusedlstm import checks, plan

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
    except (ValueError, NotImplementedError, plan.PlanError) as error:
        fail(error)
    print(text)


def run_tune(args: argparse.Namespace) -> None:
    from fusedlstm import tables
    from fusedlstm.plan import tuned

    try:
        tuned.path()
    except RuntimeError as error:
        fail(error)
    if args.clear:
        print(f"{tuned.path()}: {'removed' if tuned.clear() else 'there was none'}")
        return
    if args.show:
        for place, choices in tuned.everything().items():
            print(f"\n{place}")
            rows = []
            for what, choice in choices.items():
                ms = choice.get("ms", {})
                fastest = min(ms, key=ms.get, default="")
                rows.append((what, fastest, f"{ms[fastest]:.3g}" if ms else ""))
            print(tables.text(["what", "fastest", "ms"], rows))
        if not tuned.everything():
            print(f"{tuned.path()}: no choices")
        return
    if args.hidden is None:
        fail(ValueError("--hidden: expected a number of units (or --show, or --clear)"))
    import torch

    import fusedlstm

    where = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[args.dtype]
    features = args.input or args.hidden
    name, options = LAYERS[args.cell]
    options = {"bidirectional": args.directions == 2, "device": where, "dtype": dtype, **options}
    module = getattr(fusedlstm, name)(features, args.hidden, args.layers, **options)
    input = torch.randn(args.steps, args.batch, features, device=where, dtype=dtype)
    try:
        found = fusedlstm.tune(module, input, seconds=args.seconds)
    except (OSError, RuntimeError, ValueError) as error:
        fail(error)
    for measured in found:
        kind = "engine" if isinstance(measured.what, tuned.Call) else f"plan {measured.what.pass_}"
        print(f"\n{kind}: {measured.chosen} (predicted: {measured.predicted})")
        print(
            tables.text(["tried", "ms"], [[k, f"{v:.3f}"] for k, v in sorted(measured.ms.items(), key=lambda x: x[1])])
        )
    print(f"kept in {tuned.path()}")


def fail(error: Exception) -> None:
    sys.exit(f"python -m fusedlstm: error: {error}")


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main()
