r"""All T steps of one layer, forward, for any cell.

.. math::
    \mathrm{preact\_h}_t = h_{t-1} U^T, \qquad
    \mathrm{gates}_t, \mathrm{state}_t = \mathrm{STEP}(\mathrm{preact\_x}_t, \mathrm{preact\_h}_t, \mathrm{state}_{t-1},
    \mathrm{vectors})

Dimensions: T steps, B batch, H hidden size, DH hidden units of a head, G gates, KEPT blocks that a step keeps, V
vectors, S states beside h (`fusedlstm.cells`), D recurrences of the launch, R rows. `rows` tells which rows a step has,
and what LAYOUT says of them; `noise` what NOISE says.

A program owns BLOCK_H hidden units, with all their gates, for one batch tile and one recurrence, through all steps; its
states never leave its registers. With heads, a unit sees only h of its own head. The GROUP programs of one batch tile,
head and recurrence need each other's h: every program publishes its part of h_t in `output`, and awaits the whole of it
at the next step (`exchange`). A group of one keeps h in registers.

With STACK the layers of a stack run as a wave: layer l does step t beside layer l + 1 doing step t - 1, and what a
layer adds to preact_x above the bias is its product with the h_t of the layer below.
"""

import triton
import triton.language as tl

from fusedlstm.kernels.exchange import awaited_product, prefetch, publish
from fusedlstm.kernels.noise import Noise, drop_h, hold, load_factor, step_noise
from fusedlstm.kernels.norms import Slots, statistics
from fusedlstm.kernels.product import local_product, resident_weight
from fusedlstm.kernels.rows import (
    Batch,
    batch_tile,
    beginnings,
    cut,
    forward_rows,
    no_rows,
    recurrence_of,
    start_later,
    strided_start,
    unless_ended,
    with_resets,
    zero_padding,
)
from fusedlstm.kernels.tiles import (
    States,
    add_tuple,
    as_float32,
    fetch_tuple,
    gate_columns,
    keep_units,
    load_state,
    load_tuple,
    split_gates,
    store_state,
    store_tuple,
    units_of_program,
    zero_tuple,
)


