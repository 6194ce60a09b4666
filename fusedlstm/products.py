r"""The matrix products of a layer, their precision, and the norms that may follow them.

Float32 products on a GPU are as exact as those of `torch.nn.LSTM`. `nn.LSTM` follows the flag
`torch.backends.cudnn.rnn.fp32_precision` (which `torch.backends.cudnn.allow_tf32` sets) in all of its products, the
input product included. A matmul of torch follows `torch.backends.cuda.matmul.fp32_precision`. By default the two flags
differ: the first is TF32, the second is IEEE. The products around the kernels follow the first one. With the second,
most operations of a layer would run at a seventh of the rate on an H100.

No product of torch takes its precision as an argument. So the flag is changed while a product is launched
(`as_recurrent`). If both flags agree, it is not changed. Torch has an older and a newer interface to the flag. Reading
one raises an error if only the other was set, and TunableOp reads the older one. So both are set together, and both are
restored. Our own threads wait for each other. A product that another thread launches meanwhile may get our precision,
which only torch could prevent.

Heads are block-diagonal recurrent weights: n groups of hidden units that see only their own h. There are n heads with
DH = H / n units each, and unit u belongs to head u // DH. A recurrent weight [G * H, DH] has a row for every gate and
unit, in the order of a dense one, and a column for every unit of the row's own head. So n follows from the shapes, and
one head is the dense weight.

Layer normalisation (Ba et al. 2016) makes the mean over the last axis 0 and the variance 1, as `torch.nn.LayerNorm`:

.. math::
    n = (x - \mu) / s, \quad s^2 = \mathrm{mean}((x - \mu)^2) + \epsilon, \qquad
    dx = (dn - \mathrm{mean}(dn) - n\, \mathrm{mean}(dn\, n)) / s
"""

import contextlib
import threading
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import conv2d, layer_norm
from torch.nn.grad import conv2d_weight

from fusedlstm import transforms

_MATMUL, _ONEDNN = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
_LOCK = threading.RLock()


def autocasts(input: Tensor) -> bool:
    """Whether autocast is on for the device of `input`."""
    kind = input.device.type
    # The usual kinds first, because the question takes longer than the rest.
    return (kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind)) and torch.is_autocast_enabled(kind)


def without_autocast(input: Tensor):
    """A context in which autocast is off on the device of `input`: what is to be cast, we cast.

    The rules of autocast for LSTMs differ from device to device and from dtype to dtype. A compiler sees autocast off
    where it reads our backward, and on where it runs it.
    """
    asked = torch.compiler.is_compiling() or autocasts(input)
    return torch.autocast(input.device.type, enabled=False) if asked else contextlib.nullcontext()


def tf32() -> bool:
    """Whether `torch.nn.LSTM` would round the factors of float32 products to TF32 on a GPU."""
    return torch.backends.cudnn.rnn.fp32_precision == "tf32"


@contextlib.contextmanager
def as_recurrent():
    """Inside of this context, float32 products on a GPU follow the flag of recurrent layers."""
    with contextlib.ExitStack() as changed:
        with _LOCK:
            if (_MATMUL.fp32_precision == "tf32") != tf32():
                # Held until the flag is restored, because another thread of ours would find it changed.
                changed.enter_context(_LOCK)
                changed.callback(_switch())
        yield


def _switch() -> Callable[[], None]:
    """Switch float32 products between TF32 and IEEE. Returns a function that switches back."""
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

    if elder is None:  # the user has set only the newer flag, and with the other value the two agree
        _MATMUL.fp32_precision = "tf32" if to_tf32 else "ieee"
    elif to_tf32 or of_all is None:
        _MATMUL.allow_tf32 = to_tf32
    else:  # "high" and "medium" also change oneDNN
        torch.set_float32_matmul_precision("highest")
    return back


def _read(flag: Callable):
    """A flag of the older interface. None if it contradicts the newer one."""
    try:
        return flag()
    except RuntimeError:
        return None


def _restore(flag, value: str, inherited: str) -> None:
    """Restore a flag. If its value is the one that it would inherit, it inherits again."""
    flag.fp32_precision = "none" if value == inherited else value


def product(
    a: Tensor,  # [M, K], or a batch of these
    b: Tensor,  # [K, N], likewise
    added: Tensor | None = None,  # [N] or [M, N]; not of a batch
) -> Tensor:
    """a @ b (+ added), [M, N]. torch's transforms can differentiate it."""
    return (_product if _is_op(a) else _multiplied)(a, b, added)


def _is_op(a: Tensor) -> bool:
    """Whether a product is an op of ours, so that flags and sizes are read when it runs, and not when it is traced."""
    if a.dtype != torch.float32 or transforms.transformed():
        return False
    return a.is_cuda or (torch.compiler.is_compiling() and not torch.compiler.is_exporting())


