r"""Sums over all units of a row, when the units lie with the programs of a group: for cells with layer normalisation.

.. math::
    n = (x - \mu) / s, \quad s^2 = \mathrm{mean}((x - \mu)^2) + \epsilon, \qquad
    dx = (dn - \mathrm{mean}(dn) - n\, \mathrm{mean}(dn\, n)) / s

Every program sums what it owns, and hands two numbers a row to the others: forward its mean and its sum of squares about
that, which are put together as Chan, Golub & LeVeque (1983) do it, so that nothing is lost where the mean is large;
backward both sums. All programs then add the same numbers in the same order, so that all have the same result to the
last bit, the same from run to run. A group of one hands nothing.

The numbers lie in two slots that take turns. Exchange k of a launch's batch tile goes through slot k % 2, and is complete when
the group's second counter is at GROUP (k + 1) (`barrier`). Nobody can write a slot that is still read: exchange k + 2
follows exchange k + 1, for which every program arrived after it had read those of exchange k.

`rows`, as the functions of a cell take it, is a tuple: the group's slots, its counter, k of the next exchange, this program's
number in the group, which units it has [1, BLOCK_H]; then mean and 1 / s, each [BLOCK_B, 1], of the recurrent product of
this step and, backward, of its c. (Forward those of the product are taken from it whole: the tiles of single gates lie with the
threads in such a way that sums of them would fill all registers.)
"""

import triton
import triton.language as tl

from fusedlstm.kernels import barrier

EPS = tl.constexpr(1e-5)


@triton.jit
def _row_sum(tiles, mask, COUNT: tl.constexpr):
    """Over the units of a program and COUNT tiles, [BLOCK_B, 1]."""
    total = tiles[0]
    for k in tl.static_range(1, COUNT):
        total += tiles[k]
    return tl.sum(tl.where(mask, total, 0.0), 1)[:, None]


@triton.jit
def _of_group(
    a,  # [BLOCK_B, 1]
    b,  # [BLOCK_B, 1]
    rows,
    k,  # of this exchange
    GROUP: tl.constexpr,
    SPIN_LIMIT: tl.constexpr,
):
    """a and b of every program, each [BLOCK_B, programs], with zeros where there is no program."""
    sums_ptr, counter_ptr, _, pid = rows[:4]
    BLOCK_B: tl.constexpr = a.shape[0]
    offs_b = tl.arange(0, BLOCK_B)[:, None]
    slot_ptr = sums_ptr + k % 2 * (GROUP * 2 * BLOCK_B) + offs_b
    own_ptr = slot_ptr + pid * (2 * BLOCK_B)
    tl.store(own_ptr, a)
    tl.store(own_ptr + BLOCK_B, b)
    barrier.arrive(counter_ptr)
    barrier.wait(counter_ptr, GROUP * (k + 1), SPIN_LIMIT)
    program = tl.arange(0, triton.next_power_of_2(GROUP))[None, :]
    p = slot_ptr + program * (2 * BLOCK_B)
    mask = (program < GROUP) & (offs_b >= 0)
    # .cg: other programs wrote them, and the first-level cache is not coherent.
    a = tl.load(p, mask=mask, other=0.0, cache_modifier=".cg")
    b = tl.load(p + BLOCK_B, mask=mask, other=0.0, cache_modifier=".cg")
    return a, b


@triton.jit
def statistics(
    x,  # [BLOCK_B, N], all that the program has of a row
    mask,  # [1, N]
    COUNT: tl.constexpr,  # numbers of a unit
    rows,
    AT: tl.constexpr,  # exchanges of this step before this one
    H: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_H: tl.constexpr,
    SPIN_LIMIT: tl.constexpr,
):
    """mean and 1 / s of every row over all units, each [BLOCK_B, 1]."""
    own = COUNT * tl.minimum(H - rows[3] * BLOCK_H, BLOCK_H).to(tl.float32)
    mean = tl.sum(tl.where(mask, x, 0.0), 1)[:, None] / own
    centred = tl.where(mask, x - mean, 0.0)
    square = tl.sum(centred * centred, 1)[:, None]
    if GROUP > 1:
        means, squares = _of_group(mean, square, rows, rows[2] + AT, GROUP, SPIN_LIMIT)
        program = tl.arange(0, triton.next_power_of_2(GROUP))[None, :]
        sizes = COUNT * tl.maximum(tl.minimum(H - program * BLOCK_H, BLOCK_H), 0).to(tl.float32)
        mean = tl.sum(sizes * means, 1)[:, None] / (COUNT * H)
        square = tl.sum(squares + sizes * (means - mean) * (means - mean), 1)[:, None]
    return mean, tl.rsqrt(square / (COUNT * H) + EPS)


@triton.jit
def normalised_bwd(
    dn,  # tuple of tiles [BLOCK_B, BLOCK_H]
    n,
    rstd,  # [BLOCK_B, 1]
    COUNT: tl.constexpr,
    rows,
    AT: tl.constexpr,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    SPIN_LIMIT: tl.constexpr,
):
    """dx, a tuple of COUNT tiles; zero where there is no unit."""
    mask = rows[4]
    products = ()
    for k in tl.static_range(COUNT):
        products = products + (dn[k] * n[k],)
    a = _row_sum(dn, mask, COUNT)
    b = _row_sum(products, mask, COUNT)
    if GROUP > 1:
        all_a, all_b = _of_group(a, b, rows, rows[2] + AT, GROUP, SPIN_LIMIT)
        a = tl.sum(all_a, 1)[:, None]
        b = tl.sum(all_b, 1)[:, None]
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
    c_seq_ptr,  # [R, D*H]  float32
    # outputs
    statistics_ptr,  # [R, D, 4]  float32: mean and 1 / s of the recurrent product, which is kept last, and of c
    # sizes
    D,
    H: tl.constexpr,
    G: tl.constexpr,
    KEPT: tl.constexpr,
    # tiling
    BLOCK_GH: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """What the backward of the norms of one row needs that is not kept. A program is one row of one direction."""
    row = tl.program_id(0).to(tl.int64) * D + tl.program_id(1)
    mean_u, rstd_u = _statistics(gates_ptr + (row * KEPT + KEPT - G) * H, G * H, BLOCK_GH)
    mean_c, rstd_c = _statistics(c_seq_ptr + row * H, H, BLOCK_H)
    tl.store(statistics_ptr + row * 4, mean_u)
    tl.store(statistics_ptr + row * 4 + 1, rstd_u)
    tl.store(statistics_ptr + row * 4 + 2, mean_c)
    tl.store(statistics_ptr + row * 4 + 3, rstd_c)
