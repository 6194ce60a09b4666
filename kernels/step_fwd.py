r"""One step of one layer, forward, for any cell.

.. math::
    \mathrm{preact\_x} = x W^T + b, \qquad \mathrm{preact\_h} = h U^T, \qquad
    \mathrm{gates}, \mathrm{state}' = \mathrm{STEP}(\mathrm{preact\_x}, \mathrm{preact\_h}, \mathrm{state},
    \mathrm{vectors})

Dimensions: T steps, B batch, I input size, H hidden size, DH hidden units of a head, G gates, KEPT blocks that a step
keeps, V vectors, S states beside h, D directions. Row (t, b) is t * B + b.

A program owns BLOCK_H hidden units of a head, with all their gates, for one batch tile and one direction. It needs h of
the step before only, so nobody waits, and there may be more programs than the device holds at once. Two uses:

- HAS_INPUT: T is 1, and both products are taken here: every weight is read once.
- else launch `step` of T: preact_x is ready-made, h comes from `output`, c from `c_seq`. Direction 1 runs from the last
  step to the first.
"""

import triton
import triton.language as tl

from fusedlstm.kernels.product import add_product, no_product, product_of
from fusedlstm.kernels.tiles import (
    States,
    add_tuple,
    gate_columns,
    load_state,
    load_tuple,
    split_gates,
    store_state,
    store_tuple,
    units_of_program,
)


