"""The file of choices that `fusedlstm.tune` measured on this machine, and the look-up.

The file is `tuning.json` in `$FUSEDLSTM_CACHE`, or in `fusedlstm/` of the user's cache folder. A choice applies only to
the device and the versions with which it was measured (`Place`), and to the same sizes. With `FUSEDLSTM_TUNING=0`
nothing is looked up. A file that cannot be read, or a choice that no longer fits, is ignored with one warning.
"""

import contextlib
import functools
import json
import os
import sys
import threading
import warnings
from pathlib import Path
from typing import NamedTuple

from fusedlstm.plan import devices
from fusedlstm.plan.problem import Problem

FORMAT = 1
NOT_KEPT = ("device_limits", "protocol", "input_size")  # fields of a Problem: the `Place` stands for the device


class Call(NamedTuple):
    """What an engine is chosen for: a whole stack of layers. T does not belong to it."""

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
    num_sms: int  # that plans may use
    driver: str  # CUDA or HIP of torch, of the driver where torch tells it, and cuDNN
    torch: str
    triton: str
    fusedlstm: str


# The fields of a plan that are stored. They are enough to find it among the candidates again.
FIELDS = ("schedule", "block_b", "block_h", "block_k", "protocol", "transposed", "split", "num_warps", "stages")

_generation = 1  # of what is known of the file: part of the keys of whoever keeps what was looked up
_warned: set[str] = set()


def generation() -> int:
    """A number that changes whenever this process changes the choices. 0 if they are ignored."""
    return 0 if os.environ.get("FUSEDLSTM_TUNING") == "0" else _generation


def path() -> Path:
    """The path of the file of all choices.

    Raises:
        RuntimeError: No environment variable names a folder, and the user has no home directory.
    """
    if folder := os.environ.get("FUSEDLSTM_CACHE"):
        return Path(folder) / "tuning.json"
    folder = os.environ.get("XDG_CACHE_HOME") or (os.environ.get("LOCALAPPDATA") if sys.platform == "win32" else None)
    try:
        return (Path(folder) if folder else Path.home() / ".cache") / "fusedlstm" / "tuning.json"
    except RuntimeError as error:
        raise RuntimeError(
            f"FUSEDLSTM_CACHE: expected a folder for the choices of fusedlstm.tune, got none, and {error}"
        ) from error


def place(index: int | None) -> Place:
    """The place of a device, by its index. None is the interpreter."""
    return _place(index, devices.sms())


@functools.cache
def _place(index: int | None, sms: int | None) -> Place:
    import torch

    import fusedlstm

    try:
        import triton  # and not the metadata of a distribution: that may have another name
    except ImportError:
        triton = None
    versions = (torch.__version__, getattr(triton, "__version__", "none"), fusedlstm.__version__)
    if index is None:
        return Place("interpreter", sms or 0, "none", *versions)
    properties = torch.cuda.get_device_properties(index)
    driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: "unknown")()
    built = f"{torch.version.cuda or torch.version.hip}, driver {driver}, cudnn {torch.backends.cudnn.version()}"
    num_sms = properties.multi_processor_count
    return Place(properties.name, min(sms or num_sms, num_sms), built, *versions)


def find(index: int | None, what: Problem | Call) -> dict | None:
    """The choice stored for a device, or None. It never fails, because a forward can do without it."""
    try:
        table = _table(path(), _generation)
        return table.get(words(place(index)), {}).get(words(what)) if table else None
    except Exception as error:  # no home directory, a driver that does not tell its version
        return _warn(f"choices of fusedlstm.tune, ignored: {type(error).__name__}: {error}")


def store(index: int | None, choices: dict) -> Path:
    """Add choices, `{problem or call: dict of JSON}`, to the file under a device. Returns the file.

    Choices for other devices stay in the file.

    Raises:
        RuntimeError: As in `check`.
    """
    check()
    file = path()
    file.parent.mkdir(parents=True, exist_ok=True)
    with _locked(file):
        _add(file, index, choices)
    forget()
    return file


