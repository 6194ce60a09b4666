r"""All T steps of one layer, backward through time, for any cell.

.. math::
    \mathrm{dpreact}_t, \mathrm{dstate}_{t-1} = \mathrm{STEP}(\mathrm{gates}_t, \mathrm{state}_{t-1}, \mathrm{state}_t,
    \mathrm{dstate}_t, \mathrm{vectors}), \qquad dh_{t-1} \mathrel{+}= \mathrm{dpreact}_t U

Dimensions: T steps, B batch, H hidden size, DH hidden units of a head, G gates, KEPT blocks that a step keeps and of
its gradients, of which the last G go through U, V vectors, S states beside h, D recurrences of the launch, R rows;
where row (t, b) lies, and what PACKED, RAGGED, RESETS and STACK mean, is told in `recurrence_fwd`. With CLIP every
element of the gradient of a state that enters a step is kept within -clip and clip.

A program owns BLOCK_H hidden units for one batch tile and one recurrence through all steps, and carries the gradients
of their states in registers. dh of a unit needs the gradients of all preactivations of its batch tile and head: every
program publishes its part in `grad_preact`, and awaits the whole of it (`exchange`). A group of one keeps them in
registers. The gradients of the weights and of the input follow from `grad_preact` outside, one product each.

The product with dpreact of one step stands at the beginning of the next iteration, behind the loads of that iteration:
so these are under way while the program waits, and one exchange a step is enough. An iteration more than there are
steps brings the gradients of the initial states; there, and before the first step, masks leave nothing to load or to
store.
"""

import triton
import triton.language as tl

from fusedlstm.kernels.exchange import awaited_product, prefetch_rows, publish
from fusedlstm.kernels.noise import hold_tuple_backward, step_words
from fusedlstm.kernels.norms import statistics
from fusedlstm.kernels.product import local_product, resident_weight
from fusedlstm.kernels.rows import load_lengths, load_resets, packed_rows
from fusedlstm.kernels.tiles import (
    add_tuple,
    as_float32,
    clamp_tuple,
    fetch_state,
    fetch_tuple,
    keep_units,
    load_state,
    load_tuple,
    round_tuple,
    select_tuple,
    store_tuple,
    zero_tuple,
)


