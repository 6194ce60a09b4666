"""Why a vanilla RNN forgets and an LSTM does not: their gradients through time, measured.

A gradient that goes back one step of a vanilla RNN is multiplied by the recurrent weight and the derivative of tanh.
Its length changes by about the spectral radius of the weight per step. So it shrinks or grows like a power of the gap,
and only one radius does neither. In an LSTM no matrix is between the memory c of one step and of the next, but the
forget gate f of each unit. The recurrent weights add other paths, and here more is left than what f keeps. With a bias
b, f is about sigmoid(b), and a larger bias keeps the gradient for longer. So the bias is often 1 or more at first
(Gers et al. 2000; Jozefowicz et al. 2015). Biases that are spread out let the units of one layer remember for different
times, and then the gradient shrinks more slowly than any power (Tallec & Ollivier 2018).

Clipping helps against gradients that grow, and not against those that shrink. `grad_clip` limits every element of the
gradient at every step.

The layers are untrained. Sources: Hochreiter 1991; Bengio et al. 1994; Pascanu et al. 2013.

    python examples/gradient_flow.py
"""

import argparse
import functools
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import fusedlstm
from fusedlstm.inspect import gradient_flow
from fusedlstm.inspect.plots import new_figure

RADII = (0.8, 0.9, 1.0, 1.1)
BIASES = (0.0, 1.0, 3.0)
LIMITS = (None, 1.0, 0.1)
# Okabe and Ito's, which a deficient colour vision tells apart.
COLOURS = ("#D55E00", "#E69F00", "#009E73", "#0072B2")


def rnn_of(radius: float, features: int, units: int) -> fusedlstm.RNN:
    """An RNN whose recurrent weight is orthogonal times `radius`."""
    return fusedlstm.RNN(features, units, bias=False, init=functools.partial(fusedlstm.inits.orthogonal_, gain=radius))


def rnns(gap: int, units: int) -> dict[str, tuple[Tensor, Tensor]]:
    """For each radius, the norm of d h_T / d h_t by the distance, and what is expected, each [gap + 1]."""
    x = 1e-6 * torch.randn(gap + 1, 2, units)  # small, so that tanh is nearly the identity
    powers = torch.arange(gap + 1, dtype=torch.float64)
    return {
        f"radius {radius}": (gradient_flow(rnn_of(radius, units, units), x, probes=16).by_distance("h"), radius**powers)
        for radius in RADII
    }


def lstms(gap: int, units: int) -> dict[str, tuple[Tensor, Tensor]]:
    """For each bias of the forget gate, the norm of d c_T / d c_t, and the product of the forget gates."""
    x = torch.randn(gap + 1, 2, units)
    inits = {f"bias {bias:g}": functools.partial(fusedlstm.inits.forget_bias_, value=bias) for bias in BIASES}
    inits["biases spread out"] = functools.partial(fusedlstm.inits.chrono_, longest=max(2, gap))
    found = {}
    for name, init in inits.items():
        flow = gradient_flow(fusedlstm.LSTM(units, units, init=init), x, probes=16)
        found[name] = (flow.by_distance("c"), flow.by_distance("kept"))
    return found


def clipped(gap: int, units: int) -> dict[str, Tensor]:
    """The length of the gradient of a loss at the last step, for each limit, by the distance, [gap + 1]."""
    found = {}
    for radius, limits in ((RADII[-1], LIMITS), (RADII[0], LIMITS[1:2])):
        rnn, goal = rnn_of(radius, units, units), torch.randn(1, 1, units)
        goal /= goal.norm()
        for limit in limits:
            lengths = [goal.norm()]
            for steps in range(1, gap + 1):
                h = torch.zeros(1, 1, units, requires_grad=True)
                _, h_n = rnn(torch.zeros(steps, 1, units), h, grad_clip=limit)
                (grad,) = torch.autograd.grad((h_n * goal).sum(), h)
                lengths.append(grad.norm())
            limit_text = "no limit" if limit is None else f"limit {limit:g}"
            found[f"radius {radius}, {limit_text}"] = torch.stack(lengths)
    return found


def picture(found_rnns, found_lstms, found_clipped, path: Path) -> None:
    figure = new_figure(12, 3.9)
    panels = figure.subplots(1, 3, sharex=True)
    for panel, found in zip(panels, (found_rnns, found_lstms), strict=False):
        for (name, (norm, expected)), colour in zip(found.items(), COLOURS, strict=True):
            panel.semilogy(norm, color=colour, linewidth=2, label=name)
            panel.semilogy(expected, color="black", linewidth=1, linestyle=(0, (2, 3)))
    panels[0].plot([], [], color="black", linewidth=1, linestyle=(0, (2, 3)), label="radius to the power of the gap")
    panels[1].plot([], [], color="black", linewidth=1, linestyle=(0, (2, 3)), label="product of the forget gates")
    for (name, length), colour in zip(
        found_clipped.items(), (COLOURS[3], "#56B4E9", "#CC79A7", COLOURS[0]), strict=True
    ):
        panels[2].semilogy(length, color=colour, linewidth=2, label=name)
    panels[0].set(title="vanilla RNN: a power of the gap", ylabel=r"norm of $\partial h_T / \partial h_t$")
    panels[1].set(title="LSTM: at least what its forget gates keep", ylabel=r"norm of $\partial c_T / \partial c_t$")
    panels[2].set(title="clipping only stops growth", ylabel=r"length of $\partial\, loss / \partial h_t$")
    for panel in panels:
        panel.set(xlabel="gap, T - t (steps)", ylim=(1e-8, 1e5), xlim=(0, None))
        panel.axhline(1, color="black", linewidth=0.5)
        panel.legend(frameon=False, fontsize=8, loc="upper right" if panel is panels[1] else "lower left")
        panel.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("gap", 100), ("units", 64), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for gradient_flow.png (default: out)")
    args = parser.parse_args(arguments)
    torch.manual_seed(args.seed)
    found_rnns, found_lstms = rnns(args.gap, args.units), lstms(args.gap, args.units)
    found_clipped = clipped(args.gap, args.units)

    gaps = [gap for gap in (1, 10, 50, 100) if gap <= args.gap]
    table = Table(title="What is left of a gradient after a gap")
    table.add_column("layer", no_wrap=True)
    for gap in gaps:
        table.add_column(f"{gap} steps", justify="right")
    for kind, found in (("RNN", found_rnns), ("LSTM", found_lstms)):
        for name, (norm, expected) in found.items():
            table.add_row(f"{kind}, {name}", *(f"{norm[gap]:.2g} ({expected[gap]:.2g})" for gap in gaps))
        table.add_section()
    for name, length in found_clipped.items():
        table.add_row(f"RNN, {name}", *(f"{length[gap]:.2g}" for gap in gaps))
    console = Console()
    console.print(table)
    console.print("In brackets: the radius to the power of the gap, and the product of the forget gates.")
    path = args.out / "gradient_flow.png"
    picture(found_rnns, found_lstms, found_clipped, path)
    console.print(f"picture: {path}")


if __name__ == "__main__":
    main()
