"""Measure what the machine can do, for the planner and the bounds: `python -m bench.ceilings --out ROWS.csv`.

| metric | unit | meaning |
|---|---|---|
| `barrier` | us | one arrival and wait of `kernels/exchange.py`, P programs |
| `exchange` | us | one step in which each of P programs hands a tile to all, by counter or by data |
| `loop` | us | one step of our recurrence, forward and backward, by each protocol |
| `launch` | us | an empty kernel: host time, device time of many in a row, in a CUDA graph, cooperative |
| `l2_shared`, `l2_sliced` | TB/s | `.cg` loads of a buffer in the L2: each multiprocessor all of it, or a slice |
| `copy` | GB/s | a large copy, read plus written |
| `matmul` | TFLOP/s | a large product of torch |
| `step_matmul` | us | the product of one step, [B, H] x [H, 4H], in a CUDA graph |

The time of a barrier or an exchange is the difference between a long and a short launch, divided by the difference of
their steps. So the time of the launch is not in it. On a CPU the same code runs interpreted, with tiny sizes and the
clock of the host. This is a rehearsal, and its numbers mean nothing.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
import time
import traceback
from pathlib import Path

import torch
import triton
import triton.language as tl

from bench import environment, rows
from fusedlstm import timing
from fusedlstm.kernels import exchange
from fusedlstm.kernels.exchange import Exchange

ROWS_OF_TILE, UNITS, ABSENT = 16, 8, -1  # a program owns 8 units of 16 rows, as the smallest resident plans do
POLLS = 1 << 22  # before a wait is an error
LOOP_SIZES = ((16, 768), (128, 1024))  # B, H of our loops: F1 and L1; each is four kernels to compile
STEP_SIZES = ((16, 768), (64, 512), (128, 1024), (128, 2048))  # B, H of products of one step
PROGRAMS = (1, 2, 8, 32, 64, 128)  # of barriers and exchanges, as many as have a multiprocessor each
WIDEST = "P"  # the shape of the row with the most programs
MEASURED_AS = {  # field of a row in the planner's table of devices -> (metric, shape, provider, dtype, scale)
    "barrier_us": ("exchange", WIDEST, "counter", "int32", 1.0),
    "exchange_us": ("exchange", WIDEST, "data", "int32", 1.0),
    "launch_us": ("launch", "device", "triton", "int32", 1.0),
    "l2_tbps": ("l2_shared", "", "triton", "int32", 1.0),
    "half_tflops": ("matmul", "", "torch", "bfloat16", 1.0),
    "tf32_tflops": ("matmul", "", "torch", "float32", 1.0),
    "memory_tbps": ("copy", "", "torch", "float32", 1e-3),
}


def exchange_of(programs: int) -> Exchange:
    """How `programs` exchange here, with the end of a wait that the device has."""
    asserts = triton.knobs.runtime.interpret or torch.version.hip
    return Exchange(programs, "counter", POLLS, "" if asserts else exchange.NVIDIA_TRAP, "", bool(torch.version.hip))


@triton.jit
def barrier_kernel(arrived_ptr, STEPS, EXCHANGE: tl.constexpr):
    """STEPS barriers among all programs of the launch."""
    programs = tl.num_programs(0)
    for s in range(STEPS):
        exchange.arrive(arrived_ptr)
        exchange.wait(arrived_ptr, programs * (s + 1), EXCHANGE)


@triton.jit
def exchange_kernel(
    tiles_ptr,  # [STEPS, ROWS, P * UNITS] int16; by data all ABSENT before the launch
    seen_ptr,  # [P, ROWS, P * UNITS] int16, the sum over steps
    arrived_ptr,
    STEPS,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    BY_DATA: tl.constexpr,
    ABSENT: tl.constexpr,
    EXCHANGE: tl.constexpr,
):
    """At each step every program stores its units of the step's tile and loads the whole of it."""
    pid = tl.program_id(0)
    rows = tl.arange(0, ROWS)[:, None] * (P * UNITS)
    own = rows + pid * UNITS + tl.arange(0, UNITS)[None, :]
    whole = rows + tl.arange(0, P * UNITS)[None, :]
    seen = tl.zeros((ROWS, P * UNITS), tl.int16)
    for s in range(STEPS):
        p_tile = tiles_ptr + s * (ROWS * P * UNITS)
        tl.store(p_tile + own, tl.full((ROWS, UNITS), 1, tl.int16) + (pid % 7).to(tl.int16))
        if BY_DATA:
            tile = tl.load(p_tile + whole, cache_modifier=".cg")
            absent = tl.max(tl.max((tile == ABSENT).to(tl.int32), 1), 0)
            attempts = 0
            while (absent > 0) & (attempts < EXCHANGE.LIMIT):
                tile = tl.load(p_tile + whole, cache_modifier=".cg")
                absent = tl.max(tl.max((tile == ABSENT).to(tl.int32), 1), 0)
                attempts += 1
            exchange.end_unless(absent == 0, EXCHANGE)
        else:
            exchange.arrive(arrived_ptr)
            exchange.wait(arrived_ptr, P * (s + 1), EXCHANGE)
            tile = tl.load(p_tile + whole, cache_modifier=".cg")
        seen += tile
    tl.store(seen_ptr + pid * (ROWS * P * UNITS) + whole, seen)


