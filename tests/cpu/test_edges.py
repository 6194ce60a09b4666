"""What a call must not get wrong: malformed packs, sizes of zero, numbers that nobody uses, and who watches."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fusedlstm

MEMBERS = (
    fusedlstm.LSTM,
    fusedlstm.GRU,
    fusedlstm.RNN,
    fusedlstm.PeepholeLSTM,
    fusedlstm.CoupledLSTM,
    fusedlstm.LayerNormLSTM,
    fusedlstm.SLSTM,
    fusedlstm.ResetBeforeGRU,
    fusedlstm.LayerNormGRU,
)
OF_TORCH = ("LSTM", "GRU", "RNN")
SIZES = torch.tensor([2, 2, 1])
PERMUTATION = torch.tensor([1, 0])

MALFORMED = {
    "negative": (torch.tensor([3, -1]), None, "never grow and are at least 1, got \\[3, -1\\]"),
    "growing": (torch.tensor([1, 2]), None, "never grow and are at least 1, got \\[1, 2\\]"),
    "zero": (torch.tensor([2, 0]), None, "never grow and are at least 1"),
    "sum": (torch.tensor([2, 2]), None, "as many rows of data as batch_sizes say \\(4\\), got 5"),
    "float": (SIZES.float(), None, "dtype torch.int64"),
    "int32": (SIZES.int(), None, "dtype torch.int64"),
    "two axes": (SIZES.unsqueeze(0), None, "one dimension"),
    "no steps": (SIZES[:0], None, "at least one step"),
    "short order": (SIZES, torch.tensor([0]), "sorted_indices with shape \\[2\\]"),
    "long order": (SIZES, torch.tensor([0, 1, 2]), "sorted_indices with shape \\[2\\]"),
    "order out of range": (SIZES, torch.tensor([0, 5]), "a permutation of 0 to 1"),
    "negative order": (SIZES, torch.tensor([0, -1]), "a permutation of 0 to 1"),
    "order twice": (SIZES, torch.tensor([1, 1]), "a permutation of 0 to 1"),
    "order of floats": (SIZES, torch.tensor([0.0, 1.0]), "dtype torch.int64"),
}


@pytest.mark.parametrize("given", ["with hx", "without"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_packs_are_errors(name, backend, given):
    sizes, order, text = MALFORMED[name]
    rows = 5 if name not in ("negative", "zero") else 2
    packed = PackedSequence(torch.randn(rows, 3), sizes, order, None if order is None else PERMUTATION)
    module = fusedlstm.GRU(3, 4, backend=backend)
    hx = torch.zeros(1, 2, 4) if given == "with hx" else None
    with pytest.raises(ValueError, match=text):
        module(packed, hx)


def test_what_torch_packs_passes():
    for lengths in ([3, 1], [1, 3], [2, 2]):
        packed = pack_padded_sequence(torch.randn(3, 2, 3), torch.tensor(lengths), enforce_sorted=False)
        fusedlstm.LSTM(3, 4)(packed)


@pytest.mark.parametrize("name", ["lengths", "resets"])
def test_tables_without_values_are_errors(name):
    table = {
        "lengths": torch.ones(2, dtype=torch.long, device="meta"),
        "resets": torch.ones(5, 2, dtype=torch.bool, device="meta"),
    }[name]
    with pytest.raises(ValueError, match=f"{name}: expected a tensor with values"):
        fusedlstm.LSTM(3, 4)(torch.randn(5, 2, 3), **{name: table})


@pytest.mark.parametrize("save", ["gates", "states"])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("steps", [1, 40])
@pytest.mark.parametrize("member", MEMBERS)
def test_no_sequences(member, steps, clip, save):
    module = member(3, 4, bidirectional=True, grad_clip=clip, save=save)
    x = torch.zeros(steps, 0, 3, requires_grad=True)
    output, _ = module(x)
    assert output.shape == (steps, 0, 8)
    output.sum().backward()
    assert x.grad.shape == x.shape and all(not p.grad.any() for p in module.parameters())


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("member", MEMBERS)
def test_what_a_sequence_without_steps_begins_with_is_not_used(member, bidirectional, backend):
    """NaN there, and the gradients of everything that is used stay what they are."""
    module = member(3, 4, bidirectional=bidirectional, backend=backend)
    found = []
    for value in (0.0, float("nan")):
        module.zero_grad()
        x = torch.ones(5, 2, 3, requires_grad=True)
        states = module(x)[1]
        hx = [torch.zeros_like(s) for s in (states if isinstance(states, tuple) else (states,))]
        for state in hx:
            state[:, 1] = value
        output, _ = module(x, tuple(hx) if len(hx) > 1 else hx[0], lengths=[5, 0])
        output.square().sum().backward()
        found.append([output.detach(), x.grad, *(p.grad for p in module.parameters())])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("name", OF_TORCH)
def test_a_trace_takes_other_lengths(name, bidirectional):
    module = getattr(fusedlstm, name)(3, 4, bidirectional=bidirectional).requires_grad_(False)

    def call(x, lengths):
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        return pad_packed_sequence(module(packed)[0], total_length=5)[0]

    x, lengths = torch.randn(5, 3, 3), torch.tensor([5, 2, 4])
    traced = torch.jit.trace(call, (x, torch.tensor([4, 4, 4])), check_trace=False)
    torch.testing.assert_close(traced(x, lengths), call(x, lengths))


@pytest.mark.parametrize("member", [fusedlstm.PeepholeLSTM, fusedlstm.SLSTM])
def test_a_trace_of_lengths_that_it_would_keep_is_an_error(member):
    module = member(3, 4).requires_grad_(False)
    x, lengths = torch.randn(5, 3, 3), torch.tensor([5, 2, 4])
    with pytest.raises(RuntimeError, match="lengths and resets: expected a dense batch in torch.jit.trace"):
        torch.jit.trace(lambda x, n: module(x, lengths=n)[0], (x, lengths), check_trace=False)


@pytest.mark.parametrize(("member", "options"), [(fusedlstm.PeepholeLSTM, {}), (fusedlstm.GRU, {"num_heads": 2})])
@pytest.mark.parametrize("follows", [False, True])
def test_a_trace_of_our_own_loop_is_an_error(member, options, follows):
    module, x = member(3, 4, **options).requires_grad_(follows), torch.randn(5, 3, 3)
    text = f"input: expected a call that ATen computes in torch.jit.trace, got .*{module.cell}"
    with pytest.raises(RuntimeError, match=text):
        torch.jit.trace(module, (x,), check_trace=False)
    reference = member(3, 4, backend="reference", **options)
    traced = torch.jit.trace(reference, (x,), check_trace=False)
    torch.testing.assert_close(traced(2 * x), reference(2 * x))


@pytest.mark.filterwarnings("ignore:Casting complex values to real")
@pytest.mark.parametrize("steps", [3, 40])
@pytest.mark.parametrize("name", OF_TORCH)
def test_complex_numbers_as_in_torch(name, steps):
    ours = getattr(fusedlstm, name)(3, 4, dtype=torch.complex128)
    stock = getattr(nn, name)(3, 4, dtype=torch.complex128)
    stock.load_state_dict(ours.state_dict())
    x, found = 0.1 * torch.randn(steps, 2, 3, dtype=torch.complex128), []
    for module in (ours, stock):
        leaf = x.clone().requires_grad_()
        output, _ = module(leaf)
        output.abs().square().sum().backward()
        found.append([output.detach(), leaf.grad, *(p.grad for p in module.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("options", [{"lengths": [40, 7]}, {"return_cell_states": True}, {"grad_clip": 1e9}], ids=str)
@pytest.mark.parametrize("member", [fusedlstm.LSTM, fusedlstm.PeepholeLSTM, fusedlstm.CoupledLSTM])
def test_complex_numbers_beyond_torch_have_autograds_gradients(member, options):
    """The specification under plain autograd serves them, and `explain` says so."""
    module, x = member(3, 4, dtype=torch.complex128), 0.1 * torch.randn(40, 2, 3, dtype=torch.complex128)
    if "grad_clip" in options:
        module.grad_clip, options = options["grad_clip"], {}
        assert fusedlstm.explain(module, x).engine == "reference"
        return
    found = []
    for module.backend in ("auto", "reference"):
        leaf = x.clone().requires_grad_()
        module(leaf, **options)[0].abs().square().sum().backward()
        found.append(leaf.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize("member", MEMBERS)
def test_a_default_device_is_nobodys_business(member):
    """No tensor of ours is made on it: "meta" has no values."""
    module = member(3, 4, bidirectional=True)
    x, resets = torch.randn(40, 2, 3), torch.arange(80).reshape(40, 2) % 9 == 0
    packs = [pack_padded_sequence(x, torch.tensor(n)) for n in ([40, 3], [40, 39])]
    torch.set_default_device("meta")
    try:
        results = [module(p)[0].data for p in packs]
        results += [module(x, lengths=[4, 40])[0], module(x, resets=resets)[0]]
        sum(y.sum() for y in results).backward()
    finally:
        torch.set_default_device(None)
    assert all(y.device.type == "cpu" for y in results) and all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_resets_may_be_numbers(packed, dtype):
    """The dones of environments are floats."""
    module, x = fusedlstm.GRU(3, 4), torch.randn(5, 2, 3)
    resets = torch.arange(10).reshape(5, 2) % 3 == 0
    found = []
    for table in (resets, resets.to(dtype)):
        pack = (lambda t: pack_padded_sequence(t, torch.tensor([5, 3]))) if packed else (lambda t: t)
        output, state = module(pack(x), resets=pack(table))
        found.append((output.data if packed else output, state))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("member", [m.__name__ + "Cell" for m in MEMBERS])
def test_cells_without_units(member, backend):
    """torch.nn has them."""
    cell = getattr(fusedlstm, member)(3, 0, backend=backend)
    states = cell(torch.randn(2, 3, requires_grad=True))
    states = states if isinstance(states, tuple) else (states,)
    assert [s.shape for s in states] == [(2, 0)] * len(states)
    assert sum(s.numel() for s in cell(torch.randn(3))) == 0
