"""A GPU that does not exist: tensors claim to be on it, and launches are recorded and checked instead of run.

So the host code of a GPU is walked to its end on any machine: choice of engine, plans, allocations, devices, arguments.
Numbers there are none. `tests/fake_cuda` has the tests.
"""

import contextlib
import ctypes
import os
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import contract
from fusedlstm import transforms
from fusedlstm.engines import bound

# Not the current device, so that an allocation or a launch that forgets its device shows.
DEVICE = torch.device("cuda:1")


class Properties:
    """Of an H100, as torch tells them."""

    name, major, minor, multi_processor_count = "NVIDIA H100 80GB HBM3", 9, 0, 132
    shared_memory_per_block_optin, L2_cache_size, total_memory = 232448, 50 << 20, 80 * 10**9


class Standing:
    """`torch.cuda.device`: where the process stands."""

    current = 0

    def __init__(self, device) -> None:
        self.index = torch.device(device).index if not isinstance(device, int) else device

    def __enter__(self) -> None:
        self.before, Standing.current = Standing.current, self.index

    def __exit__(self, *_) -> None:
        Standing.current = self.before


def claim() -> None:
    """Make this process, for its life, one on a machine with GPUs that nothing can run on."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["HIP_VISIBLE_DEVICES"] = ""
    # Before it does anything on a device torch asks for the guard of its type, and a build without CUDA has none. That
    # of the CPU does nothing, which is right for devices that are not there. (A build with CUDA sees no device now, and
    # brings its own.)
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 2).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")  # CPU, CUDA
    guards[1] = guards[1] or guards[0]
    torch.cuda.get_device_properties = get_device_properties
    torch.cuda.device = Standing
    torch.cuda.current_device = lambda: Standing.current
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False  # else autocast is off
    torch.cuda.is_bf16_supported = lambda including_emulation=True: True


def get_device_properties(device=None) -> Properties:
    return Properties()


class Launch(NamedTuple):
    kernel: str
    grid: tuple[int, ...]
    arguments: dict
    options: dict


class Gpu(TorchDispatchMode):
    """The operations and launches inside, in order. The results of our custom ops must agree with their fakes."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self.operations: list[str] = []  # of a device, launches among them
        self.ops: list[str] = []  # custom ones

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in transforms.FUNCTIONS:
            self.ops.append(func.name().removeprefix("fusedlstm::"))
            with self:
                found = transforms.FUNCTIONS[func](*args, **kwargs)
            if not func._schema.is_mutable:
                _same(func, found, func(*args, **kwargs))
            return found
        if func.namespace == "prim":  # questions about a tensor
            return func(*args, **kwargs)
        with self:
            found = func.decompose(*args, **kwargs)
        if found is not NotImplemented:  # it is made of other operations
            return found
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_device = torch.device(kwargs.get("device") or "cpu").type == "cuda"
        if not on_device and not any(isinstance(x, FakeTensor) for x in given):
            with unset_fake_temporarily():  # what stays on the host has values
                return func(*args, **kwargs)
        found = func(*args, **kwargs)
        devices = {x.device for x in (*given, *tree_leaves(found)) if isinstance(x, Tensor) and x.is_cuda}
        assert devices <= {DEVICE}, f"{func}: expected tensors on {DEVICE}, got some on {devices}"
        works = any(x.numel() for x in tree_leaves(found) if isinstance(x, Tensor))  # on nothing no kernel is launched
        if devices and works and not _only_looks(func):
            self.operations.append(func.overloadpacket.__name__)
        return found

    def launch(self, kernel, grid, arguments: dict, options: dict) -> None:
        assert Standing.current == DEVICE.index, f"{kernel.__name__}: launched on device {Standing.current}"
        given = Launch(kernel.__name__.removesuffix("_kernel"), tuple(grid), arguments, options)
        for name, x in arguments.items():
            assert not isinstance(x, Tensor) or x.device == DEVICE, f"{kernel.__name__}: {name} is on {x.device}"
        contract.check(given)
        self.launches.append(given)
        self.operations.append(given.kernel)

    @property
    def kernels(self) -> list[str]:
        return [launch.kernel for launch in self.launches]


