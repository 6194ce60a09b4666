"""Compile every plan for the benchmark shapes, for every target, without a GPU.

`python -m bench.kernels` compiles them, prints the table and rewrites `bench/results/kernels.csv`. If a kernel spills,
its name goes into `fusedlstm/plan/spills.json`, and the next variant of the plan is compiled, until none spills.

`--refresh` compiles only the plans that are not in the table yet. Use it after a change of the cost model or the device
table, but not of the kernels. `--spills` only writes the list of spills, for the targets whose plans must not spill.
Use it with a second version of Triton.
"""

import argparse
import csv
import itertools
import json
import multiprocessing
import os
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.shapes import BY_ID, SHAPES, Shape
from fusedlstm.kernels.cells import STEPS
from fusedlstm.plan import LAYOUTS, Plan, allowed_bytes, cost, plan, wave
from fusedlstm.plan.devices import DEVICES
from fusedlstm.plan.tiles import SPILLS, known_spills

OTHER_LAYOUTS = ("sm_80", "sm_90")  # targets for which more is compiled than dense batches in bfloat16 and float32
MOST = ("bf16", "fp32")  # of what is not compiled for all of `DTYPES`
TRITON = "3.7.1"  # of the table
RESULTS = Path(__file__).parent / "results" / "kernels.csv"
DTYPES = {"bf16": "tf32", "fp16": "tf32", "fp32": "tf32", "fp32-ieee": "ieee"}  # name -> precision of float32 products
FAMILY_SHAPES = ("S2", "M1", "F1", "L1")  # of the cells beside the LSTM: one a schedule and more
CHOICE = ("schedule", "tiles", "warps", "split", "ahead", "protocol")
COLUMNS = [
    "cell",
    "shape",
    "dtype",
    "pass",
    "target",
    "layout",
    *CHOICE,
    "regs",
    "spill_bytes",
    "smem_bytes",
    "mma",
    "instructions",
    "bar_sync",
    "wgmma_waits",
    "load_rounds",
    "barriers_per_step",
    "predicted_us",
    "bound_us",
]


class Numbers(NamedTuple):
    """What the compiler made of a plan. The last four are of one iteration of the time loop, and empty on AMD."""

    regs: int
    spill_bytes: int
    smem_bytes: int
    mma: str  # or why it does not compile, and regs is -1
    instructions: int | None = None
    bar_sync: int | None = None
    wgmma_waits: int | None = None
    load_rounds: int | None = None


def shapes() -> list[Shape]:
    """The shapes of a GPU; a projection is outside the loop."""
    return [s for s in SHAPES if "gpu" in s.sets]


def plans() -> list[tuple[str, str, Plan]]:
    """(shape id, dtype name, plan) for all shapes, dtypes, passes and targets.

    On some targets there are also all layouts, and stacks as a wave.
    """
    found = []
    for s, (name, precision), limits in itertools.product(shapes(), DTYPES.items(), DEVICES.values()):
        sizes = (s.H, name.split("-")[0])
        # float16 has the machine code of bfloat16, and IEEE products differ from TF32 in the dot only. So both are
        # compiled for dense batches only.
        layouts = LAYOUTS if limits.arch in OTHER_LAYOUTS and name in MOST else LAYOUTS[:1]
        if limits.arch not in OTHER_LAYOUTS and name not in MOST:
            continue
        for pass_ in ("fwd", "bwd"):
            for layout in layouts:
                p = plan("lstm", s.B, *sizes, s.directions, limits, pass_, precision, layout, s.heads)
                found.append((s.id, name, p))
        if s.layers > s.directions == 1 and not (s.proj or s.alternating) and limits.arch in OTHER_LAYOUTS:
            together = wave("lstm", s.layers, s.B, *sizes, limits, precision)
            for pass_ in ("fwd", "bwd") if together > 1 else ():
                p = plan("lstm", s.B, *sizes, together, limits, pass_, precision, stack=True)
                found.append((s.id, name, p))
    return found + family()


