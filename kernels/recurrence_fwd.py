r"""All T steps of one layer, forward, for any cell.

.. math::
    \mathrm{preact\_h}_t = h_{t-1} U^T, \qquad
    \mathrm{gates}_t, \mathrm{state}_t = \mathrm{STEP}(\mathrm{preact\_x}_t, \mathrm{preact\_h}_t, \mathrm{state}_{t-1},
    \mathrm{vectors})

Dimensions: T steps, B batch, H hidden size, DH hidden units of a head, G gates, KEPT blocks that a step keeps, V
vectors, S states beside h (`fusedlstm.cells`), D recurrences of the launch, R rows: a row is one step of one sequence.
Row (t, b) is t * B + b. Sequences may have lengths of their own, in two
ways:

- RAGGED: in any order, zero among them. A row past its sequence's end holds zeros.
- PACKED: longest first, none zero; row (t, b) is first_row[t] + b for the b that are that long: the layout of
  `torch.nn.utils.rnn.PackedSequence`. So which sequences have a step is a number, and not a mask.

A batch tile ends with its longest sequence. With RESETS a true at row (t, b) cuts its sequence between the steps t - 1
and
t: the state that enters the later of them in the order of the direction is zero. HOLDS, DROPS_CANDIDATE and
DROPS_H are the zoneout and the dropouts of `fusedlstm.noise`.

A program owns BLOCK_H hidden units, with all their gates, for one batch tile and one recurrence, through all steps; its
states never leave its registers. With heads, a unit sees only h of its own head. The GROUP programs of one batch tile,
head and recurrence need each other's h: every program publishes its part of h_t in `output`, and awaits the whole of it
at the next step (`exchange`). A group of one keeps h in registers.

The recurrences of a launch are the directions of a layer: direction 1 runs from the last step to the first, in each
sequence from its own last. Or, with STACK, they are the layers of a stack, as a wave: layer l does step t beside layer
l + 1 doing step t - 1, and what a layer adds to preact_x above the bias is its product with the h_t of the layer below.
"""

import triton
import triton.language as tl

