r"""All T steps of one layer, forward, for any cell.

.. math::
    \mathrm{preact\_h}_t = h_{t-1} U^T, \qquad
    \mathrm{gates}_t, \mathrm{state}_t = \mathrm{STEP}(\mathrm{preact\_x}_t, \mathrm{preact\_h}_t, \mathrm{state}_{t-1})

Dimensions: T steps, B batch, H hidden size, G gates, S states beside h, D directions, R rows: a row is one step of one
sequence. Row (t, b) is t * B + b. Sequences may have lengths of their own, in two ways:

- RAGGED: in any order, zero among them. A row past its sequence's end holds zeros.
- PACKED: longest first, none zero; row (t, b) is first_row[t] + b for the b that are that long: the layout of
  `torch.nn.utils.rnn.PackedSequence`. So which sequences have a step is a number, and not a mask.

A batch tile ends with its longest sequence. With RESETS a true at row (t, b) cuts its sequence between the steps t - 1 and
t: the state that enters the later of them in the order of the direction is zero.

A program owns BLOCK_H hidden units, with all their gates, for one batch tile and one direction, through all steps; its
states never leave its registers. The GROUP programs of one batch tile and direction need each other's h: every program
writes its part of h_t into `output`, arrives, and reads the whole of it after the wait. A group of one that is
LOCAL keeps h in registers. Direction 1 runs from the last step to the first, in each sequence from its own last.
"""

import triton
import triton.language as tl

from fusedlstm.kernels import barrier
from fusedlstm.kernels.product import exchanged_product, local_product, resident_weight
from fusedlstm.kernels.tiles import load_state, load_tuple, select_tuple, split_gates, store_tuple, zero_tuple


