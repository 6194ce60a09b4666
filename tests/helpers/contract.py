"""What the kernels expect of their arguments: of every tensor when it is used, its shape and its dtype; and of strides.

Written from the signatures in `kernels/`, by hand: a launch is checked against it (`fake_gpu`).
"""

import dataclasses
import math

import torch
from torch import Tensor

# When a tensor is used, its shape, and its dtype: "x" that of the call, or as below.
DTYPES = {
    "f32": (torch.float32,),
    "i32": (torch.int32,),
    "i64": (torch.int64,),
    "bool": (torch.int8,),  # whose bytes are those of torch.bool
}
LAYOUT = {
    "lengths": ("RAGGED or PACKED", "B", "lengths"),
    "first_row": ("PACKED", "T + 1", "i64"),
    "resets": ("RESETS", "R", "bool"),
    "seed": ("TRAINING", "1", "i64"),
}
LOOP = {
    **LAYOUT,
    "weight_ih": ("STACK", "D - 1, G * HP, HP", "x"),
    "weight_hh": ("True", "D, G * HP, DHP", "x"),
    "vectors": ("V", "D, V, H", "x"),
    "hx": ("True", "D, B, H", "x"),
    "cx": ("True", "S, D, B, H", "f32"),
    "factor": ("DROPS_H", "D, B, H", "f32"),
    "gates": ("SAVE_GATES", "R, D * KEPT * H", "x"),
    "c_seq": ("SAVE_STATES", "S, R, D * H", "f32"),
    "arrived": ("EXCHANGE.PROTOCOL == 'counter' or (NORMS and EXCHANGE.ACQUIRES)", "D, heads, tiles, 32", "i32"),
    "sums": ("NORMS and not EXCHANGE.LOCAL", "D, tiles, 4, BLOCK_B, SUMS", "i64"),
}
STEP = {
    "weight_hh": ("True", "G * H, DH", "x"),
    "weight_hh_reverse": ("True", "G * H, DH", "x"),
    "vectors": ("V", "D, V, H", "x"),
}
KERNELS = {
    "recurrence_fwd": LOOP
    | {
        "bias": ("STACK", "D - 1, G * H", "x"),
        "hx_entering": ("DROPS_H or HP > H", "D, B, HP", "x"),
        "output": ("True", "R, D * H", "x"),
        "h_n": ("True", "D, B, H", "x"),
        "c_n": ("True", "S, D, B, H", "x or f32"),
        "entering": ("DROPS_H or HP > H", "R, D * HP", "x"),
    },
    "recurrence_bwd": LOOP
    | {
        "grad_c_seq": ("HAS_GRAD_C_SEQ", "S, R, H if STACK else D * H", "f32"),
        "grad_h_n": ("True", "D, B, H", "x"),
        "grad_c_n": ("True", "S, D, B, H", "x or f32"),
        "output": ("True", "R, D * H", "x"),
        "gates": ("True", "R, D * KEPT * H", "x"),
        "c_seq": ("True", "S, R, D * H", "f32"),
        "statistics": ("NORMS", "R, D, 2 * NORMS", "f32"),
        "grad_preact": ("True", "R, D * KEPT * H", "x"),
        "exchanged": ("HP > H", "R, D * KEPT * HP", "x"),
        "grad_hx": ("True", "D, B, H", "x"),
        "grad_cx": ("True", "S, D, B, H", "x or f32"),
    },
    "step_fwd": STEP
    | {
        "weight_ih": ("HAS_INPUT", "G * H, I", "x"),
        "weight_ih_reverse": ("HAS_INPUT", "G * H, I", "x"),
        "bias_ih": ("HAS_BIAS", "G * H", "x"),
        "bias_ih_reverse": ("HAS_BIAS", "G * H", "x"),
        "bias_hh": ("HAS_BIAS_HH", "G * H", "x"),
        "bias_hh_reverse": ("HAS_BIAS_HH", "G * H", "x"),
        "hx": ("True", "rows_states, H", "x"),
        "cx": ("True", "S, rows_states, H", "state"),
        "output": ("True", "T, B, D * H", "x"),
        "h_n": ("True", "rows_states, H", "x"),
        "c_n": ("True", "S, rows_states, H", "x or f32"),
        "gates": ("SAVE_GATES", "T, B, D * KEPT * H", "x"),
        "c_seq": ("SAVE_STATES or not HAS_INPUT", "S, T if SAVE_STATES else 2, B, D * H", "f32"),
    },
    "step_bwd": STEP
    | {
        "grad_c_seq": ("HAS_GRAD_C_SEQ", "S, T, B, D * H", "f32"),
        "hx": ("True", "D, B, H", "x"),
        "cx": ("True", "S, D, B, H", "f32"),
        "output": ("True", "T, B, D * H", "x"),
        "gates": ("True", "T, B, D * KEPT * H", "x"),
        "c_seq": ("True", "S, T, B, D * H", "f32"),
        "grad_preact": ("True", "T, B, D * KEPT * H", "x"),
        "dstate": ("True", "2, 1 + S, D, B, H", "f32"),
    },
    "recompute": LAYOUT
    | {
        "vectors": ("V", "D, V, H", "x"),
        "hx": ("True", "D, B, H", "x"),
        "cx": ("True", "S, D, B, H", "f32"),
        "gates": ("True", "R, D * G * H", "x"),
        "c_seq": ("True", "S, R, D * H", "f32"),
    },
    "row_statistics": {
        "gates": ("True", "grid[0], D * KEPT * H", "x"),
        "c_seq": ("NORMS > 1", "grid[0], D * H", "f32"),
        "statistics": ("True", "grid[0], D, 2 * NORMS", "f32"),
    },
}
# Tensors that may have gaps: when they are used, their shape, and how many rows of the last axis are between one index
# and the next.
STRIDED = {
    "recurrence_fwd": {
        "preact_x": (
            "True",
            "1 if STACK else D, *((R,) if PACKED else (T, B)), G * H",
            "rows_preact_d, *(() if PACKED else (rows_preact_t,)), rows_preact_b",
        )
    },
    "recurrence_bwd": {
        "grad_output": (
            "True",
            "*((R,) if PACKED else (T, B)), H if STACK else D * H",
            "*(() if PACKED else (rows_grad_output_t,)), rows_grad_output_b",
        )
    },
    "step_fwd": {
        "input": ("HAS_INPUT", "B, I", "rows_input_b"),
        "preact_x": ("not HAS_INPUT", "D, T, B, G * H", "rows_preact_d, rows_preact_t, rows_preact_b"),
    },
    "step_bwd": {"grad_output": ("True", "T, B, D * H", "rows_grad_output_t, rows_grad_output_b")},
    "recompute": {
        # One distance from row to row.
        "preact": ("True", "D, R, G * H", "rows_preact_d, rows_preact"),
    },
    "row_statistics": {},
}


