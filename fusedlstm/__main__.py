"""`python -m fusedlstm`: train the demo, say what runs here, explain a plan."""

import argparse
import platform
import sys
from importlib import metadata, util
from pathlib import Path

ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
PLAN_DTYPES = ("fp32", "fp16", "bf16")


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
    plan.add_argument("--hidden", type=positive, required=True)
    plan.add_argument("--batch", type=positive, default=32)
    plan.add_argument("--steps", type=positive, default=100)
    plan.add_argument("--dtype", choices=PLAN_DTYPES, default="fp32")
    plan.add_argument("--arch", choices=ARCHS, default="sm_90")
    plan.add_argument("--directions", type=int, choices=(1, 2), default=1)
    plan.set_defaults(run=run_plan)
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
    from fusedlstm import plan

    try:
        text = plan.explain(
            hidden=args.hidden,
            batch=args.batch,
            steps=args.steps,
            dtype=args.dtype,
            arch=args.arch,
            directions=args.directions,
        )
    except (ValueError, NotImplementedError) as error:
        fail(error)
    print(text)


def fail(error: Exception) -> None:
    sys.exit(f"python -m fusedlstm: error: {error}")


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main()