def add_product(
    total: Tensor | None,  # [M, N]; None: zero
    a: Tensor,  # [M, K]
    b: Tensor,  # [K, N]
) -> Tensor:
    """total + a @ b, [M, N], in place if there is a total. No gradient flows through it."""
    if total is None:
        return product(a, b)
    if a.is_cuda and _is_op(a):
        _add_product(total, a, b)
        return total
    # torch.vmap has no rule for addmm_.
    if transforms.transformed() or _is_op(a) or _is_large(a, b):
        return total.add_(product(a, b))
    return total.addmm_(a, b)


def add_sum_of_rows(
    total: Tensor | None,  # [M, N]; None: zero
    a: Tensor,  # [M, R]
    b: Tensor,  # [R, N]
) -> Tensor:
    """`add_product` where many rows are summed. A CPU would add row after row to the total, and round as often."""
    return add_product(total, a, b) if total is None or a.is_cuda else total.add_(product(a, b))


# torch's transforms see these operations directly.
def _multiplied(a: Tensor, b: Tensor, added: Tensor | None) -> Tensor:
    if a.is_cuda and a.dtype == torch.float32 and not torch.compiler.is_compiling():
        with as_recurrent():
            return _plain(a, b, added)
    if _is_large(a, b) and not transforms.followed((a, b) if added is None else (a, b, added)):
        if a.stride(1) == 1 and len(a) >= FEWEST_ROWS:
            return _rows_by_onednn(a, b, added)
        if a.stride(0) == 1 and len(b) >= FEWEST_ROWS and added is None:
            return _sum_by_onednn(a.t(), b)
    return _plain(a, b, added)


def _plain(a: Tensor, b: Tensor, added: Tensor | None) -> Tensor:
    return a @ b if added is None else torch.addmm(added, a, b)


@transforms.op("add_product", mutates_args=("total",))
def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    with as_recurrent():
        total.addmm_(a, b)


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


@transforms.op("product", _backward, _setup_context)
def _product(a: Tensor, b: Tensor, added: Tensor | None) -> Tensor:
    return _multiplied(a, b, added)


@torch.library.register_fake(_product)
def _(a, b, added):
    return a.new_empty(*a.shape[:-1], b.size(-1))


# Large products on a CPU. torch multiplies float32 by MKL, which does not use AVX-512 on a processor of AMD. oneDNN
# does, and takes half of the time (docs/engines.md). Of torch's public functions, convolutions reach it. So rows [R, C]
# are an image of R by 1 pixels with C channels, and weights are a filter of one pixel.

ONEDNN_IS_FASTER = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
# oneDNN compiles a program for each new number of rows, in 0.5 to 2 ms. It gets multiples, so that there are few.
FEWEST_ROWS, MULTIPLE, FEWEST_MULTIPLICATIONS = 1024, 256, 1 << 23


def _is_large(a: Tensor, b: Tensor) -> bool:
    """Whether oneDNN is faster for a product, and as exact."""
    return (
        ONEDNN_IS_FASTER
        # Nobody may ask for sizes there.
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing() or transforms.transformed())
        and a.device.type == "cpu"
        and a.dtype == b.dtype == torch.float32
        and a.dim() == 2
        and max(a.shape) >= FEWEST_ROWS
        and a.numel() * b.size(1) >= FEWEST_MULTIPLICATIONS
        and torch.backends.mkldnn.enabled
        and all(flag.fp32_precision in ("none", "ieee") for flag in (_ONEDNN, torch.backends.mkldnn.conv))
    )


def _rows_by_onednn(a: Tensor, b: Tensor, added: Tensor | None) -> Tensor:
    """a @ b (+ added), [M, N]."""
    whole = len(a) - len(a) % MULTIPLE
    bias = added if added is None or added.dim() == 1 else None
    first = conv2d(_image(a[:whole]), b.t()[:, :, None, None], bias).permute(0, 2, 3, 1).flatten(0, 2)
    if whole < len(a):
        first = torch.cat([first, _plain(a[whole:], b, bias)])
    return first if added is bias else first.add_(added)


def _sum_by_onednn(a: Tensor, b: Tensor) -> Tensor:
    """a^T b, [M, N], of a [R, M] and b [R, N]."""
    whole = len(a) - len(a) % MULTIPLE
    size = (a.size(1), b.size(1), 1, 1)
    total = conv2d_weight(_image(b[:whole]), size, _image(a[:whole])).view(size[:2])
    return total if whole == len(a) else total.add_(a[whole:].t() @ b[whole:])


def _image(rows: Tensor) -> Tensor:
    """[1, C, R, 1] in the memory format of channels last, of rows [R, C]."""
    return rows.contiguous().view(1, len(rows), 1, rows.size(1)).permute(0, 3, 1, 2)


# Heads.


def recurrent_product(h: Tensor, weight_hh: Tensor) -> Tensor:
    """h_{t-1} U^T, [B, G * H], from h [B, H] and weight_hh [G * H, DH]. It is differentiable."""
    DH = weight_hh.size(1)
    n = h.size(-1) // DH
    if n == 1:
        return h @ weight_hh.t()
    by_head = weight_hh.unflatten(0, (-1, n, DH))  # [G, n, DH, DH]
    return torch.einsum("bnk,gnuk->bgnu", h.unflatten(-1, (n, DH)), by_head).flatten(1)


