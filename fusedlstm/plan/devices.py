"""What the planner knows about GPUs: limits, rates and latencies. There is one table, and each constant has a source.

Rates are the dense peaks of the data sheets, until they are measured. `measured.json` beside this file holds what a GPU
run measured, by torch's name for the device, and replaces values of the table:

    {"NVIDIA H200": {"date": "2026-12-01", "commit": "0123abc", "values": {"barrier_us": 0.9, "l2_tbps": 5.1}}}

On a shared device, `FUSEDLSTM_SMS` caps the number of multiprocessors that a plan may use (`sms`).
"""

import dataclasses
import functools
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

MEASURED = Path(__file__).parent / "measured.json"


@dataclass(frozen=True)
class DeviceLimits:
    """What a plan may use, and how fast it is. Rates are for the whole device. Memory sizes are in bytes."""

    arch: str
    name: str  # as torch has it
    num_sms: int
    smem_bytes: int  # a program may have
    register_bytes: int  # of a multiprocessor
    warp_size: int
    half_tflops: float  # products of float16 and bfloat16, sums in float32
    tf32_tflops: float
    fp32_tflops: float
    l2_bytes: int
    l2_tbps: float
    memory_bytes: int
    memory_tbps: float
    wide_mma: bool = False  # the fast matrix instruction needs 64 rows (wgmma, tcgen05)
    narrow_mma: float = 1.0  # share of the matrix rate that the instruction for fewer rows reaches
    weights_in_registers: bool = False  # Triton keeps a loop-invariant operand there, not in shared memory
    barrier_us: float = 1.2  # from a store of h to the first load of it, by counter: three trips through the L2
    exchange_us: float = 0.6  # the same with the data as its own flag: one trip, of loads that begin in time
    fetch_us: float = 0.6  # from a load to its data, from memory
    launch_us: float = 3.0  # from one kernel of a stream to the next
    host_us: float = 5.0  # of the host, to launch one step after another of a sequence
    measured: str = ""  # date and commit of the fields that `measured.json` overrides, and their names


# Where the number in a field comes from, for every field that is a rate, a size or a latency.
SOURCES = {
    "num_sms": "data sheet",
    "smem_bytes": "CUDA programming guide; CDNA 3 white paper",
    "register_bytes": "CUDA programming guide; CDNA 3 white paper",
    "half_tflops": "data sheet",
    "tf32_tflops": "data sheet",
    "fp32_tflops": "data sheet",
    "l2_bytes": "data sheet or architecture white paper; MI300X: the Infinity Cache",
    "l2_tbps": "assumed, of the order that public microbenchmarks find",
    "memory_bytes": "data sheet",
    "memory_tbps": "data sheet",
    "narrow_mma": "assumed, of the order that public microbenchmarks of mma.sync beside wgmma find",
    "barrier_us": "assumed",
    "exchange_us": "assumed, half of a barrier",
    "fetch_us": "assumed",
    "launch_us": "assumed",
    "host_us": "python -m bench.overhead, less the driver's part, which is assumed",
}
# The fields that a run on a GPU can measure.
MEASURABLE = (
    "half_tflops",
    "tf32_tflops",
    "fp32_tflops",
    "l2_tbps",
    "memory_tbps",
    "narrow_mma",
    "barrier_us",
    "exchange_us",
    "fetch_us",
    "launch_us",
    "host_us",
)

