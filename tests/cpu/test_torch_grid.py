"""The grid of PyTorch's test_RNN_cpu_vs_cudnn, at more sizes: ours against torch.nn's on one device, every gradient."""

import copy
import itertools
import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fusedlstm
from grids import WHOLE
from support import assert_accurate

# A warning of stock's about itself.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


class Size(NamedTuple):
    T: int
    N: int
    I: int
    H: int
    P: int
    L: int
    lengths: list[int]  # packed with enforce_sorted=False where they are not sorted


SIZES = {
    "torch": Size(7, 6, 10, 6, 3, 2, [7, 5, 5, 2, 1, 1]),
    "odd": Size(5, 3, 7, 5, 1, 3, [2, 5, 3]),
    "one step": Size(1, 4, 3, 4, 3, 2, [1, 1, 1, 1]),
    "one sequence": Size(4, 1, 2, 3, 2, 2, [4]),
    "all alike": Size(3, 5, 1, 9, 7, 2, [3, 3, 3, 3, 3]),
    "wide": Size(7, 5, 33, 67, 31, 2, [6, 1, 4, 6, 2]),
}
OPTIONS = {
    "bias": (True, False),
    "bidirectional": (True, False),
    "batch_first": (True, False),
    "contiguous": (True, False),
    "lengths": ("none", "list", "tensor"),
    "projected": (False, True),
    "dropout": (0.0, 1.0),
    "hx": (True, False),
}
PRODUCT = [dict(zip(OPTIONS, values, strict=True)) for values in itertools.product(*OPTIONS.values())]


def covering(product: list[dict], strength: int) -> list[dict]:
    """Options in which every three values of every three options meet, or every two of two."""
    tuples = [set(itertools.combinations(case.items(), strength)) for case in product]
    missing, chosen = set().union(*tuples), []
    while missing:
        best = max(range(len(product)), key=lambda k: len(tuples[k] & missing))
        chosen.append(product[best])
        missing -= tuples[best]
    return chosen


def name(value):
    if not isinstance(value, dict):
        return value
    return "-".join(k if v is True else f"{k} {v}" for k, v in value.items() if v not in (False, 0, "none"))


# Of PyTorch's own size the whole product only with whole grids: three options that break together meet in fewer cases.
TRIPLES = covering(PRODUCT, 3)
CASES = [("LSTM", size, options) for size in SIZES for options in (PRODUCT if WHOLE and size == "torch" else TRIPLES)]
# The others have neither projection nor c; what is around the step is the LSTM's.
OTHERS = {"GRU": (nn.GRU, {}), "RNN": (nn.RNN, {}), "RNN relu": (nn.RNN, {"nonlinearity": "relu"})}
PAIRS = covering([options for options in PRODUCT if not options["projected"]], 2)
CASES += itertools.product(OTHERS, ("odd", "wide"), PAIRS)


