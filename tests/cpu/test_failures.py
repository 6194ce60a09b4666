"""failures.py: what `auto` does where a launch fails, for every cell; no kernel runs here, for every launch fails."""

import copy
import warnings

import pytest
import torch

import fusedlstm
from fusedlstm import autograd, cells, engines, ops
from fusedlstm.cells import CELLS, Grads
from fusedlstm.cells.cell import EQUATIONS
from fusedlstm.engines import bound, failures, launch, reference
from fusedlstm.kernels.cells import STEPS
from fusedlstm.noise import NO_NOISE, Noise
from fusedlstm.plan import devices
from fusedlstm.plan.tiles import MOST_VARIANTS
from grids import pairwise
from support import DTYPES, assert_accurate, cast, recurrence, recurrence_inputs, without_padding

NOISES = {
    "none": NO_NOISE,
    "mean": Noise(None, (0.3, 0.4, 0.5, 0.5)),
    "drawn": Noise(torch.tensor([987654321]), (0.2, 0.3, 0.4, 0.5), (1, 7)),
}
LAYOUTS = {
    "dense": {},
    "resets": {"resets": 0.3},
    "ragged with resets": {"lengths": [2, 0, 3, 1], "resets": 0.2},
    "packed": {"packed": [3, 2, 2, 1]},
}
AXES = {
    "cell": list(STEPS),
    "dtype": list(DTYPES),
    "layout": list(LAYOUTS),
    "directions": [1, 2],
    "noise": list(NOISES),
    "clip": [None, 0.1],
}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def tried(monkeypatch):
    """The names of the kernels whose launches failed."""
    names = []

    def launcher(self, arguments, varying=None):
        names.append(self.kernel.__name__)
        raise failures.LaunchError("no room.")

    monkeypatch.setattr(bound.Bound, "launcher", launcher)
    failures.forget()
    yield names
    failures.forget()


def falls_back():
    return pytest.warns(
        RuntimeWarning, match=r"backend='auto': no room\. From now on a loop of torch operations takes "
    )


@pytest.mark.parametrize(tuple(AXES), pairwise(AXES))
def test_the_loop_returns_what_the_kernels_would(cell, dtype, layout, directions, noise, clip):
    """Forward, and backward from what a kernel saved, in its dtypes."""
    dtype, noise = DTYPES[dtype], NOISES[noise]
    if noise.rates and not EQUATIONS[cell].update:
        noise = noise._replace(rates=(0.0, 0.0, *noise.rates[2:]))  # it has no zoneout
    inputs = recurrence_inputs(3, 4, 7, directions, dtype, cell=cell, **LAYOUTS[layout])
    inputs = inputs._replace(batch=inputs.batch._replace(noise=noise))
    spec, (weight_hh, vectors, *_) = recurrence(cell, clip=clip), inputs.weights
    same, exact = (reference.recurrence_fwd(spec, *cast(inputs, p)) for p in (dtype, torch.float64))
    saved = same._replace(c_seq=same.c_seq.float())
    generator = torch.Generator().manual_seed(1)
    grads = Grads(*(torch.randn(getattr(same, k).shape, generator=generator).to(dtype) for k in Grads._fields))
    own = (vectors, *inputs.state, *inputs.batch.flat)
    with falls_back():
        ours = ops.recurrence_fwd(cell, "auto", inputs.preact_x, weight_hh, *own, True, True)
    failures.forget()
    kept = [saved.output, saved.gates, saved.c_seq]
    with falls_back():
        ours_bwd = ops.recurrence_bwd(cell, "auto", [*grads], weight_hh, *own[:3], kept, *own[3:], clip)
    shapes = ops.recurrence_fwd(cell, "auto", inputs.preact_x.to("meta"), *to_meta(weight_hh, own), True, True)
    assert [(x.shape, x.dtype) for x in ours] == [(x.shape, x.dtype) for x in shapes], "as of the kernels"
    same_bwd, exact_bwd = (
        reference.recurrence_bwd(spec, *(cast(x, p) for x in (grads, saved, *inputs[1:])))
        for p in (dtype, torch.float64)
    )
    names = ("output", "h_n", "c_n", "gates", "c_seq", "grad_preact", "grad_hx", "grad_cx")
    for name, *values in zip(names, (*ours, *ours_bwd), (*same, *same_bwd), (*exact, *exact_bwd), strict=True):
        found = ((without_padding(x, inputs.batch.layout) if name in ("gates", "grad_preact") else x) for x in values)
        assert_accurate(name, *found)


def to_meta(weight_hh, own):
    move = lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x  # noqa: E731
    return [*map(move, weight_hh)], *map(move, own)


