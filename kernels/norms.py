r"""Sums over all units of a row, when the units lie with the programs of a group: for cells with layer normalisation.

.. math::
    n = (x - \mu) / s, \quad s^2 = \mathrm{mean}((x - \mu)^2) + \epsilon, \qquad
    dx = (dn - \mathrm{mean}(dn) - n\, \mathrm{mean}(dn\, n)) / s

Every program sums what it owns, and hands two numbers a row to the others: forward its mean and its sum of squares
about that, which are put together as Chan, Golub & LeVeque (1983) do it, so that nothing is lost where the mean is
large; backward both sums. All programs then add the same numbers in the same order, so that all have the same result to
the last bit, the same from run to run. A group of one hands nothing.

The numbers lie in two slots that take turns: exchange k of a launch's batch tile goes through slot k % 2. A number is
stored with its tag, k + 1, in one word of 64 bits, so that a reader sees from the word itself whether it has come: one
trip through the L2. A slot begins with zeros, and no tag occurs in it twice. No program can overwrite a slot that is
still being read: before a program writes for exchange k + 2, it has read the words of all programs for exchange k + 1,
and each of them stored these only after it had read exchange k. On AMD, where
a load sees what others stored only after an acquire, a counter is awaited before the words are read.

The functions of a cell take the `Slots` of a step and a tuple `norm`: mean and 1 / s of this step's recurrent product,
each [BLOCK_B, 1], and in the backward the same two of its c, if that has a norm. (In the forward the two of the product
are computed before it is split into gates. The tiles of single gates are spread over the threads in such a way that
summing them would fill all registers.)
"""

from typing import NamedTuple

import triton
import triton.language as tl

from fusedlstm.kernels import exchange

EPS = tl.constexpr(1e-5)


class Slots(NamedTuple):
    """Where the programs of a group exchange sums at one step."""

    ptr: object  # [2, 2, BLOCK_B, SUMS] int64
    counter_ptr: object  # of these exchanges, awaited on AMD
    k: object  # of the next exchange
    program: object  # this program's number in the group
    mask: object  # [1, BLOCK_H] its units


@triton.jit
def _row_sum(tiles, mask, COUNT: tl.constexpr):
    """Over the units of a program and COUNT tiles, [BLOCK_B, 1]."""
    total = tiles[0]
    for k in tl.static_range(1, COUNT):
        total += tiles[k]
    return tl.sum(tl.where(mask, total, 0.0), 1)[:, None]


@triton.jit
def _tagged(
    x,  # float32
    tag,
):
    """x and its tag in a word of 64 bits."""
    return (tag.to(tl.int64) << 32) | x.to(tl.uint32, bitcast=True).to(tl.int64)


@triton.jit
def _number(word):
    """What `_tagged` took, float32."""
    return word.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _of_group(
    a,  # [BLOCK_B, 1]
    b,  # [BLOCK_B, 1]
    slots,  # Slots
    k,  # of this exchange
    EXCHANGE: tl.constexpr,
):
    """a and b of every program, two tuples of tiles [BLOCK_B, BLOCK_H], with zeros where there is no program.

    Tiles of the same form as those of the cell: others would draw the whole step into a layout of their own.
    """
    BLOCK_B: tl.constexpr = a.shape[0]
    BLOCK_H: tl.constexpr = slots.mask.shape[1]
    GROUP: tl.constexpr = EXCHANGE.GROUP
    TILES: tl.constexpr = (GROUP + BLOCK_H - 1) // BLOCK_H
    SECOND: tl.constexpr = BLOCK_B * TILES * BLOCK_H
    slot_ptr = slots.ptr + k % 2 * (2 * SECOND)
    tag = tl.zeros((BLOCK_B, 1), tl.int32) + (k + 1)
    offs_b = tl.arange(0, BLOCK_B)[:, None] * (TILES * BLOCK_H)
    tl.store(slot_ptr + offs_b + slots.program, _tagged(a, tag))
    tl.store(slot_ptr + SECOND + offs_b + slots.program, _tagged(b, tag))
    if EXCHANGE.ACQUIRES:
        exchange.arrive(slots.counter_ptr)
        exchange.wait(slots.counter_ptr, GROUP * (k + 1), EXCHANGE)
    words_a = _no_words(BLOCK_B, BLOCK_H, TILES)
    words_b = _no_words(BLOCK_B, BLOCK_H, TILES)
    late = 1
    polls = 0
    while (late != 0) & (polls < EXCHANGE.LIMIT):
        words_a = _words(slot_ptr, offs_b, GROUP, BLOCK_H, TILES)
        words_b = _words(slot_ptr + SECOND, offs_b, GROUP, BLOCK_H, TILES)
        late = _late(words_a + words_b, k + 1, GROUP)
        polls += 1
    exchange.end_unless(late == 0, EXCHANGE)
    all_a = ()
    all_b = ()
    for q in tl.static_range(TILES):
        all_a = all_a + (_number(words_a[q]),)
        all_b = all_b + (_number(words_b[q]),)
    return all_a, all_b