@contextlib.contextmanager
def _locked(file: Path):
    """One process at a time adds choices, so that none is lost. Without locks (Windows) the last one wins."""
    try:
        import fcntl
    except ModuleNotFoundError:
        yield
        return
    # Never removed: a process that waits for a removed file would not see the next one's.
    with open(file.with_suffix(".lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _add(file: Path, index: int | None, choices: dict) -> None:
    forget()
    table = {key: dict(known) for key, known in _table(file, _generation).items()}
    table.setdefault(words(place(index)), {}).update({words(what): choice for what, choice in choices.items()})
    # Beside the file and then in its place: a reader sees the old one or the new one. Its name is known beforehand, so
    # that an interrupt at any moment leaves nothing.
    beside = file.with_name(f".tuning-{os.getpid()}-{threading.get_ident()}.json")
    try:
        beside.unlink(missing_ok=True)
        with open(beside, "x") as out:
            json.dump({"format": FORMAT, "choices": table}, out, indent=1)
        os.chmod(beside, 0o644)  # whatever the umask; a shared folder's choices are for all
        os.replace(beside, file)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def check() -> None:
    """Check that choices can be added to the file without discarding those of another version.

    Raises:
        RuntimeError: There is no folder for the file, or the file has another format. The text names it.
    """
    file = path()
    try:
        found = json.loads(file.read_text())["format"] if file.is_file() else FORMAT
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return  # none, or of no use to anybody
    if found != FORMAT:
        raise RuntimeError(
            f"{file}: expected choices of fusedlstm.tune in format {FORMAT}, got format {found!r} of another version; "
            "remove it (python -m fusedlstm tune --clear), or name another folder by FUSEDLSTM_CACHE"
        )


def clear() -> bool:
    """Remove the file. Returns whether there was one."""
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


def plan(problem: Problem, index: int | None, limits):
    """The measured plan, if it is among the plans that fit the device now, else None."""
    choice = find(index, problem)
    if choice is None:
        return None
    from fusedlstm import plan as planning

    try:
        wanted = {name: choice["plan"][name] for name in FIELDS}
        protocol = None if wanted["protocol"] == "none" else wanted["protocol"]
        found = planning.candidates(problem._replace(device_limits=limits, protocol=protocol))
    except Exception as error:  # as above
        return _warn(f"{path()}: ignored the choice for {words(problem)}: {type(error).__name__}: {error}")
    for candidate in found:
        if all(getattr(candidate, name) == value for name, value in wanted.items()):
            return candidate
    return _warn(f"{path()}: ignored the choice for {words(problem)}: no such plan fits {limits.name}")


def engine(call: Call, index: int | None) -> tuple[str, str] | None:
    """The measured engine, "triton" or "torch", and the reason as text. None if there is no measurement."""
    choice = find(index, call)
    if choice is None:
        return None
    try:
        kernels, rival = float(choice["ms"]["triton"]), float(choice["ms"]["torch"])
    except Exception as error:  # as above
        return _warn(f"{path()}: ignored the choice for {words(call)}: {type(error).__name__}: {error}")
    return "torch" if rival < kernels else "triton", f"measured: torch {rival:.3g} ms, kernels {kernels:.3g} ms"


@functools.lru_cache(maxsize=2)
def _table(file: Path, generation: int) -> dict[str, dict[str, dict]]:
    """All choices in the file. Empty if there is no file that can be read."""
    try:
        if file.exists() and not file.is_file():
            raise ValueError("expected a regular file")  # a pipe would be waited for
        content = json.loads(file.read_text())
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"expected format {FORMAT}")
        table = content["choices"]
        if not all(isinstance(c, dict) for known in table.values() for c in known.values()):
            raise ValueError("expected a dictionary a choice")
    except FileNotFoundError:
        return {}
    except Exception as error:  # whatever a file can hold, a forward goes on
        _warn(f"{file}: no choices of fusedlstm.tune, ignored: {type(error).__name__}: {error}")
        return {}
    return table


def words(what: NamedTuple) -> str:
    """Under which a choice is kept."""
    left_out = NOT_KEPT if isinstance(what, Problem) else ()
    fields = {name: value for name, value in what._asdict().items() if name not in left_out}
    return ", ".join(f"{name.rstrip('_')}={value}" for name, value in fields.items())


def _warn(text: str) -> None:
    if text not in _warned:
        _warned.add(text)
        warnings.warn(text, RuntimeWarning, stacklevel=2)