def family() -> list[tuple[str, str, Plan]]:
    """The same of the other cells, on the targets that are tuned for: dense batches, and with masks on the newest."""
    found = []
    names = [name for name in STEPS if name != "lstm"]
    for cell, shape_id, name, arch in itertools.product(names, FAMILY_SHAPES, MOST, OTHER_LAYOUTS):
        s, limits = BY_ID[shape_id], DEVICES[arch]
        masked = arch == "sm_90" and name == "bf16"
        for pass_, layout in itertools.product(("fwd", "bwd"), LAYOUTS if masked else LAYOUTS[:1]):
            p = plan(cell, s.B, s.H, name, s.directions, limits, pass_, DTYPES[name], layout)
            found.append((shape_id, name, p))
    return found


def row_key(shape_id: str, dtype: str, p: Plan) -> tuple[str, ...]:
    """What names a row of the table."""
    return p.cell, shape_id, dtype, p.pass_, p.arch, layout(p)


def rows_of(path: Path) -> dict[tuple[str, ...], dict[str, str]]:
    """The rows of a table, by `row_key`."""
    with path.open() as file:
        return {tuple(row[name] for name in COLUMNS[:6]): row for row in csv.DictReader(file)}


def numbers_of(row: dict[str, str]) -> Numbers:
    """What `compile_numbers` found."""
    found = {name: row[name] for name in Numbers._fields}
    return Numbers(**{name: x if name == "mma" else int(x) if x else None for name, x in found.items()})


def layout(p: Plan) -> str:
    """How the recurrences of the launch lie."""
    return "wave" if p.stack else p.layout


def compile_numbers(p: Plan) -> Numbers:
    """Of one plan, or the error in words."""
    from fusedlstm.engines import offline

    try:
        c = offline.compile_plan(p)
    except Exception as error:
        return Numbers(-1, -1, -1, f"{type(error).__name__}: {str(error)[:200]}")
    loop = offline.loop(c.asm["sass"]) if "sass" in c.asm else ()
    return Numbers(c.regs, c.spill_bytes, c.smem_bytes, c.mma, *loop)


def compile_all(distinct: dict[str, Plan]) -> dict[str, Numbers]:
    """Compile each once, on all cores; shows a bar."""
    # Spawned, not forked: torch has started threads by now.
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        numbers = pool.imap(compile_numbers, distinct.values(), chunksize=1)
        return dict(zip(distinct, track(numbers, "compiling", len(distinct)), strict=True))


def tiles(p: Plan) -> str:
    return f"{p.block_b}x{p.block_h}x{p.block_k}{'T' if p.transposed else ''}"


def choice(p: Plan) -> tuple[str, ...]:
    """What the table tells of a plan: schedule, tiles, warps, split, protocol."""
    return p.schedule, tiles(p), str(p.num_warps), str(p.split), str(p.ahead), p.protocol


def known_numbers(path: Path, rows: list[tuple[str, str, Plan]]) -> dict[str, Numbers]:
    """What was compiled of the plans that are still those of the table, by `Plan.code`."""
    table, found = rows_of(path), {}
    for shape_id, dtype, p in rows:
        row = table.get(row_key(shape_id, dtype, p))
        if row and tuple(row[name] for name in CHOICE) == choice(p):
            found[p.code] = numbers_of(row)
    return found


def times(shape: Shape, p: Plan) -> tuple[str, str]:
    """Predicted microseconds and the bound, a step of training, with the launch spread over the shape's T steps."""
    limits = DEVICES[p.arch]
    predicted = cost.cost(p, shape.T, shape.B, limits).total / shape.T
    sizes = (shape.T, shape.B, shape.H, p.dtype, p.grid[2], limits, p.pass_, p.precision, p.heads, p.stack)
    return f"{predicted:.4g}", f"{cost.bound(p.cell, *sizes).step:.4g}"


def is_unfit(p: Plan, numbers: Numbers) -> bool:
    """Whether it spills more than the target allows, does not compile, or compiles to a trap."""
    return numbers.regs < 0 or numbers.spill_bytes > allowed_bytes(p.arch) or _lost_matrix(p, numbers)


def _lost_matrix(p: Plan, numbers: Numbers) -> bool:
    """Whether a product has no matrix instruction though there is one for it."""
    return numbers.mma == "none" and p.block_b > 1 and not (p.dtype == "fp32" and p.precision == "ieee")