@triton.jit
def _no_words(BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, TILES: tl.constexpr):
    """Zeros in the form of `_words`."""
    words = ()
    for _ in tl.static_range(TILES):
        words = words + (tl.zeros((BLOCK_B, BLOCK_H), tl.int64),)
    return words


@triton.jit
def _words(
    slot_ptr,
    offs_b,  # [BLOCK_B, 1]
    GROUP: tl.constexpr,
    BLOCK_H: tl.constexpr,
    TILES: tl.constexpr,
):
    """The words of all programs, a tuple of tiles [BLOCK_B, BLOCK_H]."""
    words = ()
    for q in tl.static_range(TILES):
        program = q * BLOCK_H + tl.arange(0, BLOCK_H)[None, :]
        mask = (program < GROUP) & (offs_b >= 0)
        # .cg: other programs wrote them, and the first-level cache is not coherent.
        words = words + (tl.load(slot_ptr + offs_b + program, mask=mask, other=0, cache_modifier=".cg"),)
    return words


@triton.jit
def _late(words, tag, GROUP: tl.constexpr):
    """1 if a word has not come, else 0."""
    BLOCK_H: tl.constexpr = words[0].shape[1]
    TILES: tl.constexpr = len(words) // 2
    late = tl.zeros(words[0].shape, tl.int32)
    for q in tl.static_range(len(words)):
        program = q % TILES * BLOCK_H + tl.arange(0, BLOCK_H)[None, :]
        late = late | (((words[q] >> 32).to(tl.int32) != tag) & (program < GROUP)).to(tl.int32)
    return tl.max(tl.reshape(late, (late.numel,), can_reorder=True), 0)


@triton.jit
def _all_rows_sum(tiles):
    """[BLOCK_B, 1]"""
    total = tiles[0]
    for q in tl.static_range(1, len(tiles)):
        total += tiles[q]
    return tl.sum(total, 1)[:, None]


@triton.jit
def normalised(
    x,  # tuple of tiles [BLOCK_B, BLOCK_H]
    mean,  # [BLOCK_B, 1]
    rstd,
    COUNT: tl.constexpr,
):
    """COUNT tiles with mean 0 and variance 1 in every row."""
    n = ()
    for k in tl.static_range(COUNT):
        n = n + ((x[k] - mean) * rstd,)
    return n


