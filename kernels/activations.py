r"""sigmoid and tanh, in float32: the one place where they are computed.

Largest relative error against float64 for |x| <= 30, interpreted in float32: tanh 1.6e-7; sigmoid 3.0e-7 from -5 on,
and 1.8e-6 on the far left, where the rounding of the exponent counts. `tests/kernels/test_activations.py` allows 3e-7
and 4e-6, room for a GPU's exponential and division. Both are finite for every input: the exponential's argument is
never positive in tanh, and sigmoid divides by infinity on the far left.
"""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * x))


@triton.jit
def tanh(x):
    # Near zero 1 - e^(-2x) cancels, so an odd polynomial serves there: tanh(x) = x + x^3 p(x^2), fitted on [0, 0.625].
    z = x * x
    p = -0.00570498 * z + 0.02063908
    p = p * z - 0.05373971
    p = p * z + 0.13331442
    p = p * z - 0.33333282
    near = x + x * z * p
    e = tl.exp2(-2.8853900817779268 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    far = tl.where(x < 0, -far, far)
    return tl.where(tl.abs(x) < 0.625, near, far)
