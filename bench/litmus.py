"""Litmus tests of the exchange on a device: `python -m bench.litmus`. Does a program ever read what is not there yet?

| pattern | what is handed over at every step | how |
|---|---|---|
| `counter` | a tile of bfloat16 or float32 | plain stores, a release and an acquire, plain loads |
| `data` | the same | the words themselves are the flags: of 2 and of 4 bytes |
| `sums` | two numbers a row, in two slots by turns | each with its tag in a word of 8 bytes |

The functions are those of `kernels/exchange.py` and `kernels/norms.py`. At every step each program of a group publishes
its part, and takes the product of the whole with ones, which is wrong if a single number is. The numbers change from
step to step and from launch to launch, and the same buffers serve all launches. `tests/cpu/test_exchange_model.py`
searches all executions under the memory model that we assume; this counts violations in millions of steps on hardware.

The last pattern, `no wait`, must show violations, or the others prove nothing. On a CPU the programs are interpreted
under a seeded scheduler, with few steps: a rehearsal.
"""

import dataclasses
import sys
import time

import torch
import triton
import triton.language as tl

from bench.ceilings import Machine, exchange_of
from fusedlstm.engines import launch  # noqa: F401  repairs the interpreter
from fusedlstm.kernels import exchange, norms
from fusedlstm.kernels.exchange import ABSENT, Exchange
from fusedlstm.kernels.product import Dot, exchanged_product, resident_weight

ROWS, UNITS = 16, 16  # of a program's part of a tile
GROUPS = (2, 32)  # programs
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@triton.jit
def number_of(step, launch_number):
    """What every element of a step's tile is: a whole number that bfloat16 has, other than in the launch before."""
    return ((3 * step + 5 * launch_number) % 251 + 1).to(tl.float32)


