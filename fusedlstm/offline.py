"""Compile a kernel for a target without a GPU, and read what the compiler made of it.

Works in a process in which `TRITON_INTERPRET` is not set. The NVIDIA tools used here ship inside Triton.
"""

import collections
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fusedlstm import launch, stepping
from fusedlstm.plan import Plan

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MATRIX_INSTRUCTIONS = ("UTCHMMA", "UTCMMA", "HGMMA", "HMMA", "v_mfma")
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Compiled(NamedTuple):
    """A compiled kernel in numbers. `spill_bytes` are of local memory, a thread."""

    regs: int
    spill_bytes: int
    smem_bytes: int
    mma: str  # the widest matrix instruction, with its count in the whole kernel
    asm: dict[str, str]  # ttgir, and ptx and sass or amdgcn
    counts: collections.Counter  # machine instructions of the whole kernel


def compile_kernel(kernel, signature: dict[str, str], constants: dict, arch: str, **options) -> Compiled:
    """Compile `kernel`, whose pointers are taken as 16-byte aligned, as the just-in-time compiler would.

    Args:
        signature: type of every argument that is not a constant, such as "*bf16", "i32".
        constants: values of the `tl.constexpr` arguments.
        arch: one of `TARGETS`.
    """
    names = kernel.arg_names
    types = {name: "constexpr" if name in constants else signature[name] for name in names}
    aligned = {(k,): [["tt.divisibility", 16]] for k, name in enumerate(names) if types[name].startswith("*")}
    values = {(names.index(name),): value for name, value in constants.items()}
    compiled = triton.compile(ASTSource(kernel, types, values, aligned), target=TARGETS[arch], options=options)
    asm = {"ttgir": compiled.asm["ttgir"]}
    if "cubin" in compiled.asm:
        asm["ptx"] = compiled.asm["ptx"]
        regs, spill_bytes, asm["sass"] = _read_cubin(compiled.asm["cubin"])
        counts = collections.Counter(_sass_operations(asm["sass"]))
    else:
        asm["amdgcn"] = compiled.asm["amdgcn"]
        metadata = dict(re.findall(r"^\s+\.(\w+):\s+(\d+)$", asm["amdgcn"], re.M))
        regs = int(metadata["vgpr_count"])
        spill_bytes = 4 * int(metadata["vgpr_spill_count"])
        counts = collections.Counter(re.findall(r"^\s+([a-z]\w+)", asm["amdgcn"], re.M))
    return Compiled(regs, spill_bytes, compiled.metadata.shared, _matrix_instruction(counts), asm, counts)


def compile_plan(plan: Plan, **flags: bool) -> Compiled:
    """Compile the kernel of `plan` for its architecture, as a launch would. Flags as in `launch.constants`."""
    if plan.schedule == "stepped":
        return compile_step(plan, **flags)
    kernel = launch.KERNELS[plan.pass_]
    training = {"SAVE_GATES", "SAVE_STATES"} if plan.pass_ == "fwd" else set()
    # With masks, the most that a kernel can be asked for.
    masks = {"dense": set(), "packed": {"PACKED", "RESETS"}, "ragged": {"RAGGED", "RESETS"}}[plan.layout]
    more = {"CLIP", "HAS_GRAD_C_SEQ"} if masks and plan.pass_ == "bwd" else set()
    constants = launch.constants(plan, **dict.fromkeys(training | masks | more, True) | flags)
    return compile_kernel(kernel, launch.signature(plan), constants, plan.arch, **launch.options(plan))


def compile_step(plan: Plan, input_size: int = 0, **flags: bool) -> Compiled:
    """Compile the kernel of one step of `plan`, as a launch would: with the input product and for inference if
    `input_size` is given, else with what training needs. Flags as in `stepping.constants`."""
    if input_size:
        on = {"HAS_INPUT", "HAS_BIAS"}
    else:
        on = {"SAVE_GATES", "SAVE_STATES"} if plan.pass_ == "fwd" else set()
    constants = stepping.constants(plan, input_size, **dict.fromkeys(on, True) | flags)
    signature = stepping.signature(plan, input_size > 0)
    return compile_kernel(stepping.KERNELS[plan.pass_], signature, constants, plan.arch, **stepping.options(plan))


# What the order of a step is told by: an event, and the beginning of its instruction.
EVENTS = {
    "poll": r"CCTL\.IVALL",  # the end of an acquire
    "exchange": r"LDG\.E\.(64|128)\.STRONG\.GPU",  # past the first-level cache
    "fetch": r"LDG\.(?!\S*STRONG)",
    "product": r"\w*MMA",
    "store": r"STG",
    "arrive": r"(RED|ATOM)G?\S*\.ADD",
    "prefetch": r"CCTL\.\S*PF",
}