@triton.jit(
    do_not_specialize=[
        "T",
        "B",
        "D",
        "R",
        "rows_preact_d",
        "rows_preact_t",
        "rows_preact_b",
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
def recurrence_fwd_kernel(
    # inputs
    preact_x_ptr,  # [D, R, G*H]  x_t @ weight_ih^T + biases; [1, R, G*H] if STACK: of layer 0
    bias_ptr,  # [D-1, G*H]  read if STACK: of the layers above the first
    weight_ih_ptr,  # [D-1, G*HP, HP]  the same
    weight_hh_ptr,  # [D, G*HP, DHP]
    vectors_ptr,  # [D, V, H]  read if V
    hx_ptr,  # [D, B, H]
    cx_ptr,  # [S, D, B, H]  float32
    lengths_ptr,  # [B]  int32, or int64 if RAGGED; read if RAGGED or PACKED
    first_row_ptr,  # [T+1]  int64; read if PACKED
    resets_ptr,  # [R]  bool; read if RESETS
    seed_ptr,  # [1]  int64; read if TRAINING
    factor_ptr,  # [D, B, H]  float32: of the h that enters the product; read if DROPS_H
    hx_entering_ptr,  # [D, B, HP]  hx times its factor; read if APART
    # outputs
    output_ptr,  # [R, D*H]  h of every step; these three: [D, R, ...] if STACK
    h_n_ptr,  # [D, B, H]
    c_n_ptr,  # [S, D, B, H]
    gates_ptr,  # [R, D*KEPT*H]  after the nonlinearity; written if SAVE_GATES
    c_seq_ptr,  # [S, R, D*H]  float32; written if SAVE_STATES
    entering_ptr,  # [R, D*HP]  h of every step times its factor, for the group; used if APART
    arrived_ptr,  # [D, heads, batch tiles, 32]  int32, zero: a counter a group, 128 bytes apart
    sums_ptr,  # [D, batch tiles, 4, BLOCK_B, SUMS]  int64, zero: what a step's norms exchange; used if NORMS
    # sizes
    T,
    B,
    D,
    R,
    H: tl.constexpr,
    HP: tl.constexpr,  # H with what aligns rows to 16 bytes; H if there are heads
    DH: tl.constexpr,  # hidden units of a head
    G: tl.constexpr,
    KEPT: tl.constexpr,
    V: tl.constexpr,
    S: tl.constexpr,
    NORMS: tl.constexpr,  # how many sums over the units of all programs a step needs (`norms`)
    # strides of preact_x, in rows of G*H elements
    rows_preact_d,
    rows_preact_t,  # not used if PACKED
    rows_preact_b,
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
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    DOT: tl.constexpr,  # `product.Dot` of h
    DOT_X: tl.constexpr,  # of the h of the layer below, if STACK
    EXCHANGE: tl.constexpr,  # `exchange.Exchange`
    LAYOUT: tl.constexpr,  # `rows.RowLayout`
    NOISE: tl.constexpr,  # `noise.NoiseKinds`
    SAVE_GATES: tl.constexpr,
    SAVE_STATES: tl.constexpr,
):
    GROUP: tl.constexpr = EXCHANGE.GROUP
    LOCAL: tl.constexpr = EXCHANGE.LOCAL
    STACK: tl.constexpr = LAYOUT.STACK
    # Whether the group reads something else of a step than its output: rows that are dropped, or aligned.
    APART: tl.constexpr = NOISE.DROPS_H or HP != H
    DHP: tl.constexpr = DH + HP - H
    # Of a row, one a program, in tiles of the cell's form.
    SUMS: tl.constexpr = (GROUP + BLOCK_H - 1) // BLOCK_H * BLOCK_H
    G_PADDED: tl.constexpr = triton.next_power_of_2(G)
    GH: tl.constexpr = G * H
    KEPT_H: tl.constexpr = KEPT * H

    units = units_of_program(GROUP, DH, BLOCK_H)
    batch = Batch(T, B, D, R, lengths_ptr, first_row_ptr, resets_ptr)
    noise = Noise(
        seed_ptr, first_recurrence, first_row_of_all, below_h, below_c, below_candidate, rate_h, rate_c, scale_candidate
    )
    pid_d = tl.program_id(2).to(tl.int64)
    recurrence = recurrence_of(pid_d, batch, LAYOUT)
    if STACK:
        # Above layer 0 the bias stands in every row of preact_x.
        above = pid_d > 0
        preact_ptr = tl.where(above, bias_ptr + (pid_d - 1) * GH, preact_x_ptr)
        rows_t = tl.where(above, 0, rows_preact_t)
        rows_b = tl.where(above, 0, rows_preact_b)
    else:
        preact_ptr = preact_x_ptr + pid_d * rows_preact_d * GH
        rows_t = rows_preact_t
        rows_b = rows_preact_b

    # Offsets of a tile, [BLOCK_B, BLOCK_H], in every kind of row.
    offs_b = tl.arange(0, BLOCK_B)[:, None]
    offs_h = units.offs[None, :]
    offs_state = offs_b * H + offs_h
    offs_seq = offs_b * (recurrence.side_by_side * H) + offs_h
    offs_gates = offs_b * (recurrence.side_by_side * KEPT_H) + offs_h
    offs_preact = tl.arange(0, BLOCK_B).to(tl.int64)[:, None] * rows_b * GH + offs_h

    row_n, mask_n = gate_columns(units, HP, G, G_PADDED, DH, BLOCK_H)
    w = resident_weight(weight_hh_ptr + pid_d * (G * HP * DHP), row_n * DHP, mask_n, DOT)
    if STACK:
        w_x = resident_weight(weight_ih_ptr + (pid_d - 1) * (G * HP * HP), row_n * DHP, mask_n & above, DOT_X)

    # What the group reads of each other.
    exchanged_ptr = output_ptr
    exchanged_hx_ptr = hx_ptr
    if APART:
        exchanged_ptr = entering_ptr
        exchanged_hx_ptr = hx_entering_ptr
    first_of_head = units.head * DHP
    offs_exchanged = offs_b * (recurrence.side_by_side * HP) + (first_of_head + units.of_head)[None, :]

    vectors = ()
    if V > 0:
        vectors = load_tuple(vectors_ptr + pid_d * (V * H), offs_h, units.mask[None, :], H, V)

    tiles_b = tl.cdiv(B, BLOCK_B)
    for number in range(tl.program_id(1).to(tl.int64), tiles_b, tl.num_programs(1)):
        tile = batch_tile(number, batch, BLOCK_B, LAYOUT)
        mask_tile = tile.mask[:, None] & units.mask[None, :]
        group = (pid_d * (tl.num_programs(0) // GROUP) + units.head) * tiles_b + number
        counter_ptr = arrived_ptr + group * 32
        slots_ptr = sums_ptr + group * (4 * BLOCK_B * SUMS)
        row_state = pid_d * B + tile.first
        stride_state = D.to(tl.int64) * B * H
        stride_seq = R.to(tl.int64) * D * H
        initial = States(hx_ptr + row_state * H, cx_ptr + row_state * H, offs_state, stride_state)

        state = load_state(initial, mask_tile, S)
        factor = load_factor(factor_ptr + row_state * H, offs_state, mask_tile, NOISE)
        rows = no_rows(tile, LAYOUT)
        # Where the group has h of the step before, and how far its rows are apart.
        h_ptr = exchanged_hx_ptr + row_state * HP
        stride_h = HP

        for step in range(tile.steps):
            before = rows
            rows = forward_rows(step, tile, recurrence, batch, LAYOUT)
            begins = beginnings(step, rows, before, tile, recurrence, LAYOUT)
            p_h = h_ptr + first_of_head + tile.offs * stride_h
            if LAYOUT.UNEVEN:
                p_h = tl.where(begins, exchanged_hx_ptr + row_state * HP + first_of_head + tile.offs * HP, p_h)
            mask = rows.mask[:, None] & units.mask[None, :]

            # Fetched before anybody waits, and not looked at until then.
            start = strided_start(rows, tile, rows_t, rows_b, LAYOUT)
            fetched = fetch_tuple(preact_ptr + start * GH, offs_preact, mask, H, G)
            rows = with_resets(rows, before, tile, recurrence, batch, LAYOUT)
            later = start_later(rows, 2 - 4 * recurrence.reverse, tile, recurrence, batch)
            prefetch(exchanged_ptr + later * HP + first_of_head + units.program * BLOCK_H, EXCHANGE)

            # preact_h = h U^T. In a group a reset cuts the product, since a mask of h would cost more registers.
            if LOCAL:
                state = cut(state, rows, LAYOUT)
                h = keep_units((drop_h(state[0], factor, NOISE),), units.mask, DH < BLOCK_H)
                acc = local_product(h, w, DOT)
            else:
                acc = awaited_product(counter_ptr, GROUP * step, p_h, rows.stored, ~begins, w, DOT, EXCHANGE)
            norm = ()
            if NORMS > 0:
                slots = Slots(slots_ptr, counter_ptr + 16, NORMS * step, units.program, units.mask[None, :])
                norm = statistics(acc, mask_n[None, :], G, slots, 0, H, EXCHANGE)
            preact_h = split_gates(acc, BLOCK_B, BLOCK_H, G_PADDED)
            if not LOCAL:
                state = cut(state, rows, LAYOUT)
                preact_h = cut(preact_h, rows, LAYOUT)
                norm = cut(norm, rows, LAYOUT)

            # preact_x = x W^T + b, where x of a layer above the first is h of the layer below.
            preact_x = as_float32(fetched)
            if STACK:
                acc = tl.zeros((BLOCK_B, G_PADDED * BLOCK_H), tl.float32)
                if above:
                    p_x = exchanged_ptr + (rows.start - R) * HP + tile.offs * HP
                    below_ptr = counter_ptr - tiles_b * 32
                    acc = awaited_product(
                        below_ptr, GROUP * (step + 1), p_x, rows.stored, rows.stored, w_x, DOT_X, EXCHANGE
                    )
                preact_x = add_tuple(preact_x, split_gates(acc, BLOCK_B, BLOCK_H, G_PADDED))

            # Through the cell's step: from the state that enters it to the one that leaves it.
            words, drop = step_noise(noise, pid_d, rows.first + tile.first, tile.offs, units.offs, NOISE)
            if NORMS > 0:
                gates, stepped = STEP(preact_x, preact_h, state, vectors, drop, slots, norm, H, EXCHANGE)
            else:
                gates, stepped = STEP(preact_x, preact_h, state, vectors, drop)
            stepped = hold(stepped, state, words, noise, NOISE)
            state = unless_ended(stepped, state, rows.mask, LAYOUT.UNEVEN)
            stepped = zero_padding(stepped, rows, LAYOUT)

            # The group waits for what enters its next product; nobody waits for the rest.
            h_ptr = exchanged_ptr + rows.start * HP
            stride_h = recurrence.side_by_side * HP
            mask_store = rows.stored[:, None] & units.mask[None, :]
            mask_publish = rows.stored[:, None] & (units.of_head < DHP)[None, :]
            h = keep_units((drop_h(stepped[0], factor, NOISE),), units.mask, HP > H)
            publish(h_ptr, offs_exchanged, mask_publish, 0, h, 1, counter_ptr, EXCHANGE)
            if APART:
                store_tuple(output_ptr + rows.start * H, offs_seq, mask_store, 0, stepped, 0, 1)
            if SAVE_GATES:
                store_tuple(gates_ptr + rows.start * KEPT_H, offs_gates, mask, H, gates, 0, KEPT)
            if SAVE_STATES:
                store_tuple(c_seq_ptr + rows.start * H, offs_seq, mask_store, stride_seq, stepped, 1, S)

        final = States(h_n_ptr + row_state * H, c_n_ptr + row_state * H, offs_state, stride_state)
        store_state(final, mask_tile, state, S)
        if LAYOUT.RAGGED:
            # No sequence of the tile comes so far.
            zero = zero_tuple(1 + S, BLOCK_B, BLOCK_H)
            for t in range(tile.steps, T):
                start = (B.to(tl.int64) * t + tile.first) * recurrence.side_by_side + recurrence.first
                store_tuple(output_ptr + start * H, offs_seq, mask_tile, 0, zero, 0, 1)
                if SAVE_STATES:
                    store_tuple(c_seq_ptr + start * H, offs_seq, mask_tile, stride_seq, zero, 1, S)