@triton.jit(do_not_specialize=["STEPS", "launch_number"])
def tiles_kernel(
    tiles_ptr,  # [STEPS, groups, ROWS, K]; by data all ABSENT before the launch
    ones_ptr,  # [K, ROWS]
    arrived_ptr,  # [groups, 32] int32, zero
    wrong_ptr,  # [programs] int32: how many steps had a wrong product
    STEPS,
    launch_number,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    DOT: tl.constexpr,
    EXCHANGE: tl.constexpr,
    WAITS: tl.constexpr,
):
    GROUP: tl.constexpr = EXCHANGE.GROUP
    K: tl.constexpr = DOT.K
    pid = tl.program_id(0)
    groups = tl.num_programs(0) // GROUP
    group = (pid // GROUP).to(tl.int64)
    counter_ptr = arrived_ptr + group * 32
    offs_b = tl.arange(0, ROWS)
    whole = offs_b >= 0
    offs = offs_b[:, None] * K + pid % GROUP * UNITS + tl.arange(0, UNITS)[None, :]
    w = resident_weight(ones_ptr, offs_b, whole, DOT)
    wrong = 0
    for step in range(STEPS):
        number = number_of(step, launch_number)
        tile_ptr = tiles_ptr + (step * groups + group) * (ROWS * K)
        tile = tl.zeros((ROWS, UNITS), tl.float32) + number
        exchange.publish(tile_ptr, offs, whole[:, None], 0, (tile,), 1, counter_ptr, EXCHANGE)
        p_x = tile_ptr + offs_b * K
        if WAITS:
            target = GROUP * (step + 1)
            acc = exchange.awaited_product(counter_ptr, target, p_x, whole, whole, w, DOT, EXCHANGE)
        else:
            acc = exchanged_product(p_x, whole, w, DOT)
        wrong += tl.max(tl.max((acc != number * K).to(tl.int32), 1), 0)
    tl.store(wrong_ptr + pid, wrong)


@triton.jit(do_not_specialize=["STEPS", "launch_number"])
def sums_kernel(
    sums_ptr,  # [groups, 4, ROWS, SUMS] int64, zero
    arrived_ptr,  # [groups, 32] int32, zero
    wrong_ptr,  # [programs] int32
    STEPS,
    launch_number,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    EXCHANGE: tl.constexpr,
):
    GROUP: tl.constexpr = EXCHANGE.GROUP
    TILES: tl.constexpr = (GROUP + UNITS - 1) // UNITS
    pid = tl.program_id(0)
    group = (pid // GROUP).to(tl.int64)
    program = pid % GROUP
    slot_ptr = sums_ptr + group * (4 * ROWS * TILES * UNITS)
    mask = tl.arange(0, UNITS)[None, :] >= 0
    wrong = 0
    for step in range(STEPS):
        slots = norms.Slots(slot_ptr, arrived_ptr + group * 32, step, program, mask)
        number = number_of(step, launch_number)
        a = tl.zeros((ROWS, 1), tl.float32) + number * GROUP + program
        all_a, all_b = norms._of_group(a, -a, slots, step, EXCHANGE)
        for q in tl.static_range(TILES):
            other = q * UNITS + tl.arange(0, UNITS)[None, :]
            bad = ((all_a[q] != number * GROUP + other) | (all_b[q] != -all_a[q])) & (other < GROUP)
            wrong += tl.max(tl.max(bad.to(tl.int32), 1), 0)
    tl.store(wrong_ptr + pid, wrong)


def dot_of(group: int) -> Dot:
    """The product of a group's tile with ones."""
    k = group * UNITS
    block = min(k, 128)
    return Dot(ROWS, k, k, k, ROWS, ROWS, block, True, False, 1, 1, "ieee", 1)


class Pattern:
    """One pattern with its buffers, for launches one after another."""

    def __init__(self, machine: Machine, protocol: str, dtype: torch.dtype | None, group: int, waits: bool = True):
        self.machine, self.dtype, self.waits = machine, dtype, waits
        self.exchange: Exchange = dataclasses.replace(
            exchange_of(group), PROTOCOL="data" if dtype is None else protocol
        )
        groups = max(1, machine.sms // group)
        self.programs, self.steps = groups * group, 1024 if machine.gpu else 3
        on = {"device": machine.device}
        self.arrived = torch.zeros(groups, 32, dtype=torch.int32, **on)
        self.wrong = torch.zeros(self.programs, dtype=torch.int32, **on)
        if dtype is None:
            columns = -(-group // UNITS) * UNITS
            self.sums = torch.zeros(groups, 4, ROWS, columns, dtype=torch.int64, **on)
        else:
            self.tiles = torch.zeros(self.steps, groups, ROWS, group * UNITS, dtype=dtype, **on)
            self.ones = torch.ones(group * UNITS, ROWS, dtype=dtype, **on)

    def violations(self, number: int) -> int:
        """In launch `number`, how many times a program has read something wrong."""
        sizes = {"ROWS": ROWS, "UNITS": UNITS, "EXCHANGE": self.exchange, "num_stages": 1}  # as our loops
        self.arrived.zero_()
        if self.dtype is None:
            self.sums.zero_()
            arguments = (self.sums, self.arrived, self.wrong, self.steps, number)
            self.machine.launch(sums_kernel, self.programs, *arguments, waits=True, **sizes)
        else:
            if self.exchange.PROTOCOL == "data":
                self.tiles.view(torch.int16 if self.dtype == torch.bfloat16 else torch.int32).fill_(ABSENT.value)
            arguments = (self.tiles, self.ones, self.arrived, self.wrong, self.steps, number)
            sizes |= {"DOT": dot_of(self.exchange.GROUP), "WAITS": self.waits}
            self.machine.launch(tiles_kernel, self.programs, *arguments, waits=True, **sizes)
        return int(self.wrong.sum())


def patterns(groups):
    """(protocol, dtype, programs of a group, whether it waits)"""
    for group in groups:
        for protocol in ("counter", "data"):
            for dtype in DTYPES:
                yield protocol, dtype, group, True
        yield "sums", None, group, True
    yield "data", "float32", groups[0], False


def main() -> int:
    machine = Machine()
    seconds, groups = (0.4, [n for n in GROUPS if n <= machine.sms]) if machine.gpu else (0.0, GROUPS[:1])
    total, wrong, seen = 0, 0, 0
    for protocol, dtype, group, waits in patterns(groups):
        pattern = Pattern(machine, protocol, DTYPES.get(dtype), group, waits)
        launches = found = 0
        end = time.monotonic() + seconds
        while launches == 0 or time.monotonic() < end:
            found += pattern.violations(launches)
            launches += 1
        steps = launches * pattern.steps * pattern.programs
        words = f"{dtype or 'int64'}, {pattern.programs} programs in groups of {group}"
        print(f"{protocol if waits else 'no wait':8} {words}: {steps:,} steps, {found:,} violations", flush=True)
        if waits:
            total, wrong = total + steps, wrong + found
        else:
            seen += found
    print(f"{total:,} steps, {wrong:,} violations; {seen:,} without a wait, which must be some")
    return int(wrong > 0 or seen == 0)


if __name__ == "__main__":
    sys.exit(main())