def check(launch) -> None:
    """Assert that a launch gives its kernel what it expects."""
    told = {name: x for name, x in launch.arguments.items() if not isinstance(x, Tensor)}
    tensors = {name.removesuffix("_ptr"): x for name, x in launch.arguments.items() if isinstance(x, Tensor)}
    contiguous, strided = KERNELS[launch.kernel], STRIDED[launch.kernel]
    assert tensors.keys() == contiguous.keys() | strided.keys(), f"{launch.kernel}: {tensors.keys()} are its tensors"
    assert all(type(told[name]) in (int, float) for name in told if name.startswith("rows_") or name in "TBDR")
    names = _names(launch, told)
    dtype = tensors["gates" if launch.kernel == "row_statistics" else "hx"].dtype
    for name, (used, shape, kind) in contiguous.items():
        x, what = tensors[name], f"{launch.kernel}: {name}"
        if not eval(used, names):
            continue
        size = math.prod(eval(f"({shape},)", names))
        assert x.numel() == size, f"{what} has shape {tuple(x.shape)}, expected [{shape}], {size} numbers"
        assert x.is_contiguous(), f"{what} of shape {tuple(x.shape)} has strides {x.stride()}, expected none"
        allowed = {
            "x": (dtype,),
            "x or f32": (dtype, torch.float32),
            "lengths": (torch.int32, torch.int64) if names.get("RAGGED") else (torch.int32,),
            "state": (dtype, torch.float32) if names.get("HAS_INPUT") else (torch.float32,),
        }
        dtypes = (allowed | DTYPES)[kind]
        assert x.dtype in dtypes, f"{what} is {x.dtype}, expected one of {dtypes}"
    for name, (used, shape, rows) in strided.items():
        x, what = tensors[name], f"{launch.kernel}: {name}"
        if not eval(used, names):
            continue
        shape, rows = eval(f"({shape},)", names), eval(f"({rows},)", names)
        if x.dim() > len(shape):
            x = x.flatten(1, -2)  # a view, or there is no one distance from row to row
        assert tuple(x.shape) == shape, f"{what} has shape {tuple(x.shape)}, expected {shape}"
        assert x.dtype == dtype, f"{what} is {x.dtype}, expected {dtype}"
        distances = (*(n * shape[-1] for n in rows), 1)
        wrong = [n for n, given, told in zip(shape, x.stride(), distances, strict=True) if given != told and n > 1]
        assert not wrong, f"{what} of shape {shape} has strides {x.stride()}, the kernel was told {distances}"


def _names(launch, told: dict) -> dict:
    names = {"grid": launch.grid, "STACK": False, "R": 0} | told
    for bundle in ("LAYOUT", "NOISE"):
        names |= dataclasses.asdict(told[bundle]) if bundle in told else {}
    if "EXCHANGE" in told:
        heads = told["H"] // told["DH"]
        names["DHP"] = told["HP"] // heads
        tiles = -(-told["B"] // told["BLOCK_B"])
        programs = -(-told["EXCHANGE"].GROUP // told["BLOCK_H"])
        names |= {"heads": heads, "tiles": tiles, "SUMS": programs * told["BLOCK_H"]}
        assert launch.grid[0] % heads == 0 and launch.grid[2] == told["D"], f"{launch.kernel}: grid {launch.grid}"
    return {"SAVE_GATES": True, "SAVE_STATES": True} | names
