r"""All T steps of one layer, backward through time, for any cell.

.. math::
    \mathrm{dpreact}_t, \mathrm{dstate}_{t-1} = \mathrm{STEP}(\mathrm{gates}_t, \mathrm{state}_{t-1}, \mathrm{state}_t,
    \mathrm{dstate}_t, \mathrm{vectors}), \qquad dh_{t-1} \mathrel{+}= \mathrm{dpreact}_t U

Dimensions: T steps, B batch, H hidden size, DH hidden units of a head, G gates, KEPT blocks that a step keeps and of
its gradients, of which the last G go through U, V vectors, S states beside h, D recurrences of the launch, R rows.
`rows` tells which rows a step has, and what LAYOUT says of them; `noise` what NOISE says. With STACK the layers of a
stack run as a wave, as in `recurrence_fwd`, from the last to the first. With CLIP every element of the gradient of a
state that enters a step is kept within -clip and clip.

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

from fusedlstm.kernels.exchange import awaited_product, prefetch, publish
from fusedlstm.kernels.noise import Noise, drop_h, hold_backward, load_factor, step_noise
from fusedlstm.kernels.norms import Slots, statistics
from fusedlstm.kernels.product import local_product, resident_weight
from fusedlstm.kernels.rows import (
    Batch,
    as_one_state,
    backward_rows,
    batch_tile,
    cut,
    fetch_before,
    last_rows,
    no_rows,
    recurrence_of,
    start_later,
    strided_start,
    unless_ended,
    with_resets,
    zero_padding,
)
from fusedlstm.kernels.tiles import (
    Given,
    States,
    add_tuple,
    as_float32,
    at_row,
    clamp_tuple,
    fetch_given,
    fetch_tuple,
    keep_units,
    load_state,
    load_tuple,
    round_tuple,
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
    statistics_ptr,  # [R, D, 2*NORMS]  float32, of the norms; read if NORMS
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
    NORMS: tl.constexpr,  # how many sums over the units of all programs a step needs (`norms`)
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
    UPDATE: tl.constexpr,  # read if NOISE.HOLDS
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    DOT: tl.constexpr,  # `product.Dot` of dpreact
    DOT_X: tl.constexpr,  # of that of the layer above, if STACK
    EXCHANGE: tl.constexpr,  # `exchange.Exchange`
    LAYOUT: tl.constexpr,  # `rows.RowLayout`
    NOISE: tl.constexpr,  # `noise.NoiseKinds`
    CLIP: tl.constexpr,
    HAS_GRAD_C_SEQ: tl.constexpr,
):
    GROUP: tl.constexpr = EXCHANGE.GROUP
    LOCAL: tl.constexpr = EXCHANGE.LOCAL
    STACK: tl.constexpr = LAYOUT.STACK
    # Whether the group reads something else than grad_preact: its rows, aligned.
    APART: tl.constexpr = HP != H
    DHP: tl.constexpr = DH + HP - H
    # Of a row, one a program, in tiles of the cell's form.
    SUMS: tl.constexpr = (GROUP + BLOCK_H - 1) // BLOCK_H * BLOCK_H
    G_PADDED: tl.constexpr = triton.next_power_of_2(G)
    KEPT_H: tl.constexpr = KEPT * H
    KEPT_HP: tl.constexpr = KEPT * HP
    FIRST: tl.constexpr = KEPT - G  # the first block that goes through U

    units = units_of_program(GROUP, DH, BLOCK_H)
    batch = Batch(T, B, D, R, lengths_ptr, first_row_ptr, resets_ptr)
    noise = Noise(
        seed_ptr, first_recurrence, first_row_of_all, below_h, below_c, below_candidate, rate_h, rate_c, scale_candidate
    )
    pid_d = tl.program_id(2).to(tl.int64)
    recurrence = recurrence_of(pid_d, batch, LAYOUT)

    # Offsets of a tile, [BLOCK_B, BLOCK_H], in every kind of row.
    offs_b = tl.arange(0, BLOCK_B)[:, None]
    offs_h = units.offs[None, :]
    offs_state = offs_b * H + offs_h
    offs_seq = offs_b * (recurrence.side_by_side * H) + offs_h
    offs_gates = offs_b * (recurrence.side_by_side * KEPT_H) + offs_h
    offs_norm = offs_b * (recurrence.side_by_side * 2 * NORMS)
    offs_grad_output = tl.arange(0, BLOCK_B).to(tl.int64)[:, None] * rows_grad_output_b * (recurrence.side_by_side * H)
    offs_grad_output += offs_h
    stride_state = D.to(tl.int64) * B * H
    stride_seq = R.to(tl.int64) * D * H

    if STACK:
        # Gradients are given for the states of the last layer: its rows are all that these tensors have.
        below = pid_d + 1 < D
        given_c_ptr = grad_c_seq_ptr - recurrence.first * H
        stride_c = R.to(tl.int64) * H
        given = Given(grad_output_ptr, offs_grad_output, given_c_ptr, offs_seq, stride_c, units.mask & ~below)
    else:
        given = Given(grad_output_ptr + pid_d * H, offs_grad_output, grad_c_seq_ptr, offs_seq, stride_seq, units.mask)

    weight_ptr = weight_hh_ptr + pid_d * (G * HP * DHP) + units.head * (DHP * DHP)
    w = resident_weight(weight_ptr, units.of_head, units.mask, DOT)
    if STACK:
        # Of the layer above.
        w_x = resident_weight(weight_ih_ptr + pid_d * (G * HP * HP), units.of_head, units.mask & below, DOT_X)

    # What the group reads of each other.
    group_ptr = grad_preact_ptr
    if APART:
        group_ptr = exchanged_ptr
    first_of_head = units.head * DHP
    offs_group = offs_b * (recurrence.side_by_side * KEPT_HP) + (first_of_head + units.of_head)[None, :]
    offs_gate = ((FIRST + tl.minimum(tl.arange(0, G_PADDED), G - 1)) * HP)[None, :]

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
        saved = States(output_ptr, c_seq_ptr, offs_seq, stride_seq)
        initial = States(hx_ptr + row_state * H, cx_ptr + row_state * H, offs_state, stride_state)
        grad_initial = States(grad_hx_ptr + row_state * H, grad_cx_ptr + row_state * H, offs_state, stride_state)
        grad_final = States(grad_h_n_ptr + row_state * H, grad_c_n_ptr + row_state * H, offs_state, stride_state)

        # Each step hands its previous state on, so that a state is loaded once.
        before = last_rows(tile, recurrence, batch, LAYOUT)
        mask = before.mask[:, None] & units.mask[None, :]
        state = load_state(at_row(saved, before.start, H), mask, S)
        factor = load_factor(factor_ptr + row_state * H, offs_state, mask_tile, NOISE)
        # What an iteration leaves to the next: its rows; the gradients of the states before it, but for dpreact U; and
        # where the group has its dpreact, or in a group of one what of it goes through U.
        rows = no_rows(tile, LAYOUT)
        dstate = load_state(grad_final, mask_tile, S)
        later_ptr = group_ptr
        passed = ()
        if LOCAL:
            passed = round_tuple(zero_tuple(G, BLOCK_B, BLOCK_H), weight_ptr)

        for step in range(tile.steps + 1):
            later = rows
            rows, before = backward_rows(step, before, tile, recurrence, batch, LAYOUT)
            mask = rows.mask[:, None] & units.mask[None, :]

            # Fetched before anybody waits, and not looked at until then.
            rows = with_resets(rows, before, tile, recurrence, batch, LAYOUT)
            fetched_gates = fetch_tuple(gates_ptr + rows.start * KEPT_H, offs_gates, mask, H, KEPT)
            if NORMS > 0:
                p_norm = statistics_ptr + rows.start * (2 * NORMS) + offs_norm
                norm = fetch_tuple(p_norm, 0, rows.mask[:, None], 1, 2 * NORMS)
            fetched_state = fetch_before(step, rows, before, saved, initial, units, tile, recurrence, H, S, LAYOUT)
            start = strided_start(rows, tile, rows_grad_output_t, rows_grad_output_b, LAYOUT)
            start_h = start * (recurrence.side_by_side * H)
            fetched_grads = fetch_given(given, rows.mask, start_h, rows.start * H, S, HAS_GRAD_C_SEQ)
            earlier = start_later(rows, 4 * recurrence.reverse - 2, tile, recurrence, batch)
            p_earlier = group_ptr + earlier[:, None] * KEPT_HP + offs_gate
            prefetch(p_earlier + first_of_head + units.program * BLOCK_H, EXCHANGE)

            # dh += dpreact U of the step after this one, and the gradients of the states between both are complete.
            if LOCAL:
                dh = local_product(passed, w, DOT)
            else:
                p_x = later_ptr + FIRST * HP + first_of_head + tile.offs * (recurrence.side_by_side * KEPT_HP)
                dh = awaited_product(counter_ptr, GROUP * step, p_x, later.stored, later.stored, w, DOT, EXCHANGE)
            dentered = cut((dstate[0] + drop_h(dh, factor, NOISE),) + dstate[1:], later, LAYOUT)
            if CLIP:
                dentered = clamp_tuple(dentered, clip)
            dstate = unless_ended(dentered, dstate, later.mask, CLIP or LAYOUT.UNEVEN)
            if step == tile.steps:
                store_state(grad_initial, mask_tile, dstate, S)

            # dstate += what is given for this step, and what the layer above hands down.
            dstepped = add_tuple(dstate, as_float32(fetched_grads))
            if STACK:
                dh = dstepped[0]
                if below:
                    p_x = group_ptr + (rows.start + R) * KEPT_HP + tile.offs * KEPT_HP
                    above_ptr = counter_ptr + tiles_b * 32
                    target = GROUP * tl.minimum(step + 1, tile.steps)
                    dh += awaited_product(above_ptr, target, p_x, rows.mask, rows.mask, w_x, DOT_X, EXCHANGE)
                dstepped = (dh,) + dstepped[1:]

            # Through the cell's step: from what left it to what entered it.
            state_prev = as_one_state(fetched_state, S, LAYOUT)
            entered = cut(state_prev, rows, LAYOUT)
            gates = as_float32(fetched_gates)
            words, drop = step_noise(noise, pid_d, rows.first + tile.first, tile.offs, units.offs, NOISE)
            if NOISE.HOLDS:
                # The state that the step itself made is in no memory.
                state = UPDATE(gates, entered, drop)
            dstepped, dheld = hold_backward(dstepped, words, noise, NOISE)
            if NORMS > 0:
                # With zoneout, the c that the step made is in no memory, nor are the sums for its norm.
                AGAIN: tl.constexpr = NOISE.HOLDS and NORMS > 1
                k = (NORMS + AGAIN) * step + AGAIN
                slots = Slots(slots_ptr, counter_ptr + 16, k, units.program, units.mask[None, :])
                if AGAIN:
                    norm = norm[:2] + statistics(state[1], units.mask[None, :], 1, slots, -1, H, EXCHANGE)
                dpreact, dprev = STEP(gates, entered, state, dstepped, vectors, drop, slots, norm, H, EXCHANGE)
            else:
                dpreact, dprev = STEP(gates, entered, state, dstepped, vectors, drop)
            dprev = add_tuple(dprev, dheld)

            # The group waits for dpreact.
            dpreact = zero_padding(dpreact, rows, LAYOUT)
            published = keep_units(dpreact, units.mask, APART)
            mask_publish = rows.stored[:, None] & (units.of_head < DHP)[None, :]
            later_ptr = group_ptr + rows.start * KEPT_HP
            publish(later_ptr, offs_group, mask_publish, HP, published, KEPT, counter_ptr, EXCHANGE)
            if APART:
                mask_store = rows.stored[:, None] & units.mask[None, :]
                store_tuple(grad_preact_ptr + rows.start * KEPT_H, offs_gates, mask_store, H, dpreact, 0, KEPT)
            if LOCAL:
                passed = round_tuple(keep_units(dpreact[FIRST:], units.mask, DH < BLOCK_H), weight_ptr)
            state = state_prev
            dstate = unless_ended(dprev, dstate, rows.mask, LAYOUT.UNEVEN)

        if LAYOUT.RAGGED:
            # No sequence of the tile comes so far.
            for t in range(tile.steps, T):
                start = (B.to(tl.int64) * t + tile.first) * recurrence.side_by_side + recurrence.first
                zero = zero_tuple(KEPT, BLOCK_B, BLOCK_H)
                store_tuple(grad_preact_ptr + start * KEPT_H, offs_gates, mask_tile, H, zero, 0, KEPT)
