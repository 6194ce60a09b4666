"""What the tests share: the accuracy rule, inputs, and plans with tiles of the test's choice."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fusedlstm.cells import CELLS, Recurrence, State, Weights
from fusedlstm.layout import Layout
from fusedlstm.noise import Batch
from fusedlstm.plan import Plan

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# The lengths of packed batches, in tiles of 16: no, one and several sequences end at a step, and one tile ends before
# the other.
LENGTHS = {
    "ragged": [7, 6, 6, 3, 1],
    "two tiles": [4] * 3 + [3] * 12 + [3, 2, 2, 1],
}
# T and lengths of ragged batches: in no order, with empty ones; a tile of none but these; a T that no sequence has.
RAGGED = {
    "one tile": (7, [3, 0, 7, 6, 1]),
    "two tiles, one of empty sequences": (5, [2, 4, 0, 1] * 4 + [0, 0, 0]),
    "two tiles": (4, [1, 0, 3, 2] * 4 + [4, 2]),
}


def error(x: Tensor, exact: Tensor) -> float:
    """RMS error of `x` relative to `exact`, which is float64; absolute where `exact` is zero."""
    difference = (x.double() - exact).norm().item()
    size = exact.norm().item()
    return difference / size if size else difference


def assert_accurate(name: str, ours: Tensor, same_dtype: Tensor, exact: Tensor) -> None:
    """The one accuracy rule: at most twice the error of torch in the same dtype, plus two ulps."""
    assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    assert torch.isfinite(ours).all(), f"{name}: not finite"
    # A result in float32 from half-precision inputs is held to the dtype of the inputs.
    eps = max(torch.finfo(x.dtype).eps for x in (ours, same_dtype))
    err_ours, err_torch = error(ours.cpu(), exact), error(same_dtype.cpu(), exact)
    limit = 2 * err_torch + 2 * eps
    assert err_ours <= limit, f"{name}: error {err_ours:.2e}, torch {err_torch:.2e}, limit {limit:.2e}"


def tiled(
    pass_: str,
    batch: int,
    hidden: int,
    dtype: str,
    *,
    schedule: str = "resident",
    block_b: int = 16,
    block_h: int = 16,
    block_k: int = 16,
    transposed: bool = False,
    split: int = 1,
    ahead: int = 1,
    directions: int = 1,
    groups: int | None = None,
    cell: str = "lstm",
    precision: str = "tf32",
    protocol: str = "counter",
    heads: int = 1,
    stack: bool = False,
) -> Plan:
    """A plan with these tiles; `groups` batch tiles run side by side (default all), the rest are walked."""
    if schedule == "single":
        block_h = block_k = max(16, 1 << (hidden // heads - 1).bit_length())
        protocol = "none"
    group = math.ceil(hidden // heads / block_h)
    tiles_b = math.ceil(batch / block_b)
    return Plan(
        cell=cell,
        pass_=pass_,
        arch="sm_90",
        dtype=dtype,
        hidden=hidden,
        heads=heads,
        stack=stack,
        layout="dense",  # the data says it
        schedule=schedule,
        block_b=block_b,
        block_h=block_h,
        block_k=block_k,
        protocol=protocol,
        transposed=transposed,
        split=split,
        ahead=ahead,
        precision=precision,
        num_warps=4,
        stages=2,
        grid=(group * heads, groups or tiles_b, directions),
        tiles_b=tiles_b,
        smem_bytes=0,
        regs=0,
        step_us=0.0,
        why="a test",
    )


class Inputs(NamedTuple):
    """The arguments of a forward after its `Recurrence`. A backward takes all but the first, after `saved`."""

    preact_x: Tensor
    weights: Weights
    state: State
    batch: Batch


def recurrence(cell: str = "lstm", **fields) -> Recurrence:
    """What is asked of a recurrence over a cell; `fields` are those of `Recurrence`."""
    return Recurrence(CELLS[cell], **fields)


def recurrence_inputs(
    T: int,
    B: int,
    H: int,
    D: int,
    dtype: torch.dtype,
    device="cpu",
    cell="lstm",
    seed=0,
    packed=None,
    lengths=None,
    resets=0.0,
    heads=1,
) -> Inputs:
    """Random inputs of a recurrence; the values are rounded to `dtype`.

    T and B follow from `packed`, the descending lengths of a packed batch, or from T and `lengths`, those of a ragged
    one. `resets` is the share of the rows at which a sequence is cut; `heads` divides H.
    """
    G, S, V = CELLS[cell].num_gates, CELLS[cell].num_cell_states, CELLS[cell].num_vectors
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(device)

    if packed:
        T, B = packed[0], len(packed)
        batch_sizes = torch.tensor([sum(n > t for n in packed) for t in range(T)])
        layout, leading = Layout.of_packed(batch_sizes, B, torch.device(device)), (sum(packed),)
    else:
        B = len(lengths) if lengths else B
        layout = Layout(torch.tensor(lengths, dtype=torch.int32, device=device) if lengths else None)
        leading = (T, B)
    if resets:
        layout = layout._replace(resets=(torch.rand(leading, generator=generator) < resets).to(device))
    preact_x = randn(D, *leading, G * H)
    weight_hh = [randn(G * H, H // heads, scale=(H // heads) ** -0.5) for _ in range(D)]
    hx = randn(D, B, H)
    cx = randn(S, D, B, H) if cell != "slstm" else _slstm_states(randn, D, B, H)
    weights = Weights(weight_hh, randn(D, V, H) if V else None)
    return Inputs(preact_x, weights, State(hx, cx), Batch(layout))


def stack_inputs(T, B, H, layers, dtype, device, **layout):
    """The same of a stack in one launch: the first layer's preact_x, and the weights of all."""
    preact_x, weights, state, batch = recurrence_inputs(T, B, H, layers, dtype, device, **layout)
    generator = torch.Generator().manual_seed(7)
    weight_ih = torch.randn(layers - 1, 4 * H, H, generator=generator) * H**-0.5
    bias = torch.randn(layers - 1, 4 * H, generator=generator)
    weights = weights._replace(weight_ih=weight_ih.to(dtype).to(device), bias=bias.to(dtype).to(device))
    return Inputs(preact_x[:1], weights, state, batch)


def _slstm_states(randn, D: int, B: int, H: int) -> Tensor:
    """c, n and m, of which n is positive; a sequence begins with nothing."""
    states = randn(3, D, B, H)
    states[1] = states[1].abs() + 0.5
    states[1:, :, -1] = 0
    return states


def without_padding(gates: Tensor, layout: Layout) -> Tensor:
    """The rows that are of a sequence: gates of the others have no meaning."""
    if layout.name != "ragged" or layout.lengths is None:
        return gates
    steps = torch.arange(len(gates), device=gates.device).unsqueeze(1)
    return gates[steps < layout.lengths.to(gates.device)]


def cast(tree, dtype: torch.dtype, device="cpu"):
    """Tensors in dicts, lists and named tuples in another dtype; integers keep theirs, and what is no tensor stays."""
    if tree is None or isinstance(tree, (int, float, str)):
        return tree
    if isinstance(tree, Tensor):
        return tree.detach().to(device=device, dtype=dtype if tree.is_floating_point() else tree.dtype)
    if isinstance(tree, dict):
        return {k: cast(v, dtype, device) for k, v in tree.items()}
    values = [cast(v, dtype, device) for v in tree]
    return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)


def strided(x: Tensor) -> Tensor:
    """The same values as a view with gaps into a buffer of NaN, so that reading beside the view shows."""
    buffer = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 3), math.nan)
    view = buffer[..., : x.shape[-1]]
    view.copy_(x)
    return view
