"""Zoneout and the dropouts inside of a step: the generator, the effect of masks, and that all engines see the same."""

import itertools

import pytest
import torch

import fusedlstm
from fusedlstm import cells, noise
from fusedlstm.noise import Noise

T, B, I, H = 7, 5, 3, 6
KINDS = {
    "zoneout": {"zoneout": (0.3, 0.2)},
    "candidate": {"candidate_dropout": 0.4},
    "recurrent": {"recurrent_dropout": 0.4},
    "weight": {"weight_dropout": 0.4},
    "all": {"zoneout": 0.2, "candidate_dropout": 0.3, "recurrent_dropout": 0.3, "weight_dropout": 0.3},
}
LAYERS = ("LSTM", "GRU", "RNN", "PeepholeLSTM", "CoupledLSTM", "LayerNormLSTM", "ResetBeforeGRU", "LayerNormGRU")


def test_philox_known_answers():
    """The vectors that Salmon et al. publish with Random123."""
    ones = 0xFFFFFFFF
    zero, full = torch.zeros(1, dtype=torch.int64), torch.tensor([-1])
    assert [int(w) for w in noise.philox(zero, 0, 0, 0, 0)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert [int(w) for w in noise.philox(full, ones, ones, ones, ones)] == [
        0x408F276D,
        0x41C83B0E,
        0xA20BC7C6,
        0x6D5451FD,
    ]
    key = torch.tensor([(0x299F31D0 << 32) | 0xA4093822])
    words = noise.philox(key, 0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert [int(w) for w in words] == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
def test_rates_of_masks(rate):
    seed = torch.tensor([42])
    held_h, held_c, drop = Noise(seed, (rate, rate, rate, rate or 1.0)).of_rows(400, 0, 100, torch.zeros(1))
    if rate in (0.0, 1.0):
        for mask in (held_h, held_c):
            assert bool((torch.as_tensor(mask) == rate).all())
        assert bool((torch.as_tensor(drop) == (1 - rate)).all())
        return
    deviation = (rate * (1 - rate) / 40_000) ** 0.5
    for mask in (held_h, held_c, 1 - drop * (1 - rate)):
        assert abs(float(mask.mean()) - rate) < 4 * deviation
    # h, the other states and the candidate are drawn apart, and so are directions
    assert abs(float((held_h * held_c).mean()) - rate**2) < 4 * deviation
    other = Noise(seed, (rate, rate, rate, rate)).of_rows(400, 1, 100, torch.zeros(1))[0]
    assert abs(float((held_h * other).mean()) - rate**2) < 4 * deviation


def run(module, x, hx=None, **options):
    x = x.detach().requires_grad_()
    output, states = module(x, hx, **options)
    states = (states,) if isinstance(states, torch.Tensor) else states
    grads = [torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y) for y in (output, *states)]
    torch.autograd.backward([output, *states], grads)
    found = [output, *states, x.grad, *(p.grad for p in module.parameters())]
    module.zero_grad(set_to_none=True)
    return [y.detach() for y in found]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", LAYERS)
def test_engines_see_the_same_masks(layer, kind):
    """And autograd through the specification finds the gradients that are written out."""
    torch.manual_seed(0)
    module = getattr(fusedlstm, layer)(I, H, 2, bidirectional=True, **KINDS[kind]).double()
    x, lengths = torch.randn(T, B, I, dtype=torch.float64), torch.tensor([7, 0, 3, 5, 1])
    states = torch.randn(len(cells.CELLS[module.cell].states), 4, B, H, dtype=torch.float64)
    hx = states.unbind() if len(states) > 1 else states[0]
    for options in ({}, {"lengths": lengths}):
        found = []
        for backend in ("torch", "reference"):
            module.backend = backend
            torch.manual_seed(1)
            found.append(run(module, x, hx, **options))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def masks_of_layers(module, kind):
    """What was hit in a call of every layer and direction, seen from outside: bool [L * D, rows, units].

    A held h is the one of the step before, and what was dropped has no gradient.
    """
    _, _, (h_seq, _) = module(torch.randn(50, 1, I), return_states=True)
    h_seq.square().sum().backward()
    if kind == "zoneout":
        held = (h_seq[1:, :, 0] == h_seq[:-1, :, 0]).transpose(0, 1)  # at t + 1, and in reverse at t
        return torch.stack([own[1:] if k % 2 else own[:-1] for k, own in enumerate(held)])
    dropped = torch.stack([p.grad == 0 for name, p in module.named_parameters() if "weight_hh" in name])
    return dropped.all(1, keepdim=True) if kind == "recurrent" else dropped


@pytest.mark.parametrize(
    ("kind", "rates", "deviation"),
    [
        ("zoneout", {"zoneout": (0.5, 0.0)}, 0.01),
        ("recurrent", {"recurrent_dropout": 0.5}, 0.06),
        ("weight", {"weight_dropout": 0.5}, 0.01),
    ],
    ids=["zoneout", "recurrent", "weight"],
)
def test_every_layer_and_direction_has_masks_of_its_own(kind, rates, deviation):
    """Two that are drawn apart agree in half of the elements. All engines would agree if they were the same."""
    module = fusedlstm.LSTM(I, 64, 3, bidirectional=True, **rates, backend="torch")
    masks = masks_of_layers(module, kind)
    for a, b in itertools.combinations(masks, 2):
        assert abs(float((a == b).float().mean()) - 0.5) < 4 * deviation


@pytest.mark.parametrize("bidirectional", [False, True], ids=["blocks", "two directions"])
@pytest.mark.parametrize("layer", LAYERS)
def test_recomputed(layer, bidirectional):
    """save="states" recomputes, and in one direction runs over blocks of steps: the same masks."""
    torch.manual_seed(0)
    options = {"bidirectional": bidirectional, "backend": "torch"}
    module = getattr(fusedlstm, layer)(I, H, **KINDS["all"], **options).double()
    x = torch.randn(64, 16, I, dtype=torch.float64)
    found = []
    for save in ("gates", "states"):
        module.save = save
        torch.manual_seed(1)
        found.append(run(module, x))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layer", LAYERS)
def test_packed_rows_are_their_own(layer):
    """Results and gradients, from initial states that the recurrent dropout hits too."""
    torch.manual_seed(0)
    module = getattr(fusedlstm, layer)(I, H, bidirectional=True, **KINDS["all"]).double()
    x = torch.nn.utils.rnn.pack_padded_sequence(torch.randn(T, 3, I, dtype=torch.float64), [7, 4, 2])
    count, found = len(cells.CELLS[module.cell].states), []
    for module.backend in ("torch", "reference"):
        torch.manual_seed(1)
        data = x.data.clone().requires_grad_()
        states = torch.randn(count, 2, 3, H, dtype=torch.float64).requires_grad_()
        output, final = module(x._replace(data=data), states.unbind() if count > 1 else states[0])
        results = [output.data, *(final if count > 1 else (final,))]
        total = sum(y.sin().sum() for y in results)
        found.append([*results, *torch.autograd.grad(total, (data, states, *module.parameters()))])
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-10)


