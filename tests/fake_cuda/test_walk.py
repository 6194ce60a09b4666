"""Every member of the family on a GPU, to the launches: which kernels, on which device, and with what arguments.

What a launch is given is checked in `contract`, devices and the fakes of custom ops in `fake_gpu`.
"""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence

import contract
import fusedlstm
from fake_gpu import DEVICE, backward
from fusedlstm import autograd, cells
from fusedlstm.cells.cell import EQUATIONS
from fusedlstm.engines import launch, stepping
from grids import grid

I, H, B, T = 10, 64, 40, 5
MEMBERS = {
    "LSTM": (fusedlstm.LSTM, {}),
    "GRU": (fusedlstm.GRU, {}),
    "RNN": (fusedlstm.RNN, {}),
    "RNN relu": (fusedlstm.RNN, {"nonlinearity": "relu"}),
    "PeepholeLSTM": (fusedlstm.PeepholeLSTM, {}),
    "CoupledLSTM": (fusedlstm.CoupledLSTM, {}),
    "LayerNormLSTM": (fusedlstm.LayerNormLSTM, {}),
    "LayerNormGRU": (fusedlstm.LayerNormGRU, {}),
    "SLSTM": (fusedlstm.SLSTM, {}),
}
# Arguments of the constructor, of the call, and steps. What a member has not is left out.
VARIANTS = {
    "plain": ({}, {}, T),
    "no bias": ({"bias": False}, {}, T),
    "batch first, strided": ({"batch_first": True}, {}, T),
    "layers": ({"num_layers": 3}, {}, T),
    "dropout": ({"num_layers": 2, "dropout": 0.5}, {}, T),
    "one step": ({"num_layers": 2}, {}, 1),
    "projection": ({"proj_size": 16}, {}, T),
    "states": ({"save": "states"}, {}, 300),
    "zoneout": ({"zoneout": (0.1, 0.2)}, {}, T),
    "dropouts": ({"candidate_dropout": 0.1, "recurrent_dropout": 0.2, "weight_dropout": 0.3}, {}, T),
    "grad_clip, heads": ({"grad_clip": 1.0, "num_heads": 4}, {}, T),
    "cell states": ({}, {"return_cell_states": True}, T),
}
LAYOUTS = ("dense", "packed", "lengths", "resets", "packed, resets", "lengths, resets")
# What autograd hands over: of a sum one number for all, and any strides.
GRADIENTS = {
    "contiguous": torch.empty_like,
    "of a sum": lambda r: r.new_empty(()).expand(r.shape),
    "strided": lambda r: r.new_empty(r.shape[::-1]).permute(*range(r.dim())[::-1]),
    "rows with gaps": lambda r: r.new_empty(*r.shape[:-1], 2 * r.shape[-1])[..., : r.shape[-1]],
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def made(member: str, given: dict, **more):
    cls, own = MEMBERS[member]
    cell = cells.CELLS[own.get("nonlinearity", "tanh").join(("rnn_", "")) if cls is fusedlstm.RNN else cls.cell]
    given = dict(given)
    if cell.name != "lstm":
        given.pop("proj_size", None)
    if cell.norms:
        given.pop("num_heads", None)
    if EQUATIONS[cell.name].update is None:
        given.pop("zoneout", None)
    return cell, cls(I, more.pop("hidden", H), device=DEVICE, **own, **given, **more)


def arguments(module, layout: str, steps: int, training: bool, dtype) -> tuple:
    """Input, states and keywords of a call."""
    leading = (B, steps) if module.batch_first else (steps, B)
    D = 2 if module.bidirectional else 1
    if "packed" in layout:
        batch_sizes = torch.tensor([B] + [B // 2] * (steps - 1))
        rows = int(batch_sizes.sum())
        x = PackedSequence(torch.empty(rows, I, device=DEVICE, dtype=dtype, requires_grad=training), batch_sizes)
        resets = PackedSequence(torch.empty(rows, device=DEVICE, dtype=torch.bool), batch_sizes)
    else:
        x = torch.empty(*leading, 2 * I, device=DEVICE, dtype=dtype)[..., :I].requires_grad_(training)
        resets = torch.empty(leading, device=DEVICE, dtype=torch.bool)
    keywords = {"resets": resets} if "resets" in layout else {}
    if "lengths" in layout:
        keywords["lengths"] = torch.empty(B, device=DEVICE, dtype=torch.int64)
    hx = [
        torch.empty(B, module.num_layers * D, n, device=DEVICE, dtype=dtype).transpose(0, 1).requires_grad_(training)
        for n in (
            module.proj_size or module.hidden_size,
            *[module.hidden_size] * (len(cells.CELLS[module.cell].states) - 1),
        )
    ]
    return x, tuple(hx) if len(hx) > 1 else hx[0], keywords


def kernels(cell, module, layout: str, steps: int, training: bool) -> tuple[list[str], list[str]]:
    """Of the forward and of the backward, in order."""
    L, D = module.num_layers, 2 if module.bidirectional else 1
    dense = layout == "dense" or (layout == "packed" and steps == 1)  # packed, all of one length
    in_steps = any(module.rates[:4]) if training else any(module.rates[:2])
    between = training and module.dropout and L > 1
    statistics = ["row_statistics"] * bool(cell.norms)
    if dense and steps == 1 and not (cell.norms or module.proj_size or in_steps):
        return ["step_fwd"] * L, ["recurrence_bwd"] * L
    launches = L
    if D == 1 and L > 1 and not (between or in_steps or module.proj_size or cell.norms):
        launches = 1  # a wave
    blocks, recomputed = 1, []
    if module.save == "states" and training:
        recomputed = ["recompute"] * (cell.adds or cell.norms > 1)
        if D == 1 and "packed" not in layout:
            blocks = len(autograd.begins_of_blocks(steps, B)) - 1
            assert blocks > 1
    block = [*recomputed, *statistics, "recurrence_bwd"]
    return ["recurrence_fwd"] * launches * blocks, block * launches * blocks


@grid(
    {
        "member": list(MEMBERS),
        "variant": list(VARIANTS),
        "layout": list(LAYOUTS),
        "dtype": {str(d).removeprefix("torch."): d for d in DTYPES},
        "directions": [1, 2],
        "training": {"training": True, "inference": False},
        "gradient": list(GRADIENTS),
    }
)
def test_what_is_launched(gpu, member, variant, layout, dtype, directions, training, gradient):
    given, call, steps = VARIANTS[variant]
    cell, module = made(member, given, bidirectional=directions == 2, backend="triton", dtype=dtype)
    x, hx, keywords = arguments(module, layout, steps, training, dtype)
    if cell.num_cell_states:
        keywords |= call
    module.train(training).requires_grad_(training)

    output, states, *c_seq = module(x, hx, **keywords)
    forward, after = kernels(cell, module, layout, steps, training)
    assert gpu.kernels == forward
    if forward[0] == "step_fwd":  # without gradients a stack is one op, and its states one tensor
        firsts = [k * directions * B * (not training) for k in range(module.num_layers)]
        assert [given.arguments["first_state"] for given in gpu.launches] == firsts
    data = output.data if "packed" in layout else output
    expected = (x.data if "packed" in layout else x).shape[:-1]
    assert data.shape == (*expected, directions * (module.proj_size or H)) and data.dtype == dtype
    for state, initial in zip(_tensors(states), _tensors(hx), strict=True):
        assert (state.shape, state.dtype, state.device) == (initial.shape, dtype, DEVICE)
    for c in (c.data if "packed" in layout else c for of in c_seq for c in _tensors(of)):
        assert (c.shape, c.dtype, c.device) == ((*expected, directions * H), dtype, DEVICE)
    if not training:
        return
    gpu.launches.clear()
    results = [data, *_tensors(states), *(c.data if "packed" in layout else c for of in c_seq for c in _tensors(of))]
    found = backward(results, [GRADIENTS[gradient](r) for r in results])
    assert gpu.kernels == after
    leaves = [x.data if "packed" in layout else x, *_tensors(hx), *module.parameters()]
    assert {id(leaf) for leaf in leaves if leaf.is_leaf} == {id(leaf) for leaf in found}


def _tensors(of) -> list:
    return [of] if isinstance(of, (torch.Tensor, PackedSequence)) else list(of)


@pytest.mark.parametrize("kernel", ["recurrence_fwd", "recurrence_bwd", "step_fwd", "step_bwd"])
def test_what_is_launched_is_what_is_compiled_offline(kernel):
    """The types that `offline` compiles with are those that launches are held to."""
    names = {"f32": "*fp32", "i32": "*i32", "i64": "*i64", "bool": "*i8", "lengths": "*i32", "state": "*fp32"}
    plan = SimpleNamespace(pass_=kernel[-3:], dtype="bf16")
    told = launch.signature(plan) if kernel.startswith("recurrence") else stepping.signature(plan, has_input=False)
    for name, (_, _, kind) in contract.KERNELS[kernel].items():
        assert told[f"{name}_ptr"] == names.get(kind, "*bf16"), name
    assert {told[f"{name}_ptr"] for name in contract.STRIDED[kernel]} == {"*bf16"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("member", MEMBERS)
def test_autocast(gpu, member, dtype):
    cell, module = made(member, {}, backend="triton")
    x, hx, _ = arguments(module, "dense", T, True, torch.float32)
    with torch.autocast("cuda", dtype):
        output, states = module(x, hx)
    assert {r.dtype for r in (output, *_tensors(states))} == {dtype}
    assert gpu.launches[0].arguments["weight_hh_ptr"].dtype == dtype
    found = backward([output], [torch.empty_like(output)])
    assert {grad.dtype for grad in found.values()} == {torch.float32}
    assert len(gpu.kernels) == 2 + bool(cell.norms)


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("member", [name for name in MEMBERS if "LayerNorm" not in name])
def test_a_launch_a_step(gpu, member, directions):
    """Where no group of programs fits the device."""
    _, module = made(member, {}, hidden=16384, bidirectional=directions == 2, dtype=torch.bfloat16)
    x, hx, _ = arguments(module, "dense", T, True, torch.bfloat16)
    output, _ = module(x, hx)
    assert gpu.kernels == ["step_fwd"] * T
    gpu.launches.clear()
    backward([output], [torch.empty_like(output)])
    assert gpu.kernels == ["step_bwd"] * (T + 1)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "cls",
    [
        fusedlstm.LSTMCell,
        fusedlstm.GRUCell,
        fusedlstm.RNNCell,
        fusedlstm.PeepholeLSTMCell,
        fusedlstm.CoupledLSTMCell,
        fusedlstm.LayerNormLSTMCell,
        fusedlstm.LayerNormGRUCell,
        fusedlstm.SLSTMCell,
    ],
)
def test_cell_classes(gpu, cls, dtype, training):
    module = cls(I, H, device=DEVICE, dtype=dtype).requires_grad_(training)
    norms = cells.CELLS[module.cell].norms > 0
    states = _tensors(module(torch.empty(B, I, device=DEVICE, dtype=dtype)))
    assert all((s.shape, s.dtype, s.device) == ((B, H), dtype, DEVICE) for s in states)
    assert gpu.kernels == ["recurrence_fwd" if norms else "step_fwd"]
    if training:
        gpu.launches.clear()
        assert len(backward(states, [torch.empty_like(s) for s in states])) == len(list(module.parameters()))
        assert gpu.kernels == ["row_statistics"] * norms + ["recurrence_bwd"]