def add_recurrent_product(
    preact: Tensor,  # [R, G * H]
    h: Tensor,  # [R, H], the states before
    weight_hh: Tensor,  # [G * H, DH]
) -> None:
    """preact += h U^T, in place, for all rows at once. No gradient flows through it."""
    (R, H), DH = h.shape, weight_hh.size(1)
    if H == DH:
        add_product(preact, h, weight_hh.t())
        return
    G, n = len(weight_hh) // H, H // DH
    by_head = weight_hh.unflatten(0, (G, n, DH)).permute(1, 3, 0, 2).flatten(2)  # [n, DH, G*DH]
    added = product(h.view(R, n, DH).transpose(0, 1), by_head)  # [n, R, G*DH]
    preact.view(R, G, n, DH).add_(added.unflatten(2, (G, DH)).permute(1, 2, 0, 3))


def recurrent_product_backward(dpreact: Tensor, weight_hh: Tensor, hidden: int) -> Tensor:
    """dpreact_t U, [B, H], from dpreact [B, G * H] and weight_hh [G * H, DH]. It is differentiable."""
    DH = weight_hh.size(1)
    if hidden == DH:
        return dpreact @ weight_hh
    by_gate_and_head = dpreact.unflatten(1, (-1, DH)).transpose(0, 1) @ weight_hh.unflatten(0, (-1, DH))  # [G*n, B, DH]
    return by_gate_and_head.unflatten(0, (-1, hidden // DH)).sum(0).transpose(0, 1).flatten(1)


def recurrent_weight_gradient(
    dpreact: Tensor,  # [R, G * H]
    h: Tensor,  # [R, H], the states before
    num_heads: int,
    total: Tensor | None = None,  # [G * H, DH]
) -> Tensor:
    """total + the sum over rows of dpreact^T h within heads, [G * H, DH]. In place if there is a total."""
    if num_heads == 1:
        return add_sum_of_rows(total, dpreact.t(), h)
    DH = h.size(1) // num_heads
    h = h.unflatten(1, (num_heads, DH)).transpose(0, 1)  # [n, R, DH]
    by_gate = dpreact.unflatten(1, (-1, num_heads, DH)).permute(1, 2, 3, 0)  # [G, n, DH, R]
    grad = torch.cat([product(gate, h).flatten(0, 1) for gate in by_gate])
    return grad if total is None else total.add_(grad)


# Layer normalisation.

EPS = 1e-5
aten_backward = torch.ops.aten.native_layer_norm_backward.default


def normalised(x: Tensor) -> Tensor:
    return layer_norm(x, x.shape[-1:], eps=EPS)


def normalised_backward(dn: Tensor, x: Tensor) -> Tensor:
    """dx, from the gradient dn of n."""
    centred = x - x.mean(-1, keepdim=True)
    s = (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
    n = centred / s
    return (dn - dn.mean(-1, keepdim=True) - n * (dn * n).mean(-1, keepdim=True)) / s


def by_gate(norm: Callable[..., Tensor], *parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Apply a function of whole rows to rows that are split by gate, and split the result by gate."""
    return norm(*(torch.cat(part, -1) for part in parts)).chunk(len(parts[0]), -1)


def normed_input(
    x: Tensor,  # [..., D, G*H]
    gains: list[Tensor],  # D times [G*H]
    biases: list[Tensor | None],  # D times [G*H]
) -> Tensor:
    """gain n + bias for every direction, [..., D, G*H]."""
    by_direction = zip(x.split(1, -2), gains, biases, strict=True)
    found = [layer_norm(own, own.shape[-1:], gain, bias, EPS) for own, gain, bias in by_direction]
    return found[0] if len(found) == 1 else torch.cat(found, -2)


def normed_input_backward(
    grad: Tensor,  # [R, G*H] of the norm's output
    x: Tensor,  # [R, G*H]
    gain: Tensor,  # [G*H]
) -> tuple[Tensor, Tensor]:
    """The gradients of x, [R, G*H], and of the gain, [G*H]."""
    _, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], gain, None, EPS)
    return aten_backward(grad, x, x.shape[-1:], mean, rstd, gain, None, [True, True, False])[:2]


# Several tensors in one.


def joined(tensors: list[Tensor], dim: int = 0) -> Tensor:
    """Concatenate tensors. A single tensor is returned as it is."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def with_samples(x: Tensor, other: Tensor) -> Tensor:
    """`x`, with samples of `torch.vmap` if `other` has them. Then `other` can be added to it in place."""
    return x + other.new_zeros((), dtype=x.dtype) if transforms.transformed() else x


def stacked(tensors: list[Tensor]) -> Tensor:
    """Stack tensors along a new first axis. A single tensor gives a view."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)