@triton.jit(
    do_not_specialize=[
        "step",
        "T",
        "B",
        "D",
        "first_state",
        "rows_states",
        "rows_input_b",
        "rows_preact_d",
        "rows_preact_t",
        "rows_preact_b",
    ]
)
def step_fwd_kernel(
    # inputs
    input_ptr,  # [B, I]  read if HAS_INPUT, as are its weights and biases
    weight_ih_ptr,  # [G*H, I]  direction 0
    weight_ih_reverse_ptr,  # [G*H, I]  direction 1
    bias_ih_ptr,  # [G*H]  these two: read if HAS_BIAS
    bias_ih_reverse_ptr,  # [G*H]
    bias_hh_ptr,  # [G*H]  these two: read if HAS_BIAS_HH
    bias_hh_reverse_ptr,  # [G*H]
    preact_x_ptr,  # [D, T, B, G*H]  x_t @ weight_ih^T + biases; read if not HAS_INPUT
    weight_hh_ptr,  # [G*H, DH]  direction 0
    weight_hh_reverse_ptr,  # [G*H, DH]  direction 1
    vectors_ptr,  # [D, V, H]  read if V
    hx_ptr,  # [D, B, H]  of a stack: row first_state is that of direction 0 and sequence 0
    cx_ptr,  # [S, D, B, H]  the same; float32 unless HAS_INPUT
    # outputs
    output_ptr,  # [T, B, D*H]  h of every step
    h_n_ptr,  # [D, B, H]  like hx; written by the last step
    c_n_ptr,  # [S, D, B, H]  like cx; written by the last step
    gates_ptr,  # [T, B, D*KEPT*H]  after the nonlinearity; written if SAVE_GATES
    c_seq_ptr,  # [S, T, B, D*H]  float32; if not SAVE_STATES [S, 2, B, D*H], by turns, and not written if HAS_INPUT
    # sizes
    step,
    T,
    B,
    D,
    I: tl.constexpr,
    H: tl.constexpr,
    DH: tl.constexpr,
    G: tl.constexpr,
    KEPT: tl.constexpr,
    V: tl.constexpr,
    S: tl.constexpr,
    first_state,
    rows_states,  # rows of H elements from one state to the next in cx
    # strides of input in rows of I elements, of preact_x in rows of G*H
    rows_input_b,
    rows_preact_d,
    rows_preact_t,
    rows_preact_b,
    # cell, tiling and flags
    STEP: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    DOT: tl.constexpr,  # `product.StreamedDot`
    HAS_INPUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_BIAS_HH: tl.constexpr,
    SAVE_GATES: tl.constexpr,
    SAVE_STATES: tl.constexpr,
):
    G_PADDED: tl.constexpr = triton.next_power_of_2(G)
    GROUP: tl.constexpr = (DH + BLOCK_H - 1) // BLOCK_H  # programs of a head
    CHUNKS: tl.constexpr = (DH + DOT.BLOCK_K - 1) // DOT.BLOCK_K
    CHUNKS_X: tl.constexpr = (I + DOT.BLOCK_K - 1) // DOT.BLOCK_K
    GH: tl.constexpr = G * H

    units = units_of_program(GROUP, DH, BLOCK_H)
    row = tl.program_id(1).to(tl.int64) * BLOCK_B
    pid_d = tl.program_id(2).to(tl.int64)
    is_reverse = pid_d != 0
    t = step + pid_d * (T - 1 - 2 * step)
    offs_b = tl.arange(0, BLOCK_B)
    offs_h = units.offs[None, :]
    mask_b = row + offs_b < B
    mask_h = units.mask[None, :]
    mask = mask_b[:, None] & mask_h
    offs_state = offs_b[:, None] * H + offs_h  # [BLOCK_B, BLOCK_H]
    offs_seq = offs_b[:, None] * (D * H) + offs_h
    row_state = first_state + pid_d * B + row
    row_seq = (t * B + row) * D + pid_d
    stride_state = rows_states.to(tl.int64) * H

    # This program's columns of the transposed weights.
    row_n, mask_n = gate_columns(units, H, G, G_PADDED, DH, BLOCK_H)
    row_n = row_n.to(tl.int64)
    p_w = tl.where(is_reverse, weight_hh_reverse_ptr, weight_hh_ptr) + row_n * DH

    # The state before the step; and preact_x = x W^T, or as it is in memory.
    if HAS_INPUT:
        before = States(hx_ptr + row_state * H, cx_ptr + row_state * H, offs_state, stride_state)
        p_h = hx_ptr + units.head * DH + (row_state + offs_b) * H
        state = load_state(before, mask, S)
        p_x = input_ptr + (row + offs_b) * rows_input_b * I
        p_w_x = tl.where(is_reverse, weight_ih_reverse_ptr, weight_ih_ptr) + row_n * I
        acc_x = add_product(no_product(DOT), p_x, mask_b, p_w_x, mask_n, CHUNKS_X, I, 1, DOT)
    else:
        # c of the step before, and of this one, in c_seq
        slot_prev, slots = t - 1 + 2 * pid_d, T
        if not SAVE_STATES:
            slot_prev, slots = (step + 1) % 2 + pid_d * 0, 2
        begins = step == 0
        h_ptr = tl.where(begins, hx_ptr + row_state * H, output_ptr + (row_seq + (2 * pid_d - 1) * B * D) * H)
        c_ptr = tl.where(begins, cx_ptr + row_state * H, c_seq_ptr + ((slot_prev * B + row) * D + pid_d) * H)
        stride_h = tl.where(begins, H, D * H)
        stride_c = tl.where(begins, stride_state, slots * B.to(tl.int64) * D * H)
        state = load_state(States(h_ptr, c_ptr, offs_b[:, None] * stride_h + offs_h, stride_c), mask, S)
        p_h = h_ptr + units.head * DH + offs_b * stride_h

    # preact_h = h U^T
    acc_h = add_product(no_product(DOT), p_h, mask_b, p_w, mask_n, CHUNKS, DH, 1, DOT)
    preact_h = split_gates(product_of(acc_h, DOT), BLOCK_B, BLOCK_H, G_PADDED)
    if HAS_INPUT:
        preact_x = split_gates(product_of(acc_x, DOT), BLOCK_B, BLOCK_H, G_PADDED)
        if HAS_BIAS:
            bias_ih_ptr = tl.where(is_reverse, bias_ih_reverse_ptr, bias_ih_ptr)
            bias_ih = load_tuple(bias_ih_ptr, offs_h, mask_h, H, G)
            preact_x = add_tuple(bias_ih, preact_x)
        if HAS_BIAS_HH:
            bias_hh_ptr = tl.where(is_reverse, bias_hh_reverse_ptr, bias_hh_ptr)
            bias_hh = load_tuple(bias_hh_ptr, offs_h, mask_h, H, G)
            preact_h = add_tuple(bias_hh, preact_h)
    else:
        preact_row = pid_d * rows_preact_d + t * rows_preact_t + row * rows_preact_b
        offs_preact = offs_b.to(tl.int64)[:, None] * rows_preact_b * GH + offs_h
        preact_x = load_tuple(preact_x_ptr + preact_row * GH, offs_preact, mask, H, G)

    vectors = ()
    if V > 0:
        vectors = load_tuple(vectors_ptr + pid_d * (V * H), offs_h, mask_h, H, V)
    gates, state = STEP(preact_x, preact_h, state, vectors, 1.0)

    store_tuple(output_ptr + row_seq * H, offs_seq, mask, 0, state, 0, 1)
    if SAVE_GATES:
        offs_gates = offs_b[:, None] * (D * KEPT * H) + offs_h
        store_tuple(gates_ptr + row_seq * (KEPT * H), offs_gates, mask, H, gates, 0, KEPT)
    if SAVE_STATES:
        store_tuple(c_seq_ptr + row_seq * H, offs_seq, mask, T * B.to(tl.int64) * D * H, state, 1, S)
    elif not HAS_INPUT:
        row_c = (step % 2 * B + row) * D + pid_d
        store_tuple(c_seq_ptr + row_c * H, offs_seq, mask, 2 * B.to(tl.int64) * D * H, state, 1, S)
    if step == T - 1:
        final = States(h_n_ptr + row_state * H, c_n_ptr + row_state * H, offs_state, stride_state)
        store_state(final, mask, state, S)
