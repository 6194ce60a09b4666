"""An LSTM in NumPy, forward and backward, which learns to write down its own equations.

The text below is those equations. From the first character of a line, the network must write the rest of that line.
`forward` is the text itself. `backward` is the chain rule, applied to `forward` from its last line to its first.

`fusedlstm.LSTM` gets the same weights. Its output, its final state and all of its gradients are compared with those of
NumPy. Then both are trained. The losses agree up to rounding, and both networks write the four lines without a fault
after 300 updates. In float64, expect differences below 1e-14. It takes a few seconds.

    python examples/numpy_lstm.py
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from numpy import exp, tanh
from rich.console import Console
from rich.table import Table
from torch import nn
from tqdm import trange

import fusedlstm
from fusedlstm.inspect.plots import new_figure

TEXT = """\
i, f, o = sigmoid(W x + U h + b)
g = tanh(W x + U h + b)
c = f * c + i * g
h = o * tanh(c)
"""
ALPHABET = sorted({*TEXT})  # V characters

# T steps, B sequences, I inputs, H hidden units. The rows of W and U and of the bias are the gates i, f, g, o.


def sigmoid(x):
    return 1 / (1 + exp(-x))


def forward(x, h, c, W, U, b):
    """From x [T, B, I] and the state h, c [B, H] to every h [T, B, H], and what the backward needs.

    W is [4H, I], U is [4H, H], and b is [4H].
    """
    output, kept = [], []
    for x_t in x:  # [B, I]
        preact = x_t @ W.T + h @ U.T + b  # [B, 4H]
        i, f, g, o = np.split(preact, 4, axis=1)  # each [B, H]
        i, f, g, o = sigmoid(i), sigmoid(f), tanh(g), sigmoid(o)
        kept.append((x_t, h, c, i, f, g, o))
        c = f * c + i * g  # the memory: kept in part, and added to
        h = o * tanh(c)  # what is shown of it
        output.append(h)
    return np.stack(output), c, kept


def backward(d_output, dh, dc, kept, W, U):
    """From the gradients of a loss with respect to every output [T, B, H] and to the last h and c [B, H] to all others.

    d stands for the gradient of the loss: dh is [B, H] as h is.
    """
    dW, dU, db, dx = np.zeros_like(W), np.zeros_like(U), np.zeros(len(W), W.dtype), []
    for dh_t, (x_t, h, c, i, f, g, o) in zip(d_output[::-1], kept[::-1], strict=True):  # h and c are those before
        # h_t reaches the loss as the output of this step, and through all later steps.
        dh = dh + dh_t
        # h_t = o * tanh(c_t), and tanh' = 1 - tanh^2. c_t also reaches the loss through c_{t+1}, by dc.
        tanh_c = tanh(f * c + i * g)
        do = dh * tanh_c
        dc = dc + dh * o * (1 - tanh_c**2)
        # c_t = f * c + i * g, of which each factor gets the other one.
        di, df, dg = dc * g, dc * c, dc * i
        # sigmoid' = sigmoid * (1 - sigmoid)
        d_preact = np.concatenate([di * i * (1 - i), df * f * (1 - f), dg * (1 - g**2), do * o * (1 - o)], axis=1)
        # preact = x_t W^T + h U^T + b. Every step has the same W, U and b, so their gradients add up.
        dW += d_preact.T @ x_t  # [4H, B] [B, I]
        dU += d_preact.T @ h  # [4H, B] [B, H]
        db += d_preact.sum(0)
        dx.append(d_preact @ W)  # [B, 4H] [4H, I]
        # To the step before: through U for h, and through f alone for c. No matrix is in that path: the LSTM's idea.
        dh, dc = d_preact @ U, dc * f
    return np.stack(dx[::-1]), dh, dc, dW, dU, db


def cross_entropy(logits, goal):
    """The mean loss of logits [T, B, V] against characters [T, B], and its gradient."""
    p = exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    right = np.eye(len(ALPHABET))[goal]  # [T, B, V]
    return -np.log((p * right).sum(-1)).mean(), (p - right) / goal.size


def loss_and_gradients(parameters, x, goal):
    """The loss of the network, and its gradient for each parameter: W, U, b of the LSTM, then V [V, H], a [V]."""
    W, U, b, V, a = parameters
    state = np.zeros((x.shape[1], U.shape[1]))
    output, _, kept = forward(x, state, state, W, U, b)
    loss, d_logits = cross_entropy(output @ V.T + a, goal)
    *_, dW, dU, db = backward(d_logits @ V, state, state, kept, W, U)
    return loss, [dW, dU, db, np.einsum("tbv,tbh->vh", d_logits, output), d_logits.sum((0, 1))]


def adam(parameters, gradients, moments, step, rate):
    """One step of Adam (Kingma & Ba 2015), in place."""
    for parameter, gradient, (m, v) in zip(parameters, gradients, moments, strict=True):
        m += 0.1 * (gradient - m)
        v += 0.001 * (gradient**2 - v)
        parameter -= rate * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)


def text_as_numbers():
    """One-hot characters [T, B, V], and at each step the character that follows, [T, B]. Lines end in newlines."""
    lines = TEXT.splitlines()
    T = max(map(len, lines))
    codes = np.array([[ALPHABET.index(letter) for letter in line.ljust(T + 1, "\n")] for line in lines]).T
    return np.eye(len(ALPHABET))[codes[:-1]], codes[1:]


def write(parameters, letter):
    """The line that begins with this character, as the network continues it."""
    W, U, b, V, a = parameters
    line, h, c = letter, np.zeros((1, U.shape[1])), np.zeros((1, U.shape[1]))
    while len(line) < len(TEXT) and letter != "\n":
        x = np.eye(len(ALPHABET))[[[ALPHABET.index(letter)]]]  # [1, 1, V]
        output, c, _ = forward(x, h, c, W, U, b)
        h = output[-1]
        letter = ALPHABET[(h @ V.T + a).argmax()]
        line += letter
    return line


def network(units, dtype, device):
    """The layers of fusedlstm and torch. The gates have one bias, so the second one of torch's layout is zero."""
    lstm, head = fusedlstm.LSTM(len(ALPHABET), units), nn.Linear(units, len(ALPHABET))
    nn.init.zeros_(lstm.bias_hh_l0).requires_grad_(False)
    return nn.ModuleList([lstm, head]).to(device, dtype)