def test_a_seed_repeats():
    module = fusedlstm.LSTM(I, H, zoneout=0.5)
    x = torch.randn(T, B, I)
    torch.manual_seed(3)
    first, second = module(x)[0], module(x)[0]
    torch.manual_seed(3)
    assert torch.equal(module(x)[0], first) and not torch.equal(first, second)


def test_evaluation_is_the_mean():
    """The mean state of one step over many seeds is the state in evaluation, p s + (1 - p) s' (Krueger et al. 2016)."""
    torch.manual_seed(0)
    rates = (0.3, 0.6)
    module, plain = fusedlstm.LSTM(I, H, zoneout=rates).double(), fusedlstm.LSTM(I, H).double()
    plain.load_state_dict(module.state_dict())
    x, states = torch.randn(1, 1, I).double(), tuple(torch.randn(1, 1, H).double() for _ in range(2))
    many = 4000
    with torch.no_grad():
        _, drawn = module(x.expand(1, many, I), tuple(s.repeat(1, many, 1) for s in states))
        _, stepped = plain(x, states)
        _, evaluated = module.eval()(x, states)
    for p, s, new, mean, sample in zip(rates, states, stepped, evaluated, drawn, strict=True):
        torch.testing.assert_close(mean, p * s + (1 - p) * new)
        deviation = (s - new).abs() * (p * (1 - p) / many) ** 0.5
        assert bool(((sample.mean(1, keepdim=True) - mean).abs() < 5 * deviation).all())


