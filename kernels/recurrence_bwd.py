r"""All T steps of one layer, backward through time, for any cell.

.. math::
    \mathrm{dpreact}_t, \mathrm{dstate}_{t-1} = \mathrm{STEP}(\mathrm{gates}_t, \mathrm{state}_{t-1}, \mathrm{state}_t,
    \mathrm{dstate}_t), \qquad dh_{t-1} \mathrel{+}= \mathrm{dpreact}_t U

Dimensions: T steps, B batch, H hidden size, G gates, S states beside h, D directions, R rows; where row (t, b) lies, and what
PACKED, RAGGED and RESETS mean, is told in `recurrence_fwd`. With CLIP every element of the gradient of a state that enters
a step is kept within -clip and clip.

A program owns BLOCK_H hidden units for one batch tile and one direction through all steps, and carries the gradients of
their states in registers. dh of a unit needs the gradients of all preactivations of its batch tile: every program
writes its part into `grad_preact`, arrives, and reads the whole of it after the wait. A group of one that is LOCAL
keeps them in registers. The gradients of the weights and of the input follow from `grad_preact` outside, one product each.
"""

import triton
import triton.language as tl

from fusedlstm.kernels import barrier
from fusedlstm.kernels.product import exchanged_product, local_product, resident_weight
from fusedlstm.kernels.tiles import (
    add_tuple,
    clamp_tuple,
    load_state,
    load_tuple,
    select_tuple,
    store_tuple,
    zero_tuple,
)