@triton.jit(do_not_specialize=["T", "B", "D", "R", "rows_preact_d", "rows_preact_t", "rows_preact_b"])
def recurrence_fwd_kernel(
    # inputs
    preact_x_ptr,  # [D, R, G*H]  x_t @ weight_ih^T + biases
    weight_hh_ptr,  # [G*H, H]  direction 0
    weight_hh_reverse_ptr,  # [G*H, H]  direction 1
    hx_ptr,  # [D, B, H]
    cx_ptr,  # [S, D, B, H]  float32
    lengths_ptr,  # [B]  int32, or int64 if RAGGED; read if RAGGED or PACKED
    first_row_ptr,  # [T+1]  int64; read if PACKED
    resets_ptr,  # [R]  bool; read if RESETS
    # outputs
    output_ptr,  # [R, D*H]  h of every step
    h_n_ptr,  # [D, B, H]
    c_n_ptr,  # [S, D, B, H]
    gates_ptr,  # [R, D*G*H]  after the nonlinearity; written if SAVE_GATES
    c_seq_ptr,  # [S, R, D*H]  float32; written if SAVE_STATES
    arrived_ptr,  # [D, batch tiles, 32]  int32, zero: one counter a group, 128 bytes apart
    # sizes
    T,
    B,
    D,
    R,
    H: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    # strides of preact_x, in rows of G*H elements
    rows_preact_d,
    rows_preact_t,  # not used if PACKED
    rows_preact_b,
    # cell, tiling and flags
    STEP: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LOCAL: tl.constexpr,
    RESIDENT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    PACKED: tl.constexpr,
    RAGGED: tl.constexpr,
    RESETS: tl.constexpr,
    SAVE_GATES: tl.constexpr,
    SAVE_STATES: tl.constexpr,
    SPIN_LIMIT: tl.constexpr,
):
    G_PADDED: tl.constexpr = triton.next_power_of_2(G)
    N: tl.constexpr = G_PADDED * BLOCK_H
    GH: tl.constexpr = G * H
    CHUNK: tl.constexpr = H if LOCAL else BLOCK_K

    pid_h = tl.program_id(0)
    pid_d = tl.program_id(2).to(tl.int64)
    offs_h = pid_h * BLOCK_H + tl.arange(0, BLOCK_H)
    mask_h = offs_h < H
    offs_b = tl.arange(0, BLOCK_B)
    offs_state = offs_b[:, None] * H + offs_h[None, :]  # [BLOCK_B, BLOCK_H]
    offs_seq = offs_b[:, None] * (D * H) + offs_h[None, :]
    offs_gates = offs_b[:, None] * (D * GH) + offs_h[None, :]
    offs_preact = offs_b.to(tl.int64)[:, None] * rows_preact_b * GH + offs_h[None, :]

    # this program's columns of weight_hh^T, gate-major: column n is gate n // BLOCK_H of unit n % BLOCK_H
    column = tl.arange(0, N)
    unit = pid_h * BLOCK_H + column % BLOCK_H
    mask_n = (unit < H) & (column // BLOCK_H < G)
    offs_n = (column // BLOCK_H * H + unit) * H
    weight_ptr = tl.where(pid_d == 0, weight_hh_ptr, weight_hh_reverse_ptr)
    if RESIDENT:
        w = resident_weight(weight_ptr, offs_n, mask_n, 1, H, CHUNK, BLOCK_K, TRANSPOSED)
    else:
        w = ()

    num_tiles_b = tl.cdiv(B, BLOCK_B)
    for tile_b in range(tl.program_id(1).to(tl.int64), num_tiles_b, tl.num_programs(1)):
        row = tile_b * BLOCK_B
        mask_b = row + offs_b < B
        mask = mask_b[:, None] & mask_h[None, :]
        counter_ptr = arrived_ptr + (pid_d * num_tiles_b + tile_b) * 32
        row_state = pid_d * B + row
        stride_state = D.to(tl.int64) * B * H
        stride_seq = R.to(tl.int64) * D * H
        if PACKED:
            steps = tl.load(lengths_ptr + row)  # the longest sequence of the tile
        elif RAGGED:
            length = tl.load(lengths_ptr + row + offs_b, mask=mask_b, other=0).to(tl.int32)  # [BLOCK_B]
            tl.device_assert((length >= 0) & (length <= T), "lengths: expected 0 to T")
            steps = tl.max(length)
        else:
            steps = T

        state = load_state(hx_ptr + row_state * H, cx_ptr + row_state * H, offs_state, mask, stride_state, S)
        h_ptr = hx_ptr + row_state * H  # h of the previous step
        stride_h = H
        sequences = tl.full((), 0, tl.int64)  # that had it
        first_row = tl.full((), 0, tl.int64)

        for step in range(steps):
            t = step + pid_d * (steps - 1 - 2 * step)
            p_h = h_ptr + offs_b * stride_h  # [BLOCK_B]
            mask_x = mask_b  # a product of rows that have ended is not looked at
            if PACKED:
                first_row_before = first_row
                sequences_before = sequences
                first_row = tl.load(first_row_ptr + t)
                sequences = tl.load(first_row_ptr + t + 1) - first_row
                mask_t = row + offs_b < sequences
                mask_x = mask_t
                begins = row + offs_b >= sequences_before
                preact_row = pid_d * rows_preact_d + (first_row + row) * rows_preact_b
            else:
                first_row = t * B
                mask_t = mask_b
                if RAGGED:
                    mask_t = t < length
                    begins = (t + 1 == length) & (pid_d == 1)
                preact_row = pid_d * rows_preact_d + t * rows_preact_t + row * rows_preact_b
            if PACKED or RAGGED:
                p_h = tl.where(begins, hx_ptr + row_state * H + offs_b * H, p_h)
            mask = mask_t[:, None] & mask_h[None, :]
            if RESETS:
                if PACKED:
                    reset_row = first_row_before * pid_d + first_row * (1 - pid_d)
                    mask_reset = mask_t & (~begins | (pid_d == 0))
                else:
                    reset_row = (t + pid_d) * B
                    mask_reset = mask_b & (t + pid_d < steps)
                    if RAGGED:
                        mask_reset = t + pid_d < length
                reset = tl.load(resets_ptr + reset_row + row + offs_b, mask=mask_reset, other=0)
                keep = reset[:, None] == 0
                state = select_tuple(keep, state, zero_tuple(1 + S, BLOCK_B, BLOCK_H), 1 + S)

            preact_x = load_tuple(preact_x_ptr + preact_row * GH, offs_preact, mask, H, G)
            if LOCAL:
                acc = local_product(state, w, 1, N, BLOCK_B, TRANSPOSED, PRECISION)
            else:
                barrier.wait(counter_ptr, GROUP * step, SPIN_LIMIT)
                acc = exchanged_product(
                    p_h,
                    mask_x,
                    w,
                    weight_ptr,
                    offs_n,
                    mask_n,
                    1,
                    H,
                    N,
                    BLOCK_B,
                    BLOCK_K,
                    RESIDENT,
                    TRANSPOSED,
                    PRECISION,
                    STAGES,
                )
            preact_h = split_gates(acc, BLOCK_B, BLOCK_H, G_PADDED)

            if RESETS and not LOCAL:  # what was exchanged is not cut; a mask there would cost more registers
                preact_h = select_tuple(keep, preact_h, zero_tuple(G_PADDED, BLOCK_B, BLOCK_H), G_PADDED)

            gates, stepped = STEP(preact_x, preact_h, state)
            mask_store = mask
            if PACKED or RAGGED:
                lives = mask_t[:, None]
                state = select_tuple(lives, stepped, state, 1 + S)
            else:
                state = stepped
            if RAGGED:
                mask_store = mask_b[:, None] & mask_h[None, :]
                stepped = select_tuple(lives, stepped, zero_tuple(1 + S, BLOCK_B, BLOCK_H), 1 + S)

            row_seq = (first_row + row) * D + pid_d
            h_ptr = output_ptr + row_seq * H
            stride_h = D * H
            store_tuple(h_ptr, offs_seq, mask_store, 0, stepped, 0, 1)
            if not LOCAL:
                barrier.arrive(counter_ptr)
            # nobody waits for these
            if SAVE_GATES:
                store_tuple(gates_ptr + row_seq * GH, offs_gates, mask, H, gates, 0, G)
            if SAVE_STATES:
                store_tuple(c_seq_ptr + row_seq * H, offs_seq, mask_store, stride_seq, stepped, 1, S)

        mask = mask_b[:, None] & mask_h[None, :]
        store_tuple(h_n_ptr + row_state * H, offs_state, mask, 0, state, 0, 1)
        store_tuple(c_n_ptr + row_state * H, offs_state, mask, stride_state, state, 1, S)
        if RAGGED:
            zero = zero_tuple(1 + S, BLOCK_B, BLOCK_H)
            for t in range(steps, T):  # no sequence of the tile comes so far
                row_seq = (B.to(tl.int64) * t + row) * D + pid_d
                store_tuple(output_ptr + row_seq * H, offs_seq, mask, 0, zero, 0, 1)
                if SAVE_STATES:
                    store_tuple(c_seq_ptr + row_seq * H, offs_seq, mask, stride_seq, zero, 1, S)
