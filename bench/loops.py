"""Time the loops on a CPU: `python -m bench.loops`.

Every cell's layer runs on the engine "torch" as a module runs it, forward and backward. The rival of a GRU and of a
vanilla RNN is ATen's layer. The rival of the other cells is a loop of torch operations under autograd, in which the
input product is taken before the loop. It has two forms:

- "as written" is the loop as people usually write it. Step t is `preact_x[t] + linear(h, weight_hh)`.
- "careful" uses `unbind` on `preact_x`, because the gradient of indexing is slow, and adds within the product.

The row of the LSTM shows what a loop costs beside oneDNN, which runs the whole layer. By default an LSTM runs there.

Weights and input are the same on all sides. All gradients are compared first. Then all run in rounds
(`fusedlstm.timing`).

A block of 31 MB is freed first, for all sides. glibc returns the free end of the heap to the system if it is more than
twice the largest block freed so far, and later every page of it costs a fault. Without this block the order of the
cases would decide who pays for the faults. A process that trains has freed such a block, with its data or weights.
"""

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench import report, rows
from fusedlstm import timing
from fusedlstm.commands.bench import loop

RESULTS = Path(__file__).parent / "results" / "cpu.csv"
FREED_BEFORE = 31 << 20  # bytes; from 32 MB on glibc asks the system for every block, and learns nothing from it

CASES = {
    "gru": [(512, 1, 64), (128, 32, 128), (32, 64, 512)],
    "rnn_tanh": [(512, 1, 64), (128, 32, 128), (32, 64, 512)],
    "rnn_relu": [(512, 1, 64), (128, 32, 128), (32, 64, 512)],
    "peephole": [(128, 32, 128)],
    "coupled": [(128, 32, 128)],
    "layernorm": [(128, 32, 128)],
    "lstm": [(128, 32, 128)],
}


def rivals(cell: str, parameters: list) -> dict:
    """Functions of x [T, B, I] that give h of every step: torch.nn's layer, else loops as users write them."""
    of_aten = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "rnn_tanh": torch.nn.RNN, "rnn_relu": torch.nn.RNN}
    if cell in of_aten:
        options = {"nonlinearity": "relu"} if cell == "rnn_relu" else {}
        module = of_aten[cell](parameters[0].size(1), parameters[1].size(1), **options)
        names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
        for name, p in zip(names, parameters, strict=True):
            setattr(module, name, p)
        return {f"torch.nn.{module._get_name()}": lambda x: module(x)[0]}
    return {name: loop(cell, parameters, indexed=name == "as written") for name in ("careful", "as written")}


def calls_of(cell: str, T: int, B: int, H: int) -> dict:
    """All sides, forward and backward; each gives all gradients."""
    from fusedlstm import autograd, cells, functional

    of, bound = cells.CELLS[cell], H**-0.5
    torch.manual_seed(0)
    shapes = [(of.num_gates * H, H)] * 2 + [(of.num_gates * H,)] * 2
    shapes += [(blocks * H,) for blocks in of.vector_blocks.values()]
    parameters = [torch.nn.Parameter(torch.empty(shape).uniform_(-bound, bound)) for shape in shapes]
    x, grad = torch.randn(T, B, H, requires_grad=True), torch.randn(T, B, H)
    states = tuple(torch.zeros(1, B, H) for _ in of.states)

    def both(forward):
        return lambda: torch.autograd.grad(forward(x), [x, *parameters], grad)

    def as_module(x):
        return functional.run(functional.Spec(of, backend="torch"), x, states, parameters)[0]

    def as_loop(x):
        return autograd.layer(of, x, states, [parameters], "torch")[0]

    calls = {name: both(rival) for name, rival in rivals(cell, parameters).items()}
    return calls | {"ours": both(as_loop if cell == "lstm" else as_module)}


def measured(cell: str, T: int, B: int, H: int, seconds: float) -> list[rows.Row]:
    """Rows of one case: milliseconds of every side, and how many times ours is as fast as each rival."""
    from bench import environment, registry

    calls = calls_of(cell, T, B, H)
    *names, _ = calls
    for name in names:
        for ours, exact in zip(calls["ours"](), calls[name](), strict=True):
            assert registry.relative_error(ours, exact) < 1e-3, (cell, T, B, H, name)
    samples = timing.time_cpu(calls | {report.AGAIN: calls[names[0]]}, seconds)
    row = {
        "op": "lstm (loop)" if cell == "lstm" else cell,
        "mode": "fwdbwd",
        "shape": f"{cell}-{T}-{B}-{H}",
        "layers": "1",
        "directions": "1",
    }
    row |= {"T": str(T), "B": str(B), "I": str(H), "H": str(H), "dtype": "float32", "date": environment.today()}
    threads = environment.threads(torch.get_num_threads())
    row |= environment.facts("cpu") | {"protocol": f"{samples.protocol} {threads}"}

    def of(provider: str, metric: str, unit: str, values: list[float]) -> rows.Row:
        p50, p20, p80 = (f"{x:.5g}" for x in timing.percentiles(values))
        return row | {"provider": provider, "metric": metric, "unit": unit, "p50": p50, "p20": p20, "p80": p80}

    latencies = [of(name, "latency", "ms", samples.ms[name]) for name in (*names, "ours")]
    ratios = [of("ours", f"speedup over {name}", "x", timing.ratios(samples, name, "ours")) for name in names]
    noise = of(report.AGAIN, f"speedup over {names[0]}", "x", timing.ratios(samples, names[0], report.AGAIN))
    return [*latencies, *ratios, noise]


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.loops", description=__doc__.splitlines()[0])
    parser.add_argument("--cell", choices=CASES, action="append", help="may be repeated; default: all")
    parser.add_argument("--seconds", type=float, default=8.0, help="of rounds, a case (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="CSV file (default: bench/results/cpu.csv)")
    options = parser.parse_args(arguments)
    torch.empty(FREED_BEFORE, dtype=torch.uint8)  # and freed
    writer = rows.Writer(options.out)
    drawn = Table(*report.family([])[0])
    for cell in options.cell or CASES:
        for T, B, H in CASES[cell]:
            found = measured(cell, T, B, H, options.seconds)
            for row in found:
                writer.write(row)
            for line in report.family(found)[1]:
                drawn.add_row(*line)
    writer.close()
    Console(width=120).print(drawn)


if __name__ == "__main__":
    main()