KINDS = {
    "lstm": (fusedlstm.LSTM, {}),
    "gru": (fusedlstm.GRU, {}),
    "rnn_tanh": (fusedlstm.RNN, {}),
    "rnn_relu": (fusedlstm.RNN, {"nonlinearity": "relu"}),
    "peephole": (fusedlstm.PeepholeLSTM, {}),
    "coupled": (fusedlstm.CoupledLSTM, {}),
    "slstm": (fusedlstm.SLSTM, {}),
}
MODULES = {
    "lstm": (fusedlstm.LSTM, {}),
    "gru": (fusedlstm.GRU, {"bidirectional": True}),
    "projected": (fusedlstm.LSTM, {"proj_size": 3}),
    "layernorm": (fusedlstm.LayerNormLSTM, {}),
    "states": (fusedlstm.LSTM, {"save": "states"}),
    "layernorm states": (fusedlstm.LayerNormLSTM, {"save": "states"}),
    "heads": (fusedlstm.LSTM, {"num_heads": 2}),
    "zoneout": (fusedlstm.GRU, {"zoneout": 0.3}),
    "slstm": (fusedlstm.SLSTM, {}),
}


@pytest.fixture
def kernels_chosen(monkeypatch):
    """`auto` takes the kernels, as on a GPU, unless they failed before; asked for by name they pass for being there."""

    def choice(backend, device, dtype, cell="lstm", hidden=None, directions=1, clips=False, layout="dense", heads=1):
        engine = engines.requested(backend)
        failed = failures.reason(device, cell, hidden, dtype, directions, layout, heads)
        return ("torch" if failed else "triton") if engine == "auto" else engine, "for this test"

    monkeypatch.setattr(engines, "choice", choice)
    monkeypatch.setattr(fusedlstm.Recurrent, "_is_plain", lambda *_: False)  # which knows that a CPU runs no kernels


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("name", MODULES)
def test_a_module_goes_on_without_its_kernels(kernels_chosen, tried, name, steps):
    """Forward and backward of a stack. After a wave one layer alone is tried; after that no launch is."""
    kind, options = MODULES[name]
    torch.manual_seed(0)
    module = kind(5, 6, 2, **options).eval()
    same = kind(5, 6, 2, **options, backend="reference").eval()
    same.load_state_dict(module.state_dict())
    exact = copy.deepcopy(same).double()
    input = torch.randn(steps, 3, 5)

    def results(module, input):
        input = input.clone().requires_grad_()
        output, _ = module(input)
        module.zero_grad()
        output.square().sum().backward()
        return [output.detach(), input.grad, *(p.grad for p in module.parameters())]

    found = []
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.append(results(module, input))
    assert tried
    tried.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        found.append(results(module, input))
    assert not tried
    for a, b, c, *expected in zip(*found, results(same, input), results(exact, input.double()), strict=True):
        for ours in (a, b, c):
            assert_accurate("result", ours, *expected)


def test_inference_of_one_step_goes_on_too(kernels_chosen, tried):
    module, twin = fusedlstm.LSTM(5, 6, 2), fusedlstm.LSTM(5, 6, 2, backend="reference")
    twin.load_state_dict(module.state_dict())
    x, states = torch.randn(1, 3, 5), tuple(torch.randn(2, 3, 6) for _ in range(2))
    with torch.no_grad(), falls_back():
        torch.testing.assert_close(module(x, states), twin(x, states))
    assert tried == ["step_fwd_kernel"]


def everything(module, input, states):
    """All results that a module can give, and all gradients, in the dtype of its parameters."""
    input, *states = (x.to(module.weight_ih_l0.dtype, copy=True).requires_grad_() for x in (input, *states))
    alone = len(states) == 1
    found = module(input, states[0] if alone else tuple(states), return_cell_states=not alone)
    results = [y for x in found for y in (x if isinstance(x, tuple) else (x,))]
    torch.autograd.backward(results, [torch.linspace(0, 1, y.numel()).view_as(y).to(y) for y in results])
    return [y.detach() for y in results] + [x.grad for x in (input, *states, *module.parameters())]


@pytest.mark.parametrize("options", [{}, {"bias": False}], ids=str)
@pytest.mark.parametrize("cell", KINDS)
def test_a_wave_that_fails_says_nothing_about_one_layer(kernels_chosen, tried, monkeypatch, cell, options):
    """Its loop gives the right numbers, forward and backward; the next call is one layer after another."""
    kind, own = KINDS[cell]
    torch.manual_seed(1)
    module, same = kind(5, 6, 3, **own, **options), kind(5, 6, 3, **own, **options, backend="reference")
    same.load_state_dict(module.state_dict())
    exact = copy.deepcopy(same).double()
    monkeypatch.setattr(launch, "_cached_wave", lambda *_: 3)
    monkeypatch.setattr(bound.Bound, "launcher", only_waves(tried))
    input, states = torch.randn(4, 3, 5), [torch.rand(3, 3, 6) for _ in CELLS[module.cell].states]
    with falls_back() as seen:
        found = everything(module, input, states)
    assert len(seen) == 1 and "layers in one launch" in str(seen[0].message)
    expected = everything(same, input, states), everything(exact, input, states)
    for k, results in enumerate(zip(found, *expected, strict=True)):
        assert_accurate(f"result {k}", *results)
    assert (
        autograd.layers_together(
            CELLS[module.cell], input, (torch.zeros(3, 3, 6),), module._flat_weights, 3, autograd.DENSE
        )
        == 1
    )