@triton.jit(do_not_specialize=["T", "B", "D", "R", "rows_grad_output_t", "rows_grad_output_b", "clip"])
def recurrence_bwd_kernel(
    # inputs
    grad_output_ptr,  # [R, D*H]; read if HAS_GRAD_OUTPUT
    grad_c_seq_ptr,  # [S, R, D*H]  float32; read if HAS_GRAD_C_SEQ
    grad_h_n_ptr,  # [D, B, H]
    grad_c_n_ptr,  # [S, D, B, H]
    weight_hh_ptr,  # [G*H, H]  direction 0
    weight_hh_reverse_ptr,  # [G*H, H]  direction 1
    hx_ptr,  # [D, B, H]
    cx_ptr,  # [S, D, B, H]  float32
    lengths_ptr,  # [B]  int32, or int64 if RAGGED; read if RAGGED or PACKED
    first_row_ptr,  # [T+1]  int64; read if PACKED
    resets_ptr,  # [R]  bool; read if RESETS
    output_ptr,  # [R, D*H]  h of every step
    gates_ptr,  # [R, D*G*H]  after the nonlinearity
    c_seq_ptr,  # [S, R, D*H]  float32
    # outputs
    grad_preact_ptr,  # [R, D*G*H]
    grad_hx_ptr,  # [D, B, H]
    grad_cx_ptr,  # [S, D, B, H]
    arrived_ptr,  # [D, batch tiles, 32]  int32, zero: one counter a group, 128 bytes apart
    # sizes
    T,
    B,
    D,
    R,
    clip,  # float32; used if CLIP
    H: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    # strides of grad_output, in rows of D*H elements
    rows_grad_output_t,  # not used if PACKED
    rows_grad_output_b,
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
    CLIP: tl.constexpr,
    HAS_GRAD_OUTPUT: tl.constexpr,
    HAS_GRAD_C_SEQ: tl.constexpr,
    SPIN_LIMIT: tl.constexpr,
):
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
    offs_grad_output = offs_b.to(tl.int64)[:, None] * rows_grad_output_b * (D * H) + offs_h[None, :]

    weight_ptr = tl.where(pid_d == 0, weight_hh_ptr, weight_hh_reverse_ptr)
    if RESIDENT:
        w = resident_weight(weight_ptr, offs_h, mask_h, H, GH, CHUNK, BLOCK_K, TRANSPOSED)
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
            steps = tl.max(length)
        else:
            steps = T

        # The last step of the forward order; each step hands its previous state on, so that a state is loaded once.
        t = tl.maximum(steps - 1, 0) * (1 - pid_d)
        if PACKED:
            first_row = tl.load(first_row_ptr + t)
            sequences = tl.load(first_row_ptr + t + 1) - first_row  # that have step t
            mask_t = row + offs_b < sequences
        else:
            first_row = t * B
            mask_t = mask_b
            if RAGGED:
                mask_t = t < length
        mask = mask_t[:, None] & mask_h[None, :]
        row_seq = (first_row + row) * D + pid_d
        state = load_state(output_ptr + row_seq * H, c_seq_ptr + row_seq * H, offs_seq, mask, stride_seq, S)
        mask = mask_b[:, None] & mask_h[None, :]
        dstate = load_state(
            grad_h_n_ptr + row_state * H, grad_c_n_ptr + row_state * H, offs_state, mask, stride_state, S
        )

        for step in range(steps):
            t = steps - 1 - step - pid_d * (steps - 1 - 2 * step)
            t_prev = t - 1 + 2 * pid_d
            # The first step of the forward order starts from hx and cx.
            mask_x = mask_b
            if PACKED:
                mask_t = row + offs_b < sequences
                mask_x = mask_t
                mask = mask_t[:, None] & mask_h[None, :]
                has_prev = (t_prev >= 0) & (t_prev < T)
                prev_row = tl.load(first_row_ptr + t_prev, mask=has_prev, other=0)
                sequences_prev = tl.load(first_row_ptr + t_prev + 1, mask=has_prev, other=0) - prev_row
                begins = (row + offs_b >= sequences_prev)[:, None]  # [BLOCK_B, 1]
                mask_prev = (row + offs_b < tl.maximum(sequences, sequences_prev))[:, None] & mask_h[None, :]
            else:
                prev_row = t_prev * B
                begins = step == steps - 1
                if RAGGED:
                    mask_t = t < length
                    mask = mask_t[:, None] & mask_h[None, :]
                    begins = (tl.where(pid_d == 0, t == 0, t_prev == length))[:, None]
                    mask_prev = (t - 1 + pid_d < length)[:, None] & mask_h[None, :]
            if RESETS:
                if PACKED:
                    reset_row = prev_row * pid_d + first_row * (1 - pid_d)
                    mask_reset = mask_t & ((row + offs_b < sequences_prev) | (pid_d == 0))
                else:
                    reset_row = (t + pid_d) * B
                    mask_reset = mask_b & (t + pid_d < steps)
                    if RAGGED:
                        mask_reset = t + pid_d < length
                reset = tl.load(resets_ptr + reset_row + row + offs_b, mask=mask_reset, other=0)
                keep = reset[:, None] == 0

            row_seq = (first_row + row) * D + pid_d
            gates = load_tuple(gates_ptr + row_seq * GH, offs_gates, mask, H, G)
            row_prev = (prev_row + row) * D + pid_d
            if PACKED or RAGGED:  # each sequence from its own place
                before = load_state(
                    output_ptr + row_prev * H, c_seq_ptr + row_prev * H, offs_seq, mask_prev & ~begins, stride_seq, S
                )
                initial = load_state(
                    hx_ptr + row_state * H, cx_ptr + row_state * H, offs_state, mask & begins, stride_state, S
                )
                state_prev = add_tuple(before, initial, 1 + S)
            else:
                h_ptr = tl.where(begins, hx_ptr + row_state * H, output_ptr + row_prev * H)
                c_ptr = tl.where(begins, cx_ptr + row_state * H, c_seq_ptr + row_prev * H)
                offs_prev = offs_b[:, None] * tl.where(begins, H, D * H) + offs_h[None, :]
                state_prev = load_state(h_ptr, c_ptr, offs_prev, mask, tl.where(begins, stride_state, stride_seq), S)
            dh = dstate[0]
            if HAS_GRAD_OUTPUT:
                if PACKED:
                    grad_row = (first_row + row) * rows_grad_output_b
                else:
                    grad_row = t * rows_grad_output_t + row * rows_grad_output_b
                grad_ptr = grad_output_ptr + grad_row * (D * H) + pid_d * H
                dh = dh + load_tuple(grad_ptr, offs_grad_output, mask, 0, 1)[0]

            dcell = dstate[1:]
            if HAS_GRAD_C_SEQ:
                dcell = add_tuple(dcell, load_tuple(grad_c_seq_ptr + row_seq * H, offs_seq, mask, stride_seq, S), S)

            entered = state_prev
            if RESETS:
                entered = select_tuple(keep, state_prev, zero_tuple(1 + S, BLOCK_B, BLOCK_H), 1 + S)
            dpreact, dprev = STEP(gates, entered, state, (dh,) + dcell)
            state = state_prev

            dpreact_ptr = grad_preact_ptr + row_seq * GH
            mask_store = mask
            if RAGGED:
                mask_store = mask_b[:, None] & mask_h[None, :]
                dpreact = select_tuple(mask_t[:, None], dpreact, zero_tuple(G, BLOCK_B, BLOCK_H), G)
            store_tuple(dpreact_ptr, offs_gates, mask_store, H, dpreact, 0, G)
            if LOCAL:
                dh_recurrent = local_product(dpreact, w, G, BLOCK_H, BLOCK_B, TRANSPOSED, PRECISION)
            else:
                barrier.arrive(counter_ptr)
                barrier.wait(counter_ptr, GROUP * (step + 1), SPIN_LIMIT)
                dh_recurrent = exchanged_product(
                    dpreact_ptr + offs_b * (D * GH),
                    mask_x,
                    w,
                    weight_ptr,
                    offs_h,
                    mask_h,
                    H,
                    GH,
                    BLOCK_H,
                    BLOCK_B,
                    BLOCK_K,
                    RESIDENT,
                    TRANSPOSED,
                    PRECISION,
                    STAGES,
                )
            dprev = (dprev[0] + dh_recurrent,) + dprev[1:]
            if RESETS:
                dprev = select_tuple(keep, dprev, zero_tuple(1 + S, BLOCK_B, BLOCK_H), 1 + S)
            if CLIP:
                dprev = clamp_tuple(dprev, clip, 1 + S)
            first_row = prev_row
            if PACKED:
                sequences = sequences_prev
            if PACKED or RAGGED:
                dstate = select_tuple(mask_t[:, None], dprev, dstate, 1 + S)
            else:
                dstate = dprev

        mask = mask_b[:, None] & mask_h[None, :]
        store_tuple(grad_hx_ptr + row_state * H, offs_state, mask, 0, dstate, 0, 1)
        store_tuple(grad_cx_ptr + row_state * H, offs_state, mask, stride_state, dstate, 1, S)
        if RAGGED:
            for t in range(steps, T):  # no sequence of the tile comes so far
                dpreact_ptr = grad_preact_ptr + ((B.to(tl.int64) * t + row) * D + pid_d) * GH
                store_tuple(dpreact_ptr, offs_gates, mask, H, zero_tuple(G, BLOCK_B, BLOCK_H), 0, G)
