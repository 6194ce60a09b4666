r"""Gates and cell states of all steps, from preactivations that have their recurrent part already.

.. math::
    \mathrm{gates}_t, \mathrm{state}_t = \mathrm{STEP}(\mathrm{preact}_t, 0, \mathrm{state}_{t-1}, \mathrm{vectors})

What the backward needs of a forward that kept only h: since all h are known, the recurrent products of all steps are
one product before this. Nothing is exchanged, so a program is one sequence in one direction with BLOCK_H units, and
nobody waits. For cells that add both parts of a preactivation.

Dimensions as in `recurrence_fwd`, and what LAYOUT says of lengths and resets as in `rows`.
"""

import triton
import triton.language as tl

from fusedlstm.kernels.noise import Noise, hold, step_noise
from fusedlstm.kernels.rows import load_lengths
from fusedlstm.kernels.tiles import States, load_state, load_tuple, mask_tuple, store_tuple, zero_tuple


@triton.jit(
    do_not_specialize=[
        "T",
        "B",
        "D",
        "R",
        "rows_preact_d",
        "rows_preact",
        "first_recurrence",
        "first_row_of_all",
        "below_h",
        "below_c",
        "below_candidate",
        "rate_h",
        "rate_c",
        "scale_candidate",
    ]
)
def recompute_kernel(
    # inputs
    preact_ptr,  # [D, R, G*H]  x_t @ weight_ih^T + biases + h_{t-1} @ weight_hh^T
    vectors_ptr,  # [D, V, H]  read if V
    hx_ptr,  # [D, B, H]
    cx_ptr,  # [S, D, B, H]  float32
    lengths_ptr,  # [B]  int32, or int64 if RAGGED; read if RAGGED or PACKED
    first_row_ptr,  # [T+1]  int64; read if PACKED
    resets_ptr,  # [R]  bool; read if RESETS
    seed_ptr,  # [1]  int64; read if TRAINING
    # outputs
    gates_ptr,  # [R, D*G*H]  after the nonlinearity
    c_seq_ptr,  # [S, R, D*H]  float32
    # sizes
    T,
    B,
    D,
    R,
    H: tl.constexpr,
    G: tl.constexpr,
    V: tl.constexpr,
    S: tl.constexpr,
    # strides of preact, in rows of G*H elements
    rows_preact_d,
    rows_preact,
    # noise: the number of the first recurrence and of the first row; what words are below, and the rates in the mean
    first_recurrence,
    first_row_of_all,  # int64
    below_h,
    below_c,
    below_candidate,
    rate_h,  # float32
    rate_c,
    scale_candidate,
    # cell, tiling and flags
    STEP: tl.constexpr,
    BLOCK_H: tl.constexpr,
    LAYOUT: tl.constexpr,  # `rows.RowLayout`
    NOISE: tl.constexpr,  # `noise.NoiseKinds`
):
    GH: tl.constexpr = G * H
    G_PADDED: tl.constexpr = triton.next_power_of_2(G)
    noise = Noise(
        seed_ptr, first_recurrence, first_row_of_all, below_h, below_c, below_candidate, rate_h, rate_c, scale_candidate
    )
    units = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    offs = units[None, :]  # [1, BLOCK_H]
    mask = offs < H
    b = tl.program_id(0).to(tl.int64)
    pid_d = tl.program_id(2).to(tl.int64)
    steps = T
    if LAYOUT.UNEVEN:
        steps = load_lengths(lengths_ptr, b, True, T)
    row_state = pid_d * B + b
    stride_state = D.to(tl.int64) * B * H
    stride_seq = R.to(tl.int64) * D * H
    no_preact = zero_tuple(G_PADDED, 1, BLOCK_H)
    vectors = ()
    if V > 0:
        vectors = load_tuple(vectors_ptr + pid_d * (V * H), offs, mask, H, V)

    state = load_state(States(hx_ptr + row_state * H, cx_ptr + row_state * H, offs, stride_state), mask, S)
    for step in range(steps):
        t = step + pid_d * (steps - 1 - 2 * step)
        row = t * B + b
        if LAYOUT.PACKED:
            row = tl.load(first_row_ptr + t) + b
        if LAYOUT.RESETS:
            # A reset stands at the later of the two steps that it separates.
            later = t + pid_d
            inside = later < steps
            reset_row = later * B + b
            if LAYOUT.PACKED:
                reset_row = tl.load(first_row_ptr + later, mask=inside, other=0) + b
            state = mask_tuple(state, tl.load(resets_ptr + reset_row, mask=inside, other=0) == 0)

        preact = load_tuple(preact_ptr + (pid_d * rows_preact_d + row * rows_preact) * GH, offs, mask, H, G)
        words, drop = step_noise(noise, pid_d, row, tl.zeros((1,), tl.int32), units, NOISE)
        gates, stepped = STEP(preact, no_preact, state, vectors, drop)
        state = hold(stepped, state, words, noise, NOISE)

        row_seq = row * D + pid_d
        store_tuple(gates_ptr + row_seq * GH, offs, mask, H, gates, 0, G)
        store_tuple(c_seq_ptr + row_seq * H, offs, mask, stride_seq, state, 1, S)
    if LAYOUT.RAGGED:
        zero = zero_tuple(1 + S, 1, BLOCK_H)
        for t in range(steps, T):
            row_seq = (B.to(tl.int64) * t + b) * D + pid_d
            store_tuple(c_seq_ptr + row_seq * H, offs, mask, stride_seq, zero, 1, S)
