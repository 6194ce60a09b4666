"""The demo: an LSTM learns to read handwritten digits, one pixel per step.

The data are the 1797 digits that come with scikit-learn, so nothing is downloaded. Each has 8 by 8 pixels, which are
read row by row as a sequence of T = 64 steps with I = 1 value.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fusedlstm import checks, engines, inspect
from fusedlstm.modules import LSTM

SIDE = 8  # pixels
CLASSES = 10


class Settings(NamedTuple):
    """How to train. With the defaults the test accuracy reaches 96 % in less than a minute on two cores."""

    epochs: int = 50
    hidden_size: int = 128
    seed: int = 0
    backend: str = "auto"
    device: str = "cpu"
    batch_size: int = 64
    max_lr: float = 0.01
    clip: float = 1.0
    noise: float = 0.1  # standard deviation of the noise on a pixel, where full ink is 1


class Digits(NamedTuple):
    """Sequences of pixels, from 0 (paper) to 1 (ink), and the digits that they show."""

    x: Tensor  # [T, B, 1]
    y: Tensor  # [B]


class Split(NamedTuple):
    train: Digits
    test: Digits


class Curve(NamedTuple):
    """Loss and accuracy, one number per epoch."""

    loss: list[float]  # mean over the epoch's batches
    accuracy: list[float]  # on the test set, 0 to 1


class Race(NamedTuple):
    """The times of the same epochs of training with `fusedlstm.LSTM` and with `torch.nn.LSTM`."""

    fused_ms: float  # median time of an epoch
    torch_ms: float
    loss_difference: float  # largest relative difference between the losses of a step
    epochs: int  # timed, of each


class Classifier(nn.Module):
    """An LSTM reads the sequence, and a linear layer reads the class from its last h.

    Shapes: x is [T, B, 1]. The logits that are returned are [B, 10].
    """

    def __init__(self, lstm: nn.RNNBase) -> None:
        super().__init__()
        self.lstm = lstm
        self.head = nn.Linear(lstm.hidden_size, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        output, _ = self.lstm(x)
        return self.head(output[-1])


def load_digits(device: str = "cpu") -> Split:
    """Load the digits. A quarter of every class is the test set. The split does not depend on the seed."""
    datasets = checks.needs("sklearn.datasets", "demo")
    model_selection = checks.needs("sklearn.model_selection", "demo")
    pixels, labels = datasets.load_digits(return_X_y=True)  # [N, 64], 0 to 16
    parts = model_selection.train_test_split(pixels / 16, labels, test_size=0.25, stratify=labels, random_state=0)
    train_x, test_x, train_y, test_y = (torch.as_tensor(part, device=device) for part in parts)
    return Split(
        *(Digits(x.float().t().unsqueeze(-1).contiguous(), y) for x, y in ((train_x, train_y), (test_x, test_y)))
    )


def build(settings: Settings) -> Classifier:
    """Build a classifier with `fusedlstm.LSTM`. The same seed gives the same weights."""
    torch.manual_seed(settings.seed)
    model = Classifier(LSTM(1, settings.hidden_size, backend=settings.backend))
    H = settings.hidden_size
    with torch.no_grad():
        # torch.nn adds two biases. Together they hold the forget gate open at first, so that gradients do not vanish.
        model.lstm.bias_ih_l0[H : 2 * H] = 1
        model.lstm.bias_hh_l0[H : 2 * H] = 0
    return model.to(settings.device)


def optimizer_of(model: Classifier, settings: Settings, steps: int):
    """Adam, and a one-cycle schedule over the given number of steps."""
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.max_lr)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.max_lr, total_steps=steps)


def batches(digits: Digits, batch_size: int, generator: torch.Generator) -> list[Tensor]:
    """The indices of the batches of one shuffled epoch. Digits that do not fill a batch are left out."""
    N = len(digits.y)
    batch_size = min(batch_size, N)
    order = torch.randperm(N, generator=generator)[: N // batch_size * batch_size]
    return list(order.to(digits.y.device).view(-1, batch_size))


def train_epoch(
    model: Classifier, digits: Digits, order: list[Tensor], optimizer, schedule, settings: Settings
) -> Tensor:
    """Train for one epoch. Returns the loss of every step, [len(order)], without waiting for the device."""
    model.train()
    losses = []
    for index in order:
        x = digits.x[:, index]
        # Every step adds new noise to the pixels. Without it the model learns the 1347 digits by heart.
        logits = model(x + settings.noise * torch.randn_like(x))
        loss = nn.functional.cross_entropy(logits, digits.y[index])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@torch.no_grad()
def accuracy(model: Classifier, digits: Digits) -> float:
    """The share of digits that are read correctly, from 0 to 1."""
    model.eval()
    return (model(digits.x).argmax(-1) == digits.y).float().mean().item()


def fit(data: Split, settings: Settings) -> tuple[Classifier, Curve]:
    """Train with a progress bar. The same seed, device and engine give the same result."""
    tqdm = checks.needs("tqdm", "demo").tqdm
    model = build(settings)
    shuffle = torch.Generator().manual_seed(settings.seed)
    steps = len(batches(data.train, settings.batch_size, torch.Generator()))
    optimizer, schedule = optimizer_of(model, settings, settings.epochs * steps)
    curve = Curve([], [])
    with tqdm(range(settings.epochs), desc="training", unit="epoch") as bar:
        for _ in bar:
            order = batches(data.train, settings.batch_size, shuffle)
            curve.loss.append(train_epoch(model, data.train, order, optimizer, schedule, settings).mean().item())
            curve.accuracy.append(accuracy(model, data.test))
            bar.set_postfix(loss=f"{curve.loss[-1]:.3f}", test=f"{curve.accuracy[-1]:.1%}")
    return model, curve


def race(data: Split, settings: Settings, epochs: int = 5) -> Race:
    """Time an epoch of training with `fusedlstm.LSTM` and with `torch.nn.LSTM`.

    Every epoch starts from the same weights and has the same batches and noise, so the losses of both can be compared
    step by step. The two alternate, and each goes first in every second turn. One epoch of each is not timed, to warm
    up.
    """
    start = build(settings).state_dict()
    order = batches(data.train, settings.batch_size, torch.Generator().manual_seed(settings.seed))
    layers = {
        "fused": LSTM(1, settings.hidden_size, backend=settings.backend),
        "torch": nn.LSTM(1, settings.hidden_size),
    }
    models = {name: Classifier(layer).to(settings.device) for name, layer in layers.items()}

    def timed_epoch(model: Classifier) -> tuple[float, Tensor]:
        model.load_state_dict(start)
        optimizer, schedule = optimizer_of(model, settings, settings.epochs * len(order))
        torch.manual_seed(settings.seed)  # the same noise
        synchronize(settings.device)
        begin = time.perf_counter()
        losses = train_epoch(model, data.train, order, optimizer, schedule, settings)
        synchronize(settings.device)
        return (time.perf_counter() - begin) * 1e3, losses

    losses = {name: timed_epoch(model)[1] for name, model in models.items()}
    times_ms = {name: [] for name in models}
    with checks.needs("tqdm", "demo").tqdm(range(epochs), desc="timing", unit="round") as bar:
        for turn in bar:
            for name in list(models)[:: 1 if turn % 2 == 0 else -1]:
                times_ms[name].append(timed_epoch(models[name])[0])
    difference = ((losses["fused"] - losses["torch"]).abs() / losses["torch"]).max().item()
    return Race(*(statistics.median(times_ms[name]) for name in ("fused", "torch")), difference, epochs)


def synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def picture(model: Classifier, curve: Curve, digits: Digits, path: Path, sample: int = 0) -> None:
    """Save a PNG with the learning curve, one digit, and the gates and states while the model reads it."""
    checks.needs("matplotlib.figure", "demo")
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(13, 10.5), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 2.1))
    loss_axes, accuracy_axes, digit_axes = top.subplots(1, 3, width_ratios=(1.25, 1.25, 1))
    epochs = range(1, len(curve.loss) + 1)
    marker = "o" if len(curve.loss) == 1 else None

    loss_axes.semilogy(epochs, curve.loss, color="tab:blue", marker=marker)
    loss_axes.set(title="training loss", xlabel="epoch", ylabel="cross-entropy (nats)")
    accuracy_axes.plot(epochs, curve.accuracy, color="tab:orange", marker=marker)
    accuracy_axes.set(title=f"test accuracy: {curve.accuracy[-1]:.1%} at the end", xlabel="epoch", ylim=(0, 1.02))
    accuracy_axes.yaxis.set_major_formatter(PercentFormatter(1))
    for axes in (loss_axes, accuracy_axes):
        axes.grid(alpha=0.3)

    x = digits.x[:, sample : sample + 1]
    with torch.no_grad():
        said = model(x).argmax(-1).item()
    digit_axes.imshow(x.view(SIDE, SIDE).cpu().numpy(), cmap="gray_r", vmin=0, vmax=1)
    digit_axes.set(
        title=f"a {digits.y[sample].item()}, read as a {said}",
        xlabel="read left to right, then the next row",
        ylabel="row of pixels",
        xticks=[],
        yticks=range(SIDE),
        yticklabels=range(1, SIDE + 1),
    )

    inspect.plot_gates(inspect.gates(model.lstm, x), figure=bottom, period=SIDE)
    bottom.suptitle(
        f"gates and states while the {x.size(0)} pixels of this digit are read (a tick is the end of a row of pixels)"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def run(settings: Settings, out: Path, say: Callable[[str], None]) -> float:
    """Run the whole demo. Prints the results with `say`, and returns the test accuracy, from 0 to 1."""
    checks.needs("matplotlib.figure", "demo")  # before a minute of training, not after
    engine = engines.choose(settings.backend, torch.device(settings.device), torch.float32)
    data = load_digits(settings.device)
    where = torch.cuda.get_device_name(settings.device) if settings.device.startswith("cuda") else settings.device
    say(f"engine: {engine}, on {where}")
    say(f"digits: {len(data.train.y)} to learn, {len(data.test.y)} to test; LSTM of {settings.hidden_size} units")

    begin = time.perf_counter()
    model, curve = fit(data, settings)
    say(f"test accuracy: {curve.accuracy[-1]:.2%} after {settings.epochs} epochs, {time.perf_counter() - begin:.1f} s")

    result = race(data, settings)
    say(f"time per epoch, median of {result.epochs} in turns, same weights:")
    say(f"  fusedlstm.LSTM  {result.fused_ms:8.1f} ms  ({engine})")
    say(f"  torch.nn.LSTM   {result.torch_ms:8.1f} ms")
    say(f"  largest relative difference between their losses: {result.loss_difference:.1e}")

    path = out / "digits.png"
    picture(model, curve, data.test, path)
    say(f"picture: {path}")
    return curve.accuracy[-1]
