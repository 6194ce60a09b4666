"""Measure the error of every layer against float64, and write the tables of docs/precision.md.

    TRITON_INTERPRET=1 python -m bench.precision --page docs/precision.md

The error of a tensor is the norm of its difference to float64 over the norm of the float64 result. The values of
inputs and parameters are rounded to the dtype first, so that only the arithmetic differs. A row has three numbers: our
kernels, our loop of torch operations, and the layer of `torch.nn` if there is one. Without a GPU, Triton interprets the
kernels.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import fusedlstm
from bench.report import rewrite_block
from fusedlstm.commands import info

STEPS, BATCH, UNITS = 50, 8, 32
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYERS = {
    "LSTM": {},
    "GRU": {},
    "RNN": {},
    "RNN, relu": {"nonlinearity": "relu"},
    "PeepholeLSTM": {},
    "CoupledLSTM": {},
    "LayerNormLSTM": {},
    "LayerNormGRU": {},
    "SLSTM": {},
}


def results(module: nn.RNNBase, x: Tensor, grad: Tensor, **options) -> list[Tensor]:
    """The output, and the gradients of the input and of all parameters."""
    x = x.clone().requires_grad_()
    output = module(x, **options)[0]
    return [output.detach(), *torch.autograd.grad(output, [x, *module.parameters()], grad)]


def errors(found: list[Tensor], exact: list[Tensor]) -> tuple[float, float]:
    """The error of the output, and the largest error of a gradient."""
    each = [((a.double() - e).norm() / e.norm()).item() for a, e in zip(found, exact, strict=True)]
    return each[0], max(each[1:])


def measured(name: str, dtype: torch.dtype, device: str) -> dict[str, tuple[float, float]]:
    """The errors of one layer, by what computed it."""
    torch.manual_seed(0)
    kind, options = name.partition(",")[0], LAYERS[name]
    make = getattr(fusedlstm, kind)
    module = make(UNITS, UNITS, **options).to(device, dtype)
    x, grad = torch.randn(2, STEPS, BATCH, UNITS, device=device).to(dtype)

    def run(found: nn.RNNBase, dtype: torch.dtype = dtype, **more) -> list[Tensor]:
        found = found.to(device, dtype)
        found.load_state_dict(module.state_dict())
        return results(found, x.to(dtype), grad.to(dtype), **more)

    def ours(backend: str, **more) -> nn.RNNBase:
        return make(UNITS, UNITS, **options, backend=backend, **more)

    torchs = getattr(nn, kind)(UNITS, UNITS, **options) if hasattr(nn, kind) else ours("reference")
    # A limit that nothing reaches makes the loop compute the call, where ATen could.
    runs = {"kernels": ours("triton"), "loop": ours("torch", grad_clip=1e30), "torch": torchs}
    exact = run(ours("reference"), torch.float64)
    return {each: errors(run(found), exact) for each, found in runs.items()}


def tables(device: str) -> str:
    """Two tables in Markdown, and a line about the machine."""
    rows = {(name, dtype): measured(name, dtype, device) for name in LAYERS for dtype in DTYPES}
    text = []
    for k, title in enumerate(("Forward: the output", "Backward: the largest error of a gradient")):
        text += [f"**{title}**", "", "| layer | dtype | kernels | loop | torch |", "|---|---|---:|---:|---:|"]
        for (name, dtype), found in rows.items():
            numbers = [f"{each[k]:.1e}" for each in found.values()]
            text.append(f"| {' | '.join([name, str(dtype).removeprefix('torch.'), *numbers])} |")
        text.append("")
    where = torch.cuda.get_device_name() if device == "cuda" else f"{info.cpu()}, kernels interpreted"
    sizes = f"T {STEPS}, B {BATCH}, I and H {UNITS}, one layer, seed 0"
    return "\n".join([*text, f"{sizes}; {where}; torch {torch.__version__}; `make precision`."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", type=Path, help="write the tables between the marks of this page")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.allow_tf32 = False  # the IEEE form of float32 products
    text = tables(device)
    print(text)
    if args.page:
        rewrite_block(args.page, "precision", text)


if __name__ == "__main__":
    main()