@pytest.mark.parametrize("cell", ["lstm", "gru", "slstm"])
def test_ops_that_go_on_pass_opcheck(cell):
    """Shapes and dtypes of the loops are those that a compiler was promised of the kernels."""
    checks = ("test_schema", "test_faketensor")
    of, T, B, H = cells.CELLS[cell], 3, 2, 6
    G, K, S = of.num_gates, of.num_kept, of.num_cell_states
    half = torch.bfloat16
    given = recurrence_inputs(T, B, H, 2, half, cell=cell)  # both directions, or two layers
    (weight_hh, vectors, *_), (hx, cx) = given.weights, given.state
    weight_ih, bias = torch.randn(1, G * H, H).to(half), torch.zeros(1, G * H, dtype=half)
    parameters = [x for w in weight_hh for x in (weight_ih[0], w, bias[0], bias[0])]
    arguments = (cell, torch.randn(B, H).to(half), hx, cx, parameters, 1, True, True, "auto")
    torch.library.opcheck(ops.step_fwd, arguments, test_utils=checks)
    own = (weight_ih, bias, weight_hh, vectors, hx, cx, [None] * 4)
    torch.library.opcheck(ops.wave_fwd, (cell, given.preact_x[:1], *own, True, True, "auto"), test_utils=checks)
    output, gates = torch.randn(2, T, B, H).to(half), torch.rand(2, T, B, K * H).to(half)
    grads, saved = [output[0], None, hx, cx], [output, gates, torch.rand(S, 2, T, B, H) + 1]
    arguments = (cell, grads, weight_ih, *own[2:6], saved, own[6], None, "auto")
    torch.library.opcheck(ops.wave_bwd, arguments, test_utils=checks)


def only_waves(tried):
    def launcher(self, arguments, varying=None):
        assert self.constants["LAYOUT"].STACK, "no other launch is tried"
        raise failures.LaunchError("no room.")

    return launcher


def test_by_name_it_is_an_error_every_time(kernels_chosen, tried):
    module = fusedlstm.LSTM(5, 6, backend="triton")
    counts = []
    for _ in range(2):
        with pytest.raises(failures.LaunchError, match="no room"):
            module(torch.randn(4, 3, 5))
        counts.append(len(tried))
    # Each call tries the plan and the variants of its tiles, and is refused anew.
    assert 0 < counts[0] <= MOST_VARIANTS and counts[1] == 2 * counts[0]
    assert not failures._failed


def test_another_error_is_not_swallowed(kernels_chosen, monkeypatch):
    def launcher(self, arguments, varying=None):
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    monkeypatch.setattr(bound.Bound, "launcher", launcher)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        fusedlstm.LSTM(5, 6)(torch.randn(4, 3, 5))


def test_auto_on_a_gpu_takes_torch_after_a_failure(monkeypatch):
    """For that layer, on that device, with so many multiprocessors; and by name the kernels again."""
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(launch, "device_limits", lambda index: devices.DEVICES["sm_90"])
    weights, hx = [torch.zeros(4 * 64, 64)], torch.zeros(1, 3, 64)
    here = (torch.bfloat16, "lstm", 64)
    assert engines.choose("auto", gpu, *here) == "triton"

    def where():
        return failures.where(gpu, "lstm", torch.bfloat16, weights, hx, autograd.DENSE)

    def refused():
        raise failures.LaunchError("no room.")

    with falls_back():
        assert failures.attempt("auto", where, refused, lambda: "loop") == "loop"
    assert failures.attempt("auto", where, lambda: pytest.fail("tried again"), lambda: "loop") == "loop"
    assert failures.attempt("triton", where, lambda: "kernels", lambda: "loop") == "kernels"
    assert engines.choose("auto", gpu, *here) == "torch"
    assert engines.choose("triton", gpu, *here) == "triton"
    others = (("gru", gpu), ("lstm", torch.device("cuda", 1)))
    assert all(engines.choose("auto", device, torch.bfloat16, cell, 64) == "triton" for cell, device in others)
    assert engines.choose("auto", gpu, *here, directions=2) == "triton"
    assert engines.choose("auto", gpu, *here, layout="packed") == "triton"
    monkeypatch.setenv("FUSEDLSTM_SMS", "60")
    assert engines.choose("auto", gpu, *here) == "triton"


def test_an_error_of_a_kernel_that_ran_is_no_refusal_whatever_was_under_way():
    ran = torch.AcceleratorError("an illegal memory access was encountered")
    for compiling in (False, True):
        assert not failures.is_refusal(ran, compiling)
        assert failures.is_refusal(RuntimeError("ptxas"), compiling) is compiling


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ("CUDA error: unspecified launch failure", True),
        ("CUDA error: an illegal instruction was encountered\nCompile with", True),
        ("CUDA error: device-side assert triggered", True),
        ("CUDA out of memory", False),
    ],
)
def test_explain(text, known):
    found = failures.explain(RuntimeError(text))
    assert (found is not None) == known
    assert not known or ("FUSEDLSTM_SMS" in found and "docs/on_a_gpu.md" in found)
