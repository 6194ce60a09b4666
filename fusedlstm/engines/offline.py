"""Compile a kernel for a target without a GPU, and analyse the result.

`TRITON_INTERPRET` must not be set in the process. The NVIDIA tools that are used come with Triton.
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

from fusedlstm.engines import launch, stepping
from fusedlstm.plan import Plan, variants
from fusedlstm.plan.devices import DeviceLimits

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
    """A compiled kernel in numbers. `spill_bytes` is the local memory of a thread."""

    regs: int
    spill_bytes: int
    smem_bytes: int
    mma: str  # the widest matrix instruction, with its count in the whole kernel
    asm: dict[str, str]  # ttgir, and ptx and sass or amdgcn
    counts: collections.Counter  # machine instructions of the whole kernel


def compile_kernel(kernel, signature: dict[str, str], constants: dict, arch: str, **options) -> Compiled:
    """Compile `kernel` as the just-in-time compiler would, with pointers that are 16-byte aligned.

    Args:
        kernel: A function under `triton.jit`.
        signature: The type of every argument that is not a constant, such as "*bf16" or "i32".
        constants: The values of the `tl.constexpr` arguments.
        arch: One of `TARGETS`.
        options: Options of the compiler, such as `num_warps`.
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
    """Compile the kernel of `plan` for its architecture, as a launch would. `flags` are those of `launch.constants`."""
    if plan.schedule == "stepped":
        return compile_step(plan, **flags)
    kernel = launch.KERNELS[plan.pass_]
    training = {"SAVE_GATES", "SAVE_STATES"} if plan.pass_ == "fwd" else set()
    # With masks, everything that a kernel can be asked for is switched on.
    masks = {"dense": set(), "packed": {"PACKED", "RESETS"}, "ragged": {"RAGGED", "RESETS"}}[plan.layout]
    more = {"CLIP", "HAS_GRAD_C_SEQ"} if masks and plan.pass_ == "bwd" else set()
    constants = launch.constants(plan, **dict.fromkeys(training | masks | more, True) | flags)
    return compile_kernel(kernel, launch.signature(plan), constants, plan.arch, **launch.options(plan))


def compile_clean(plan: Plan, limits: DeviceLimits, **flags: bool) -> tuple[Plan, Compiled]:
    """Compile `plan`, or its next variant that does not spill, as a launch does. If all spill, it is `plan`."""
    first = compile_plan(plan, **flags)
    for other in variants(plan, limits) if first.spill_bytes else []:
        found = compile_plan(other, **flags)
        if not found.spill_bytes:
            return other, found
    return plan, first


def compile_step(plan: Plan, input_size: int = 0, **flags: bool) -> Compiled:
    """Compile the kernel of one step of `plan`, as a launch would.

    With `input_size` it is the kernel for inference with the input product, else the one for training. The flags are
    those of `stepping.constants`.
    """
    if input_size:
        on = {"HAS_INPUT", "HAS_BIAS"}
    else:
        on = {"SAVE_GATES", "SAVE_STATES"} if plan.pass_ == "fwd" else set()
    constants = stepping.constants(plan, input_size, **dict.fromkeys(on, True) | flags)
    signature = stepping.signature(plan, input_size > 0)
    return compile_kernel(stepping.KERNELS[plan.pass_], signature, constants, plan.arch, **stepping.options(plan))