@triton.jit
def read_kernel(
    x_ptr,  # [BLOCKS * BLOCK] int32
    sum_ptr,  # [programs, BLOCK] int32
    BLOCKS,
    COUNT,
    APART,
    REPEATS,
    BLOCK: tl.constexpr,
):
    """Every program reads COUNT blocks REPEATS times, each time one block later. The next one begins APART later."""
    pid = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int32)
    for r in range(REPEATS):
        for k in range(COUNT):
            block = (pid * APART + k + r) % BLOCKS
            total += tl.load(x_ptr + block * BLOCK + offs, cache_modifier=".cg")
    tl.store(sum_ptr + pid * BLOCK + offs, total)


@triton.jit
def empty_kernel(x_ptr):
    pass


class Machine:
    """A device to measure, or the interpreter in its place."""

    def __init__(self) -> None:
        self.gpu = torch.cuda.is_available()
        self.device = "cuda" if self.gpu else "cpu"
        properties = torch.cuda.get_device_properties(0) if self.gpu else None
        self.sms = properties.multi_processor_count if self.gpu else 2
        self.matrix, self.steps = (8192, (10, 1010)) if self.gpu else (256, (1, 2))
        # What is read from the L2 takes half of it at most, both ends of a copy a quarter of the memory.
        self.l2_bytes = (
            min(16 << 20, (getattr(properties, "L2_cache_size", 0) or 32 << 20) // 2) if self.gpu else 2 << 10
        )
        self.copy_mib = min(2048, properties.total_memory >> 23) if self.gpu else 8
        self.loop_sizes, self.loop_steps = (LOOP_SIZES, (20, 220)) if self.gpu else (((2, 32),), (1, 2))

    def launch(self, kernel, programs: int, *args, waits: bool = False, **constants) -> None:
        """`waits`: programs wait for each other, so all must be there at once."""
        options = {"num_warps": 4}
        if waits:
            options |= {"launch_cooperative_grid": True, "debug": True}
        with contextlib.nullcontext() if self.gpu or not waits else self._side_by_side():
            kernel[(programs,)](*args, **constants, **options)

    def _side_by_side(self):
        from fusedlstm.engines import interpreter

        return interpreter.side_by_side(seed=0, yield_on_memory=True)

    def ms(self, call, before=lambda: None, samples: int = 7) -> list[float]:
        """Times of single calls, sorted; `before` runs ahead of each and is not timed."""
        found = []
        for k in range(samples + 2 if self.gpu else 2):
            before()
            if self.gpu:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call()
                end.record()
                end.synchronize()
                value = start.elapsed_time(end)
            else:
                begin = time.perf_counter()
                call()
                value = (time.perf_counter() - begin) * 1e3
            if k >= (2 if self.gpu else 1):  # those before warm up
                found.append(value)
        return sorted(found)

    def us_a_step(self, run, few: int, many: int, before=lambda: None) -> list[float]:
        """Microseconds of one step of `run(steps)`: the difference of a long and a short launch."""
        if not self.gpu:  # two steps: a difference would be noise
            return [ms * 1e3 / many for ms in self.ms(lambda: run(many), before)]
        short, long = (self.ms(lambda n=n: run(n), before) for n in (few, many))
        return [(b - a) * 1e3 / (many - few) for a, b in zip(short, long, strict=True)]


def barriers(machine: Machine):
    """(shape, provider, metric, unit, values, protocol) of barriers and exchanges."""
    few, many = machine.steps
    for P in (p for p in PROGRAMS if p <= machine.sms):
        arrived = torch.zeros(1, dtype=torch.int32, device=machine.device)

        def run(n, P=P, arrived=arrived):
            machine.launch(barrier_kernel, P, arrived, n, waits=True, EXCHANGE=exchange_of(P))

        steps = f"{many} steps less {few}"
        yield f"P{P}", "counter", "barrier", "us", machine.us_a_step(run, few, many, arrived.zero_), steps
        for by_data in (False, True):
            width = P * UNITS
            tiles = torch.empty(many, ROWS_OF_TILE, width, dtype=torch.int16, device=machine.device)
            seen = torch.empty(P, ROWS_OF_TILE, width, dtype=torch.int16, device=machine.device)

            def clear(tiles=tiles, arrived=arrived):
                tiles.fill_(ABSENT)
                arrived.zero_()

            def run(n, P=P, by_data=by_data, tiles=tiles, seen=seen, arrived=arrived):
                constants = {"P": P, "ROWS": ROWS_OF_TILE, "UNITS": UNITS, "BY_DATA": by_data, "ABSENT": ABSENT}
                machine.launch(
                    exchange_kernel, P, tiles, seen, arrived, n, waits=True, EXCHANGE=exchange_of(P), **constants
                )

            values = machine.us_a_step(run, few, many, clear)
            expected = many * (torch.arange(P, device=machine.device) % 7 + 1).repeat_interleave(UNITS)
            if not (seen == expected.to(torch.int16)).all():
                raise RuntimeError(f"exchange of {P} programs, by data {by_data}: wrong numbers")
            yield f"P{P}", "data" if by_data else "counter", "exchange", "us", values, steps


def loops(machine: Machine):
    """A step of our own loops, forward and backward, by each exchange protocol. Both must give the same numbers."""
    from fusedlstm import plan
    from fusedlstm.engines import launch

    limits = launch.device_limits(torch.cuda.current_device() if machine.gpu else None)
    few, many = machine.loop_steps
    for B, H in machine.loop_sizes:
        kept = None
        by_data = [plan.plan("lstm", B, H, "bf16", 1, limits, p, protocol="data") for p in ("fwd", "bwd")]
        if any(p.schedule == "stepped" for p in by_data):
            print(
                f"loop of B{B} H{H}: skipped, "
                f"no group of programs fits on {limits.name} with {limits.num_sms} multiprocessors"
            )
            continue
        for protocol in ("counter", "data"):
            # The same tiles for both: other tiles add up in another order.
            forward, backward = (p if p.local else dataclasses.replace(p, protocol=protocol) for p in by_data)
            if not machine.gpu:  # a group of two in place of one: the smallest that exchanges
                tiles = {"schedule": "resident", "block_h": H // 2, "block_k": H // 2, "transposed": False}
                forward, backward = (
                    dataclasses.replace(p, **tiles, grid=(2, 1, 1), protocol=protocol) for p in (forward, backward)
                )
            runs = {n: _loop(machine, B, H, n, forward, backward) for n in (few, many)}
            tensors = [x for run in runs[many] for x in run()]
            kept = kept or tensors
            if not all(torch.equal(a, b) for a, b in zip(tensors, kept, strict=True)):
                raise RuntimeError(f"B{B} H{H}: the protocols do not agree")
            for k, (pass_, p) in enumerate((("fwd", forward), ("bwd", backward))):
                values = machine.us_a_step(lambda n, k=k, runs=runs: runs[n][k](), few, many)
                words = f"{p.protocol} {p.schedule} {p.block_b}x{p.block_h}, {many} steps less {few}, bfloat16"
                yield f"{pass_}-B{B}-H{H}", protocol, "loop", "us", values, words


def _loop(machine: Machine, B: int, H: int, T: int, forward_plan, backward_plan):
    """Functions that launch the forward and the backward loop of T steps on random data."""
    from fusedlstm.cells import CELLS, Grads, Recurrence, State, Weights
    from fusedlstm.engines import launch

    generator = torch.Generator().manual_seed(0)

    def randn(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(machine.device, torch.bfloat16)

    preact_x, weight_hh = randn(1, T, B, 4 * H), [randn(4 * H, H, scale=H**-0.5)]
    spec, given = Recurrence(CELLS["lstm"]), (Weights(weight_hh), State(randn(1, B, H), randn(1, 1, B, H)))
    grads = Grads(randn(T, B, H), None, randn(1, B, H), randn(1, 1, B, H))

    def forward():
        return launch.recurrence_fwd(spec, preact_x, *given, plan=forward_plan)

    saved = forward()

    def backward():
        return launch.recurrence_bwd(spec, grads, saved, *given, plan=backward_plan)

    return forward, backward


def launches(machine: Machine):
    """Empty kernels."""
    x = torch.zeros(16, device=machine.device)
    count = 200 if machine.gpu else 3

    def many(waits=False):
        for _ in range(count):
            machine.launch(empty_kernel, machine.sms, x, waits=waits)

    many()
    if machine.gpu:
        torch.cuda.synchronize()
    host = []
    for _ in range(7 if machine.gpu else 1):
        begin = time.perf_counter()
        many()
        host.append((time.perf_counter() - begin) * 1e6 / count)
        if machine.gpu:
            torch.cuda.synchronize()
    yield "host", "triton", "launch", "us", sorted(host), f"perf_counter over {count}"
    for name, waits in (("device", False), ("cooperative", True)):
        values = [ms * 1e3 / count for ms in machine.ms(lambda waits=waits: many(waits))]
        yield name, "triton", "launch", "us", values, f"{count} in a row"
    if machine.gpu:
        graph, _ = timing.capture(many)
        yield (
            "graph",
            "triton",
            "launch",
            "us",
            [ms * 1e3 / count for ms in machine.ms(graph.replay)],
            f"graph of {count}",
        )
    else:
        print("launch in a graph: skipped, needs a GPU")


def reads(machine: Machine):
    """L2 bandwidth."""
    block = 8192 if machine.gpu else 64
    blocks = max(1, machine.l2_bytes // (4 * block))
    programs = 4 * machine.sms
    x = torch.randint(1 << 20, (blocks * block,), dtype=torch.int32, device=machine.device)
    total = torch.empty(programs, block, dtype=torch.int32, device=machine.device)
    slice_ = max(1, blocks // programs)
    for name, count, apart, repeats in (("shared", blocks, 7, 2), ("sliced", slice_, slice_, 2 * blocks // slice_)):
        repeats = repeats if machine.gpu else 1

        def run(count=count, apart=apart, repeats=repeats):
            machine.launch(read_kernel, programs, x, total, blocks, count, apart, repeats, BLOCK=block)

        read_bytes = programs * count * repeats * block * 4
        values = [read_bytes / (ms * 1e9) for ms in machine.ms(run)]
        yield "", "triton", f"l2_{name}", "TB/s", values, f"{x.numel() * 4 >> 10} KiB, {programs} programs, .cg"


def products(machine: Machine):
    """Large products, a large copy, and the product of one step."""
    torch.backends.cuda.matmul.allow_tf32 = True  # float32 is TF32, as in torch.nn.LSTM
    n, mebibytes = machine.matrix, machine.copy_mib
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a, b = (torch.randn(n, n, device=machine.device, dtype=dtype) for _ in range(2))
        values = [2 * n**3 / (ms * 1e9) for ms in machine.ms(lambda a=a, b=b: a @ b)]
        yield "", str(dtype), "matmul", "TFLOP/s", values, f"{n} cubed, random"
    source = torch.randn(mebibytes << 18, device=machine.device)
    target = torch.empty_like(source)
    values = [2 * source.numel() * 4 / (ms * 1e6) for ms in machine.ms(lambda: target.copy_(source))]
    yield "", "torch.float32", "copy", "GB/s", values, f"{mebibytes} MiB"
    if not machine.gpu:
        print("products of a step in a graph: skipped, needs a GPU")
        return
    for B, H in STEP_SIZES:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            h, weight = (torch.randn(m, H, device=machine.device, dtype=dtype) for m in (B, 4 * H))
            out = h.new_empty(B, 4 * H)

            def step(h=h, weight=weight, out=out):
                torch.mm(h, weight.t(), out=out)

            graph, _ = timing.capture(step, copies=50)
            values = [ms * 1e3 / 50 for ms in machine.ms(graph.replay)]
            yield f"B{B}-H{H}", str(dtype), "step_matmul", "us", values, "graph of 50, weights in the L2"


# Last what could hang: an assertion on the device ends the process, and what is written stays.
GROUPS = {"products": products, "reads": reads, "launches": launches, "barriers": barriers, "loops": loops}


def constants() -> tuple[str, dict]:
    """The planner's own row for this device: its name, and field -> value."""
    from fusedlstm.engines import launch

    limits = launch.device_limits(torch.cuda.current_device() if torch.cuda.is_available() else None)
    return limits.name, {name: getattr(limits, name, None) for name in MEASURED_AS}


def beside_constants(measured: list[rows.Row]) -> tuple[list[str], dict[str, float]]:
    """Lines of the planner's constants beside the measured ones, and the measured ones by field."""
    name, assumed = constants()
    found, lines = {}, [f"{'constant':14} {'in the table':>14} {'measured':>10}   ({name})"]
    for field, (metric, shape, provider, dtype, scale) in MEASURED_AS.items():
        wanted = ("roof", metric, provider, dtype)
        by_shape = {
            row["shape"]: float(row["p50"]) * scale
            for row in measured
            if (row["op"], row["metric"], row["provider"], row["dtype"]) == wanted
        }
        if shape == WIDEST:
            shape = max(by_shape, key=lambda name: int(name[1:]), default=WIDEST)
        values = [value for name, value in by_shape.items() if name in (shape, metric)]
        if values:
            found[field] = min(values)
        table = "not there" if assumed[field] is None else f"{assumed[field]:g}"
        lines.append(f"{field:14} {table:>14} {f'{found[field]:.4g}' if values else '-':>10}")
    return lines, found


def _row(machine: Machine, shape: str, provider: str, metric: str, unit: str, values, protocol: str) -> dict:
    other = "bfloat16" if metric == "loop" else "int32"
    dtype = provider.removeprefix("torch.") if provider.startswith("torch.") else other
    p50, p20, p80 = timing.percentiles(values)
    return {
        **dict.fromkeys(("T", "B", "I", "H", "layers", "directions"), 0),
        **{"op": "roof", "provider": "torch" if provider.startswith("torch.") else provider, "mode": "roof"},
        **{"shape": shape or metric, "dtype": dtype, "metric": metric, "unit": unit},
        **{"p50": f"{p50:.5g}", "p20": f"{p20:.5g}", "p80": f"{p80:.5g}"},
        **environment.facts(machine.device),
        "date": environment.today(),
        "protocol": ("events " if machine.gpu else "interpreted ") + protocol,
    }


def tell(path: Path) -> None:
    """Print the planner's constants beside the measured ones, and these as an entry of fusedlstm/plan/measured.json."""
    lines, found = beside_constants(rows.read(path))
    print("\n".join(lines))
    values = {name: float(f"{value:.4g}") for name, value in found.items()}
    entry = {"date": environment.today(), "commit": environment.commit()[0], "values": values}
    print("as constants:", json.dumps({constants()[0]: entry}), flush=True)


def main(argv: list[str] | None = None) -> int:
    """Returns 0 if every group could be measured; each row is written as soon as it is there."""
    parser = argparse.ArgumentParser(prog="python -m bench.ceilings", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="CSV file of rows")
    parser.add_argument("--only", choices=GROUPS, action="append", help="may be repeated")
    options = parser.parse_args(argv)
    machine = Machine()
    writer = rows.Writer(options.out)
    failed = []
    groups = options.only or list(GROUPS)
    for k, name in enumerate(groups):
        if 0 < k == len(groups) - 1:  # the last could hang; who reads takes the last table there is
            tell(options.out)
        try:
            for found in GROUPS[name](machine):
                row = _row(machine, *found)
                writer.write(row)
                print(
                    f"{row['metric']:12} {row['shape']:12} {row['provider']:8} {row['dtype']:9} "
                    f"{row['p50']:>9} {row['unit']:8} {row['protocol']}",
                    flush=True,
                )
        except Exception as error:  # the next group may still tell something
            traceback.print_exc()
            print(f"FAILED {name}: {type(error).__name__}: {str(error)[:200]}", flush=True)
            failed.append(name)
    writer.close()
    tell(options.out)
    print(f"{len(groups) - len(failed)} groups measured, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