def faults(p: Plan, numbers: Numbers) -> list[str]:
    """What is wrong with a compiled plan: a spill, too much shared memory, a lost matrix instruction."""
    regs, spill_bytes, smem_bytes, mma = numbers[:4]
    if regs < 0:
        return [f"does not compile: {mma}"]
    found = []
    if spill_bytes > allowed_bytes(p.arch):
        found.append(f"spills {spill_bytes} bytes a thread")
    if smem_bytes > p.smem_bytes:
        found.append(f"{smem_bytes} bytes of shared memory, {p.smem_bytes} expected at most")
    if _lost_matrix(p, numbers):
        found.append("no matrix instruction")
    rows = p.columns if p.transposed else p.block_b
    if p.arch == "sm_90" and rows >= 64 and p.precision != "ieee" and not mma.startswith("HGMMA"):
        found.append(f"{rows} rows and no wgmma but {mma}")
    return found


def settle(numbers: dict[str, Numbers], targets: set[str]) -> tuple[list[tuple[str, str, Plan]], dict[str, Numbers]]:
    """Compile what is not in `numbers` until no plan spills that has a variant left; writes the list of spills.

    Returns the plans, with the shapes and dtypes of `plans`, and what the compiler made of them by `Plan.code`.
    """
    while True:
        rows = [(s, d, p) for s, d, p in plans() if p.arch in targets]
        distinct = {p.code: p for _, _, p in rows}
        numbers |= compile_all({code: p for code, p in distinct.items() if code not in numbers})
        found = {code for code, p in distinct.items() if is_unfit(p, numbers[code])} - known_spills()
        if not found:
            return rows, numbers
        SPILLS.write_text(json.dumps(sorted(known_spills() | found), indent=0) + "\n")
        known_spills.cache_clear()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--target", choices=DEVICES, help="this one only (the table is then not written)")
    parser.add_argument("--refresh", action="store_true", help="compile only what the table does not have")
    parser.add_argument("--spills", action="store_true", help="write the list of spills, and no table")
    args = parser.parse_args()
    if not (args.refresh or args.spills or args.target):  # of other kernels, perhaps
        SPILLS.write_text("[]\n")
        known_spills.cache_clear()
    known = known_numbers(args.out, plans()) if args.refresh and args.out.exists() else {}
    rows, numbers = settle(known, {args.target} if args.target else {*(OTHER_LAYOUTS if args.spills else DEVICES)})
    distinct = {p.code: p for _, _, p in rows}

    bad = [(p, faults(p, numbers[key])) for key, p in distinct.items()]
    table = Table(
        *(
            "cell",
            "H",
            "heads",
            "dtype",
            "pass",
            "target",
            "layout",
            *CHOICE,
            "regs",
            "spill",
            "smem KiB",
            "mma",
            *Numbers._fields[4:],
        )
    )
    for key, p in distinct.items():
        regs, spill_bytes, smem_bytes, mma, *loop = numbers[key]
        dtype = "fp32-ieee" if p.dtype == "fp32" and p.precision == "ieee" else p.dtype
        words = (p.cell, p.hidden, p.heads, dtype, p.pass_, p.arch, layout(p), *choice(p), regs, spill_bytes)
        table.add_row(
            *map(str, words),
            f"{smem_bytes / 1024:.0f}",
            mma,
            *("" if x is None else str(x) for x in loop),
        )
    console = Console(width=180)
    console.print(table)
    if not (args.target or args.spills):
        with args.out.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            for shape_id, dtype, p in rows:
                compiled, key = numbers[p.code], row_key(shape_id, dtype, p)
                writer.writerow([*key, *choice(p), *compiled, p.barriers_per_step, *times(BY_ID[shape_id], p)])
        console.print(f"{len(rows)} rows, {len(distinct)} kernels -> {args.out.name}")
    for p, found in bad:
        for fault in found:
            console.print(
                f"[red]{p.cell} {p.arch} {p.pass_} {p.dtype} {p.precision} H={p.hidden} "
                f"{p.schedule} {tiles(p)} w{p.num_warps} {layout(p)}: {fault}"
            )
    return int(any(found and p.arch in ("sm_80", "sm_90") for p, found in bad))


if __name__ == "__main__":
    raise SystemExit(main())
