"""Choose the engine that serves a call, and say why.

| engine | what runs |
|---|---|
| `triton` | the kernels, on a GPU, or interpreted on CPU tensors with `TRITON_INTERPRET=1` |
| `torch` | ATen (oneDNN on a CPU, cuDNN on a GPU), or a loop of torch operations for everything that ATen lacks |
| `reference` | the specification in plain torch, for any dtype, slow |

With `auto`, a call runs on `triton` if it is on a GPU and the kernels support it, and otherwise on `torch`. It also
runs on `torch` if cuDNN supports the call and is faster, either in a measurement (`fusedlstm.tune`) or clearly in the
prediction (`fastest`). A cell without a written-out backward runs on `reference` in the place of `torch`, because only
autograd can differentiate its step. An engine that the user names serves the call or raises an error. It never falls
back silently. If a launch of the kernels fails that `auto` chose, there is one warning, and from then on `torch` runs
that layer (`fusedlstm.engines.failures`). `FUSEDLSTM_BACKEND` replaces the backend of every module whose backend is
`auto`.

The logger `fusedlstm` says at level DEBUG which engine ran a call and why. `FUSEDLSTM_LOG=1` writes this to stderr.
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
# Looked up once, because it takes longer than the rest of a choice, and a compiler cannot trace it.
TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None
NUMPY_IS_INSTALLED = importlib.util.find_spec("numpy") is not None


if os.environ.get("FUSEDLSTM_LOG") == "1":
    LOGGER.addHandler(logging.StreamHandler())
    LOGGER.setLevel(logging.DEBUG)


def interpreting() -> bool:
    """Whether Triton interprets the kernels on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


def requested(backend: str) -> str:
    """The backend of a module. `FUSEDLSTM_BACKEND` takes the place of "auto"."""
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
    """The reason why the kernels cannot serve a call, or None. If `cell` or `hidden` is None, it does not matter."""
    if not TRITON_IS_INSTALLED:
        return 'the package triton is not installed (it exists for Linux only): pip install ".[triton]"'
    # On "meta" nothing runs, and our ops say the shapes.
    if device.type not in ("cuda", "meta") and not (device.type == "cpu" and interpreting()):
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

    if cell is not None and (reason := without_kernels(cell)):
        return reason
    if device.type == "cuda":
        return launch.why_not(cell, hidden, dtype, directions, device, layout, heads)
    return None


def without_kernels(cell: str) -> str | None:
    """Say that the kernels do not have a cell, as text. None if they have it, or if Triton is not installed."""
    if TRITON_IS_INSTALLED:
        from fusedlstm.kernels.cells import STEPS

        if cell not in STEPS:
            return f"the kernels have no cell {cell!r}, they have {', '.join(STEPS)}"
    return None


def choose(*arguments, **more) -> str:
    """The engine that `choice` returns, with the same arguments."""
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
    """Choose "triton", "torch" or "reference" for tensors of `dtype` on `device`. Returns the engine and the reason.

    Raises:
        RuntimeError: The user named `triton`, and it cannot serve the call. The text says why.
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
    """The faster of "triton" and "torch" for a call that both can serve on GPU `index`, and the reason as text.

    A measurement by `fusedlstm.tune` decides. If there is none, the prediction of `plan.beside_cudnn` does, and "torch"
    is chosen only if it is clearly faster.
    """
    return _fastest(call, index, tuned.generation(), devices.sms())


@functools.lru_cache(maxsize=4096)
def _fastest(call: tuned.Call, index: int | None, generation: int, sms: int | None) -> tuple[str, str]:
    measured = tuned.engine(call, index) if generation else None
    return measured or predicted(call, index)


def predicted(call: tuned.Call, index: int | None) -> tuple[str, str]:
    """As `fastest`, but without measurements. If `index` is None, the kernels are interpreted as for an sm_90.

    For a packed batch the prediction assumes that all sequences have every step, as its plan does. Most of the time is
    spent in steps that many sequences have. And an engine that depended on the lengths would change from batch to
    batch.
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
