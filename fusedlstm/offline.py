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


def loop_operations(sass: str) -> collections.Counter:
    """Machine instructions of the longest loop: the one over time."""
    return collections.Counter(_sass_operations(_longest_loop(sass)))


# What the order of a step is told by: an event, and the beginning of its instruction.
EVENTS = {
    "poll": r"CCTL\.IVALL",  # the end of an acquire
    "exchange": r"LDG\.\S*\.128\.STRONG",  # past the first-level cache
    "fetch": r"LDG\.(?!\S*STRONG)",
    "product": r"\w*MMA",
    "store": r"STG",
    "arrive": r"(RED|ATOM)G?\S*\.ADD",
}


def loop_events(sass: str) -> list[str]:
    """The names of `EVENTS`, one for every such instruction of the loop over time, in the order of the machine code."""
    instructions = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\S*)", _longest_loop(sass), re.M)
    return [name for i in instructions for name, pattern in EVENTS.items() if re.match(pattern, i)]


def _longest_loop(sass: str) -> str:
    lines = sass.splitlines()
    labels = {m[1]: k for k, line in enumerate(lines) if (m := re.match(r"\s*(\.L_x_\d+):", line))}
    start, end = 0, 0
    for k, line in enumerate(lines):
        m = re.search(r"BRA.*?(\.L_x_\d+)", line)
        if m and labels.get(m[1], k) < k and k - labels[m[1]] > end - start:
            start, end = labels[m[1]], k
    return "\n".join(lines[start : end + 1])


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