@triton.jit
def statistics(
    x,  # [BLOCK_B, N], all that the program has of a row
    mask,  # [1, N]
    COUNT: tl.constexpr,  # numbers of a unit
    slots,  # Slots
    AT: tl.constexpr,  # exchanges of this step before this one
    H: tl.constexpr,
    EXCHANGE: tl.constexpr,
):
    """mean and 1 / s of every row over all units, each [BLOCK_B, 1]."""
    BLOCK_H: tl.constexpr = slots.mask.shape[1]
    own = COUNT * tl.minimum(H - slots.program * BLOCK_H, BLOCK_H).to(tl.float32)
    mean = tl.sum(tl.where(mask, x, 0.0), 1)[:, None] / own
    centred = tl.where(mask, x - mean, 0.0)
    square = tl.sum(centred * centred, 1)[:, None]
    if EXCHANGE.GROUP > 1:
        means, squares = _of_group(mean, square, slots, slots.k + AT, EXCHANGE)
        weighted = ()
        sizes = ()
        for q in tl.static_range(len(means)):
            program = q * BLOCK_H + tl.arange(0, BLOCK_H)[None, :]
            sizes = sizes + (COUNT * tl.maximum(tl.minimum(H - program * BLOCK_H, BLOCK_H), 0).to(tl.float32),)
            weighted = weighted + (means[q] * sizes[q],)
        mean = _all_rows_sum(weighted) / (COUNT * H)
        parts = ()
        for q in tl.static_range(len(means)):
            parts = parts + (squares[q] + sizes[q] * (means[q] - mean) * (means[q] - mean),)
        square = _all_rows_sum(parts)
    return mean, tl.rsqrt(square / (COUNT * H) + EPS)


@triton.jit
def normalised_bwd(
    dn,  # tuple of tiles [BLOCK_B, BLOCK_H]
    n,
    rstd,  # [BLOCK_B, 1]
    COUNT: tl.constexpr,
    slots,  # Slots
    AT: tl.constexpr,
    H: tl.constexpr,
    EXCHANGE: tl.constexpr,
):
    """dx, a tuple of COUNT tiles; zero where there is no unit."""
    mask = slots.mask
    products = ()
    for k in tl.static_range(COUNT):
        products = products + (dn[k] * n[k],)
    a = _row_sum(dn, mask, COUNT)
    b = _row_sum(products, mask, COUNT)
    if EXCHANGE.GROUP > 1:
        all_a, all_b = _of_group(a, b, slots, slots.k + AT, EXCHANGE)
        a = _all_rows_sum(all_a)
        b = _all_rows_sum(all_b)
    a = a / (COUNT * H)
    b = b / (COUNT * H)
    dx = ()
    for k in tl.static_range(COUNT):
        dx = dx + (tl.where(mask, rstd * (dn[k] - a - n[k] * b), 0.0),)
    return dx


@triton.jit
def _statistics(ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """mean and 1 / s of WIDTH numbers that lie together."""
    offs = tl.arange(0, BLOCK)
    mask = offs < WIDTH
    x = tl.load(ptr + offs, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, 0) / WIDTH
    centred = tl.where(mask, x - mean, 0.0)
    return mean, tl.rsqrt(tl.sum(centred * centred, 0) / WIDTH + EPS)


@triton.jit(do_not_specialize=["D"])
def row_statistics_kernel(
    # inputs
    gates_ptr,  # [R, D*KEPT*H]
    c_seq_ptr,  # [R, D*H]  float32; read if NORMS is 2
    # outputs
    statistics_ptr,  # [R, D, 2*NORMS]  float32: mean and 1 / s of the recurrent product, which is kept last, and of c
    # sizes
    D,
    H: tl.constexpr,
    G: tl.constexpr,
    KEPT: tl.constexpr,
    NORMS: tl.constexpr,  # 1 or 2: without or with that of c
    # tiling
    BLOCK_GH: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """What the backward of the norms of one row needs that is not kept. A program is one row of one direction."""
    row = tl.program_id(0).to(tl.int64) * D + tl.program_id(1)
    mean_u, rstd_u = _statistics(gates_ptr + (row * KEPT + KEPT - G) * H, G * H, BLOCK_GH)
    tl.store(statistics_ptr + row * (2 * NORMS), mean_u)
    tl.store(statistics_ptr + row * (2 * NORMS) + 1, rstd_u)
    if NORMS > 1:
        mean_c, rstd_c = _statistics(c_seq_ptr + row * H, H, BLOCK_H)
        tl.store(statistics_ptr + row * (2 * NORMS) + 2, mean_c)
        tl.store(statistics_ptr + row * (2 * NORMS) + 3, rstd_c)