class Call(NamedTuple):
    """The arguments of a module and the gradients that arrive from above, in float64."""

    data: Tensor  # of the input, or of the packed input
    packed: PackedSequence | None
    hx: list[Tensor] | None  # h_0, and of an LSTM c_0
    grads: list[Tensor]  # of output (packed: its data) and the final states
    contiguous: bool

    @classmethod
    def random(cls, layer: str, size: Size, options: dict) -> "Call":
        T, N, I, H, P, L, lengths = size
        D = 2 if options["bidirectional"] else 1
        P = P if options["projected"] else H

        def randn(*shape):
            return torch.randn(shape, dtype=torch.float64)

        def sequence(features):
            return randn(N, T, features) if options["batch_first"] else randn(T, N, features)

        def packed(x):
            as_given = torch.tensor(lengths) if options["lengths"] == "tensor" else lengths
            in_order = lengths == sorted(lengths, reverse=True)
            return pack_padded_sequence(x, as_given, options["batch_first"], enforce_sorted=in_order)

        input, grad_output = sequence(I), sequence(D * P)
        widths = (P, H) if layer == "LSTM" else (H,)
        states = [[randn(L * D, N, width) for width in widths] for _ in range(2)]
        hx = states[0] if options["hx"] else None
        if options["lengths"] == "none":
            return cls(input, None, hx, [grad_output, *states[1]], options["contiguous"])
        input, grad_output = packed(input), packed(grad_output)
        return cls(input.data, input, hx, [grad_output.data, *states[1]], options["contiguous"])

    def results(self, module: nn.Module) -> dict[str, Tensor]:
        """What the module returns, and the gradients of everything that it was given, in the dtype of the module."""
        dtype = next(module.parameters()).dtype

        def given(x):
            x = x.to(dtype)
            if not self.contiguous:  # every second element of a buffer of NaN
                x = torch.stack([torch.full_like(x, math.nan), x], -1)[..., 1]
            assert x.is_contiguous() == self.contiguous
            return x.detach()

        leaves = {"input": given(self.data).requires_grad_()}
        if self.hx is not None:
            leaves |= {f"{k}_0": given(x).requires_grad_() for k, x in zip("hc", self.hx, strict=False)}
        input = leaves["input"] if self.packed is None else PackedSequence(leaves["input"], *self.packed[1:])
        hx = None if self.hx is None else leaves["h_0"] if "c_0" not in leaves else (leaves["h_0"], leaves["c_0"])
        output, states = module(input, hx)
        states = {"h_n": states} if isinstance(states, Tensor) else dict(zip(("h_n", "c_n"), states, strict=True))
        found = {}
        if self.packed is not None:
            assert type(output) is PackedSequence
            found |= {k: x for k, x in output._asdict().items() if k != "data" and x is not None}
            output = output.data
        found |= {"output": output} | states
        module.zero_grad()
        torch.autograd.backward([output, *states.values()], [given(g) for g in self.grads])
        leaves |= module.named_parameters()
        return found | {f"grad of {k}": x.grad for k, x in leaves.items()}


def pair(layer: str, size: Size, options: dict, backend: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """Stock and ours with the same parameters."""
    arguments = {k: options[k] for k in ("bias", "bidirectional", "batch_first", "dropout")}
    projection = {"proj_size": size.P if options["projected"] else 0}
    cls, more = OTHERS.get(layer, (nn.LSTM, projection))
    arguments |= {"num_layers": size.L, "dtype": dtype} | more
    stock = cls(size.I, size.H, **arguments)
    ours = getattr(fusedlstm, cls.__name__)(size.I, size.H, **arguments, backend=backend)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def test_the_cases_cover_the_grid():
    assert len(PRODUCT) == 2**7 * 3
    for three in itertools.combinations(OPTIONS, 3):
        expected = set(itertools.product(*(OPTIONS[k] for k in three)))
        for size in SIZES:
            cases = [options for layer, s, options in CASES if layer == "LSTM" and s == size]
            assert {tuple(options[k] for k in three) for options in cases} == expected
    without_projection = {k: v for k, v in OPTIONS.items() if k != "projected"}
    for two in itertools.combinations(without_projection, 2):
        expected = set(itertools.product(*(OPTIONS[k] for k in two)))
        assert {tuple(options[k] for k in two) for options in PAIRS} == expected


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(("layer", "size", "options"), CASES, ids=name)
def test_float64(layer, size, options, backend):
    """Both are plain loops."""
    stock, ours = pair(layer, SIZES[size], options, backend, torch.float64)
    call = Call.random(layer, SIZES[size], options)
    expected, found = call.results(stock), call.results(ours)
    assert list(found) == list(expected)
    for key, x in found.items():
        assert x.shape == expected[key].shape and x.dtype == expected[key].dtype, key
        torch.testing.assert_close(x, expected[key], rtol=1e-9, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(("layer", "size", "options"), CASES, ids=name)
def test_float32(layer, size, options, backend):
    stock, ours = pair(layer, SIZES[size], options, backend, torch.float32)
    call = Call.random(layer, SIZES[size], options)
    same_dtype, found, exact = call.results(stock), call.results(ours), call.results(copy.deepcopy(stock).double())
    assert list(found) == list(exact)
    for key, x in found.items():
        assert x.dtype == same_dtype[key].dtype, key
        if x.is_floating_point():
            assert_accurate(key, x.detach(), same_dtype[key].detach(), exact[key].detach())
        else:
            assert torch.equal(x, exact[key]), key