@contextlib.contextmanager
def gpu():
    """Inside, tensors may be made on `DEVICE`; yields the `Gpu`."""
    here, run, compiled, found = Gpu(), triton.JITFunction.run, bound.Bound._compiled, transforms.gradients

    def record(kernel, *, grid, warmup, **given):
        names = kernel.arg_names
        assert not (missing := [n for n in names if n not in given]), f"{kernel.__name__}: no argument {missing}"
        arguments = {n: given[n] for n in names}
        here.launch(kernel, grid, arguments, {k: v for k, v in given.items() if k not in arguments})

    triton.JITFunction.run, transforms.gradients = record, gradients
    bound.Bound._compiled = lambda kernel, arguments: (None, None)  # Triton shall find it
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), here:
            yield here
    finally:
        triton.JITFunction.run, bound.Bound._compiled, transforms.gradients = run, compiled, found


ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")


def _only_looks(func) -> bool:
    """Whether an operation does nothing on its device."""
    return func.is_view or func.overloadpacket.__name__ in (*ALLOCATIONS, "_unsafe_view")


def _same(func, found, told) -> None:
    for k, (a, b) in enumerate(zip(tree_leaves(found), tree_leaves(told), strict=True)):
        expected, got = ((x.shape, x.dtype, x.device, x.stride()) for x in (b, a))
        assert got == expected, f"{func}: result {k}: the fake says {expected}, the op returned {got}"


def backward(outputs: list[Tensor], grads: list[Tensor]) -> dict[Tensor, Tensor]:
    """The gradients of all leaves. In Python, since torch's own engine wants streams of a device."""
    order, seen, pending, leaves = [], set(), {}, {}

    def add(node, k: int, grad: Tensor | None, is_ours: bool = True) -> None:
        if node is None or grad is None:
            return
        at = node._input_metadata[k]
        if not is_ours:  # torch's own leave the sum over what was broadcast to the engine
            grad = grad.sum_to_size(at.shape)
        expected, got = (at.dtype, at.device, tuple(at.shape)), (grad.dtype, grad.device, tuple(grad.shape))
        assert got == expected, f"{node.name()}: a gradient is {got}, expected {expected}"
        slots = pending.setdefault(node, [None] * len(node._input_metadata))
        slots[k] = grad if slots[k] is None else slots[k] + grad

    def visit(node) -> None:
        if node is not None and node not in seen:
            seen.add(node)
            for other, _ in node.next_functions:
                visit(other)
            order.append(node)

    with torch.no_grad():
        for x, grad in zip(outputs, grads, strict=True):
            add(x.grad_fn, x.output_nr, grad)
            visit(x.grad_fn)
        for node in reversed(order):
            if (given := pending.pop(node, None)) is None:
                continue
            if hasattr(node, "variable"):
                leaves[node.variable] = given[0]
                continue
            is_ours = hasattr(node, "needs_input_grad")
            found = node.apply(*given) if is_ours else node(*given)
            found = found if isinstance(found, tuple) else (found,)
            following = node.next_functions
            if is_ours:  # results for all arguments, and a next node for tensors
                found = [x for x, needed in zip(found, node.needs_input_grad, strict=False) if needed]
                following = [entry for entry in following if entry[0] is not None]
            for (other, k), grad in zip(following, found, strict=True):
                add(other, k, grad, is_ours)
    return leaves


def gradients(call, tensors, needs, grads) -> list[Tensor | None]:
    """`transforms.gradients`, which asks the engine of torch, by `backward`."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() if need else x for x, need in zip(tensors, needs, strict=True)]
        results = [(y, g) for y, g in zip(call(*leaves), grads, strict=True) if g is not None]
    found = backward(*([*of] for of in zip(*results, strict=True)))
    return [found[x] if need else None for x, need in zip(leaves, needs, strict=True)]