class Instruction(NamedTuple):
    """A line of machine code."""

    operation: str  # with its suffixes, such as "LDG.E.128.STRONG.GPU"
    operands: str

    @property
    def event(self) -> str | None:
        """Its name in `EVENTS`."""
        return next((name for name, pattern in EVENTS.items() if re.match(pattern, self.operation)), None)

    @property
    def loaded(self) -> set[int]:
        """The registers that a load from global memory writes."""
        first = re.match(r"R(\d+)", self.operands)
        width = re.search(r"\.(64|128)\b", self.operation)
        return {int(first[1]) + k for k in range(int(width[1]) // 32 if width else 1)} if first else set()

    @property
    def read(self) -> set[int]:
        """The registers that it reads, but for the upper ones of wide operands: no first one of a load is among these."""
        written, _, rest = self.operands.partition(",")
        if self.operation.startswith(("ST", "RED", "BAR", "BRA")):  # these write no register
            rest = self.operands
        return {int(k) for k in re.findall(r"\bR(\d+)", rest)} | {int(k) for k in re.findall(r"\[R(\d+)", written)}


class Loop(NamedTuple):
    """The loop over time in numbers, an iteration; a loop that polls is counted once."""

    instructions: int
    bar_sync: int  # barriers of all threads of a program
    wgmma_waits: int  # for matrix instructions that run on their own
    load_rounds: int  # of loads of what the group exchanges, of which each round waits for one before


def loop(sass: str) -> Loop:
    """What an iteration of the loop over time does."""
    found = loop_instructions(sass)
    operations = [i.operation for i in found]
    return Loop(
        len(found),
        sum(o.startswith("BAR.SYNC") for o in operations),
        sum(o.startswith("WARPGROUP.DEPBAR") for o in operations),
        _rounds(found, "exchange"),
    )


def read_before(sass: str, wait: str) -> list[tuple[Instruction, Instruction]]:
    """What an iteration fetches from memory and reads before its first event `wait`: loads and the instructions that read.

    But for tables of rows, which are integers of 64 bits that addresses are made of.
    """
    pending, found = {}, []
    for i in loop_instructions(sass):
        if i.event == wait:
            break
        found += [(pending.pop(register), i) for register in i.read & pending.keys()]
        if i.event == "fetch":
            pending |= dict.fromkeys(i.loaded, i)
    is_number = re.compile(r"F|STS|\w*MMA|MUFU|H[A-Z]+2")
    return [(load, i) for load, i in found if ".64" not in load.operation or is_number.match(i.operation)]


def _rounds(instructions: list[Instruction], event: str) -> int:
    """How many loads of that kind wait for each other, one after another."""
    pending, waited, rounds = {}, 0, 0
    for i in instructions:
        for register in i.read & pending.keys():
            waited = max(waited, pending.pop(register))
        if i.event == event:
            pending |= dict.fromkeys(i.loaded, waited + 1)
            rounds = max(rounds, waited + 1)
    return rounds


def loop_operations(sass: str) -> collections.Counter:
    """Machine instructions of the loop over time, without their suffixes."""
    return collections.Counter(i.operation.partition(".")[0] for i in loop_instructions(sass))


def loop_events(sass: str) -> list[str]:
    """The names of `EVENTS`, one for every such instruction of the loop over time, in the order of the machine code."""
    return [i.event for i in loop_instructions(sass) if i.event]


def loop_instructions(sass: str) -> list[Instruction]:
    """The loop over time, in the order of the machine code: the shortest loop that multiplies, stores and has a barrier.

    Loops inside of it poll, or go through chunks of a reduction; the loop around it walks over batch tiles. What is done only
    now and then is left out: where a wait takes long, the look for values that are absent (`kernels.exchange`).
    """
    lines = sass.splitlines()
    labels = {m[1]: k for k, line in enumerate(lines) if (m := re.match(r"\s*(\.L_x_\d+):", line))}
    backward = [
        (begin, k)
        for k, line in enumerate(lines)
        if (m := re.search(r"BRA.*?(\.L_x_\d+)", line)) and (begin := labels.get(m[1], k)) < k
    ]
    for begin, end in sorted(backward, key=lambda span: span[1] - span[0]):
        operations = {i.operation.partition(".")[0] for i in _instructions(lines[begin : end + 1])}
        if {"STG", "BAR"} <= operations and operations & {"HMMA", "HGMMA", "FFMA"}:
            skipped = set()
            for k in range(begin, end):
                m = re.search(r"@!?U?P\w+ BRA.*?(\.L_x_\d+)", lines[k])
                if m and k < (target := labels.get(m[1], k)) <= end:
                    events = {i.event for i in _instructions(lines[k + 1 : target])}
                    if "exchange" in events and not events & {"product", "store"}:
                        skipped |= {*range(k + 1, target)}
            return _instructions([lines[k] for k in range(begin, end + 1) if k not in skipped])
    return []


_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*)")


def _instructions(lines: list[str]) -> list[Instruction]:
    return [Instruction(m[1], m[2]) for line in lines if (m := _INSTRUCTION.match(line))]


def _read_cubin(cubin: bytes) -> tuple[int, int, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([_TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True).stdout
        sass = subprocess.run([_TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    return int(found[1]), int(found[2]) + int(found[3]), sass


def _sass_operations(sass: str) -> list[str]:
    return re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", sass, re.M)


def _matrix_instruction(counts: collections.Counter) -> str:
    for name in MATRIX_INSTRUCTIONS:
        total = sum(n for operation, n in counts.items() if operation.startswith(name))
        if total:
            return f"{name} x{total}"
    return "none"