# The events by which the order of a step is described, and the beginning of the instruction of each.
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
    """An instruction of the machine code."""

    operation: str  # with its suffixes, such as "LDG.E.128.STRONG.GPU"
    operands: str

    @property
    def event(self) -> str | None:
        """The name of its event in `EVENTS`, or None."""
        return next((name for name, pattern in EVENTS.items() if re.match(pattern, self.operation)), None)

    @property
    def loaded(self) -> set[int]:
        """The registers that a load from global memory writes."""
        first = re.match(r"R(\d+)", self.operands)
        width = re.search(r"\.(64|128)\b", self.operation)
        return {int(first[1]) + k for k in range(int(width[1]) // 32 if width else 1)} if first else set()

    @property
    def read(self) -> set[int]:
        """The registers that it reads, without the upper ones of wide operands, with which no load begins."""
        written, _, rest = self.operands.partition(",")
        if self.operation.startswith(("ST", "RED", "BAR", "BRA")):  # these write no register
            rest = self.operands
        return {int(k) for k in re.findall(r"\bR(\d+)", rest)} | {int(k) for k in re.findall(r"\[R(\d+)", written)}


class Loop(NamedTuple):
    """The numbers of one iteration of the loop over time. A loop that polls is counted once."""

    instructions: int
    bar_sync: int  # barriers of all threads of a program
    wgmma_waits: int  # for matrix instructions that run on their own
    load_rounds: int  # of loads of what the group exchanges, of which each round waits for one before


def loop(sass: str) -> Loop:
    """Count what an iteration of the loop over time does."""
    found = loop_instructions(sass)
    operations = [i.operation for i in found]
    return Loop(
        len(found),
        sum(o.startswith("BAR.SYNC") for o in operations),
        sum(o.startswith("WARPGROUP.DEPBAR") for o in operations),
        _rounds(found, "exchange"),
    )


def read_before(sass: str, wait: str) -> list[tuple[Instruction, Instruction]]:
    """The loads from memory whose values an iteration reads before its first event `wait`, each with its reader.

    Tables of rows are left out. They are integers of 64 bits, from which addresses are computed.
    """
    pending, found = {}, []
    for i in loop_instructions(sass):
        if i.event == wait:
            break
        found += [(pending.pop(register), i) for register in i.read & pending.keys()]
        if i.event == "fetch":
            pending |= dict.fromkeys(i.loaded, i)
    of_addresses = re.compile(r"U?(IADD3|LEA|ISETP|SHF|SEL)|IMAD(\.(WIDE|X|IADD|HI|SHL)|$)|R2UR|V?IMNMX")
    return [(load, i) for load, i in found if ".64" not in load.operation or not of_addresses.match(i.operation)]


def _rounds(instructions: list[Instruction], event: str) -> int:
    """The number of rounds of loads of that event in which each round waits for the one before."""
    pending, waited, rounds = {}, 0, 0
    for i in instructions:
        for register in i.read & pending.keys():
            waited = max(waited, pending.pop(register))
        if i.event == event:
            pending |= dict.fromkeys(i.loaded, waited + 1)
            rounds = max(rounds, waited + 1)
    return rounds


def loop_operations(sass: str) -> collections.Counter:
    """The machine instructions of the loop over time, without their suffixes, with their counts."""
    return collections.Counter(i.operation.partition(".")[0] for i in loop_instructions(sass))


def loop_events(sass: str) -> list[str]:
    """The events of the loop over time, in the order of the machine code."""
    return [i.event for i in loop_instructions(sass) if i.event]


def loop_instructions(sass: str) -> list[Instruction]:
    """The instructions of one iteration of the loop over time, in a possible order.

    It is the smallest loop that multiplies, stores and has a barrier. The loops inside of it poll, or go through chunks
    of a reduction. The loop around it goes through batch tiles. Instructions that rarely run are left out. These look
    for absent values when a wait takes long (`kernels.exchange`).
    """
    blocks, after = _blocks(sass)
    loops = sorted(_loops(after), key=lambda loop: sum(len(blocks[k]) for k in loop[1]))
    for header, body in loops:
        if _has(blocks, body, "STG", "BAR") and _multiplies(blocks, body):
            polls = [x for x in loops if x[1] < body and _has(blocks, x[1], "LDG") and not _has(blocks, x[1], "STG")]
            polls = [x for x in polls if not _multiplies(blocks, x[1])]
            rare = {k for h, inner in polls for k in inner - {h} if _can_avoid(after, h, inner, k)}
            rare = {k for k in rare if any(i.event == "exchange" for i in blocks[k])}
            return [i for k in _in_order(after, header, body) if k not in rare for i in blocks[k]]
    return []


def _blocks(sass: str) -> tuple[list[list[Instruction]], list[set[int]]]:
    """The blocks of instructions between jumps and their targets, and for each block those that can follow it."""
    blocks, labels, jumps, runs_on = [[]], {}, {}, {}
    for line in sass.splitlines():
        if m := re.match(r"\s*(\.L_x_\d+):", line):
            if blocks[-1]:
                blocks.append([])
            labels[m[1]] = len(blocks) - 1
        elif m := re.match(r"\s*/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*)", line):
            guard, operation, operands = m.groups()
            blocks[-1].append(Instruction(operation, operands))
            target = re.search(r"\.L_x_\d+", operands)
            # A call of a label is a jump to what ptxas has laid elsewhere, which does not come back.
            if operation.startswith(("BRA", "EXIT")) or (operation.startswith("CALL") and target):
                if target:
                    jumps[len(blocks) - 1] = target[0]
                runs_on[len(blocks) - 1] = guard is not None or "," in operands
                blocks.append([])
    after = [{labels[jumps[k]]} if jumps.get(k) in labels else set() for k in range(len(blocks))]
    for k in range(len(blocks) - 1):
        if runs_on.get(k, True):
            after[k].add(k + 1)
    return blocks, after


def _loops(after: list[set[int]]) -> list[tuple[int, set[int]]]:
    """The natural loops, each as its first block and the set of all its blocks."""
    before = [{j for j, follow in enumerate(after) if k in follow} for k in range(len(after))]
    order = _in_order(after, 0, {*range(len(after))})
    place = {k: n for n, k in enumerate(order)}
    loops = {}
    for k in order:
        for header in after[k]:
            if place[header] <= place[k]:
                body, left = loops.setdefault(header, {header}), [k]
                while left:
                    if (j := left.pop()) not in body:
                        body.add(j)
                        left += before[j]
    return [*loops.items()]


def _in_order(after: list[set[int]], first: int, among: set[int]) -> list[int]:
    """The blocks that can be reached, in topological order without jumps back."""
    found, seen, path = [], {first}, [(first, iter(sorted(after[first] & among, reverse=True)))]
    while path:
        k, follow = path[-1]
        if (new := next((j for j in follow if j not in seen), None)) is None:
            found.append(k)
            path.pop()
        else:
            seen.add(new)
            path.append((new, iter(sorted(after[new] & among, reverse=True))))
    return found[::-1]


def _can_avoid(after: list[set[int]], header: int, body: set[int], block: int) -> bool:
    """Whether an iteration can skip a block."""
    seen, left = {block}, [header]
    while left:
        k = left.pop()
        if header in after[k] and k != block:
            return True
        new = (after[k] & body) - seen
        seen |= new
        left += new
    return False


def _multiplies(blocks: list[list[Instruction]], body: set[int]) -> bool:
    return any(re.match(r"\w*MMA|FFMA", i.operation) for k in body for i in blocks[k])


def _has(blocks: list[list[Instruction]], body: set[int], *names: str) -> bool:
    """Whether each of these operations is in one of the blocks."""
    found = {i.operation.partition(".")[0] for k in body for i in blocks[k]}
    return found.issuperset(names)


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
