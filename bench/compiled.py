"""Compare compiled calls with eager ones on a CPU: `python -m bench.compiled`.

A layer and its compiled form run in turns in one process, with the same parameters and input. The extra time is that of
the compiled call less that of the eager one. `torch.compile` itself takes some time in every call, whatever the graph
holds. Two rows show how much: `torch.nn.Linear`, and, beside an eager LSTM, a graph with nothing but its op. A graph of
`torch.nn.LSTM` would break at the layer, which then runs as if it was not compiled, so there is no row of it.
"""

import argparse
import statistics

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import fusedlstm
from fusedlstm import ops, timing

LAYERS = (
    *("LSTM", "GRU", "RNN", "PeepholeLSTM", "CoupledLSTM", "LayerNormLSTM", "LayerNormGRU", "SLSTM"),
    "ResetBeforeGRU",
)
SIZES = [(300, 16, 32, 64), (128, 32, 128, 128), (300, 32, 128, 256)]


class Op(nn.Module):
    """An LSTM as nothing but its op."""

    def __init__(self, lstm: fusedlstm.LSTM) -> None:
        super().__init__()
        self.lstm = lstm

    def forward(self, x):
        h = x.new_zeros(1, x.size(1), self.lstm.hidden_size)
        return ops.onednn_fwd(x, h, h, [*self.lstm.parameters()], False)


OP, LINEAR = "LSTM's op alone", "nn.Linear"


def pair_of(name: str, I: int, H: int) -> tuple[nn.Module, nn.Module]:
    """A module, and what is compiled."""
    module = (nn.Linear if name == LINEAR else getattr(fusedlstm, "LSTM" if name == OP else name))(I, H)
    return module, Op(module) if name == OP else module


def calls_of(eager: nn.Module, compiled: nn.Module, T: int, B: int, I: int, H: int, training: bool) -> dict:
    """A call of each module, the second one compiled, with a backward in training."""
    x, grad = torch.randn(T, B, I), torch.randn(T, B, H)
    parameters = [*eager.parameters()]

    def of(layer):
        def call():
            with torch.set_grad_enabled(training):
                found = layer(x)
            output = found if isinstance(found, torch.Tensor) else found[0]
            if training:
                torch.autograd.grad(output, parameters, grad)

        return call

    return {"eager": of(eager), "compiled": of(torch.compile(compiled))}


def measured(name: str, sizes: tuple[int, int, int, int], training: bool, seconds: float) -> tuple[str, ...]:
    """A line of the table."""
    torch.compiler.reset()
    torch.manual_seed(0)
    calls = calls_of(*pair_of(name, *sizes[2:]), *sizes, training)
    samples = timing.time_cpu(calls, seconds)
    eager, compiled = (statistics.median(samples.ms[side]) for side in ("eager", "compiled"))
    ratio, _, _ = timing.percentiles(timing.ratios(samples, "compiled", "eager"))
    mode = "training" if training else "inference"
    shape = ", ".join(map(str, sizes))
    return name, shape, mode, f"{eager:.2f}", f"{compiled:.2f}", f"{compiled - eager:+.2f}", f"{ratio:.2f}"


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.compiled", description=__doc__.splitlines()[0])
    parser.add_argument("--layer", choices=[LINEAR, OP, *LAYERS], action="append", help="may be repeated; default: all")
    parser.add_argument("--seconds", type=float, default=4.0, help="of rounds, a line (default: %(default)s)")
    options = parser.parse_args(arguments)
    drawn = Table("layer", "T, B, I, H", "mode", "eager ms", "compiled ms", "extra ms", "ratio")
    for name in options.layer or (LINEAR, OP, *LAYERS):
        for sizes in SIZES:
            for training in (True, False):
                drawn.add_row(*measured(name, sizes, training, options.seconds))
    Console(width=120).print(drawn)


if __name__ == "__main__":
    main()
