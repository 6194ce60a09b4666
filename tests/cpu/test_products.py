"""products.py: large products on a CPU go to oneDNN, and are as exact as those of torch.

A machine without AVX-512 takes the same way here, at another speed.
"""

import contextlib

import pytest
import torch

from fusedlstm import products
from fusedlstm.products import add_product, add_sum_of_rows, product

SIZES = [(1023, 64, 192), (1024, 64, 192), (1025, 65, 193), (1279, 33, 320), (1280, 33, 320), (2303, 7, 1100)]


@pytest.fixture
def by_onednn(monkeypatch):
    """The products that went to oneDNN: their functions, in order."""
    found = []

    def counted(name):
        function = getattr(products, name)
        monkeypatch.setattr(products, name, lambda *given: (found.append(name), function(*given))[1])

    monkeypatch.setattr(products, "ONEDNN_IS_FASTER", True)
    counted("_rows_by_onednn")
    counted("_sum_by_onednn")
    return found


def of_size(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape)))


def check_as_exact(found, call, *tensors):
    """At most twice the error of torch's float32 against float64, and two ulps."""
    exact, torchs = call(*(x.double() for x in tensors)), call(*tensors)
    floor = 2 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert found.shape == exact.shape and found.dtype == torch.float32
    assert (found - exact).abs().max() <= 2 * (torchs - exact).abs().max() + floor


@pytest.mark.parametrize(("R", "K", "N"), SIZES)
@pytest.mark.parametrize("strided", [False, True])
def test_many_rows(R, K, N, strided, by_onednn, monkeypatch):
    """[R, K] @ [K, N], where the rows may be a part of wider ones, with a bias or a matrix added."""
    monkeypatch.setattr(products, "FEWEST_MULTIPLICATIONS", 1)
    a = of_size(R, 2 * K)[:, :K] if strided else of_size(R, K)
    weight, bias, matrix = of_size(N, K), of_size(N), of_size(R, N)
    check_as_exact(product(a, weight.t()), lambda a, w: a @ w.t(), a, weight)
    check_as_exact(product(a, weight.t(), bias), lambda a, w, b: a @ w.t() + b, a, weight, bias)
    check_as_exact(product(a, weight.t(), matrix), lambda a, w, m: a @ w.t() + m, a, weight, matrix)
    check_as_exact(product(a, weight.t().contiguous()), lambda a, w: a @ w.t(), a, weight)
    total = matrix.clone()
    assert add_product(total, a, weight.t()) is total
    check_as_exact(total, lambda a, w, m: m + a @ w.t(), a, weight, matrix)
    assert by_onednn == (["_rows_by_onednn"] * 5 if R >= 1024 else [])


@pytest.mark.parametrize(("R", "M", "N"), SIZES)
@pytest.mark.parametrize("strided", [False, True])
def test_sum_over_many_rows(R, M, N, strided, by_onednn, monkeypatch):
    """[R, M]^T @ [R, N], as for the gradients of weights, with and without a sum so far."""
    monkeypatch.setattr(products, "FEWEST_MULTIPLICATIONS", 1)
    a = of_size(R, 2 * M)[:, M:] if strided else of_size(R, M)
    b, total = of_size(R, N), of_size(M, N)
    check_as_exact(product(a.t(), b), lambda a, b: a.t() @ b, a, b)
    check_as_exact(add_sum_of_rows(total.clone(), a.t(), b), lambda a, b, s: s + a.t() @ b, a, b, total)
    assert by_onednn == (["_sum_by_onednn"] * 2 if R >= 1024 else [])


def test_what_is_too_small(by_onednn):
    """Rows, or multiplications."""
    product(of_size(1023, 64), of_size(64, 256))
    product(of_size(1024, 64), of_size(64, 127))
    product(of_size(3, 1023, 64), of_size(3, 64, 256))
    assert not by_onednn
    product(of_size(1024, 64), of_size(64, 128))
    assert by_onednn == ["_rows_by_onednn"]


@contextlib.contextmanager
def of_convolutions(precision):
    before = torch.backends.mkldnn.conv.fp32_precision
    torch.backends.mkldnn.conv.fp32_precision = precision
    try:
        yield
    finally:
        torch.backends.mkldnn.conv.fp32_precision = before


@pytest.mark.parametrize(
    ("context", "uses"),
    [
        (contextlib.nullcontext, True),
        (lambda: torch.backends.mkldnn.flags(enabled=False), False),
        (lambda: of_convolutions("bf16"), False),
        (lambda: of_convolutions("ieee"), True),
    ],
    ids=["default", "oneDNN is off", "less exact convolutions", "exact convolutions"],
)
def test_the_flags_of_torch_decide(context, uses, by_onednn):
    a, b = of_size(1024, 64), of_size(64, 128)
    with context():
        check_as_exact(product(a, b), torch.matmul, a, b)
    assert bool(by_onednn) == uses


def test_what_autograd_follows_is_plain(by_onednn):
    """So all derivatives are those of a product, and no graph keeps the sizes of a trace."""
    a, weight = of_size(1024, 64), of_size(64, 128).requires_grad_()
    assert "Conv" not in product(a, weight).grad_fn.name()
    assert "Conv" not in product(a, weight.detach(), of_size(128).requires_grad_()).grad_fn.name()
    fixed = weight.detach()
    torch.jit.trace(lambda a: product(a, fixed), a, check_trace=False)
    with torch.no_grad():
        torch.vmap(lambda a: product(a, fixed))(of_size(2, 1024, 64))
    product(a.double(), fixed.double())
    assert not by_onednn
    with torch.no_grad():
        product(a, weight)
    assert by_onednn == ["_rows_by_onednn"]


def test_a_compiled_product_decides_when_it_runs(by_onednn):
    compiled = torch.compile(product, backend="eager", fullgraph=True, dynamic=True)
    b = of_size(64, 128)
    for R in (1023, 1300):
        a = of_size(R, 64)
        check_as_exact(compiled(a, b), torch.matmul, a, b)
    assert by_onednn == ["_rows_by_onednn"]


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", "PeepholeLSTM", "LayerNormLSTM", "LayerNormGRU", "SLSTM"])
def test_all_large_products_of_a_layer(name, by_onednn):
    """The input product, and the gradients of the input and of both weights."""
    import fusedlstm

    module = getattr(fusedlstm, name)(64, 64, grad_clip=1.0)
    input = of_size(33, 64, 64).requires_grad_()
    module(input)[0].sum().backward()
    assert by_onednn[0] == "_rows_by_onednn"
    assert sorted(by_onednn[1:]) == ["_rows_by_onednn", "_sum_by_onednn", "_sum_by_onednn"]
