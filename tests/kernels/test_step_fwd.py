"""kernels/step_fwd.py: one step with its input product, and sequences as a launch a step, against the specification."""

import dataclasses
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import fusedlstm
from fusedlstm.cells import Saved, State, Weights
from fusedlstm.engines import launch, reference, stepping
from support import DTYPES, assert_accurate, cast, recurrence, recurrence_inputs, strided, tiled

# Rows of a batch tile, and whether the dot is transposed; a tile of one row has none.
FORMS = {"row": (1, False), "plain": (16, False), "transposed": (16, True)}
# B, I, H; tiles are 16 rows, 8 or 16 units and chunks of 16: sizes below, at, above and more than twice a block. In
# half precision one size: the edges of blocks are the same there.
SIZES = {
    "fp32": [(1, 1, 1), (3, 5, 13), (16, 16, 16), (17, 37, 17), (35, 15, 21)],
    "fp16": [(3, 37, 19)],
    "bf16": [(3, 37, 19)],
}


class StepInputs(NamedTuple):
    """What `launch.step_fwd` takes behind its `Recurrence`."""

    input: Tensor
    state: State
    parameters: list[list[Tensor]]
    directions: int


def step_inputs(B, I, H, D, dtype, device="cpu", layers=1, bias=True, heads=1):
    generator = torch.Generator().manual_seed(2)

    def randn(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(device)

    parameters = []
    for k in range(layers * D):
        width = I if k < D else D * H
        weights = [randn(4 * H, width, scale=width**-0.5), randn(4 * H, H // heads, scale=(H // heads) ** -0.5)]
        parameters.append(weights + [randn(4 * H), randn(4 * H)] * bias)
    input, hx, cx = randn(B, I), randn(layers * D, B, H), randn(1, layers * D, B, H)
    return StepInputs(input, State(hx, cx), parameters, D)


def specified(input, state, parameters, directions):
    """What `launch.step_fwd` returns, by the specification."""
    (hx, cx), x, h_n, c_n = state, input.unsqueeze(0), [], []
    for k in range(0, len(parameters), directions):
        rows = slice(k, k + directions)
        preact_x = torch.stack([x @ p[0].t() + sum(p[2:]) for p in parameters[rows]])
        weights = Weights([p[1] for p in parameters[rows]])
        x, h, c, gates, c_seq = reference.recurrence_fwd(recurrence(), preact_x, weights, State(hx[rows], cx[:, rows]))
        h_n.append(h)
        c_n.append(c)
    return Saved(x[0], torch.cat(h_n), torch.cat(c_n, 1), gates[0], c_seq[:, 0])


@pytest.fixture
def step_tiles(monkeypatch):
    """Make every step use tiles of the test's choice."""

    def choose(**kwargs):
        def step_plan_for(cell, like, H, D, heads, input_size):
            dtype = launch.DTYPES[like.dtype]
            options = {"schedule": "stepped", "heads": heads, "directions": D, "precision": "ieee"}
            return tiled("fwd", like.size(0), H, dtype, **options | kwargs)

        monkeypatch.setattr(launch, "step_plan_for", step_plan_for)

    return choose


def check(inputs, change=lambda x: x):
    """`change` is made to every tensor before the launch."""
    ours = launch.step_fwd(recurrence(), *tree_map_only(Tensor, change, inputs))
    torch_results = specified(*cast(inputs, inputs.input.dtype))
    exact = specified(*cast(inputs, torch.float64))
    for name, a, b, c in zip(Saved._fields, ours, torch_results, exact, strict=True):
        assert_accurate(name, a, b, c)


@pytest.mark.parametrize(("dtype", "B", "I", "H"), [(d, *size) for d in SIZES for size in SIZES[d]], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_equals_specification(device, step_tiles, dtype, form, B, I, H):
    block_b, transposed = FORMS[form]
    step_tiles(block_b=block_b, transposed=transposed, block_h=8 if form == "plain" else 16)
    check(step_inputs(B if block_b > 1 else 1, I, H, 1, DTYPES[dtype], device))


@pytest.mark.parametrize("block_h", [1, 2, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_single_row_in_small_tiles(device, step_tiles, dtype, block_h):
    step_tiles(block_b=1, block_h=block_h, block_k=64)
    check(step_inputs(1, 65, 5, 2, DTYPES[dtype], device))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("directions", [1, 2])
def test_directions_and_biases(device, step_tiles, directions, bias):
    step_tiles()
    check(step_inputs(5, 7, 20, directions, torch.float32, device, bias=bias))


@pytest.mark.parametrize("batch", [1, 5])
def test_a_stack_with_the_plans_own_tiles(device, batch):
    """Of each layer the final states, of the last its gates and states."""
    check(step_inputs(batch, 7, 6, 2, torch.float32, device, layers=2))
    check(step_inputs(batch, 7, 6, 1, torch.bfloat16, device, layers=3, heads=3))


@pytest.mark.parametrize("batch", [1, 18])
def test_heads(device, step_tiles, batch):
    step_tiles(block_b=1 if batch == 1 else 16, block_h=4)
    check(step_inputs(batch, 7, 18, 2, torch.float32, device, heads=3))


def test_strides(device, step_tiles):
    """Input, states, weights and biases as views with gaps of NaN, and the rows of an input two apart."""
    step_tiles()
    check(step_inputs(5, 7, 20, 2, torch.float32, device), strided)
    check(step_inputs(5, 7, 20, 1, torch.float32, device), lambda x: torch.stack([x, x * float("nan")], -2)[..., 0, :])


def test_c_keeps_its_dtype(device):
    """A c_0 in float32 beside half precision gives a c_n in float32, of that accuracy."""
    inputs = step_inputs(3, 7, 20, 1, torch.float16, device)
    inputs = inputs._replace(state=inputs.state._replace(cx=torch.randn(1, 1, 3, 20, device=device)))
    saved = launch.step_fwd(recurrence(), *inputs)
    assert saved.c_n.dtype == torch.float32 and saved.gates.dtype == torch.float16
    assert torch.equal(saved.c_n[:, 0], saved.c_seq)
    assert not torch.equal(saved.c_n, saved.c_n.half().float())


def check_sequences(inputs, plan):
    ours = launch.recurrence_fwd(recurrence(), *inputs, plan=plan)
    torch_results = reference.recurrence_fwd(recurrence(), *cast(inputs, inputs.state.hx.dtype))
    exact = reference.recurrence_fwd(recurrence(), *cast(inputs, torch.float64))
    for name, a, b, c in zip(Saved._fields, ours, torch_results, exact, strict=True):
        assert_accurate(name, a, b, c)
    return ours


SEQUENCES = [("fp32", 1, 1, 1), ("fp32", 4, 3, 13), ("fp32", 2, 17, 16), ("fp16", 2, 3, 19), ("bf16", 2, 3, 19)]


@pytest.mark.parametrize(("dtype", "T", "B", "H"), SEQUENCES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_sequences(device, dtype, form, T, B, H):
    """A launch a step, both directions; and the same without saving anything."""
    block_b, transposed = FORMS[form]
    B = B if block_b > 1 else 1
    inputs = recurrence_inputs(T, B, H, 2, DTYPES[dtype], device)
    options = {"schedule": "stepped", "transposed": transposed, "directions": 2, "precision": "ieee"}
    plan = tiled("fwd", B, H, dtype, block_b=block_b, **options)
    ours = check_sequences(inputs, plan)
    lean = launch.recurrence_fwd(recurrence(save_gates=False, save_states=False), *inputs, plan=plan)
    assert lean.gates.numel() == lean.c_seq.numel() == 0
    assert all(torch.equal(a, b) for a, b in zip(lean[:3], ours[:3], strict=True))


def test_sequences_with_strides_and_heads(device):
    """Rows of preact_x in batch-major order, as a batch-first input leaves them."""
    inputs = recurrence_inputs(3, 5, 24, 2, torch.float32, device, heads=3)
    inputs = inputs._replace(preact_x=inputs.preact_x.transpose(1, 2).contiguous().transpose(1, 2))
    plan = tiled("fwd", 5, 24, "fp32", schedule="stepped", block_h=4, directions=2, precision="ieee", heads=3)
    check_sequences(inputs, plan)


def test_what_stepped_does_not_run_is_an_error(device):
    plan = tiled("fwd", 3, 20, "fp32", schedule="stepped")
    inputs = recurrence_inputs(3, 0, 20, 1, torch.float32, device, lengths=[3, 1, 2])
    with pytest.raises(ValueError, match="plan: the schedule 'stepped' runs dense batches of one layer, got ragged"):
        launch.recurrence_fwd(recurrence(), *inputs, plan=plan)


class Operations(TorchDispatchMode):
    """Names of the operations that ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name().partition(".")[0])
        return function(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch):
    """The arguments of every launch of the forward kernel."""
    seen, kernel = [], stepping.KERNELS["fwd"]

    class Recorded:
        def __getitem__(self, grid):
            def run(**arguments):
                seen.append(arguments)
                return kernel[grid](**arguments)

            return run

    monkeypatch.setitem(stepping.KERNELS, "fwd", Recorded())
    return seen


@pytest.mark.parametrize("options", [{}, {"num_layers": 3, "bidirectional": True, "batch_first": True}], ids=str)
def test_inference_is_one_launch_a_layer(device, launches, options):
    """No other operation computes anything, and nothing is saved."""
    lstm = fusedlstm.LSTM(5, 7, **options, backend="triton").to(device).requires_grad_(False)
    x = torch.randn(1, 1, 5, device=device)
    states = tuple(torch.randn(len(lstm.all_weights), 1, 7, device=device) for _ in range(2))
    with Operations() as ran:
        lstm(x, states)
    assert ran.names.count("fusedlstm::step_fwd") == 1
    views = {
        "aten::select",
        "aten::unbind",
        "aten::unsqueeze",
        "aten::squeeze",
        "aten::transpose",
        "aten::view",
        "aten::detach",
    }
    assert set(ran.names) <= views | {"fusedlstm::step_fwd"}
    assert len(launches) == lstm.num_layers
    assert not any(seen["SAVE_GATES"] or seen["SAVE_STATES"] for seen in launches)


def test_dropout_and_cell_states_go_layer_by_layer(device, launches):
    lstm = fusedlstm.LSTM(5, 7, num_layers=2, dropout=0.5, backend="triton").to(device).requires_grad_(False)
    x = torch.randn(1, 3, 5, device=device)
    lstm(x)
    assert len(launches) == 2
    *_, c_seq = lstm.eval()(x, return_cell_states=True)
    assert len(launches) == 4 and launches[-1]["SAVE_STATES"] and not launches[-2]["SAVE_STATES"]
    assert torch.equal(c_seq[0], lstm(x)[1][1][1])


@pytest.mark.parametrize("training", [False, True])
def test_a_graph_for_any_batch(device, training):
    """torch.compile traces a step whole, and gives the same bits and gradients."""
    lstm = fusedlstm.LSTM(5, 4, num_layers=2, backend="triton").to(device).requires_grad_(training)
    torch.compiler.reset()
    compiled = torch.compile(lstm, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (2, 3):
        x = torch.randn(1, batch, 5, device=device, requires_grad=training)
        found, expected = compiled(x), lstm(x)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1][1], expected[1][1])
        if training:
            grads = [torch.autograd.grad(y[0].square().sum(), [x, *lstm.parameters()]) for y in (found, expected)]
            assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    torch.compiler.reset()


@pytest.mark.parametrize("saved", [False, True])
def test_the_op_is_what_its_fake_says(device, saved):
    inputs = step_inputs(3, 5, 7, 2, torch.bfloat16, device)
    flat = [p for direction in inputs.parameters for p in direction]
    arguments = ("lstm", inputs.input, *inputs.state, flat, 2, saved, saved)
    torch.library.opcheck(torch.ops.fusedlstm.step_fwd.default, arguments)


def test_same_bits_every_time(device):
    inputs = step_inputs(5, 40, 40, 1, torch.float32, device)
    first, second = (launch.step_fwd(recurrence(), *inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_plan_of_another_precision_is_another_kernel(device):
    """The flag of torch reaches the dot."""
    plan = launch.step_plan_for("lstm", torch.zeros(2, 3, device=device), 64, 1, 1, 3)
    assert plan.precision == "ieee"
    torch.backends.cudnn.allow_tf32 = True
    assert launch.step_plan_for("lstm", torch.zeros(2, 3, device=device), 64, 1, 1, 3).precision == "tf32"
    assert stepping.constants(dataclasses.replace(plan, precision="tf32"), 3)["DOT"].PRECISION == "tf32"