_SM_90 = DeviceLimits(
    arch="sm_90",
    name="NVIDIA H200",
    num_sms=132,
    smem_bytes=227 << 10,
    register_bytes=256 << 10,
    warp_size=32,
    half_tflops=990,
    tf32_tflops=495,
    fp32_tflops=67,
    l2_bytes=50 << 20,
    l2_tbps=5.5,
    memory_bytes=141 * 10**9,
    memory_tbps=4.8,
    wide_mma=True,
    narrow_mma=0.6,
)
_TABLE = (
    DeviceLimits(
        arch="sm_80",
        name="NVIDIA A100-SXM4-80GB",
        num_sms=108,
        smem_bytes=163 << 10,
        register_bytes=256 << 10,
        warp_size=32,
        half_tflops=312,
        tf32_tflops=156,
        fp32_tflops=19.5,
        l2_bytes=40 << 20,
        l2_tbps=4.0,
        memory_bytes=80 * 10**9,
        memory_tbps=2.04,
    ),
    _SM_90,
    dataclasses.replace(_SM_90, name="NVIDIA H100 80GB HBM3", memory_bytes=80 * 10**9, memory_tbps=3.35),
    DeviceLimits(
        arch="sm_100",
        name="NVIDIA B200",
        num_sms=148,
        smem_bytes=227 << 10,
        register_bytes=256 << 10,
        warp_size=32,
        half_tflops=2250,
        tf32_tflops=1100,
        fp32_tflops=80,
        l2_bytes=126 << 20,
        l2_tbps=9.0,
        memory_bytes=180 * 10**9,
        memory_tbps=8.0,
        wide_mma=True,
        narrow_mma=0.6,
    ),
    DeviceLimits(
        arch="sm_120",
        name="NVIDIA GeForce RTX 5090",
        num_sms=170,
        smem_bytes=99 << 10,
        register_bytes=256 << 10,
        warp_size=32,
        half_tflops=210,
        tf32_tflops=105,
        fp32_tflops=105,
        l2_bytes=96 << 20,
        l2_tbps=5.0,
        memory_bytes=32 * 10**9,
        memory_tbps=1.79,
    ),
    DeviceLimits(
        arch="gfx942",
        name="AMD Instinct MI300X",
        num_sms=304,
        smem_bytes=64 << 10,
        register_bytes=512 << 10,
        warp_size=64,
        half_tflops=1300,
        tf32_tflops=650,
        fp32_tflops=163,
        l2_bytes=256 << 20,
        l2_tbps=8.0,
        memory_bytes=192 * 10**9,
        memory_tbps=5.3,
        weights_in_registers=True,
    ),
)


class _Sheet(NamedTuple):
    """The part of a data sheet that torch would report, of a device that has no row in the table."""

    name: str  # as torch has it
    arch: str
    num_sms: int
    smem_kib: int  # a program may have
    l2_mib: int
    memory_gb: int
    memory_tbps: float


# Memory and bandwidth are from NVIDIA's data sheets. Multiprocessors and L2 are from the white papers "NVIDIA Ampere
# GA102 GPU Architecture" and "NVIDIA Ada GPU Architecture". Those of the A10G and the L4 are what torch reports there.
# Compute capabilities 8.6 and 8.9 have 100 KiB of shared memory, less 1 KiB per program (CUDA programming guide).
_SHEETS = (
    _Sheet("NVIDIA A10", "sm_86", 72, 99, 6, 24, 0.600),
    _Sheet("NVIDIA A10G", "sm_86", 80, 99, 6, 24, 0.600),
    _Sheet("NVIDIA A40", "sm_86", 84, 99, 6, 48, 0.696),
    _Sheet("NVIDIA RTX A6000", "sm_86", 84, 99, 6, 48, 0.768),
    _Sheet("NVIDIA GeForce RTX 3090", "sm_86", 82, 99, 6, 24, 0.936),
    _Sheet("NVIDIA L4", "sm_89", 58, 99, 48, 24, 0.300),
    _Sheet("NVIDIA L40S", "sm_89", 142, 99, 96, 48, 0.864),
    _Sheet("NVIDIA GeForce RTX 4090", "sm_89", 128, 99, 72, 24, 1.008),
)
# Devices that people may ask for, and that the kernels do not serve.
_UNSERVED = {
    "P100": "sm_60",
    "V100": "sm_70",
    "T4": "sm_75",
    "RTX 2080 Ti": "sm_75",
    "MI100": "gfx908",
    "MI210": "gfx90a",
    "MI250": "gfx90a",
    "MI250X": "gfx90a",
}
ARCHS = tuple(dict.fromkeys(row.arch for row in _TABLE))
SERVED = "the kernels serve NVIDIA from compute capability 8.0 on and AMD gfx942 (MI300)"