@pytest.mark.parametrize("kind", ["candidate", "recurrent", "weight"])
def test_dropouts_keep_the_mean(kind):
    """The dropouts keep the mean of the candidate and the recurrent product. A small vanilla RNN is linear in them."""
    torch.manual_seed(0)
    module = fusedlstm.RNN(I, H, bias=False, **KINDS[kind]).double()
    x, h = torch.zeros(1, 1, I).double(), 1e-4 * torch.randn(1, 1, H).double()
    with torch.no_grad():
        plain = module.eval()(x, h)[1]
        module.train()
        if kind == "weight":  # one mask a call
            samples = torch.cat([module(x, h)[1] for _ in range(3000)], 1)
        else:
            samples = module(x.expand(1, 3000, I), h.repeat(1, 3000, 1))[1]
    error, deviation = samples.mean(1, keepdim=True) - plain, samples.std(1, keepdim=True) / 3000**0.5
    assert bool((deviation > 0).all()) and bool((error.abs() < 5 * deviation).all())


def test_recurrent_mask_is_one_for_all_steps():
    """With an identity for a recurrent weight and no input, what is dropped at the first step is dropped at all."""
    module = fusedlstm.RNN(1, H, nonlinearity="relu", bias=False, recurrent_dropout=0.5)
    with torch.no_grad():
        module.weight_hh_l0.copy_(torch.eye(H))
        output, _ = module(torch.zeros(4, B, 1), torch.ones(1, B, H))
    for t in range(1, 4):
        torch.testing.assert_close(output[t], output[0] ** (t + 1))
    assert set(output[0].unique().tolist()) == {0.0, 2.0}


def test_evaluation_has_no_dropout():
    module = fusedlstm.LSTM(I, H, candidate_dropout=0.5, recurrent_dropout=0.5, weight_dropout=0.5).eval()
    plain = fusedlstm.LSTM(I, H)
    plain.load_state_dict(module.state_dict())
    x = torch.randn(T, B, I)
    assert torch.equal(module(x)[0], plain(x)[0])


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_rates_of_one(backend):
    """Nothing changes, or no h enters the recurrent product; and no number is NaN."""
    x, hx = torch.randn(T, B, I), (torch.randn(1, B, H), torch.randn(1, B, H))
    held = fusedlstm.LSTM(I, H, zoneout=1.0, backend=backend)
    torch.testing.assert_close(held(x, hx), (hx[0].expand(T, B, H), hx))
    for rates in ({"recurrent_dropout": 1.0}, {"weight_dropout": 1.0}):
        module, plain = fusedlstm.LSTM(I, H, **rates, backend=backend), fusedlstm.LSTM(I, H)
        plain.load_state_dict(module.state_dict())
        plain.weight_hh_l0.detach().zero_()
        torch.testing.assert_close(module(x, hx), plain(x, hx))


def test_compiled_whole():
    module = fusedlstm.GRU(I, H, **KINDS["all"])
    torch.compile(module, fullgraph=True, backend="aot_eager")(torch.randn(T, B, I))[0].sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_double_backward():
    module = fusedlstm.GRU(2, 3, zoneout=0.3, candidate_dropout=0.3, recurrent_dropout=0.3).double()

    def call(x):
        torch.manual_seed(0)
        return module(x)[0]

    assert torch.autograd.gradgradcheck(call, torch.randn(3, 2, 2).double().requires_grad_())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"zoneout": 1.5}, "zoneout: expected a probability in [0, 1], got 1.5"),
        ({"zoneout": (0.1, 0.1, 0.1)}, "zoneout: expected a probability or two, of h and of the other states, got 3"),
        ({"candidate_dropout": "0.1"}, "candidate_dropout: expected a probability in [0, 1], got '0.1'"),
        ({"recurrent_dropout": True}, "recurrent_dropout: expected a probability in [0, 1], got True"),
        ({"weight_dropout": -0.1}, "weight_dropout: expected a probability in [0, 1], got -0.1"),
        ({"zoneout": 0.1, "proj_size": 2}, "zoneout and dropouts of a step: expected 0 with proj_size=2"),
    ],
)
def test_errors(options, text):
    with pytest.raises(ValueError) as caught:
        fusedlstm.LSTM(I, H, **options)
    assert str(caught.value).startswith(text)


def test_slstm_has_no_zoneout():
    with pytest.raises(ValueError, match="zoneout: expected 0 for the cell 'slstm'"):
        fusedlstm.SLSTM(I, H, zoneout=0.1)
    fusedlstm.SLSTM(I, H, candidate_dropout=0.1)(torch.randn(T, B, I))


def test_rates_are_shown_and_kept_from_torch():
    module = fusedlstm.LSTM(I, H, zoneout=(0.1, 0.0), weight_dropout=0.5)
    assert "zoneout_h=0.1, weight=0.5" in repr(module)
    assert "zoneout" in fusedlstm.restore(module, return_report=True)[1].kept[""]