def differences(units, dtype, device, seed):
    """For each result: its shape, its largest value, and the largest difference between fusedlstm and NumPy."""
    torch.manual_seed(seed)
    lstm, _ = network(units, dtype, device)
    x = torch.as_tensor(text_as_numbers()[0]).to(device, dtype).requires_grad_()
    h_0, c_0 = (torch.randn(1, x.size(1), units, dtype=dtype, device=device, requires_grad=True) for _ in range(2))
    output, (_, c_n) = lstm(x, (h_0, c_0))
    d_output, d_c = torch.randn_like(output), torch.randn_like(c_n)
    inputs = [x, h_0, c_0, lstm.weight_ih_l0, lstm.weight_hh_l0, lstm.bias_ih_l0]
    ours = [output, c_n, *torch.autograd.grad([output, c_n], inputs, [d_output, d_c])]

    x, h, c, W, U, b, d_output, d_c = (t.detach().cpu().double().numpy() for t in (*inputs, d_output, d_c))
    output, c_n, kept = forward(x, h[0], c[0], W, U, b)
    by_hand = [output, c_n, *backward(d_output, np.zeros_like(h[0]), d_c[0], kept, W, U)]
    names = ("output", "c_n", *(f"gradient of {name}" for name in ("x", "h_0", "c_0", "W", "U", "b")))
    return {
        name: (n.shape, np.abs(n).max(), np.abs(t.detach().cpu().numpy().reshape(n.shape) - n).max())
        for name, t, n in zip(names, ours, by_hand, strict=True)
    }


