r"""One step of one layer, backward through time, for any cell: the product first, so that nobody waits.

.. math::
    dh_t = \mathrm{dpreact}_{t+1} U + \mathrm{grad\_output}_t + \ldots, \qquad
    \mathrm{dpreact}_t, \mathrm{dstate} = \mathrm{STEP}(\mathrm{gates}_t, \mathrm{state}_{t-1}, \mathrm{state}_t,
    \mathrm{dstate}_t, \mathrm{vectors})

Dimensions: T steps, B batch, H hidden size, DH hidden units of a head, G gates, KEPT blocks that a step keeps and of
its gradients, of which the last G go through U, V vectors, S states beside h, D directions. Row (t, b) is t * B + b. A
program owns BLOCK_H hidden units of a head for one batch tile and one direction.

Launch `step` counts from the last step of the forward order: 0 has no later step, hence no product; T has none of its
own, and leaves the gradients of the initial states. `dstate` holds what a launch leaves to the next: the gradients of
the states that do not pass through `weight_hh`, in float32, in two places by turns. With CLIP every element of the
gradient of a state that enters a step is kept within -clip and clip.
"""

import triton
import triton.language as tl

from fusedlstm.kernels.product import add_product, no_product, product_of
from fusedlstm.kernels.tiles import (
    States,
    add_tuple,
    clamp_tuple,
    load_state,
    load_tuple,
    store_tuple,
    units_of_program,
)


