"""Print versions, devices and settings for a bug report, and which engine runs here."""

import argparse
import functools
import importlib
import os
import platform
from collections.abc import Callable
from pathlib import Path

import torch

import fusedlstm
from fusedlstm import commands, engines
from fusedlstm.plan import tuned

EXAMPLES = """\
examples:
  python -m fusedlstm info
  FUSEDLSTM_BACKEND=torch python -m fusedlstm info      # what a setting does"""


def add_arguments(add: commands.Add) -> None:
    """There are none."""


def run(args: argparse.Namespace) -> None:
    for name, ask in facts().items():
        commands.say(f"{name:14} {told(ask)}")
    commands.say("engine         that backend='auto' takes for a default layer")
    for where in ["cpu", *(f"cuda:{k}" for k in gpus())]:
        by_line: dict[str, list[str]] = {}
        for name, dtype in commands.DTYPES.items():
            line = told(functools.partial(engine_line, torch.device(where), dtype))
            by_line.setdefault(line, []).append(name)
        for line, names in by_line.items():
            commands.say(f"  {where}, {', '.join(names)}: {line}")


def facts() -> dict[str, Callable[[], object]]:
    """The facts of a bug report, each with a function that finds it out."""
    return {
        "fusedlstm": lambda: fusedlstm.__version__,
        "Python": platform.python_version,
        "torch": lambda: f"{torch.__version__}, {built_for()}",
        "Triton": lambda: version("triton"),
        "numpy": lambda: version("numpy"),
        "platform": platform.platform,
        "CPU": cpu,
        "threads": torch.get_num_threads,
        **{f"cuda:{k}": functools.partial(gpu, k) for k in gpus()},
        **({} if gpus() else {"GPU": lambda: "none that torch can use"}),
        "driver": driver,
        "cuDNN": cudnn,
        "environment": environment,
        "tuning file": tuning_file,
    }


def told(ask: Callable[[], object]) -> str:
    """The answer, or the error, because people write a report when something is broken."""
    try:
        return str(ask())
    except Exception as error:
        return f"unknown, {type(error).__name__}: {error}"


def built_for() -> str:
    if torch.version.hip:
        return f"HIP {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA and HIP"


def version(package: str) -> str:
    try:
        return importlib.import_module(package).__version__
    except ModuleNotFoundError:
        return "not installed"


def cpu() -> str:
    """Model and number of usable cores."""
    listed = Path("/proc/cpuinfo")  # on Linux, where `platform` does not know the model
    lines = listed.read_text().splitlines() if listed.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{models[0] if models else platform.processor() or platform.machine()}, {cores} cores"


def gpus() -> range:
    """The indices of the GPUs that torch can use."""
    return range(torch.cuda.device_count() if torch.cuda.is_available() else 0)


def gpu(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    kind = properties.gcnArchName if torch.version.hip else f"compute capability {properties.major}.{properties.minor}"
    return f"{properties.name}, {kind}, {properties.multi_processor_count} multiprocessors"


def driver() -> str:
    from torch.utils import collect_env

    return collect_env.get_nvidia_driver_version(collect_env.run) or "no NVIDIA driver found"


def cudnn() -> str:
    if not torch.backends.cudnn.is_available():
        return "none in this torch"
    return f"{torch.backends.cudnn.version()}, {'enabled' if torch.backends.cudnn.enabled else 'switched off'}"


def environment() -> str:
    names = sorted(name for name in os.environ if name.startswith("FUSEDLSTM_") or name == "TRITON_INTERPRET")
    return " ".join(f"{name}={os.environ[name]}" for name in names) or "no FUSEDLSTM_* and no TRITON_INTERPRET"


def tuning_file() -> str:
    kept = tuned.everything()
    places = {tuned.words(tuned.place(k)) for k in gpus() or [None]}
    return f"{tuned.path()}, {sum(len(kept.get(place, {})) for place in places)} choices for this machine"


def engine_line(where: torch.device, dtype: torch.dtype) -> str:
    """The engine that `auto` chooses, and why."""
    try:
        engine, why = engines.choice("auto", where, dtype)
    except (RuntimeError, ValueError) as error:  # FUSEDLSTM_BACKEND asks for what cannot be
        return f"error: {error}"
    return f"{engine}: {why}"