def train(units, updates, rate, device, seed):
    """Train both from the same weights. Returns the losses of both [updates, 2], and the parameters in NumPy."""
    torch.manual_seed(seed)
    lstm, head = network(units, torch.float64, device)
    tensors = [lstm.weight_ih_l0, lstm.weight_hh_l0, lstm.bias_ih_l0, head.weight, head.bias]
    parameters = [t.detach().cpu().numpy().copy() for t in tensors]
    moments = [(np.zeros_like(p), np.zeros_like(p)) for p in parameters]
    optimizer = torch.optim.Adam(tensors, rate)
    x, goal = text_as_numbers()
    torch_x, torch_goal = (torch.as_tensor(array, device=device) for array in (x, goal))
    losses = []
    for step in trange(1, updates + 1, desc="updates", leave=False, disable=None):
        loss, gradients = loss_and_gradients(parameters, x, goal)
        adam(parameters, gradients, moments, step, rate)
        logits = head(lstm(torch_x)[0])
        torch_loss = nn.functional.cross_entropy(logits.flatten(0, 1), torch_goal.flatten())
        optimizer.zero_grad()
        torch_loss.backward()
        optimizer.step()
        losses.append((loss, torch_loss.item()))
    return np.array(losses), parameters


def picture(losses, parameters, path):
    """The losses, and what the cells hold while the network reads the first line."""
    W, U, b, _, _ = parameters
    x, _ = text_as_numbers()
    line = TEXT.splitlines()[0]
    _, _, kept = forward(x[:, :1], np.zeros((1, U.shape[1])), np.zeros((1, U.shape[1])), W, U, b)
    figure = new_figure(12, 4)
    curve, heat = figure.subplots(1, 2, width_ratios=(1, 1.8))
    curve.semilogy(losses[:, 0], color="#0072B2", linewidth=5, alpha=0.4, label="NumPy")
    curve.semilogy(losses[:, 1], color="#D55E00", linewidth=1.2, label="fusedlstm")
    curve.set(title="the same loss, update by update", xlabel="update", ylabel="loss (nats per character)")
    curve.legend(frameon=False)
    curve.spines[["top", "right"]].set_visible(False)
    forget = np.concatenate([f for _, _, _, _, f, _, _ in kept])  # [T, H]
    order = forget.mean(0).argsort()
    image = heat.imshow(forget.T[order], aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    heat.set_xticks(range(len(line)), line, family="monospace")
    heat.set(title="forget gate of each unit at each character", ylabel="unit, by how much it keeps")
    figure.colorbar(image, ax=heat, pad=0.01)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("units", 32), ("updates", 300), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--rate", type=float, default=1e-2, help="learning rate of Adam (default: 0.01)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of fusedlstm's side")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for numpy_lstm.png (default: out)")
    args = parser.parse_args(arguments)
    console = Console()
    table = Table(title=f"fusedlstm on {args.device} against NumPy in float64, largest difference")
    for name in ("result", "shape", "largest value", "float64", "float32"):
        table.add_column(name, justify="left" if name == "result" else "right", no_wrap=True)
    double, single = (
        differences(args.units, dtype, args.device, args.seed) for dtype in (torch.float64, torch.float32)
    )
    for name, (shape, largest, apart) in double.items():
        table.add_row(name, str([*shape]), f"{largest:.3g}", f"{apart:.1e}", f"{single[name][-1]:.1e}")
    console.print(table)

    losses, parameters = train(args.units, args.updates, args.rate, args.device, args.seed)
    for update in sorted({0, args.updates // 10, args.updates - 1}):
        console.print(f"update {update + 1}: loss {losses[update, 0]:.6f} NumPy, {losses[update, 1]:.6f} fusedlstm")
    console.print(f"The losses of {args.updates} updates are at most {np.abs(np.diff(losses)).max():.1e} apart.")
    written = "".join(write(parameters, line[0]) for line in TEXT.splitlines())
    console.print(f"Written from the first characters ({'all' if written == TEXT else 'not all'} right):\n")
    console.print(written, markup=False, highlight=False)
    path = args.out / "numpy_lstm.png"
    picture(losses, parameters, path)
    console.print(f"picture: {path}")


if __name__ == "__main__":
    main()
