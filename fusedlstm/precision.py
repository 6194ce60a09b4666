"""How exact the float32 products on a GPU are: as in `torch.nn.LSTM`, all of a layer's at once.

`nn.LSTM` on a GPU follows `torch.backends.cudnn.rnn.fp32_precision` (which `torch.backends.cudnn.allow_tf32` sets), its
input product included; a matmul of torch follows `torch.backends.cuda.matmul.fp32_precision`. So the products around the
kernels run under the flag of the former. By default the two differ, TF32 and IEEE: were a layer to follow the latter with its products,
most of its float32 operations would run at IEEE's rate, a seventh of TF32's on an H100.

No product of torch takes its precision as an argument, so the flag is changed while one is launched (`as_recurrent`), and nothing is
changed where both agree, as with `torch.backends.cuda.matmul.fp32_precision = "tf32"`. Torch has an elder and a newer interface to it, and
reading one raises where only the other was set; TunableOp reads the elder. So both are set together, and all is as it was afterwards. Threads
of ours wait for each other; a product that another thread launches meanwhile may get our precision, which only torch could prevent.
"""

import contextlib
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from fusedlstm import differentiable

_MATMUL, _ONEDNN = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
_LOCK = threading.RLock()


def tf32() -> bool:
    """Whether `torch.nn.LSTM` would round the factors of float32 products to TF32 on a GPU."""
    return torch.backends.cudnn.rnn.fp32_precision == "tf32"


@contextlib.contextmanager
def as_recurrent():
    """float32 products on a GPU inside follow the flag of recurrent layers."""
    with contextlib.ExitStack() as changed:
        with _LOCK:
            if (_MATMUL.fp32_precision == "tf32") != tf32():
                changed.enter_context(
                    _LOCK
                )  # until the flag is as it was: another thread of ours would find it changed
                changed.callback(_switch())
        yield


def _switch() -> Callable[[], None]:
    """Let float32 products take the other precision of TF32 and IEEE; returns what takes that back."""
    own, onednn = _MATMUL.fp32_precision, _ONEDNN.fp32_precision
    to_tf32 = own != "tf32"
    elder, of_all = _read(lambda: _MATMUL.allow_tf32), _read(torch.get_float32_matmul_precision)

    def back() -> None:
        if elder is not None and (to_tf32 or of_all is None):
            _MATMUL.allow_tf32 = elder
        elif elder is not None:
            torch.set_float32_matmul_precision(of_all)
            _restore(_ONEDNN, onednn, torch.backends.mkldnn.fp32_precision)
        _restore(_MATMUL, own, torch.backends.cudnn.fp32_precision)

    if elder is None:  # the user has set the newer flag alone, and with the other value they agree
        _MATMUL.fp32_precision = "tf32" if to_tf32 else "ieee"
    elif to_tf32 or of_all is None:
        _MATMUL.allow_tf32 = to_tf32
    else:  # "high" and "medium" are of oneDNN too
        torch.set_float32_matmul_precision("highest")
    return back


def _read(flag: Callable):
    """A flag of the elder interface; None where it contradicts the newer one."""
    try:
        return flag()
    except RuntimeError:
        return None


def _restore(flag, value: str, inherited: str) -> None:
    """A flag that says what it would inherit goes on inheriting."""
    flag.fp32_precision = "none" if value == inherited else value


def product(
    a: Tensor,  # [M, K], or a batch of these
    b: Tensor,  # [K, N], likewise
    added: Tensor | None = None,  # [N] or [M, N]; not of a batch
) -> Tensor:
    """a @ b (+ added), [M, N]; differentiable."""
    if a.is_cuda and a.dtype == torch.float32:
        return (_multiplied if differentiable.transformed() else _product)(a, b, added)
    return a @ b if added is None else torch.addmm(added, a, b)


def add_product(
    total: Tensor | None,  # [M, N]; None: zero
    a: Tensor,  # [M, K]
    b: Tensor,  # [K, N]
) -> Tensor:
    """total + a @ b, [M, N], in place where there is a total. No gradient flows through it."""
    if total is None:
        return product(a, b)
    if a.is_cuda and a.dtype == torch.float32:
        (_add_multiplied if differentiable.transformed() else _add_product)(total, a, b)
        return total
    return total.addmm_(a, b)


# Transforms of torch see these operations themselves.
def _multiplied(a: Tensor, b: Tensor, added: Tensor | None) -> Tensor:
    with as_recurrent():
        return a @ b if added is None else torch.addmm(added, a, b)


def _add_multiplied(total: Tensor, a: Tensor, b: Tensor) -> None:
    with as_recurrent():
        total.addmm_(a, b)


@differentiable.op("fusedlstm::add_product", mutates_args=("total",))
def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    _add_multiplied(total, a, b)


# An op of its own, so that the flag is read when it runs and not when a compiler traces it.
@differentiable.op("fusedlstm::product")
def _product(a: Tensor, b: Tensor, added: Tensor | None) -> Tensor:
    return _multiplied(a, b, added)


@_product.register_fake
def _(a, b, added):
    return a.new_empty(*a.shape[:-1], b.size(-1))


def _setup_context(ctx, inputs, output):
    a, b, added = inputs
    ctx.added_dim = None if added is None else added.dim()
    ctx.save_for_backward(a, b)


def _backward(ctx, grad):
    a, b = ctx.saved_tensors
    grad_a = _product(grad, b.mT, None) if ctx.needs_input_grad[0] else None
    grad_b = _product(a.mT, grad, None) if ctx.needs_input_grad[1] else None
    grad_added = None
    if ctx.added_dim and ctx.needs_input_grad[2]:
        grad_added = grad.sum(0) if ctx.added_dim == 1 else grad
    return grad_a, grad_b, grad_added


_product.register_autograd(_backward, setup_context=_setup_context)
