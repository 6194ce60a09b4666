"""Choices that were measured on this machine (`fusedlstm.tune`): the file that keeps them, and the look-up.

The file is `tuning.json` in `$FUSEDLSTM_CACHE`, or in `fusedlstm/` of the user's cache folder. A choice counts only on the
device and with the versions on and with which it was measured (`Place`), and for the very sizes. `FUSEDLSTM_TUNING=0` looks
nothing up. A file that cannot be read, or a choice that no longer fits, is ignored with one warning.
"""

import contextlib
import functools
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

FORMAT = 1


class Problem(NamedTuple):
    """What a plan is for; T is no part of it."""

    cell: str
    batch: int
    hidden: int
    dtype: str  # "fp32", "fp16" or "bf16"
    directions: int  # or layers of a stack
    pass_: str
    precision: str
    layout: str
    heads: int = 1
    stack: bool = False


class Call(NamedTuple):
    """What an engine is chosen for: a whole stack; T is no part of it."""

    cell: str
    batch: int
    input_size: int
    hidden: int
    proj_size: int
    layers: int
    directions: int
    dtype: str
    precision: str
    layout: str
    training: bool  # a backward will follow


class Place(NamedTuple):
    """Where a choice was measured."""

    device: str
    num_sms: int
    driver: str  # CUDA or HIP of torch, of the driver where torch tells it, and cuDNN
    torch: str
    triton: str
    fusedlstm: str


# What of a plan is stored: enough to find it among the candidates again.
FIELDS = ("schedule", "block_b", "block_h", "block_k", "protocol", "transposed", "split", "num_warps", "stages")

_generation = 1  # of what is known of the file: part of the keys of whoever keeps what was looked up
_warned: set[str] = set()


def generation() -> int:
    """Changes with every change of the choices by this process; 0 if they are to be ignored."""
    return 0 if os.environ.get("FUSEDLSTM_TUNING") == "0" else _generation


def path() -> Path:
    """The file of all choices."""
    if folder := os.environ.get("FUSEDLSTM_CACHE"):
        return Path(folder) / "tuning.json"
    folder = os.environ.get("XDG_CACHE_HOME") or (os.environ.get("LOCALAPPDATA") if sys.platform == "win32" else None)
    return (Path(folder) if folder else Path.home() / ".cache") / "fusedlstm" / "tuning.json"


@functools.cache
def place(index: int | None) -> Place:
    """Of a device by its index; None is the interpreter."""
    from importlib import metadata, util

    import torch

    import fusedlstm

    triton = metadata.version("triton") if util.find_spec("triton") else "none"
    versions = (torch.__version__, triton, fusedlstm.__version__)
    if index is None:
        return Place("interpreter", 0, "none", *versions)
    properties = torch.cuda.get_device_properties(index)
    driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: "unknown")()
    words = f"{torch.version.cuda or torch.version.hip}, driver {driver}, cudnn {torch.backends.cudnn.version()}"
    return Place(properties.name, properties.multi_processor_count, words, *versions)


def find(where: Place, what: Problem | Call) -> dict | None:
    """The stored choice, or None."""
    return _table(path(), _generation).get(_words(where), {}).get(_words(what))


def store(where: Place, choices: dict) -> Path:
    """Add choices, `{problem or call: dict of JSON}`, to the file; what is there of others stays. Returns the file."""
    file = path()
    file.parent.mkdir(parents=True, exist_ok=True)
    forget()
    table = {place: dict(known) for place, known in _table(file, _generation).items()}
    table.setdefault(_words(where), {}).update({_words(what): choice for what, choice in choices.items()})
    # Beside the file and then in its place: a reader sees the old one or the new one.
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=".tuning-", suffix=".json")
    try:
        with os.fdopen(handle, "w") as out:
            json.dump({"format": FORMAT, "choices": table}, out, indent=1)
        os.replace(name, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    forget()
    return file


def clear() -> bool:
    """Remove the file; whether there was one."""
    forget()
    try:
        path().unlink()
    except FileNotFoundError:
        return False
    return True


def forget() -> None:
    """Read the file again at the next look-up."""
    global _generation
    _generation += 1
    _table.cache_clear()


def everything() -> dict[str, dict[str, dict]]:
    """All choices of all places, as stored: `{place: {problem or call: choice}}`, in words."""
    return _table(path(), _generation)


def plan(problem: Problem, where: Place, limits):
    """The measured plan, rebuilt among those that fit the device now; None if there is none."""
    choice = find(where, problem)
    if choice is None:
        return None
    from fusedlstm import plan as planning

    try:
        wanted = {name: choice["plan"][name] for name in FIELDS}
        protocol = None if wanted["protocol"] == "none" else wanted["protocol"]
        found = candidates(problem, limits, protocol)
    except (KeyError, TypeError, planning.PlanError) as error:
        return _warn(f"{path()}: ignored the choice for {_words(problem)}: {type(error).__name__}: {error}")
    for candidate in found:
        if all(getattr(candidate, name) == value for name, value in wanted.items()):
            return candidate
    return _warn(f"{path()}: ignored the choice for {_words(problem)}: no such plan fits {limits.name}")


def candidates(problem: Problem, limits, protocol: str | None = None) -> list:
    """Of `plan.candidates`."""
    from fusedlstm import plan as planning

    p = problem
    sizes = (p.cell, 1, p.batch, p.hidden, p.dtype, p.directions, limits, p.pass_, p.precision, p.layout)
    return planning.candidates(*sizes, heads=p.heads, stack=p.stack, protocol=protocol)


def engine(call: Call, where: Place) -> tuple[str, str] | None:
    """The measured engine, "triton" or "torch", and why in words; None if there is none."""
    choice = find(where, call)
    if choice is None:
        return None
    try:
        kernels, rival = float(choice["ms"]["triton"]), float(choice["ms"]["torch"])
    except (KeyError, TypeError, ValueError) as error:
        return _warn(f"{path()}: ignored the choice for {_words(call)}: {type(error).__name__}: {error}")
    return "torch" if rival < kernels else "triton", f"measured: torch {rival:.3g} ms, kernels {kernels:.3g} ms"


@functools.lru_cache(maxsize=2)
def _table(file: Path, generation: int) -> dict[str, dict[str, dict]]:
    """All choices in the file; empty if there is none that can be read."""
    try:
        content = json.loads(file.read_text())
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"expected format {FORMAT}")
        table = content["choices"]
        if not all(isinstance(c, dict) for known in table.values() for c in known.values()):
            raise ValueError("expected a dictionary a choice")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        _warn(f"{file}: no choices of fusedlstm.tune, ignored: {type(error).__name__}: {error}")
        return {}
    return table


def _words(what: NamedTuple) -> str:
    return ", ".join(f"{name.rstrip('_')}={value}" for name, value in what._asdict().items())


def _warn(text: str) -> None:
    if text not in _warned:
        _warned.add(text)
        warnings.warn(text, RuntimeWarning, stacklevel=2)
