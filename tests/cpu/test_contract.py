"""What users do to a torch.nn.LSTM beside calling it, done to ours: the same tensors must come out."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.nn.utils.rnn import pack_sequence
from torch.utils.checkpoint import checkpoint

import fusedlstm

I, H = 5, 7
X = torch.randn(4, 3, I, generator=torch.Generator().manual_seed(1))


def build(library, **options):
    torch.manual_seed(7)
    return library.LSTM(I, H, **{"num_layers": 2, "bidirectional": True, **options})


def results(module, x=X):
    """Output, states and the gradient of every parameter."""
    module.zero_grad()
    output, (h_n, c_n) = module(x)
    (output.square().sum() + h_n.sum() + c_n.square().sum()).backward()
    return [output, h_n, c_n, *(p.grad for p in module.parameters())]


def deep_copied(library):
    module = build(library)
    results(module)
    return results(copy.deepcopy(module))


def pickled(library):
    return results(pickle.loads(pickle.dumps(build(library))))


def state_dict_of_the_other(library):
    module = build(library, bias=False)
    other = nn if library is fusedlstm else fusedlstm
    module.load_state_dict(build(other, bias=False).state_dict())
    return results(module)


def old_checkpoint(library):
    """A module pickled by an early torch knew no proj_size, and held its weights in a list."""
    module = build(library)
    state = dict(module.__dict__)
    state["all_weights"] = module.all_weights
    for newer in ("proj_size", "_all_weights", "_flat_weights", "_flat_weight_refs", "_flat_weights_names"):
        del state[newer]
    old = library.LSTM.__new__(library.LSTM)
    old.__setstate__(state)
    return results(old)


def functional_call(library):
    module = build(library)
    other = {k: torch.full_like(v, 0.1) for k, v in module.state_dict().items()}
    return [*torch.func.functional_call(module, other, (X,))[1]]


def replaced_parameter(library):
    module = build(library)
    module.weight_hh_l1 = nn.Parameter(torch.full((4 * H, H), 0.1))
    assert module._flat_weights[9] is module.weight_hh_l1 and module.all_weights[2][1] is module.weight_hh_l1
    return results(module)


def weight_drop(library):
    """AWD-LSTM: a weight that is a plain tensor, made anew from a parameter before every call."""
    module = build(library)
    raw = nn.Parameter(module.weight_hh_l0.detach().clone())
    del module.weight_hh_l0
    module.weight_hh_l0 = raw * 0.5
    return [*results(module), raw.grad]


def old_weight_norm(library):
    module = build(library)
    with pytest.warns(FutureWarning):
        module = nn.utils.weight_norm(module, "weight_hh_l0")
    first = results(module)
    nn.utils.remove_weight_norm(module, "weight_hh_l0")
    return first + results(module)


def parametrised_weight_norm(library):
    module = weight_norm(build(library), "weight_ih_l1")
    first = results(module)
    nn.utils.parametrize.remove_parametrizations(module, "weight_ih_l1")
    return first + results(module)


def spectral(library):
    return results(spectral_norm(build(library), "weight_hh_l0_reverse"))


def pruned(library):
    module = build(library)
    prune.random_unstructured(module, "weight_ih_l0", 0.5)
    first = results(module)
    prune.remove(module, "weight_ih_l0")
    return first + results(module)


def hooks(library):
    module, seen = build(library), []
    module.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    module.register_forward_hook(lambda module, args, out: seen.append(out[0].detach()))
    module.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append(grad_out[0]))
    return results(module, X.clone().requires_grad_()) + seen


def checkpointed(library):
    module, x = build(library), X.clone().requires_grad_()
    output, (h_n, _) = checkpoint(module, x, use_reentrant=False)
    (output.sum() + h_n.square().sum()).backward()
    return [x.grad, *(p.grad for p in module.parameters())]


def inference(library):
    with torch.inference_mode():
        output, (h_n, c_n) = build(library)(X)
    assert output.is_inference()
    return [output, h_n, c_n]


def frozen(library):
    module = build(library).requires_grad_(False)
    x = X.clone().requires_grad_()
    module(x)[0].square().sum().backward()
    assert all(p.grad is None for p in module.parameters())
    return [x.grad]


def evaluated(library):
    return results(build(library, dropout=0.5).eval())


def twice(library):
    module = build(library)
    output, _ = module(X)
    output.sum().backward(retain_graph=True)
    output.sum().backward()
    return [p.grad for p in module.parameters()]


def from_meta(library):
    with torch.device("meta"):
        module = build(library)
    assert module.weight_hh_l0.is_meta
    module.to_empty(device="cpu")
    module.load_state_dict(build(library).state_dict())
    return results(module)


def in_float64(library):
    return results(build(library).to(torch.float64), X.double())


def shared(library):
    module = build(library).share_memory()
    assert module.weight_hh_l0.is_shared()
    return results(module)


def applied(library):
    module = build(library)
    module.apply(lambda m: [nn.init.constant_(p, 0.1) for p in m.parameters()])
    return results(module)


def flattened(library):
    module = build(library)
    assert module.flatten_parameters() is None
    return results(module)


def state_list(library):
    state = [torch.full((4, 3, H), 0.5), torch.full((4, 3, H), -0.5)]
    return [*build(library)(X, state)[1]]


def state_strided(library):
    state = torch.full((3, 4, 2 * H), 0.5).transpose(0, 1)
    return [*build(library)(X, (state[..., :H], state[..., H:]))[1]]


def no_sequences(library):
    return results(build(library), X[:, :0])


def one_step(library):
    return results(build(library), X[:1])


def one_step_of_inference(library):
    module = build(library, batch_first=True, num_layers=3, dropout=0.5)
    with torch.no_grad():
        torch.manual_seed(3)
        output, (h_n, c_n) = module(X.transpose(0, 1)[:, :1])
    return [output, h_n, c_n]


def dropped_out(library):
    return results(build(library, dropout=1.0))


def under_a_seed(library):
    """Without a GPU the masks of dropout are torch's own."""
    module = build(library, dropout=0.5)
    torch.manual_seed(3)
    return results(module)