class UnsupportedDevice(RuntimeError):
    """The kernels do not serve the device. The text names its architecture and what they serve."""


def of_properties(properties, hip: bool) -> DeviceLimits:
    """The limits of a device, from what `torch.cuda.get_device_properties` says about it.

    Raises:
        UnsupportedDevice: The kernels do not serve it.
    """
    name = properties.name
    if hip:
        arch = properties.gcnArchName.split(":")[0]  # without the features that are on or off
        if arch not in ARCHS:
            raise UnsupportedDevice(f"{SERVED}, {name} is {arch}")
    else:
        if properties.major < 8:
            raise UnsupportedDevice(f"{SERVED}, {name} has {properties.major}.{properties.minor}")
        arch = _planned_as(properties.major)
    # Older versions of torch do not report all of them, and a driver may report 0.
    clock, width = (getattr(properties, field, 0) for field in ("memory_clock_rate", "memory_bus_width"))
    told = {
        "smem_bytes": getattr(properties, "shared_memory_per_block_optin", 0),
        "l2_bytes": getattr(properties, "L2_cache_size", 0),
        "memory_bytes": getattr(properties, "total_memory", 0),
        "memory_tbps": 2 * clock * 1e3 * width / 8 / 1e12,  # kHz, two bits a cycle and line
    }
    sizes = {field: size for field, size in told.items() if size}
    if _row(name):  # the data sheet's
        sizes.pop("memory_tbps", None)
    return named(name, arch, properties.multi_processor_count, **sizes)


def _planned_as(major: int) -> str:
    """The architecture of the table for a compute capability."""
    return {8: "sm_80", 9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_120")


def find(text: str) -> DeviceLimits:
    """Find a device by its usual name, such as "h100", "RTX 4090" or "sm_89", or by torch's name. Case is ignored.

    A device without a row in the table gets the numbers that `of_properties` would return for it. An architecture
    stands for its first device.

    Raises:
        ValueError: The name is unknown. The text lists what is accepted.
        UnsupportedDevice: The kernels do not serve the device.
    """
    known = {_word(arch): limits for arch, limits in DEVICES.items()}
    for row in _TABLE:
        known[_word(row.name)] = known[_short(row.name)] = with_measured(row)
    for sheet in _SHEETS:
        limits = named(
            sheet.name,
            _planned_as(int(sheet.arch[3:-1])),
            sheet.num_sms,
            smem_bytes=sheet.smem_kib << 10,
            l2_bytes=sheet.l2_mib << 20,
            memory_bytes=sheet.memory_gb * 10**9,
            memory_tbps=sheet.memory_tbps,
        )
        known[_word(sheet.name)] = known[_short(sheet.name)] = limits
        known.setdefault(_word(sheet.arch), limits)
    word = _word(text)
    if word in known:
        return known[word]
    unserved = {_word(name): arch for name, arch in _UNSERVED.items()}
    old = re.fullmatch(r"sm[1-7]\d|gfx\w+", word)
    if old or word in unserved:
        raise UnsupportedDevice(
            f"arch: {SERVED}, got {text!r}{'' if old else f', which is {unserved[word]}'}; "
            "there backend='auto' takes torch's engine, which needs no plan"
        )
    archs = sorted({*ARCHS, *(sheet.arch for sheet in _SHEETS)}, key=lambda arch: (arch[0] != "s", len(arch), arch))
    names = [_short(device.name) for device in (*_TABLE, *_SHEETS)]
    raise ValueError(f"arch: expected one of {', '.join(archs + names)}, or torch's name of one of these, got {text!r}")


def described(limits: DeviceLimits) -> str:
    """The name of a device, and where its rates come from if it has no row in the table."""
    if _row(limits.name):
        return f"{limits.name} ({limits.arch})"
    return f"{limits.name} (planned as {limits.arch}, with rates scaled from those of {DEVICES[limits.arch].name})"


def _word(name: str) -> str:
    """A name without its maker and without spaces, in lower case."""
    return re.sub(r"nvidia|geforce|rtx|tesla|amd|instinct|[\s_-]", "", name.lower())


def _short(name: str) -> str:
    """The short name that people use: h100 for an NVIDIA H100 80GB HBM3."""
    return re.search(r"[a-z]*\d+[a-z]*", name.lower())[0]


def named(name: str, arch: str, num_sms: int | None = None, **told: float) -> DeviceLimits:
    """The limits of a device, by torch's name for it.

    If the table does not have it, it is taken for a part of the first device of its architecture.

    Args:
        name: Torch's name for the device.
        arch: An architecture of the table.
        num_sms: The number of its multiprocessors. If the table does not have the device, the rates of the matrix units
            and of the L2 are proportional to this number.
        told: Fields that the device itself reports, such as `smem_bytes`.
    """
    known = _row(name)
    if known is None:
        known = dataclasses.replace(_cut(next(row for row in _TABLE if row.arch == arch), num_sms), name=name)
    return with_measured(dataclasses.replace(known, num_sms=num_sms or known.num_sms, **told))


def _row(name: str) -> DeviceLimits | None:
    return next((row for row in _TABLE if row.name == name), None)


def _cut(limits: DeviceLimits, num_sms: int | None) -> DeviceLimits:
    """A device like this one with another number of multiprocessors."""
    share = (num_sms or limits.num_sms) / limits.num_sms
    rates = {
        field: getattr(limits, field) * share for field in ("half_tflops", "tf32_tflops", "fp32_tflops", "l2_tbps")
    }
    return dataclasses.replace(limits, num_sms=num_sms or limits.num_sms, **rates)


def sms() -> int | None:
    """The value of `FUSEDLSTM_SMS`: the most multiprocessors that a plan may use. None if it is not set.

    Raises:
        ValueError: The value is not a whole number from 1.
    """
    text = os.environ.get("FUSEDLSTM_SMS")
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and int(text)):
        raise ValueError(f"FUSEDLSTM_SMS: expected a whole number of multiprocessors from 1, got {text!r}")
    return int(text)


