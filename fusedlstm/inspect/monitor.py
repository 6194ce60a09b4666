"""Log during a training what `fusedlstm.inspect` measures."""

import csv
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from fusedlstm import checks, sequences
from fusedlstm.inspect import measures, plots
from fusedlstm.inspect.measures import Counts, GradientFlow, gradient_flow, place_name
from fusedlstm.products import without_autocast


class Monitor:
    """Logs how saturated the gates of a model are, and how far its gradients reach, every few steps of a training.

    A step is a call of the model in training mode with gradients. On every `every`-th step, beginning with the first,
    the monitor keeps the input of each recurrent layer for a few sequences of the batch. When the model has returned,
    it runs these sequences once more by the specification, and takes the gradients of their last states. The training
    itself does not change, and torch's random generators do not move. The other steps only count.

    Example::

        monitor = fusedlstm.inspect.Monitor(model, "out/monitor", every=100)
        for x, _ in loader:
            model["lstm"](x)[0].sum().backward()
        monitor.close()

    Args:
        model: A module with layers of this package, or LSTMs, GRUs and RNNs of `torch.nn`. It may be such a layer
            itself.
        to: A writer with the methods `add_scalar(tag, value, step)` and perhaps `add_figure(tag, figure, step)`, such
            as `torch.utils.tensorboard.SummaryWriter`. Or the path of a folder, which gets the numbers in
            `scalars.csv` and a PNG for each figure.
        every: The number of steps from one log to the next.
        sequences: The number of sequences of the batch that are looked at.
        probes: The number of random vectors of `gradient_flow`.
        figures: Whether to draw. This needs matplotlib.

    Logs, for every recurrent layer of the model by its name, each of its layers and each direction: the share of units
    and steps at which a gate is below 0.1 (`shut`) and above 0.9 (`open`), the share of units that are idle, and for
    each state the factor per step by which the norm of its gradient changes, and the norm at the first step.

    Raises:
        TypeError: `model` is not a module, or `to` is neither a path nor has `add_scalar`.
        ValueError: The model has no recurrent layer, or a number is less than 1.
        ModuleNotFoundError: matplotlib is missing.
    """

    def __init__(
        self,
        model: nn.Module,
        to: Any,
        *,
        every: int = 100,
        sequences: int = 4,
        probes: int = 8,
        figures: bool = True,
    ) -> None:
        for name, value in (("every", every), ("sequences", sequences), ("probes", probes)):
            checks.at_least_one(name, value)
        self.writer = Folder(to) if isinstance(to, str | Path) else to
        if not callable(getattr(self.writer, "add_scalar", None)):
            raise TypeError(f"to: expected a path or a writer with add_scalar, got {type(to).__name__}")
        self.figures = figures and callable(getattr(self.writer, "add_figure", None))
        if self.figures:
            checks.needs("matplotlib.figure", "demo")
        named = checks.module(model).named_modules()
        # torch.compile calls the model that it holds _orig_mod.
        recurrent = {name: m for name, m in named if isinstance(m, nn.RNNBase)}
        self.layers = {name.replace("_orig_mod", "").strip(".") or "layer": m for name, m in recurrent.items()}
        if not self.layers:
            raise ValueError(f"model: expected one with a recurrent layer, got a {type(model).__name__} without")
        self.every, self.sequences, self.probes = every, sequences, probes
        self.step = 0
        self._calls: dict[str, dict[str, Any]] = {}
        self._temporary: list[Any] = []
        outside = torch.compiler.disable  # called here and not as a decorator, because it imports Dynamo
        self._hooks = [
            model.register_forward_pre_hook(outside(self._before), with_kwargs=True),
            model.register_forward_hook(outside(self._after)),
        ]

    def close(self) -> None:
        """Take the hooks off the model. The writer stays open, because it is yours."""
        self._forget()
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _before(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        if not (model.training and torch.is_grad_enabled()) or self.step % self.every:
            return
        self._forget()  # what a call that ended in an error left
        for name, layer in self.layers.items():
            if layer is model:  # its own hooks are being called already
                self._note(name, layer, args, kwargs)
                continue

            def note(layer: nn.Module, args: tuple, kwargs: dict, name: str = name) -> None:
                self._note(name, layer, args, kwargs)

            hook = torch.compiler.disable(note)
            self._temporary.append(layer.register_forward_pre_hook(hook, with_kwargs=True))

    def _note(self, name: str, layer: Any, args: tuple, kwargs: dict) -> None:
        """Keep the first call of a layer, of a few sequences."""
        if name in self._calls:
            return
        given = dict(zip(("input", "hx"), args, strict=False)) | kwargs
        wanted = ("input", "hx", "lengths", "resets", "padding_side")
        self._calls[name] = _of_some({k: given[k] for k in wanted if given.get(k) is not None}, layer, self.sequences)

    def _after(self, model: nn.Module, args: tuple, output: Any) -> None:
        if not (model.training and torch.is_grad_enabled()):
            return
        due, step = self.step % self.every == 0, self.step
        self.step += 1
        calls = self._forget()
        if due and not calls:
            warnings.warn(
                f"fusedlstm.inspect.Monitor: expected a call of {', '.join(self.layers)} in step {step}, got none, so "
                "there is nothing to log",
                stacklevel=2,
            )
        for name, call in calls.items():
            self._log(name, self.layers[name], call, step)

    def _forget(self) -> dict[str, dict[str, Any]]:
        """Take the hooks off the layers. Returns the calls that they saw."""
        for hook in self._temporary:
            hook.remove()
        calls, self._calls, self._temporary = self._calls, {}, []
        return calls

    def _log(self, name: str, layer: Any, call: dict[str, Any], step: int) -> None:
        counts, flows = Counts(), {}
        with torch.no_grad():
            ours = measures.ours(layer)
            made = measures.call_of(ours, **call)
            with without_autocast(made.x):
                counts.add(made.cell, measures.traces(made))
            if not counts.units:  # all of the sequences are empty
                return
            found = counts.result()
            for place in found.units:
                flows[place] = gradient_flow(layer, **call, layer=place[0], direction=place[1], probes=self.probes)
        for place, units in found.units.items():
            tag = f"{name}/layer {place_name(*place)}"
            for kind, shares in (("shut", units.shut), ("open", units.open), ("units that", units.idle)):
                for what, share in shares.items():
                    self.writer.add_scalar(f"{tag}/{kind} {what}", float(share.double().mean()), step)
            for state in flows[place].norms:
                for what, value in _summary(flows[place], state).items():
                    self.writer.add_scalar(f"{tag}/gradient of {state} {what}", value, step)
        if self.figures:
            by_title = {f"layer {place_name(*place)}": flow for place, flow in flows.items()}
            self.writer.add_figure(f"{name}/gradient flow", plots.plot_gradient_flow(by_title), step)
            self.writer.add_figure(f"{name}/saturation", plots.plot_saturation(found), step)


def _summary(flow: GradientFlow, state: str) -> dict[str, float]:
    norm = flow.by_distance(state)
    return {"per step": flow.per_step(state), "at the first step": float(norm[~norm.isnan()][-1])}


def _of_some(given: dict[str, Any], layer: Any, count: int) -> dict[str, Any]:
    """The arguments of a call of a layer, for the first sequences of its batch."""
    input, hx, first = given["input"], given.get("hx"), layer.batch_first
    if isinstance(input, PackedSequence):
        if (resets := given.get("resets")) is not None:
            given["resets"], _ = pad_packed_sequence(resets, first)
        input, given["lengths"] = sequences.padded_from_packed(input, batch_first=first)
    elif input.is_nested:
        input, given["lengths"] = sequences.padded_from_jagged(input, batch_first=first)
    given["input"] = input.detach()
    if hx is not None:
        given["hx"] = tuple(s.detach() for s in hx) if isinstance(hx, tuple | list) else hx.detach()
    if input.dim() == 2:
        return given

    def few(x: Tensor, axis: int) -> Tensor:
        return x.detach().narrow(axis, 0, min(count, x.size(axis)))

    for name in ("input", "resets"):
        if name in given:
            given[name] = few(given[name], 0 if first else 1)
    if "lengths" in given:
        given["lengths"] = few(torch.as_tensor(given["lengths"]), 0)
    if hx is not None:
        given["hx"] = tuple(few(s, 1) for s in hx) if isinstance(hx, tuple | list) else few(hx, 1)
    return given


class Folder:
    """A writer into a folder: a row of `scalars.csv` for each number, and a PNG for each figure."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        file = self.path / "scalars.csv"
        is_new = not file.exists()
        with file.open("a", newline="") as opened:
            rows = csv.writer(opened)
            rows.writerows([["step", "tag", "value"]] * is_new + [[step, tag, value]])

    def add_figure(self, tag: str, figure: Any, step: int) -> None:
        figure.savefig(self.path / f"{file_name(tag)}-{step:06}.png", dpi=120)


def file_name(text: str) -> str:
    """The text, with a dash in place of what a name of a file should not have."""
    return re.sub(r"[^\w.]+", "-", text).strip("-")
