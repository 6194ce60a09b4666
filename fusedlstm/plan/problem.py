"""The problem that a plan solves, and the plan."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from fusedlstm import cells
from fusedlstm.plan.devices import DeviceLimits

ITEMSIZE = {"fp32": 4, "fp16": 2, "bf16": 2}
# How the rows of a batch lie in memory (`fusedlstm.layout`): all sequences with the same length, sorted and packed, or
# padded with lengths or resets.
LAYOUTS = ("dense", "packed", "ragged")
COUNTER_STRIDE = 32  # int32 values from one group's counter to the next: a cache line each
SPIN_LIMIT = 1 << 26  # polls of a counter before a wait is an error; tens of seconds
ATTEMPT_LIMIT = 1 << 24  # the same by data, whose poll is a load of all that is awaited


class PlanError(RuntimeError):
    """No plan fits the device. The text says what was requested and what the device has."""


class Problem(NamedTuple):
    """The sizes of one launch, before a plan is chosen. The number of steps is not among them."""

    cell: str  # a name of `fusedlstm.cells.CELLS`
    batch: int
    hidden: int
    dtype: str  # "fp32", "fp16" or "bf16"
    directions: int  # 1 or 2, or the layers of a stack; all run in one launch
    pass_: str  # "fwd" or "bwd"
    precision: str = "tf32"  # of float32 products, or "ieee"
    layout: str = "dense"  # one of LAYOUTS
    heads: int = 1  # blocks of a block-diagonal weight_hh
    stack: bool = False  # whether the recurrences are the layers of a stack, as a wave
    device_limits: DeviceLimits | None = None  # what a plan may use; needed for a plan
    protocol: str | None = None  # of the exchange, "counter" or "data"; None leaves it to the plan
    input_size: int = 0  # of one step whose input product is taken in the same launch

    @property
    def limits(self) -> DeviceLimits:
        assert self.device_limits is not None, "device_limits: expected those of a device, got None"
        return self.device_limits

    @property
    def head(self) -> int:
        """The number of hidden units on which the preactivations of a unit depend."""
        return self.hidden // self.heads

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    @property
    def ieee(self) -> bool:
        """Whether products have full float32 precision, for which there is no matrix instruction."""
        return self.dtype == "fp32" and self.precision == "ieee"

    @property
    def norms(self) -> bool:
        return cells.CELLS[self.cell].norms > 0

    @property
    def masked(self) -> bool:
        """Whether sequences end or are cut at different steps."""
        return self.layout != "dense"

    def product(self, block_h: int) -> tuple[int, int]:
        """N and K of the product of a program with `block_h` units. In a group the rows are aligned."""
        head = self.head if self.heads > 1 or block_h >= self.head else aligned(self.head, self.dtype)
        return product_sizes(self.cell, head, block_h, self.pass_)

    def planned(self, **how) -> "Plan":
        """A plan with these sizes. Its predicted time is not known yet."""
        return Plan(
            cell=self.cell,
            pass_=self.pass_,
            arch=self.limits.arch,
            dtype=self.dtype,
            hidden=self.hidden,
            heads=self.heads,
            stack=self.stack,
            layout=self.layout,
            precision=self.precision if self.dtype == "fp32" else "tf32",
            step_us=math.nan,
            **how,
        )


@dataclass(frozen=True)
class Plan:
    """One launch: every compile-time number of a kernel, its grid, and its predicted time."""

    cell: str
    pass_: str  # "fwd" or "bwd"
    arch: str
    dtype: str
    hidden: int
    heads: int  # block-diagonal blocks of weight_hh
    stack: bool  # whether the recurrences of the launch are layers, and not directions
    layout: str  # one of LAYOUTS
    schedule: str  # "single", "resident", "streamed" or "stepped"
    block_b: int
    block_h: int
    block_k: int
    protocol: str  # of the exchange: "counter", "data" or "none"
    transposed: bool
    split: int  # parts of a chunk, a warp each
    ahead: int  # chunks of what is exchanged that are under way at once, of a resident weight
    precision: str  # of float32 products: "tf32" or "ieee"
    num_warps: int
    stages: int  # of the streamed loop
    grid: tuple[int, int, int]  # programs of all heads' groups, batch tiles that run side by side, directions or layers
    tiles_b: int  # batch tiles; grid[1] of them run at once
    smem_bytes: int  # at most, a program
    regs: int  # roughly, a thread
    step_us: float  # predicted, all batch tiles
    why: str

    @property
    def aligned_hidden(self) -> int:
        """H, padded so that the rows of weights and of the exchanged values are aligned to 16 bytes."""
        return aligned(self.hidden, self.dtype) if self.protocol != "none" and self.heads == 1 else self.hidden

    @property
    def group(self) -> int:
        """The number of programs that exchange data with each other."""
        return self.grid[0] // self.heads

    @property
    def columns(self) -> int:
        """N of the program's product: its gates and units in the forward, its units in the backward."""
        return product_sizes(self.cell, self.aligned_hidden // self.heads, self.block_h, self.pass_)[0]

    @property
    def reduction(self) -> int:
        """K of the program's product: all units in the forward, all gates and units in the backward."""
        return product_sizes(self.cell, self.aligned_hidden // self.heads, self.block_h, self.pass_)[1]

    @property
    def code(self) -> str:
        """Everything that the machine code depends on, as text. Plans with the same text share a kernel."""
        tiles = f"{self.block_b}x{self.block_h}x{self.block_k}"
        form = f"{'T' if self.transposed else ''} split {self.split} ahead {self.ahead} stages {self.stages}"
        precision = "ieee" if self.dtype == "fp32" and self.precision == "ieee" else self.dtype
        layout = f"{'wave ' if self.stack else ''}{self.layout}"
        return (
            f"{self.arch} {self.cell} {self.pass_} {precision} H {self.hidden}/{self.heads} {layout} {self.schedule} "
            f"{self.protocol} {tiles}{form} warps {self.num_warps}"
        )

    @property
    def chunks(self) -> int:
        """The number of chunks of `block_k` in the reduction. A chunk ends with its gate if gates are separate."""
        by_gate = self.schedule == "single" or self.heads > 1
        segments = cells.CELLS[self.cell].num_gates if self.pass_ == "bwd" and by_gate else 1
        return segments * math.ceil(self.reduction // segments / self.block_k)

    @property
    def padded_reduction(self) -> int:
        """K, including the padding of its chunks."""
        return self.chunks * self.block_k

    @property
    def local(self) -> bool:
        """Whether programs exchange nothing."""
        return self.protocol == "none"

    @property
    def resident(self) -> bool:
        return self.schedule in ("single", "resident")

    @property
    def barriers_per_step(self) -> int:
        return 0 if self.local else 1 + self.norms_per_step  # in a launch

    @property
    def norms_per_step(self) -> int:
        """Exchanges of sums, by words with tags in either protocol.

        A backward with zoneout has one more, if a state beside h has a norm.
        """
        return 0 if self.local else cells.CELLS[self.cell].norms

    @property
    def walked(self) -> int:
        """The number of batch tiles that a program takes, one after another."""
        return math.ceil(self.tiles_b / self.grid[1])


def product_sizes(cell: str, hidden: int, block_h: int, pass_: str) -> tuple[int, int]:
    """N and K of a program's product.

    In the forward they are the gates of its units, and all units. In the backward they are its units, and all gates of
    all units.
    """
    gates = cells.CELLS[cell].num_gates
    return (block_h * power_of_2(gates), hidden) if pass_ == "fwd" else (block_h, gates * hidden)


def aligned(hidden: int, dtype: str) -> int:
    """`hidden`, padded so that rows of so many elements are aligned to 16 bytes."""
    elements = 16 // ITEMSIZE[dtype]
    return math.ceil(hidden / elements) * elements


def power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
