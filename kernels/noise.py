"""What regularises a step: the masks of zoneout and of the candidate, of one step and tile; and the factor of h.

`fusedlstm.noise` tells what they are. Philox4x32-10 with the seed as key and the counter (unit, row, row's upper half,
recurrence): the words of an element are the same in every program, pass and engine.
"""

from dataclasses import dataclass
from typing import NamedTuple

import triton
import triton.language as tl

SHIFT = tl.constexpr(8)  # 24 bits of a word are looked at
STREAMS = tl.constexpr(4)  # of a recurrence; the first is that of rows


@dataclass(frozen=True)
class NoiseKinds:
    """What regularises the steps of a launch: one compile-time value of a kernel."""

    HOLDS: bool  # zoneout
    DROPS_CANDIDATE: bool
    DROPS_H: bool  # of the h that enters the product
    TRAINING: bool  # masks, and not their mean


class Noise(NamedTuple):
    """The same in numbers."""

    seed_ptr: object  # [1]  int64
    first_recurrence: object  # the number of the first recurrence
    first_row: object  # int64: and of the first row
    below_h: object  # int32: words below it hold the state
    below_c: object
    below_candidate: object  # or drop the candidate
    rate_h: object  # float32: zoneout's, in the mean
    rate_c: object
    scale_candidate: object  # of a candidate that is not dropped


@triton.jit
def step_words(
    seed_ptr,  # [1]  int64
    recurrence,
    row,  # int64: of the tile's first sequence
    offs_b,  # [BLOCK_B]
    offs_h,  # [BLOCK_H]
):
    """Three words [BLOCK_B, BLOCK_H] of 24 bits, as int32: for h, for the other states, for the candidate."""
    rows = (row + offs_b).to(tl.int64)[:, None] + tl.zeros_like(offs_h)[None, :]
    unit = tl.zeros_like(offs_b)[:, None] + offs_h[None, :]
    stream = tl.zeros_like(unit) + (recurrence * STREAMS).to(tl.int32)
    lower = (rows & 0xFFFFFFFF).to(tl.uint32)
    upper = (rows >> 32).to(tl.uint32)
    a, b, c, _ = tl.philox(tl.load(seed_ptr), unit.to(tl.uint32), lower, upper, stream.to(tl.uint32))
    return (a >> SHIFT).to(tl.int32), (b >> SHIFT).to(tl.int32), (c >> SHIFT).to(tl.int32)


@triton.jit
def step_noise(
    noise,  # Noise
    recurrence,
    row,  # int64: of the tile's first sequence, in this launch
    offs_b,  # [BLOCK_B]
    offs_h,  # [BLOCK_H]
    NOISE: tl.constexpr,  # `NoiseKinds`
):
    """The words of a step's masks, none unless TRAINING, and what multiplies the candidate."""
    drop = 1.0
    words = ()
    if NOISE.TRAINING:
        row = noise.first_row + row
        words = step_words(noise.seed_ptr, noise.first_recurrence + recurrence, row, offs_b, offs_h)
        if NOISE.DROPS_CANDIDATE:
            drop = tl.where(words[2] < noise.below_candidate, 0.0, noise.scale_candidate)
    return words, drop


@triton.jit
def hold(
    stepped,
    entered,
    words,
    noise,  # Noise
    NOISE: tl.constexpr,
):
    """Zoneout: state by state what entered where it is held, else what the step made of it; without TRAINING the
    mean.
    """
    if NOISE.HOLDS:
        if NOISE.TRAINING:
            states = (tl.where(words[0] < noise.below_h, entered[0], stepped[0]),)
        else:
            states = (stepped[0] + noise.rate_h * (entered[0] - stepped[0]),)
        for k in tl.static_range(1, len(stepped)):
            if NOISE.TRAINING:
                states = states + (tl.where(words[1] < noise.below_c, entered[k], stepped[k]),)
            else:
                states = states + (stepped[k] + noise.rate_c * (entered[k] - stepped[k]),)
        stepped = states
    return stepped


@triton.jit
def hold_backward(
    dstate,
    words,
    noise,  # Noise
    NOISE: tl.constexpr,
):
    """The gradients of what the step made, and of what entered and was held; of that none unless HOLDS."""
    held = ()
    if NOISE.HOLDS:
        if NOISE.TRAINING:
            held = (tl.where(words[0] < noise.below_h, dstate[0], 0.0),)
        else:
            held = (noise.rate_h * dstate[0],)
        for k in tl.static_range(1, len(dstate)):
            if NOISE.TRAINING:
                held = held + (tl.where(words[1] < noise.below_c, dstate[k], 0.0),)
            else:
                held = held + (noise.rate_c * dstate[k],)
        dstepped = (dstate[0] - held[0],)
        for k in tl.static_range(1, len(dstate)):
            dstepped = dstepped + (dstate[k] - held[k],)
        dstate = dstepped
    return dstate, held


@triton.jit
def load_factor(
    factor_ptr,
    offs,  # [BLOCK_B, BLOCK_H]
    mask,  # [BLOCK_B, BLOCK_H]
    NOISE: tl.constexpr,
):
    """What multiplies h before a product: the same at all steps of a sequence."""
    factor = 1.0
    if NOISE.DROPS_H:
        factor = tl.load(factor_ptr + offs, mask=mask, other=0.0)
    return factor


@triton.jit
def drop_h(
    h,  # or its gradient
    factor,
    NOISE: tl.constexpr,
):
    if NOISE.DROPS_H:
        h = h * factor
    return h