@triton.jit(
    do_not_specialize=[
        "T",
        "B",
        "D",
        "R",
        "rows_grad_output_t",
        "rows_grad_output_b",
        "clip",
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
def recurrence_bwd_kernel(
    # inputs
    grad_output_ptr,  # [R, D*H]; [R, H] if STACK: of the last layer
    grad_c_seq_ptr,  # [S, R, D*H]  float32; [S, R, H] if STACK; read if HAS_GRAD_C_SEQ
    grad_h_n_ptr,  # [D, B, H]
    grad_c_n_ptr,  # [S, D, B, H]
    weight_ih_ptr,  # [D-1, G*HP, HP]  read if STACK: above the first layer, gates in the order of gradients
    weight_hh_ptr,  # [D, G*HP, DHP]
    vectors_ptr,  # [D, V, H]  read if V
    hx_ptr,  # [D, B, H]
    cx_ptr,  # [S, D, B, H]  float32
    lengths_ptr,  # [B]  int32, or int64 if RAGGED; read if RAGGED or PACKED
    first_row_ptr,  # [T+1]  int64; read if PACKED
    resets_ptr,  # [R]  bool; read if RESETS
    seed_ptr,  # [1]  int64; read if TRAINING
    factor_ptr,  # [D, B, H]  float32: of the h that enters the product; read if DROPS_H
    output_ptr,  # [R, D*H]  h of every step; these three: [D, R, ...] if STACK
    gates_ptr,  # [R, D*KEPT*H]  after the nonlinearity
    c_seq_ptr,  # [S, R, D*H]  float32
    statistics_ptr,  # [R, D, 4]  float32, of the norms; read if NORMS
    # outputs
    grad_preact_ptr,  # [R, D*KEPT*H]; [D, R, KEPT*H] if STACK
    grad_hx_ptr,  # [D, B, H]
    grad_cx_ptr,  # [S, D, B, H]
    exchanged_ptr,  # [R, D*KEPT*HP]  grad_preact with aligned rows, for the group; used if HP > H
    arrived_ptr,  # [D, heads, batch tiles, 32]  int32, zero: a counter a group, 128 bytes apart
    sums_ptr,  # [D, batch tiles, 4, BLOCK_B, SUMS]  int64, zero: what a step's norms exchange; used if NORMS
    # sizes
    T,
    B,
    D,
    R,
    clip,  # float32; used if CLIP
    H: tl.constexpr,
    HP: tl.constexpr,  # H with what aligns rows to 16 bytes; H if there are heads
    DH: tl.constexpr,  # hidden units of a head
    G: tl.constexpr,
    KEPT: tl.constexpr,
    V: tl.constexpr,
    S: tl.constexpr,
    NORMS: tl.constexpr,  # whether a step needs sums over the units of all programs (`norms`)
    # strides of grad_output, in rows; 0: one row stands for all
    rows_grad_output_t,  # not used if PACKED
    rows_grad_output_b,
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
    UPDATE: tl.constexpr,  # read if HOLDS
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    DOT: tl.constexpr,  # `product.Dot` of dpreact
    DOT_X: tl.constexpr,  # of that of the layer above, if STACK
    EXCHANGE: tl.constexpr,  # `exchange.Exchange`
    STACK: tl.constexpr,
    PACKED: tl.constexpr,
    RAGGED: tl.constexpr,
    RESETS: tl.constexpr,
    HOLDS: tl.constexpr,  # zoneout
    DROPS_CANDIDATE: tl.constexpr,
    DROPS_H: tl.constexpr,
    TRAINING: tl.constexpr,  # masks, and not their mean
    CLIP: tl.constexpr,
    HAS_GRAD_C_SEQ: tl.constexpr,
):
    GROUP: tl.constexpr = EXCHANGE.GROUP
    LOCAL: tl.constexpr = EXCHANGE.LOCAL
    DHP: tl.constexpr = DH + HP - H
    # Of a row, one a program, in tiles of the cell's form.
    SUMS: tl.constexpr = (GROUP + BLOCK_H - 1) // BLOCK_H * BLOCK_H
    G_PADDED: tl.constexpr = triton.next_power_of_2(G)
    KEPT_H: tl.constexpr = KEPT * H
    KEPT_HP: tl.constexpr = KEPT * HP
    FIRST: tl.constexpr = KEPT - G  # the first block that goes through U
    # Whether the group reads something else than grad_preact: its rows, aligned.
    APART: tl.constexpr = HP != H

    head = tl.program_id(0) // GROUP
    pid_h = tl.program_id(0) % GROUP
    pid_d = tl.program_id(2).to(tl.int64)  # direction, or layer
    if STACK:
        reverse, side_by_side, stride_d = pid_d * 0, 1, R
        below = pid_d + 1 < D
    else:
        reverse, side_by_side, stride_d = pid_d, D, 1
    unit = pid_h * BLOCK_H + tl.arange(0, BLOCK_H)  # of the head
    mask_h = unit < DH
    offs_h = head * DH + unit
    offs_b = tl.arange(0, BLOCK_B)
    offs_state = offs_b[:, None] * H + offs_h[None, :]  # [BLOCK_B, BLOCK_H]
    offs_seq = offs_b[:, None] * (side_by_side * H) + offs_h[None, :]
    offs_gates = offs_b[:, None] * (side_by_side * KEPT_H) + offs_h[None, :]
    offs_grad_output = offs_b.to(tl.int64)[:, None] * rows_grad_output_b * (side_by_side * H) + offs_h[None, :]

    weight_ptr = weight_hh_ptr + pid_d * (G * HP * DHP) + head * (DHP * DHP)
    w = resident_weight(weight_ptr, unit, mask_h, DOT)
    if STACK:  # of the layer above
        w_x = resident_weight(weight_ih_ptr + pid_d * (G * HP * HP), unit, mask_h & below, DOT_X)
    # what the group reads of each other
    group_ptr = grad_preact_ptr
    if APART:
        group_ptr = exchanged_ptr
    offs_group = offs_b[:, None] * (side_by_side * KEPT_HP) + (head * DHP + unit)[None, :]

    vectors = ()
    if V > 0:
        vectors = load_tuple(vectors_ptr + pid_d * (V * H), offs_h[None, :], mask_h[None, :], H, V)

    num_tiles_b = tl.cdiv(B, BLOCK_B)
    for tile_b in range(tl.program_id(1).to(tl.int64), num_tiles_b, tl.num_programs(1)):
        row = tile_b * BLOCK_B
        mask_b = row + offs_b < B
        mask = mask_b[:, None] & mask_h[None, :]
        heads = tl.num_programs(0) // GROUP
        group = (pid_d * heads + head) * num_tiles_b + tile_b
        counter_ptr = arrived_ptr + group * 32
        slots_ptr = sums_ptr + group * (4 * BLOCK_B * SUMS)
        row_state = pid_d * B + row
        stride_state = D.to(tl.int64) * B * H
        stride_seq = R.to(tl.int64) * D * H
        length = 0
        if PACKED:
            steps = tl.load(lengths_ptr + row)  # the longest sequence of the tile
        elif RAGGED:
            length = load_lengths(lengths_ptr, row + offs_b, mask_b, T)  # [BLOCK_B]
            steps = tl.max(length)
        else:
            steps = T

        # The last step of the forward order; each step hands its previous state on, so that a state is loaded once.
        t = tl.maximum(steps - 1, 0) * (1 - reverse)
        sequences = 0
        if PACKED:
            first_row, sequences = packed_rows(first_row_ptr, t, True)
            mask_t = row + offs_b < sequences
        else:
            first_row = t * B
            mask_t = mask_b
            if RAGGED:
                mask_t = t < length
        mask_first = mask_t[:, None] & mask_h[None, :]
        row_seq = (first_row + row) * side_by_side + pid_d * stride_d
        state = load_state(output_ptr + row_seq * H, c_seq_ptr + row_seq * H, offs_seq, mask_first, stride_seq, S)

        # What an iteration leaves to the next: its dpreact, the gradients of the states before it but for dpreact U,
        # and which sequences those are of.
        dstate = load_state(
            grad_h_n_ptr + row_state * H, grad_c_n_ptr + row_state * H, offs_state, mask, stride_state, S
        )
        if DROPS_H:
            factor = tl.load(factor_ptr + row_state * H + offs_state, mask=mask, other=0.0)
        later_ptr = group_ptr  # dpreact of the iteration before
        if LOCAL:
            dpreact = round_tuple(zero_tuple(G, BLOCK_B, BLOCK_H), weight_ptr, G)
        mask_later = offs_b < 0  # [BLOCK_B]
        if RESETS:
            reset_later = tl.zeros((BLOCK_B,), tl.int8)

        for step in range(steps + 1):
            t = steps - 1 - step - reverse * (steps - 1 - 2 * step)
            t_prev = t - 1 + 2 * reverse
            # The first step of the forward order starts from hx and cx.
            sequences_prev = 0
            mask_x = mask_later
            if PACKED:
                mask_t = row + offs_b < sequences
                prev_row, sequences_prev = packed_rows(first_row_ptr, t_prev, (t_prev >= 0) & (t_prev < T))
                begins = (row + offs_b >= sequences_prev)[:, None]  # [BLOCK_B, 1]
                mask_prev = (row + offs_b < tl.maximum(sequences, sequences_prev))[:, None] & mask_h[None, :]
            else:
                prev_row = t_prev * B
                mask_t = mask_b & (step < steps)
                begins = step == steps - 1
                if RAGGED:
                    mask_t = (t < length) & (step < steps)
                    mask_x = mask_b & (step > 0)
                    begins = (tl.where(reverse == 0, t == 0, t_prev == length))[:, None]
                    mask_prev = ((t - 1 + reverse < length) & (step < steps))[:, None] & mask_h[None, :]
            mask = mask_t[:, None] & mask_h[None, :]
            row_seq = (first_row + row) * side_by_side + pid_d * stride_d

            # fetched before anybody waits, and not looked at until then
            if RESETS:
                reset = load_resets(
                    resets_ptr, t, reverse, row, offs_b, B, steps, length, mask_t, first_row, prev_row, sequences_prev,
                    PACKED, RAGGED,
                )  # fmt: skip
            gates = fetch_tuple(gates_ptr + row_seq * KEPT_H, offs_gates, mask, H, KEPT)
            if NORMS:
                of_row = statistics_ptr + row_seq * 4 + offs_b[:, None] * (side_by_side * 4)
                norm = fetch_tuple(of_row, 0, mask_t[:, None], 1, 4)
            row_prev = (prev_row + row) * side_by_side + pid_d * stride_d
            if PACKED or RAGGED:  # each sequence from its own place
                before = fetch_state(
                    output_ptr + row_prev * H, c_seq_ptr + row_prev * H, offs_seq, mask_prev & ~begins, stride_seq, S
                )
                initial = fetch_state(
                    hx_ptr + row_state * H, cx_ptr + row_state * H, offs_state, mask & begins, stride_state, S
                )
            else:
                h_ptr = tl.where(begins, hx_ptr + row_state * H, output_ptr + row_prev * H)
                c_ptr = tl.where(begins, cx_ptr + row_state * H, c_seq_ptr + row_prev * H)
                offs_prev = offs_b[:, None] * tl.where(begins, H, side_by_side * H) + offs_h[None, :]
                before = fetch_state(h_ptr, c_ptr, offs_prev, mask, tl.where(begins, stride_state, stride_seq), S)
            mask_grad = mask
            if PACKED:
                grad_row = (first_row + row) * rows_grad_output_b
            else:
                grad_row = t * rows_grad_output_t + row * rows_grad_output_b
            grad_ptr = grad_output_ptr + grad_row * (side_by_side * H)
            if STACK:
                mask_grad = mask & ~below
            else:
                grad_ptr += pid_d * H
            grad_output = fetch_tuple(grad_ptr, offs_grad_output, mask_grad, 0, 1)
            if HAS_GRAD_C_SEQ:
                mask_grad = mask
                grad_c_ptr = grad_c_seq_ptr + row_seq * H
                stride_grad_c = stride_seq
                if STACK:
                    mask_grad = mask & ~below
                    grad_c_ptr = grad_c_seq_ptr + (first_row + row) * H
                    stride_grad_c = R.to(tl.int64) * H
                grad_c = fetch_tuple(grad_c_ptr, offs_seq, mask_grad, stride_grad_c, S)

            if EXCHANGE.PREFETCH != "":
                # The row after the next: what filled it may have pushed it out of the L2 by now.
                ahead = tl.minimum(tl.maximum(first_row + row + offs_b - (2 - 4 * reverse) * B, 0), R - 1)
                ahead = ahead * side_by_side + pid_d * stride_d
                gate = tl.minimum(tl.arange(0, G_PADDED), G - 1)
                p_ahead = (
                    group_ptr + ahead[:, None] * KEPT_HP + ((FIRST + gate) * HP)[None, :] + head * DHP + pid_h * BLOCK_H
                )
                prefetch_rows(p_ahead, EXCHANGE)

            # what the iteration before left
            if LOCAL:
                dh_recurrent = local_product(dpreact, w, DOT)
            else:
                p_x = later_ptr + FIRST * HP + head * DHP + offs_b * (side_by_side * KEPT_HP)
                dh_recurrent = awaited_product(counter_ptr, GROUP * step, p_x, mask_x, mask_x, w, DOT, EXCHANGE)
            if DROPS_H:
                dh_recurrent = dh_recurrent * factor
            stepped = (dstate[0] + dh_recurrent,) + dstate[1:]
            if RESETS:
                keep = reset_later[:, None] == 0
                stepped = select_tuple(keep, stepped, zero_tuple(1 + S, BLOCK_B, BLOCK_H), 1 + S)
            if CLIP:
                stepped = clamp_tuple(stepped, clip, 1 + S)
            if CLIP or PACKED or RAGGED:
                dstate = select_tuple(mask_later[:, None], stepped, dstate, 1 + S)
            else:
                dstate = stepped
            if step == steps:
                mask = mask_b[:, None] & mask_h[None, :]
                store_tuple(grad_hx_ptr + row_state * H, offs_state, mask, 0, dstate, 0, 1)
                store_tuple(grad_cx_ptr + row_state * H, offs_state, mask, stride_state, dstate, 1, S)

            dh = dstate[0]
            dcell = dstate[1:]
            dh = dh + grad_output[0].to(tl.float32)
            if HAS_GRAD_C_SEQ:
                dcell = add_tuple(dcell, grad_c, S)
            if STACK:
                if below:  # what the layer above hands down
                    p_above = group_ptr + (row_seq + stride_d) * KEPT_HP + offs_b * KEPT_HP
                    above_ptr = counter_ptr + num_tiles_b * 32
                    target = GROUP * tl.minimum(step + 1, steps)
                    dh += awaited_product(above_ptr, target, p_above, mask_t, mask_t, w_x, DOT_X, EXCHANGE)

            state_prev = as_float32(before, 1 + S)
            if PACKED or RAGGED:
                state_prev = add_tuple(state_prev, as_float32(initial, 1 + S), 1 + S)
            entered = state_prev
            if RESETS:
                entered = select_tuple(reset[:, None] == 0, state_prev, zero_tuple(1 + S, BLOCK_B, BLOCK_H), 1 + S)
                reset_later = reset
            kept = as_float32(gates, KEPT)
            dstepped = (dh,) + dcell
            drop = 1.0
            words = ()
            if TRAINING:
                tile_row = first_row_of_all + first_row + row
                words = step_words(seed_ptr, first_recurrence + pid_d, tile_row, offs_b, offs_h)
                if DROPS_CANDIDATE:
                    drop = tl.where(words[2] < below_candidate, 0.0, scale_candidate)
            if HOLDS:  # the state that the step itself made is in no memory
                state = UPDATE(kept, entered, drop)
                dstepped, dheld = hold_tuple_backward(
                    dstepped, words, below_h, below_c, rate_h, rate_c, TRAINING, 1 + S
                )
            if NORMS:
                rows = (slots_ptr, counter_ptr + 16, (2 + HOLDS) * step + HOLDS, pid_h, mask_h[None, :])
                if HOLDS:
                    norm = norm[:2] + statistics(state[1], mask_h[None, :], 1, rows, -1, H, EXCHANGE)
                dpreact_all, dprev = STEP(kept, entered, state, dstepped, vectors, drop, rows + norm, H, EXCHANGE)
            else:
                dpreact_all, dprev = STEP(kept, entered, state, dstepped, vectors, drop)
            if HOLDS:
                dprev = add_tuple(dprev, dheld, 1 + S)
            state = state_prev

            dpreact_ptr = grad_preact_ptr + row_seq * KEPT_H
            later_ptr = group_ptr + row_seq * KEPT_HP
            rows_store = mask_t
            if RAGGED:
                rows_store = mask_b & (step < steps)
                dpreact_all = select_tuple(mask_t[:, None], dpreact_all, zero_tuple(KEPT, BLOCK_B, BLOCK_H), KEPT)
            mask_store = rows_store[:, None] & mask_h[None, :]
            if APART:
                mask_group = rows_store[:, None] & (unit < DHP)[None, :]
                # A cell may make anything of no unit, and zero weights times NaN are NaN.
                aligned = keep_units(dpreact_all, mask_h, KEPT)
                publish(later_ptr, offs_group, mask_group, HP, aligned, KEPT, counter_ptr, EXCHANGE)
                store_tuple(dpreact_ptr, offs_gates, mask_store, H, dpreact_all, 0, KEPT)
            else:
                publish(dpreact_ptr, offs_gates, mask_store, H, dpreact_all, KEPT, counter_ptr, EXCHANGE)
            if LOCAL:
                left = dpreact_all[FIRST:]
                if DH < BLOCK_H:
                    left = keep_units(left, mask_h, G)
                dpreact = round_tuple(left, weight_ptr, G)
            mask_later = mask_t
            first_row = prev_row
            sequences = sequences_prev
            if PACKED or RAGGED:
                dstate = select_tuple(mask_t[:, None], dprev, dstate, 1 + S)
            else:
                dstate = dprev

        if RAGGED:
            mask = mask_b[:, None] & mask_h[None, :]
            for t in range(steps, T):  # no sequence of the tile comes so far
                dpreact_ptr = grad_preact_ptr + ((B.to(tl.int64) * t + row) * side_by_side + pid_d * stride_d) * KEPT_H
                store_tuple(dpreact_ptr, offs_gates, mask, H, zero_tuple(KEPT, BLOCK_B, BLOCK_H), 0, KEPT)
