r"""Gates and cell states of all steps, from preactivations that have their recurrent part already.

.. math::
    \mathrm{gates}_t, \mathrm{state}_t = \mathrm{STEP}(\mathrm{preact}_t, 0, \mathrm{state}_{t-1}, \mathrm{vectors})

What the backward needs of a forward that kept only h: since all h are known, the recurrent products of all steps are
one product before this. Nothing is exchanged, so a program is one sequence in one direction with BLOCK_H units, and
nobody waits. For cells that add both parts of a preactivation.

Dimensions, lengths and resets as in `recurrence_fwd.py`.
"""

import triton
import triton.language as tl

from fusedlstm.kernels.noise import hold_tuple, step_words
from fusedlstm.kernels.rows import load_lengths
from fusedlstm.kernels.tiles import load_state, load_tuple, select_tuple, store_tuple, zero_tuple


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
    PACKED: tl.constexpr,
    RAGGED: tl.constexpr,
    RESETS: tl.constexpr,
    HOLDS: tl.constexpr,
    DROPS_CANDIDATE: tl.constexpr,
    TRAINING: tl.constexpr,
):
    GH: tl.constexpr = G * H
    G_PADDED: tl.constexpr = triton.next_power_of_2(G)
    units = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    offs = units[None, :]  # [1, BLOCK_H]
    mask = offs < H
    b = tl.program_id(0).to(tl.int64)
    pid_d = tl.program_id(2).to(tl.int64)
    steps = T
    if PACKED or RAGGED:
        steps = load_lengths(lengths_ptr, b, True, T)
    row_state = pid_d * B + b
    stride_state = D.to(tl.int64) * B * H
    stride_seq = R.to(tl.int64) * D * H
    zero = zero_tuple(1 + S, 1, BLOCK_H)
    no_preact = zero_tuple(G_PADDED, 1, BLOCK_H)
    vectors = ()
    if V > 0:
        vectors = load_tuple(vectors_ptr + pid_d * (V * H), offs, mask, H, V)

    state = load_state(hx_ptr + row_state * H, cx_ptr + row_state * H, offs, mask, stride_state, S)
    for step in range(steps):
        t = step + pid_d * (steps - 1 - 2 * step)
        row = t * B + b
        if PACKED:
            row = tl.load(first_row_ptr + t) + b
        if RESETS:
            later = t + pid_d
            inside = later < steps
            reset_row = later * B + b
            if PACKED:
                reset_row = tl.load(first_row_ptr + later, mask=inside, other=0) + b
            keep = tl.load(resets_ptr + reset_row, mask=inside, other=0) == 0
            state = select_tuple(keep, state, zero, 1 + S)
        preact = load_tuple(preact_ptr + (pid_d * rows_preact_d + row * rows_preact) * GH, offs, mask, H, G)
        drop = 1.0
        words = ()
        if TRAINING:
            sequence = tl.zeros((1,), tl.int32)
            words = step_words(seed_ptr, first_recurrence + pid_d, first_row_of_all + row, sequence, units)
            if DROPS_CANDIDATE:
                drop = tl.where(words[2] < below_candidate, 0.0, scale_candidate)
        gates, stepped = STEP(preact, no_preact, state, vectors, drop)
        if HOLDS:
            stepped = hold_tuple(stepped, state, words, below_h, below_c, rate_h, rate_c, TRAINING, 1 + S)
        state = stepped
        row_seq = row * D + pid_d
        store_tuple(gates_ptr + row_seq * GH, offs, mask, H, gates, 0, G)
        store_tuple(c_seq_ptr + row_seq * H, offs, mask, stride_seq, state, 1, S)
    if RAGGED:
        for t in range(steps, T):
            row_seq = (B.to(tl.int64) * t + b) * D + pid_d
            store_tuple(c_seq_ptr + row_seq * H, offs, mask, stride_seq, zero, 1, S)