from fusedlstm.kernels.exchange import awaited_product, prefetch_rows, publish
from fusedlstm.kernels.noise import hold_tuple, step_words
from fusedlstm.kernels.norms import statistics
from fusedlstm.kernels.product import local_product, resident_weight
from fusedlstm.kernels.rows import load_lengths, load_resets, packed_rows
from fusedlstm.kernels.tiles import (
    add_tuple,
    as_float32,
    fetch_tuple,
    keep_units,
    load_state,
    load_tuple,
    select_tuple,
    split_gates,
    store_tuple,
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
    NORMS: tl.constexpr,  # whether a step needs sums over the units of all programs (`norms`)
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
    STACK: tl.constexpr,
    PACKED: tl.constexpr,
    RAGGED: tl.constexpr,
    RESETS: tl.constexpr,
    HOLDS: tl.constexpr,  # zoneout
    DROPS_CANDIDATE: tl.constexpr,
    DROPS_H: tl.constexpr,
    TRAINING: tl.constexpr,  # masks, and not their mean
    SAVE_GATES: tl.constexpr,
    SAVE_STATES: tl.constexpr,
):
    GROUP: tl.constexpr = EXCHANGE.GROUP
    LOCAL: tl.constexpr = EXCHANGE.LOCAL
    # Whether the group reads something else of a step than its output: rows that are dropped, or aligned.
    APART: tl.constexpr = DROPS_H or HP != H
    DHP: tl.constexpr = DH + HP - H
    # Of a row, one a program, in tiles of the cell's form.
    SUMS: tl.constexpr = (GROUP + BLOCK_H - 1) // BLOCK_H * BLOCK_H
    G_PADDED: tl.constexpr = triton.next_power_of_2(G)
    N: tl.constexpr = G_PADDED * BLOCK_H
    GH: tl.constexpr = G * H
    KEPT_H: tl.constexpr = KEPT * H

    head = tl.program_id(0) // GROUP
    pid_h = tl.program_id(0) % GROUP
    pid_d = tl.program_id(2).to(tl.int64)  # direction, or layer
    if (
        STACK
    ):  # layers lie one after another, all run forward, and above layer 0 the bias stands in every row of preact_x
        reverse, side_by_side, stride_d = pid_d * 0, 1, R
        above = pid_d > 0
        preact_ptr = tl.where(above, bias_ptr + (pid_d - 1) * GH, preact_x_ptr)
        rows_t = tl.where(above, 0, rows_preact_t)
        rows_b = tl.where(above, 0, rows_preact_b)
    else:
        reverse, side_by_side, stride_d = pid_d, D, 1
        preact_ptr = preact_x_ptr + pid_d * rows_preact_d * GH
        rows_t = rows_preact_t
        rows_b = rows_preact_b
    unit = pid_h * BLOCK_H + tl.arange(0, BLOCK_H)  # of the head
    mask_h = unit < DH
    offs_h = head * DH + unit
    offs_b = tl.arange(0, BLOCK_B)
    offs_state = offs_b[:, None] * H + offs_h[None, :]  # [BLOCK_B, BLOCK_H]
    offs_seq = offs_b[:, None] * (side_by_side * H) + offs_h[None, :]
    offs_gates = offs_b[:, None] * (side_by_side * KEPT_H) + offs_h[None, :]
    offs_preact = offs_b.to(tl.int64)[:, None] * rows_b * GH + offs_h[None, :]

    # this program's columns of weight_hh^T, gate-major: column n is gate n // BLOCK_H of unit n % BLOCK_H
    column = tl.arange(0, N)
    unit_n = pid_h * BLOCK_H + column % BLOCK_H
    mask_n = (unit_n < DH) & (column // BLOCK_H < G)
    offs_n = (column // BLOCK_H * HP + head * DH + unit_n) * DHP
    w = resident_weight(weight_hh_ptr + pid_d * (G * HP * DHP), offs_n, mask_n, DOT)
    if STACK:
        w_x = resident_weight(weight_ih_ptr + (pid_d - 1) * (G * HP * HP), offs_n, mask_n & above, DOT_X)

    # what the group reads of each other
    exchanged_ptr = output_ptr
    exchanged_hx_ptr = hx_ptr
    offs_exchanged = offs_b[:, None] * (side_by_side * HP) + (head * DHP + unit)[None, :]
    if APART:
        exchanged_ptr = entering_ptr
        exchanged_hx_ptr = hx_entering_ptr
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

        state = load_state(hx_ptr + row_state * H, cx_ptr + row_state * H, offs_state, mask, stride_state, S)
        if DROPS_H:
            factor = tl.load(factor_ptr + row_state * H + offs_state, mask=mask, other=0.0)
        h_ptr = exchanged_hx_ptr + row_state * HP  # h of the previous step
        stride_h = HP
        sequences = tl.full((), 0, tl.int64)  # that had it
        first_row = tl.full((), 0, tl.int64)

        for step in range(steps):
            t = step + reverse * (steps - 1 - 2 * step)
            p_h = h_ptr + head * DHP + offs_b * stride_h  # [BLOCK_B]
            prev_row = first_row
            sequences_prev = sequences
            mask_x = mask_b  # a product of rows that have ended is not looked at
            begins = tl.full((BLOCK_B,), step, tl.int32) == 0  # [BLOCK_B]
            if PACKED:
                first_row, sequences = packed_rows(first_row_ptr, t, True)
                mask_t = row + offs_b < sequences
                mask_x = mask_t
                begins = row + offs_b >= sequences_prev
                preact_row = (first_row + row) * rows_b
            else:
                first_row = t * B
                mask_t = mask_b
                if RAGGED:
                    mask_t = t < length
                    begins = begins | ((t + 1 == length) & (reverse == 1))
                preact_row = t * rows_t + row * rows_b
            if PACKED or RAGGED:
                p_h = tl.where(begins, exchanged_hx_ptr + row_state * HP + head * DHP + offs_b * HP, p_h)
            mask = mask_t[:, None] & mask_h[None, :]
            row_seq = (first_row + row) * side_by_side + pid_d * stride_d

            # fetched before anybody waits, and not looked at until then
            fetched = fetch_tuple(preact_ptr + preact_row * GH, offs_preact, mask, H, G)
            if RESETS:
                reset = load_resets(
                    resets_ptr, t, reverse, row, offs_b, B, steps, length, mask_t, first_row, prev_row, sequences_prev,
                    PACKED, RAGGED,
                )  # fmt: skip

            if EXCHANGE.PREFETCH != "":
                # The row after the next: what filled it may have pushed it out of the L2 by now.
                later = tl.minimum(tl.maximum(first_row + row + offs_b + (2 - 4 * reverse) * B, 0), R - 1)
                later = later * side_by_side + pid_d * stride_d
                prefetch_rows(exchanged_ptr + later * HP + head * DHP + pid_h * BLOCK_H, EXCHANGE)

            if LOCAL:
                if RESETS:
                    state = select_tuple(reset[:, None] == 0, state, zero_tuple(1 + S, BLOCK_B, BLOCK_H), 1 + S)
                entering = state
                if DROPS_H:
                    entering = (state[0] * factor,)
                if DH < BLOCK_H:  # a cell may make anything of no unit, and zero weights times NaN are NaN
                    entering = keep_units(entering, mask_h, 1)
                acc = local_product(entering, w, DOT)
            else:
                acc = awaited_product(counter_ptr, GROUP * step, p_h, mask_x, ~begins, w, DOT, EXCHANGE)
            if NORMS:
                rows = (slots_ptr, counter_ptr + 16, 2 * step, pid_h, mask_h[None, :])
                norm = statistics(acc, mask_n[None, :], G, rows, 0, H, EXCHANGE)
            preact_h = split_gates(acc, BLOCK_B, BLOCK_H, G_PADDED)
            if RESETS and not LOCAL:  # what was exchanged is not cut; a mask there would cost more registers
                keep = reset[:, None] == 0
                state = select_tuple(keep, state, zero_tuple(1 + S, BLOCK_B, BLOCK_H), 1 + S)
                preact_h = select_tuple(keep, preact_h, zero_tuple(G_PADDED, BLOCK_B, BLOCK_H), G_PADDED)
                if NORMS:
                    norm = select_tuple(keep, norm, zero_tuple(2, BLOCK_B, 1), 2)
            preact_x = as_float32(fetched, G)
            if STACK:
                acc = tl.zeros((BLOCK_B, N), tl.float32)
                if above:
                    p_x = exchanged_ptr + (row_seq - stride_d) * HP + offs_b * HP
                    below_ptr = counter_ptr - num_tiles_b * 32
                    acc = awaited_product(below_ptr, GROUP * (step + 1), p_x, mask_x, mask_x, w_x, DOT_X, EXCHANGE)
                preact_x = add_tuple(preact_x, split_gates(acc, BLOCK_B, BLOCK_H, G_PADDED), G)

            drop = 1.0
            words = ()
            if TRAINING:
                tile_row = first_row_of_all + first_row + row
                words = step_words(seed_ptr, first_recurrence + pid_d, tile_row, offs_b, offs_h)
                if DROPS_CANDIDATE:
                    drop = tl.where(words[2] < below_candidate, 0.0, scale_candidate)
            if NORMS:
                gates, stepped = STEP(preact_x, preact_h, state, vectors, drop, rows + norm, H, EXCHANGE)
            else:
                gates, stepped = STEP(preact_x, preact_h, state, vectors, drop)
            if HOLDS:
                stepped = hold_tuple(stepped, state, words, below_h, below_c, rate_h, rate_c, TRAINING, 1 + S)
            rows_store = mask_t
            if PACKED or RAGGED:
                lives = mask_t[:, None]
                state = select_tuple(lives, stepped, state, 1 + S)
            else:
                state = stepped
            if RAGGED:
                rows_store = mask_b
                stepped = select_tuple(lives, stepped, zero_tuple(1 + S, BLOCK_B, BLOCK_H), 1 + S)

            h_ptr = exchanged_ptr + row_seq * HP
            stride_h = side_by_side * HP
            mask_store = rows_store[:, None] & mask_h[None, :]
            mask_publish = rows_store[:, None] & (unit < DHP)[None, :]
            published = stepped
            if DROPS_H:
                published = (stepped[0] * factor,)
            if HP > H:
                published = keep_units(published, mask_h, 1)
            publish(h_ptr, offs_exchanged, mask_publish, 0, published, 1, counter_ptr, EXCHANGE)
            if APART:
                store_tuple(output_ptr + row_seq * H, offs_seq, mask_store, 0, stepped, 0, 1)
            # nobody waits for these
            if SAVE_GATES:
                store_tuple(gates_ptr + row_seq * KEPT_H, offs_gates, mask, H, gates, 0, KEPT)
            if SAVE_STATES:
                store_tuple(c_seq_ptr + row_seq * H, offs_seq, mask_store, stride_seq, stepped, 1, S)

        mask = mask_b[:, None] & mask_h[None, :]
        store_tuple(h_n_ptr + row_state * H, offs_state, mask, 0, state, 0, 1)
        store_tuple(c_n_ptr + row_state * H, offs_state, mask, stride_state, state, 1, S)
        if RAGGED:
            zero = zero_tuple(1 + S, BLOCK_B, BLOCK_H)
            for t in range(steps, T):  # no sequence of the tile comes so far
                row_seq = (B.to(tl.int64) * t + row) * side_by_side + pid_d * stride_d
                store_tuple(output_ptr + row_seq * H, offs_seq, mask, 0, zero, 0, 1)
                if SAVE_STATES:
                    store_tuple(c_seq_ptr + row_seq * H, offs_seq, mask, stride_seq, zero, 1, S)
