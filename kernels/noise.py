"""The masks of zoneout and of the candidate, of one step and tile; `fusedlstm.noise` tells what they are.

Philox4x32-10 with the seed as key and the counter (unit, row, row's upper half, recurrence): the words of an element
are the same in every program, pass and engine.
"""

import triton
import triton.language as tl

SHIFT = tl.constexpr(8)  # 24 bits of a word are looked at
STREAMS = tl.constexpr(4)  # of a recurrence; the first is that of rows


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
def hold_tuple(
    stepped,
    entered,
    words,  # the masks' words; not looked at without TRAINING
    below_h,  # int32: words below it hold the state
    below_c,
    rate_h,  # float32
    rate_c,
    TRAINING: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Zoneout: state by state what entered where it is held, else what the step made of it; without TRAINING the
    mean.
    """
    if TRAINING:
        states = (tl.where(words[0] < below_h, entered[0], stepped[0]),)
    else:
        states = (stepped[0] + rate_h * (entered[0] - stepped[0]),)
    for k in tl.static_range(1, COUNT):
        if TRAINING:
            states = states + (tl.where(words[1] < below_c, entered[k], stepped[k]),)
        else:
            states = states + (stepped[k] + rate_c * (entered[k] - stepped[k]),)
    return states


@triton.jit
def hold_tuple_backward(
    dstate,
    words,
    below_h,
    below_c,
    rate_h,
    rate_c,
    TRAINING: tl.constexpr,
    COUNT: tl.constexpr,
):
    """The gradients of what the step made, and of what entered and was held."""
    if TRAINING:
        held = (tl.where(words[0] < below_h, dstate[0], 0.0),)
    else:
        held = (rate_h * dstate[0],)
    for k in tl.static_range(1, COUNT):
        if TRAINING:
            held = held + (tl.where(words[1] < below_c, dstate[k], 0.0),)
        else:
            held = held + (rate_c * dstate[k],)
    dstepped = (dstate[0] - held[0],)
    for k in tl.static_range(1, COUNT):
        dstepped = dstepped + (dstate[k] - held[k],)
    return dstepped, held
