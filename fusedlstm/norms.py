r"""Layer normalisation (Ba et al. 2016): over the last axis, mean 0 and variance 1, as `torch.nn.LayerNorm`.

.. math::
    n = (x - \mu) / s, \quad s^2 = \mathrm{mean}((x - \mu)^2) + \epsilon, \qquad
    dx = (dn - \mathrm{mean}(dn) - n\, \mathrm{mean}(dn\, n)) / s
"""

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

EPS = 1e-5
aten_backward = torch.ops.aten.native_layer_norm_backward.default


def normalised(x: Tensor) -> Tensor:
    return layer_norm(x, x.shape[-1:], eps=EPS)


def normalised_backward(dn: Tensor, x: Tensor) -> Tensor:
    """dx, of dn the gradient of n."""
    centred = x - x.mean(-1, keepdim=True)
    s = (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
    n = centred / s
    return (dn - dn.mean(-1, keepdim=True) - n * (dn * n).mean(-1, keepdim=True)) / s


def of_input_product(
    x: Tensor,  # [..., D, G*H]
    gains: list[Tensor],  # D times [G*H]
    biases: list[Tensor | None],  # D times [G*H]
) -> Tensor:
    """gain n + bias of every direction, [..., D, G*H]."""
    by_direction = zip(x.split(1, -2), gains, biases, strict=True)
    found = [layer_norm(own, own.shape[-1:], gain, bias, EPS) for own, gain, bias in by_direction]
    return found[0] if len(found) == 1 else torch.cat(found, -2)


def of_input_product_backward(
    grad: Tensor,  # [R, G*H] of the norm's output
    x: Tensor,  # [R, G*H]
    gain: Tensor,  # [G*H]
) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the gain, [G*H]."""
    _, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], gain, None, EPS)
    return aten_backward(grad, x, x.shape[-1:], mean, rstd, gain, None, [True, True, False])[:2]