def capped(limits: DeviceLimits, most: int | None) -> DeviceLimits:
    """The part of a device that has at most `most` multiprocessors."""
    return limits if most is None or most >= limits.num_sms else _cut(limits, most)


def with_measured(limits: DeviceLimits) -> DeviceLimits:
    """`limits` with the values that were measured on that device."""
    entry = measurements().get(limits.name)
    if entry is None:
        return limits
    values = entry["values"]
    words = f"{entry['date']}, {entry['commit']}: {', '.join(sorted(values))}"
    return dataclasses.replace(limits, measured=words, **values)


def source(limits: DeviceLimits, field: str) -> str:
    """Where a constant comes from, as text."""
    entry = measurements().get(limits.name, {"values": {}})
    if field in entry["values"]:
        return f"measured, {entry['date']}, {entry['commit']}"
    return SOURCES[field]


@functools.cache
def measurements() -> dict[str, dict]:
    """The content of `measured.json`.

    Raises:
        ValueError: The file does not have the form that this module's docstring describes.
    """
    table = json.loads(MEASURED.read_text())
    for name, entry in table.items():
        if set(entry) != {"date", "commit", "values"} or not set(entry["values"]) <= set(MEASURABLE):
            raise ValueError(
                f"{MEASURED.name}, {name!r}: expected date, commit and values of some of {', '.join(MEASURABLE)}, "
                f"got {entry}"
            )
        if not all(isinstance(v, int | float) and 0 < v < math.inf for v in entry["values"].values()):
            raise ValueError(f"{MEASURED.name}, {name!r}: expected positive numbers, got {entry['values']}")
    return table


# The first device of each architecture. The plans of an architecture are compiled offline for it.
DEVICES = {row.arch: with_measured(row) for row in reversed(_TABLE)}
DEVICES = {arch: DEVICES[arch] for arch in ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")}