@triton.jit(do_not_specialize=["step", "T", "B", "D", "clip", "rows_grad_output_t", "rows_grad_output_b"])
def step_bwd_kernel(
    # inputs
    grad_output_ptr,  # [T, B, D*H]
    grad_c_seq_ptr,  # [S, T, B, D*H]  float32; read if HAS_GRAD_C_SEQ
    weight_hh_ptr,  # [G*H, DH]  direction 0
    weight_hh_reverse_ptr,  # [G*H, DH]  direction 1
    vectors_ptr,  # [D, V, H]  read if V
    hx_ptr,  # [D, B, H]
    cx_ptr,  # [S, D, B, H]  float32
    output_ptr,  # [T, B, D*H]  h of every step
    gates_ptr,  # [T, B, D*KEPT*H]  after the nonlinearity
    c_seq_ptr,  # [S, T, B, D*H]  float32
    # outputs
    grad_preact_ptr,  # [T, B, D*KEPT*H]  read at the later step, written at this one
    dstate_ptr,  # [2, 1+S, D, B, H]  float32; read at step % 2, written at the other
    # sizes
    step,
    T,
    B,
    D,
    clip,  # float32; used if CLIP
    H: tl.constexpr,
    DH: tl.constexpr,
    G: tl.constexpr,
    KEPT: tl.constexpr,
    V: tl.constexpr,
    S: tl.constexpr,
    # strides of grad_output, in rows of D*H elements; 0: one row stands for all
    rows_grad_output_t,
    rows_grad_output_b,
    # cell, tiling and flags
    STEP: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    DOT: tl.constexpr,  # `product.StreamedDot`
    CLIP: tl.constexpr,
    HAS_GRAD_C_SEQ: tl.constexpr,
):
    KEPT_H: tl.constexpr = KEPT * H
    GROUP: tl.constexpr = (DH + BLOCK_H - 1) // BLOCK_H  # programs of a head
    # The reduction: all gates in one piece, or with heads the head's part of every gate.
    PIECES: tl.constexpr = 1 if DH == H else G
    PIECE: tl.constexpr = G * H if DH == H else DH
    CHUNKS: tl.constexpr = (PIECE + DOT.BLOCK_K - 1) // DOT.BLOCK_K

    units = units_of_program(GROUP, DH, BLOCK_H)
    row = tl.program_id(1).to(tl.int64) * BLOCK_B
    pid_d = tl.program_id(2).to(tl.int64)
    forward = 1 - 2 * pid_d  # from a step to the next of the forward order
    t = T - 1 - step - pid_d * (T - 1 - 2 * step)
    offs_b = tl.arange(0, BLOCK_B)
    offs_h = units.offs[None, :]
    mask_b = row + offs_b < B
    mask_h = units.mask[None, :]
    mask = mask_b[:, None] & mask_h
    offs_state = offs_b[:, None] * H + offs_h  # [BLOCK_B, BLOCK_H]
    offs_seq = offs_b[:, None] * (D * H) + offs_h
    offs_gates = offs_b[:, None] * (D * KEPT_H) + offs_h
    row_state = pid_d * B + row
    row_seq = (t * B + row) * D + pid_d
    row_later = row_seq + forward * B * D
    stride_state = D.to(tl.int64) * B * H
    stride_seq = T.to(tl.int64) * B * D * H

    # What the launch before left, and dh += dpreact U of the later step.
    into_ptr = dstate_ptr + (step % 2 * (1 + S) * stride_state + row_state * H)
    out_ptr = dstate_ptr + ((step + 1) % 2 * (1 + S) * stride_state + row_state * H)
    dstate = load_tuple(into_ptr, offs_state, mask, stride_state, 1 + S)
    first = units.head.to(tl.int64) * DH  # column of the gradients, row of the weight
    p_x = grad_preact_ptr + row_later * KEPT_H + (KEPT - G) * H + first + offs_b * (D * KEPT_H)
    p_w = tl.where(pid_d == 0, weight_hh_ptr, weight_hh_reverse_ptr) + first * DH + units.of_head
    chunks = tl.where(step == 0, 0, CHUNKS)
    acc = no_product(DOT)
    for g in tl.static_range(PIECES):
        acc = add_product(acc, p_x + g * H, mask_b, p_w + g * H * DH, units.mask, chunks, PIECE, DH, DOT)
    dstate = (dstate[0] + product_of(acc, DOT),) + dstate[1:]
    if CLIP:
        # What the caller gives for the final states is not clipped.
        dstate = clamp_tuple(dstate, tl.where(step == 0, float("inf"), clip))

    if step == T:
        store_tuple(out_ptr, offs_state, mask, stride_state, dstate, 0, 1 + S)
    else:
        # What is given for the states of this step.
        grad_row = t * rows_grad_output_t + row * rows_grad_output_b
        offs_grad = offs_b.to(tl.int64)[:, None] * rows_grad_output_b * (D * H) + offs_h
        dh = load_tuple(grad_output_ptr + (grad_row * D + pid_d) * H, offs_grad, mask, 0, 1)
        dstate = (dstate[0] + dh[0],) + dstate[1:]
        if HAS_GRAD_C_SEQ:
            dc = load_tuple(grad_c_seq_ptr + row_seq * H, offs_seq, mask, stride_seq, S)
            dstate = (dstate[0],) + add_tuple(dstate[1:], dc)

        # dpreact, dprev = STEP(gates, state_prev, state, dstate, vectors). The first step starts from hx and cx.
        gates = load_tuple(gates_ptr + row_seq * KEPT_H, offs_gates, mask, H, KEPT)
        saved = States(output_ptr + row_seq * H, c_seq_ptr + row_seq * H, offs_seq, stride_seq)
        state = load_state(saved, mask, S)
        begins = step == T - 1
        row_prev = row_seq - forward * B * D
        h_ptr = tl.where(begins, hx_ptr + row_state * H, output_ptr + row_prev * H)
        c_ptr = tl.where(begins, cx_ptr + row_state * H, c_seq_ptr + row_prev * H)
        offs_prev = offs_b[:, None] * tl.where(begins, H, D * H) + offs_h
        before = States(h_ptr, c_ptr, offs_prev, tl.where(begins, stride_state, stride_seq))
        state_prev = load_state(before, mask, S)
        vectors = ()
        if V > 0:
            vectors = load_tuple(vectors_ptr + pid_d * (V * H), offs_h, mask_h, H, V)
        dpreact, dprev = STEP(gates, state_prev, state, dstate, vectors, 1.0)
        store_tuple(grad_preact_ptr + row_seq * KEPT_H, offs_gates, mask, H, dpreact, 0, KEPT)
        store_tuple(out_ptr, offs_state, mask, stride_state, dprev, 0, 1 + S)
