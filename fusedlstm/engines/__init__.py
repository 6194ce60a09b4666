"""Which engine serves a call, and why.

| engine | what runs |
|---|---|
| `triton` | the kernels: on a GPU, or interpreted on CPU tensors with `TRITON_INTERPRET=1` |
| `torch` | ATen: oneDNN on a CPU, cuDNN on a GPU; a loop of torch operations for cells and calls that it has not |
| `reference` | the specification in plain torch, any dtype, slow |

`auto` is `triton` on a GPU for what the kernels serve, else `torch`; and `torch` where cuDNN serves the call too and is
faster, measured (`fusedlstm.tune`) or clearly by prediction (`fastest`). An engine asked for by name serves the call or
raises: nothing falls back in silence. Where a launch of the kernels fails that `auto` chose, `torch` takes that layer
from then on, with one warning (`fusedlstm.engines.failures`). `FUSEDLSTM_BACKEND` overrides every module whose backend
is `auto`.

The logger `fusedlstm` tells at level DEBUG which engine ran a call and why. `FUSEDLSTM_LOG=1` writes that to stderr.
"""

import functools
import importlib.util
import logging
import os

import torch

from fusedlstm.engines import failures
from fusedlstm.plan import devices, tuned

LOGGER = logging.getLogger("fusedlstm")
BACKENDS = ("auto", "triton", "torch", "reference")
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CUDNN_WITH_BFLOAT16 = 91300
# Looked up once: it takes longer than the rest of a choice, and a compiler cannot.
TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None
NUMPY_IS_INSTALLED = importlib.util.find_spec("numpy") is not None


if os.environ.get("FUSEDLSTM_LOG") == "1":
    LOGGER.addHandler(logging.StreamHandler())
    LOGGER.setLevel(logging.DEBUG)


def interpreting() -> bool:
    """Whether Triton interprets the kernels on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


def requested(backend: str) -> str:
    """The backend of a module, after `FUSEDLSTM_BACKEND`."""
    if backend == "auto":
        backend = os.environ.get("FUSEDLSTM_BACKEND") or "auto"
        if backend not in BACKENDS:
            raise ValueError(f"FUSEDLSTM_BACKEND: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


def why_not_triton(
    device: torch.device,
    dtype: torch.dtype,
    cell: str | None = None,
    hidden: int | None = None,
    directions: int = 1,
    clipped_projection: bool = False,
    layout: str = "dense",
    heads: int = 1,
) -> str | None:
    """The reason why the kernels cannot serve a call, or None if they can. None as `cell` and `hidden`: any."""
    if not TRITON_IS_INSTALLED:
        return 'the package triton is not installed (it exists for Linux only): pip install ".[triton]"'
    if device.type != "cuda" and not (device.type == "cpu" and interpreting()):
        return (
            f"the kernels need a CUDA or ROCm device, got tensors on {device.type!r} "
            "(TRITON_INTERPRET=1 interprets them on CPU tensors)"
        )
    if dtype not in TRITON_DTYPES:
        return f"the kernels serve float32, float16 and bfloat16, got {dtype}"
    if clipped_projection:
        return "the kernels do not clip the gradient of a projected h (grad_clip with proj_size)"
    if interpreting() and not NUMPY_IS_INSTALLED:
        return 'Triton interprets with numpy, which is not installed: pip install ".[interpret]"'
    from fusedlstm.engines import launch

    if cell is not None and cell not in launch.STEPS:
        return f"the kernels have no cell {cell!r}, they have {', '.join(launch.STEPS)}"
    if device.type == "cuda":
        return launch.why_not(cell, hidden, dtype, directions, device, layout, heads)
    return None


def choose(*arguments, **more) -> str:
    """The engine of `choice`, whose arguments these are."""
    return choice(*arguments, **more)[0]


def choice(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    cell: str | None = None,
    hidden: int | None = None,
    directions: int = 1,
    clipped_projection: bool = False,
    layout: str = "dense",
    heads: int = 1,
) -> tuple[str, str]:
    """Resolve `backend` for tensors of `dtype` on `device` to "triton", "torch" or "reference"; and why, in words.

    Raises:
        RuntimeError: `triton` was asked for and cannot serve; the text names the reason.
    """
    engine = requested(backend)
    call = (device, dtype, cell, hidden, directions, clipped_projection, layout, heads)
    if engine == "auto":
        if device.type != "cuda":
            return "torch", "auto takes the kernels on a GPU only"
        if reason := why_not_triton(*call):
            return "torch", reason
        if reason := failures.reason(device, cell, hidden, dtype, directions, layout, heads):
            return "torch", reason
        return "triton", "the kernels serve this call"
    if engine == "triton" and (reason := why_not_triton(*call)):
        raise RuntimeError(f"backend='triton' cannot serve this call: {reason}")
    return engine, "asked for by name" if engine == backend else "FUSEDLSTM_BACKEND asks for it"


def fastest(call: tuned.Call, index: int | None) -> tuple[str, str]:
    """The faster of "triton" and "torch" for a call that both serve on GPU `index`, and why in words.

    Measured where `fusedlstm.tune` has, else predicted (`plan.beside_cudnn`): torch only if it is clearly faster.
    """
    return _fastest(call, index, tuned.generation(), devices.sms())


@functools.lru_cache(maxsize=4096)
def _fastest(call: tuned.Call, index: int | None, generation: int, sms: int | None) -> tuple[str, str]:
    measured = tuned.engine(call, index) if generation else None
    return measured or predicted(call, index)


def predicted(call: tuned.Call, index: int | None) -> tuple[str, str]:
    """As `fastest`, of what nothing is measured; index None is the interpreter, which plays an sm_90.

    A packed batch is taken for one in which all sequences have every step, as its plan is too: most of the time goes
    into steps that many have, and an engine that changed with the lengths would change from batch to batch.
    """
    from fusedlstm import plan
    from fusedlstm.engines import launch

    if call.layout == "ragged":
        return "triton", "cuDNN takes no lengths and no resets"
    if call.dtype == "bf16" and index is not None and (torch.backends.cudnn.version() or 0) < CUDNN_WITH_BFLOAT16:
        return "triton", "this cuDNN has no bfloat16"
    sizes = (call.cell, call.batch, call.hidden, call.dtype, call.directions, launch.device_limits(index))
    ours, cudnn = plan.beside_cudnn(*sizes, call.precision, call.training, call.layout, call.proj_size)
    words = f"predicted: kernels {ours:.3g} us a step, cuDNN {cudnn:.3g}"
    return "torch" if ours > plan.CLEARLY * cudnn else "triton", words
