"""Launches that fail: the error that says what was requested and what the device has, and what `auto` does then.

A launch that fails has not run. Either the compiler failed, or the device has too little shared memory, too few
registers, or too few multiprocessors to hold all its programs at once, for example because others share it. With
`backend="triton"` this is a `LaunchError`. With `auto` there is one warning, and the call continues with a loop of
torch operations. The same holds for a backward. From then on every call of that layer does so (`attempt`, `reason`).

An error of a kernel that ran, such as an illegal memory access, is no such failure. It is passed on, because nothing
else works after it either. `explain` says what it can mean.
"""

import subprocess
import warnings
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch

from fusedlstm import transforms
from fusedlstm.plan import devices

Results = TypeVar("Results")

# The messages of a driver that refused a launch. All other messages belong to a kernel that ran before.
REFUSED = (
    "too many blocks in cooperative launch",
    "too many resources requested for launch",
    "invalid argument",
    "invalid configuration argument",
    "operation not supported",
    "device kernel image is invalid",
    "no kernel image is available for execution on the device",
    "a PTX JIT compilation failed",
    "the provided PTX was compiled with an unsupported toolchain.",
)
REFUSALS = ("OutOfResources", "CompilationError", "PTXASError")  # Triton's own, by name: it may not be installed
# The messages of torch at the next synchronisation after a kernel gave up.
TRAPPED = ("unspecified launch failure", "an illegal instruction was encountered", "device-side assert triggered")


class LaunchError(RuntimeError):
    """A kernel could not be launched. Nothing of it has run, and the device has not changed."""


class Where(NamedTuple):
    """What is known about a layer before its launches. These are the arguments of `engines.choose`."""

    device: torch.device
    sms: int | None
    cell: str | None
    hidden: int | None
    dtype: torch.dtype
    directions: int
    layout: str
    heads: int

    def __str__(self) -> str:
        sizes = f"hidden size {self.hidden}, {self.heads} head(s), {self.directions} direction(s)"
        return f"{self.cell}, {self.layout}, {sizes}, {self.dtype}, on {self.device}"


_failed: dict[Where, str] = {}


def as_wave(cell: str) -> str:
    """The name under which layers that share a launch fail. Such a failure says nothing about a single layer."""
    return f"{cell}, layers in one launch"


def where(device: torch.device, cell: str, dtype: torch.dtype, weight_hh: list, hx: torch.Tensor, layout) -> Where:
    """The key of a layer, from the arguments of an op: weight_hh [G*H, DH] for each direction, and hx [.., B, H]."""
    hidden = hx.size(-1)
    heads = hidden // weight_hh[0].size(1) if weight_hh and hidden else 1
    return Where(device, devices.sms(), cell, hidden, dtype, len(weight_hh), layout.name, heads)


@transforms.constant
def reason(
    device: torch.device,
    cell: str | None,
    hidden: int | None,
    dtype: torch.dtype,
    directions: int,
    layout: str,
    heads: int,
) -> str | None:
    """The reason why a launch of such a layer failed before, or None."""
    return (
        _failed.get(Where(device, devices.sms(), cell, hidden, dtype, directions, layout, heads)) if _failed else None
    )


def attempt(
    engine: str, where: Callable[[], Where], kernels: Callable[[], Results], loop: Callable[[], Results]
) -> Results:
    """Return what `kernels` return, or, with the engine "torch", what `loop` returns.

    With "auto" it is that of `kernels`, unless a launch of theirs fails or has failed before.
    """
    if engine == "triton":
        return kernels()
    if engine == "auto" and not (_failed and where() in _failed):
        try:
            return kernels()
        except LaunchError as error:
            _failed[where()] = str(error)
            text = f"backend='auto': {error} From now on a loop of torch operations takes {where()}."
            warnings.warn(text, RuntimeWarning, stacklevel=2)
    return loop()


def forget() -> None:
    """Forget all failures, so that the kernels are tried again."""
    _failed.clear()


def is_refusal(error: BaseException, compiling: bool) -> bool:
    """Whether an error of Triton means that a launch was refused, and not that a kernel before it failed.

    Args:
        error: The error.
        compiling: Whether only the compiler ran.
    """
    if isinstance(error, torch.AcceleratorError):  # of a kernel that ran
        return False
    if str(error).startswith("Triton Error ["):  # of the driver
        return str(error).endswith(REFUSED)
    if any(kind.__name__ in REFUSALS for kind in type(error).__mro__):
        return True
    # Everything that can go wrong in a compiler. Errors of a call, such as a TypeError, are ours.
    return compiling and isinstance(error, RuntimeError | OSError | subprocess.SubprocessError)


def launch_error(error: BaseException, plan: str, device: torch.device, smem_bytes: int | None) -> LaunchError:
    """The error that says what was requested from a device, and what it has.

    Args:
        error: The error of Triton or of the driver.
        plan: The launch in words.
        device: The device of the launch.
        smem_bytes: The shared memory of a program. None if the compiler has not reported it.
    """
    each = "" if smem_bytes is None else f", {smem_bytes / 1024:.0f} KiB of shared memory each"
    name = str(device)
    has = ""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        smem = getattr(properties, "shared_memory_per_block_optin", 0)
        name = f"{properties.name} ({device})"
        has = f" It has {properties.multi_processor_count} multiprocessors"
        has += f" and {smem >> 10} KiB of shared memory a program." if smem else "."
        if devices.sms() is not None:
            has += f" FUSEDLSTM_SMS={devices.sms()} of them may be used."
    what = str(error).strip().splitlines() or [""]
    return LaunchError(
        f"cannot launch {plan}{each}, on {name}: {type(error).__name__}: {what[0]}.{has} Where others share the device "
        "(MPS, a green context, NCCL), FUSEDLSTM_SMS caps the multiprocessors that a plan may use."
    )


def explain(error: BaseException) -> str | None:
    """Explain an error that torch raised at a synchronisation, if a kernel of this package may be its cause.

    A kernel cannot tell the host why it gave up. When the error appears, any kernel of the process may be its cause.

    Args:
        error: The error.

    Returns:
        The explanation, or None if no kernel of this package can be the cause.
    """
    if not any(text in str(error) for text in TRAPPED):
        return None
    return (
        "A kernel gave up. One of fusedlstm does so if a program of a group never arrived: "
        "the programs of a launch wait for each other's h, and after tens of seconds a wait ends with a trap. "
        "That happens if they are not on the device at once (a debugger, a device that is shared without "
        "FUSEDLSTM_SMS), or if another kernel wrote over their memory. "
        "The context is lost, and the process must begin anew; CUDA_LAUNCH_BLOCKING=1 then names the call, "
        "and FUSEDLSTM_BACKEND=torch shows whether it is ours. See docs/on_a_gpu.md."
    )
