r"""All T steps of one layer, forward, for any cell.

.. math::
    \mathrm{preact\_h}_t = h_{t-1} U^T, \qquad
    \mathrm{gates}_t, \mathrm{state}_t = \mathrm{STEP}(\mathrm{preact\_x}_t, \mathrm{preact\_h}_t, \mathrm{state}_{t-1})

Dimensions: T steps, B batch, H hidden size, G gates, S states beside h, D directions, R rows: a row is one step of one
sequence. Row (t, b) is t * B + b; if PACKED, sequences have lengths of their own, longest first, and row (t, b) is
first_row[t] + b for the b that are that long: the layout of `torch.nn.utils.rnn.PackedSequence`.

A program owns BLOCK_H hidden units, with all their gates, for one batch tile and one direction, through all steps; its
states never leave its registers. The GROUP programs of one batch tile and direction need each other's h: every program
writes its part of h_t into `output`, arrives, and reads the whole of it after the wait. A group of one that is
LOCAL keeps h in registers. Direction 1 runs from the last step to the first, in each sequence from its own last.
"""

import triton
import triton.language as tl

from fusedlstm.kernels import barrier
from fusedlstm.kernels.product import exchanged_product, local_product, resident_weight
from fusedlstm.kernels.tiles import load_tuple, select_tuple, split_gates, store_tuple


@triton.jit(do_not_specialize=["T", "B", "D", "R", "rows_preact_d", "rows_preact_t", "rows_preact_b"])
def recurrence_fwd_kernel(
    # inputs
    preact_x_ptr,  # [D, R, G*H]  x_t @ weight_ih^T + biases
    weight_hh_ptr,  # [G*H, H]  direction 0
    weight_hh_reverse_ptr,  # [G*H, H]  direction 1
    hx_ptr,  # [D, B, H]
    cx_ptr,  # [S, D, B, H]  float32
    lengths_ptr,  # [B]  int32, longest first; read if PACKED
    first_row_ptr,  # [T+1]  int64; read if PACKED
    # outputs
    output_ptr,  # [R, D*H]  h of every step
    h_n_ptr,  # [D, B, H]
    c_n_ptr,  # [S, D, B, H]
    gates_ptr,  # [R, D*G*H]  after the nonlinearity; written if SAVE
    c_seq_ptr,  # [S, R, D*H]  float32; written if SAVE
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
    SAVE: tl.constexpr,
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
        else:
            steps = T

        state = load_tuple(hx_ptr + row_state * H, offs_state, mask, 0, 1)
        if S > 0:
            state = state + load_tuple(cx_ptr + row_state * H, offs_state, mask, stride_state, S)
        h_ptr = hx_ptr + row_state * H  # h of the previous step
        stride_h = H
        sequences = tl.full((), 0, tl.int64)  # that had it

        for step in range(steps):
            t = step + pid_d * (steps - 1 - 2 * step)
            p_h = h_ptr + offs_b * stride_h  # [BLOCK_B]
            if PACKED:
                first_row = tl.load(first_row_ptr + t)
                p_h = tl.where(row + offs_b < sequences, p_h, hx_ptr + row_state * H + offs_b * H)  # others begin here
                sequences = tl.load(first_row_ptr + t + 1) - first_row
                mask_t = row + offs_b < sequences
                mask = mask_t[:, None] & mask_h[None, :]
                preact_row = pid_d * rows_preact_d + (first_row + row) * rows_preact_b
            else:
                first_row = t * B
                mask_t = mask_b
                preact_row = pid_d * rows_preact_d + t * rows_preact_t + row * rows_preact_b

            preact_x = load_tuple(preact_x_ptr + preact_row * GH, offs_preact, mask, H, G)
            if LOCAL:
                acc = local_product(state, w, 1, N, BLOCK_B, TRANSPOSED, PRECISION)
            else:
                barrier.wait(counter_ptr, GROUP * step, SPIN_LIMIT)
                acc = exchanged_product(
                    p_h,
                    mask_t,
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

            if PACKED:
                gates, stepped = STEP(preact_x, preact_h, state)
                state = select_tuple(mask_t[:, None], stepped, state, 1 + S)
            else:
                gates, state = STEP(preact_x, preact_h, state)

            row_seq = (first_row + row) * D + pid_d
            h_ptr = output_ptr + row_seq * H
            stride_h = D * H
            store_tuple(h_ptr, offs_seq, mask, 0, state, 0, 1)
            if not LOCAL:
                barrier.arrive(counter_ptr)
            if SAVE:  # nobody waits for these
                store_tuple(gates_ptr + row_seq * GH, offs_gates, mask, H, gates, 0, G)
                store_tuple(c_seq_ptr + row_seq * H, offs_seq, mask, stride_seq, state, 1, S)

        mask = mask_b[:, None] & mask_h[None, :]
        store_tuple(h_n_ptr + row_state * H, offs_state, mask, 0, state, 0, 1)
        store_tuple(c_n_ptr + row_state * H, offs_state, mask, stride_state, state, 1, S)
