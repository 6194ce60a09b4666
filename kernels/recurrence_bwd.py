r"""All T steps of one layer, backward through time, for any cell.

.. math::
    \mathrm{dpreact}_t, \mathrm{dstate}_{t-1} = \mathrm{STEP}(\mathrm{gates}_t, \mathrm{state}_{t-1}, \mathrm{state}_t,
    \mathrm{dstate}_t), \qquad dh_{t-1} \mathrel{+}= \mathrm{dpreact}_t U

Dimensions: T steps, B batch, H hidden size, G gates, S states beside h, D directions.

A program owns BLOCK_H hidden units for one batch tile and one direction through all steps, and carries the gradients of
their states in registers. dh of a unit needs the gradients of all preactivations of its batch tile: every program
writes its part into `grad_preact`, arrives, and reads the whole of it after the wait. A group of one that is LOCAL
keeps them in registers. The gradients of the weights and of the input follow from `grad_preact` outside, one product each.
"""

import triton
import triton.language as tl

from fusedlstm.kernels import barrier
from fusedlstm.kernels.product import exchanged_product, local_product, resident_weight
from fusedlstm.kernels.tiles import load_tuple, store_tuple


@triton.jit(do_not_specialize=["T", "B", "D", "rows_grad_output_t", "rows_grad_output_b"])
def recurrence_bwd_kernel(
    # inputs
    grad_output_ptr,  # [T, B, D*H]; read if HAS_GRAD_OUTPUT
    grad_h_n_ptr,  # [D, B, H]
    grad_c_n_ptr,  # [S, D, B, H]
    weight_hh_ptr,  # [G*H, H]  direction 0
    weight_hh_reverse_ptr,  # [G*H, H]  direction 1
    hx_ptr,  # [D, B, H]
    cx_ptr,  # [S, D, B, H]  float32
    output_ptr,  # [T, B, D*H]  h of every step
    gates_ptr,  # [T, B, D*G*H]  after the nonlinearity
    c_seq_ptr,  # [S, T, B, D*H]  float32
    # outputs
    grad_preact_ptr,  # [T, B, D*G*H]
    grad_hx_ptr,  # [D, B, H]
    grad_cx_ptr,  # [S, D, B, H]
    arrived_ptr,  # [D, batch tiles, 32]  int32, zero: one counter a group, 128 bytes apart
    # sizes
    T,
    B,
    D,
    H: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    # strides of grad_output, in rows of D*H elements
    rows_grad_output_t,
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
    HAS_GRAD_OUTPUT: tl.constexpr,
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
        stride_seq = stride_state * T

        # Step T - 1 of the forward order; each step hands its previous state on, so that a state is loaded once.
        t = (T - 1) * (1 - pid_d)
        row_seq = (t * B + row) * D + pid_d
        state = load_tuple(output_ptr + row_seq * H, offs_seq, mask, 0, 1)
        dstate = load_tuple(grad_h_n_ptr + row_state * H, offs_state, mask, 0, 1)
        if S > 0:
            state = state + load_tuple(c_seq_ptr + row_seq * H, offs_seq, mask, stride_seq, S)
            dstate = dstate + load_tuple(grad_c_n_ptr + row_state * H, offs_state, mask, stride_state, S)

        for step in range(T):
            t = T - 1 - step - pid_d * (T - 1 - 2 * step)
            t_prev = t - 1 + 2 * pid_d
            first = step == T - 1  # the first step of the forward order starts from hx and cx

            row_seq = (t * B + row) * D + pid_d
            gates = load_tuple(gates_ptr + row_seq * GH, offs_gates, mask, H, G)
            row_prev = (t_prev * B + row) * D + pid_d
            offs_prev = offs_b[:, None] * tl.where(first, H, D * H) + offs_h[None, :]
            h_ptr = tl.where(first, hx_ptr + row_state * H, output_ptr + row_prev * H)
            state_prev = load_tuple(h_ptr, offs_prev, mask, 0, 1)
            if S > 0:
                c_ptr = tl.where(first, cx_ptr + row_state * H, c_seq_ptr + row_prev * H)
                stride_prev = tl.where(first, stride_state, stride_seq)
                state_prev = state_prev + load_tuple(c_ptr, offs_prev, mask, stride_prev, S)
            if HAS_GRAD_OUTPUT:
                grad_row = t * rows_grad_output_t + row * rows_grad_output_b
                dh = load_tuple(grad_output_ptr + grad_row * (D * H) + pid_d * H, offs_grad_output, mask, 0, 1)
                dstate = (dstate[0] + dh[0],) + dstate[1:]

            dpreact, dstate = STEP(gates, state_prev, state, dstate)
            state = state_prev

            dpreact_ptr = grad_preact_ptr + row_seq * GH
            store_tuple(dpreact_ptr, offs_gates, mask, H, dpreact, 0, G)
            if LOCAL:
                dh_recurrent = local_product(dpreact, w, G, BLOCK_H, BLOCK_B, TRANSPOSED, PRECISION)
            else:
                barrier.arrive(counter_ptr)
                barrier.wait(counter_ptr, GROUP * (step + 1), SPIN_LIMIT)
                dh_recurrent = exchanged_product(
                    dpreact_ptr,
                    D * GH,
                    mask_b,
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
            dstate = (dstate[0] + dh_recurrent,) + dstate[1:]

        store_tuple(grad_hx_ptr + row_state * H, offs_state, mask, 0, dstate, 0, 1)
        store_tuple(grad_cx_ptr + row_state * H, offs_state, mask, stride_state, dstate, 1, S)
