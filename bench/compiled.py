"""Compare compiled calls with eager ones on a CPU: `python -m bench.compiled`.

A layer and its compiled form run in turns in one process, with the same parameters and input. The extra time is that of
the compiled call less that of the eager one. `torch.compile` itself takes some time in every call, whatever the graph
holds: the row of `torch.nn.Linear` shows how much. A graph of `torch.nn.LSTM` would break at the layer, which then runs
as if it was not compiled, so there is no row of it.
"""

import argparse
import statistics

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import fusedlstm
from fusedlstm import timing

LAYERS = (
    *("LSTM", "GRU", "RNN", "PeepholeLSTM", "CoupledLSTM", "LayerNormLSTM", "LayerNormGRU", "SLSTM"),
    "ResetBeforeGRU",
)
SIZES = [(300, 16, 32, 64), (128, 32, 128, 128)]


def calls_of(module: nn.Module, T: int, B: int, I: int, H: int, training: bool) -> dict:
    """A call of the module and of its compiled form, with a backward in training."""
    x, grad = torch.randn(T, B, I), torch.randn(T, B, H)
    parameters = [*module.parameters()]

    def of(layer):
        def call():
            with torch.set_grad_enabled(training):
                found = layer(x)
            output = found if isinstance(found, torch.Tensor) else found[0]
            if training:
                torch.autograd.grad(output, parameters, grad)

        return call

    return {"eager": of(module), "compiled": of(torch.compile(module))}


def measured(name: str, sizes: tuple[int, int, int, int], training: bool, seconds: float) -> tuple[str, ...]:
    """A line of the table."""
    torch.compiler.reset()
    torch.manual_seed(0)
    module = (nn.Linear if name == "nn.Linear" else getattr(fusedlstm, name))(*sizes[2:])
    samples = timing.time_cpu(calls_of(module, *sizes, training), seconds)
    eager, compiled = (statistics.median(samples.ms[side]) for side in ("eager", "compiled"))
    ratio, _, _ = timing.percentiles(timing.ratios(samples, "compiled", "eager"))
    mode = "training" if training else "inference"
    shape = ", ".join(map(str, sizes))
    return name, shape, mode, f"{eager:.2f}", f"{compiled:.2f}", f"{compiled - eager:+.2f}", f"{ratio:.2f}"


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.compiled", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--layer", choices=["nn.Linear", *LAYERS], action="append", help="may be repeated; default: all"
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="of rounds, a line (default: %(default)s)")
    options = parser.parse_args(arguments)
    drawn = Table("layer", "T, B, I, H", "mode", "eager ms", "compiled ms", "extra ms", "ratio")
    for name in options.layer or ("nn.Linear", *LAYERS):
        for sizes in SIZES:
            for training in (True, False):
                drawn.add_row(*measured(name, sizes, training, options.seconds))
    Console(width=120).print(drawn)


if __name__ == "__main__":
    main()
