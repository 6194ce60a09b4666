"""How exact the float32 products on a GPU are: as in `torch.nn.LSTM`, all of a layer's at once.

`nn.LSTM` on a GPU follows `torch.backends.cudnn.rnn.fp32_precision` (which `torch.backends.cudnn.allow_tf32` sets), its
input product included; a matmul of torch follows `torch.backends.cuda.matmul.fp32_precision`. So the products around the
kernels run under the flag of the former.
"""

import contextlib

import torch
from torch import Tensor

from fusedlstm import differentiable


def tf32() -> bool:
    """Whether `torch.nn.LSTM` would round the factors of float32 products to TF32 on a GPU."""
    return torch.backends.cudnn.rnn.fp32_precision == "tf32"


@contextlib.contextmanager
def as_recurrent():
    """Products of float32 inside follow the flag of recurrent layers. Set for the process, as every such flag is."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    if (before == "tf32") == tf32():
        yield
        return
    matmul.fp32_precision = "tf32" if tf32() else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def product(
    a: Tensor,  # [M, K], or a batch of these
    b: Tensor,  # [K, N], likewise
    added: Tensor | None = None,  # [N] or [M, N]; not of a batch
) -> Tensor:
    """a @ b (+ added), [M, N]; differentiable."""
    if a.is_cuda and a.dtype == torch.float32:
        return _product(a, b, added)
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
        _add_product(total, a, b)
        return total
    return total.addmm_(a, b)


@differentiable.op("fusedlstm::add_product", mutates_args=("total",))
def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    with as_recurrent():
        total.addmm_(a, b)


# An op of its own, so that the flag is read when it runs and not when a compiler traces it.
@differentiable.op("fusedlstm::product")
def _product(a: Tensor, b: Tensor, added: Tensor | None) -> Tensor:
    with as_recurrent():
        return a @ b if added is None else torch.addmm(added, a, b)


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