def packed_under_a_seed(library):
    module = build(library, dropout=0.5)
    torch.manual_seed(3)
    return [module(pack_sequence([X[:, 0], X[:3, 1], X[:1, 2]]))[0].data]


def in_half_precision(library):
    """torch's own loop rounds at every step, ours computes in float32."""
    output, (h_n, c_n) = build(library).half()(X.half())
    assert output.dtype == h_n.dtype == c_n.dtype == torch.float16
    return [output.float(), h_n.float(), c_n.float()]


SAME_CODE = [
    deep_copied, pickled, state_dict_of_the_other, old_checkpoint, functional_call, replaced_parameter, weight_drop,
    old_weight_norm, parametrised_weight_norm, spectral, pruned, hooks, checkpointed, inference, frozen, evaluated,
    twice, from_meta, in_float64, shared, applied, flattened, state_list, state_strided, no_sequences, dropped_out,
    under_a_seed,
]  # fmt: skip


@pytest.mark.parametrize("use", SAME_CODE, ids=lambda use: use.__name__)
def test_same_bits_as_stock(use):
    stock, ours = use(nn), use(fusedlstm)
    assert stock
    for a, b in zip(stock, ours, strict=True):
        assert torch.equal(a, b)


TOLERANCE = {packed_under_a_seed: 1e-6, one_step: 1e-6, one_step_of_inference: 1e-6, in_half_precision: 2e-3}


@pytest.mark.parametrize("use", TOLERANCE, ids=lambda use: use.__name__)
def test_same_numbers_as_stock(use):
    for a, b in zip(use(nn), use(fusedlstm), strict=True):
        torch.testing.assert_close(a, b, rtol=TOLERANCE[use], atol=TOLERANCE[use])


CELL_USES = {
    "no bias": ({"bias": False}, X[0]),
    "unbatched": ({}, X[0, 0]),
    "no sequences": ({}, X[0, :0]),
    "strided": ({}, X.permute(1, 2, 0)[..., 0]),
    "float64": ({"dtype": torch.float64}, X[0].double()),
}


@pytest.mark.parametrize(("options", "x"), CELL_USES.values(), ids=CELL_USES.keys())
def test_cell_same_bits_as_stock(options, x):
    found = []
    for library in (nn, fusedlstm):
        torch.manual_seed(7)
        cell = library.LSTMCell(I, H, **options)
        h, c = cell(x, cell(x))
        (h.sum() + c.square().sum()).backward()
        found.append([h, c, *(p.grad for p in cell.parameters())])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("library", [nn, fusedlstm], ids=["stock", "ours"])
def test_load_state_dict_leaves_no_cycle(library):
    module = build(library)
    module.load_state_dict(module.state_dict())
    gone = weakref.ref(module)
    gc.disable()
    try:
        del module
        assert gone() is None
    finally:
        gc.enable()


def test_extra_repr_and_attributes():
    options = {"bias": False, "batch_first": True, "dropout": 0.5, "proj_size": 3}
    stock, ours = build(nn, **options), build(fusedlstm, **options)
    assert repr(ours) == repr(stock)
    assert ours.__constants__ == stock.__constants__
    names = ("mode", "input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")
    for name in (*names, "proj_size", "_flat_weights_names", "_all_weights"):
        assert getattr(ours, name) == getattr(stock, name)
    missing = {name for name in dir(nn.LSTM) if not name.startswith("__")} - set(dir(fusedlstm.LSTM))
    assert not missing


def test_whole_module_in_a_file():
    file = io.BytesIO()
    torch.save(build(fusedlstm), file)
    file.seek(0)
    for a, b in zip(results(torch.load(file, weights_only=False)), results(build(nn)), strict=True):
        assert torch.equal(a, b)


def test_more_steps_than_cudnn_takes():
    module = fusedlstm.LSTM(2, 3)
    x = torch.randn(65536 + 70, 1, 2)
    output, (h_n, _) = module(x)
    expected, _ = module(x[-100:])  # the start is long forgotten
    torch.testing.assert_close(output[-1], expected[-1])
    assert torch.equal(output[-1], h_n[0])


@pytest.mark.parametrize("batch_first", [False, True])
def test_runs_for_cudnn_equal_one_call(monkeypatch, batch_first):
    """What a GPU without our kernels does beyond cuDNN's 65535 steps, here with 3."""
    from fusedlstm.cells import CELLS
    from fusedlstm.engines import aten

    monkeypatch.setattr(aten, "CUDNN_STEPS", 3)
    module = build(nn, batch_first=batch_first)
    x = torch.randn(2, 10, I) if batch_first else torch.randn(10, 2, I)
    hx = torch.randn(4, 2, H), torch.randn(4, 2, H)
    output, (h_n, c_n) = aten.stack(
        CELLS["lstm"], "runs", x, None, hx, module._flat_weights, True, 2, 0.0, True, True, batch_first
    )
    expected, (h, c) = module(x, hx)
    for a, b in ((output, expected), (h_n, h), (c_n, c)):
        torch.testing.assert_close(a, b)
