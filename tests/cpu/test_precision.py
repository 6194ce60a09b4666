"""products.py: float32 products on a GPU follow the flag that torch.nn.LSTM follows. The flags exist without a GPU."""

import threading
import time

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from fusedlstm import products

RNN, MATMUL, ONEDNN = torch.backends.cudnn.rnn, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul


@pytest.fixture(autouse=True)
def flags_as_they_were():
    before = RNN.fp32_precision, torch.backends.cudnn.conv.fp32_precision
    yield
    torch.backends.fp32_precision = torch.backends.cudnn.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    MATMUL.fp32_precision = ONEDNN.fp32_precision = "none"
    RNN.fp32_precision, torch.backends.cudnn.conv.fp32_precision = before


def state() -> list:
    """Every flag of products as both interfaces tell it; "raises" where one contradicts the other."""
    found = [MATMUL.fp32_precision, ONEDNN.fp32_precision, torch.backends.fp32_precision]
    for read in (lambda: MATMUL.allow_tf32, torch.get_float32_matmul_precision):
        try:
            found.append(read())
        except RuntimeError:
            found.append("raises")
    return found


def set_elder(value):
    MATMUL.allow_tf32 = value


def set_newer(value):
    MATMUL.fp32_precision = value


def set_all(value):
    torch.backends.fp32_precision = value


def set_cuda(value):
    torch.backends.cudnn.fp32_precision = value


# What a user may have set of products, one after another.
SETTINGS = {
    "nothing": [],
    "elder": [(set_elder, True)],
    "elder, taken back": [(set_elder, True), (set_elder, False)],
    "newer": [(set_newer, "tf32")],
    "newer, taken back": [(set_newer, "tf32"), (set_newer, "ieee")],
    "high": [(torch.set_float32_matmul_precision, "high")],
    "medium": [(torch.set_float32_matmul_precision, "medium")],
    "high, and the newer": [(torch.set_float32_matmul_precision, "high"), (set_newer, "ieee")],
    "medium, and the elder": [(torch.set_float32_matmul_precision, "medium"), (set_elder, False)],
    "all": [(set_all, "tf32")],
    "all, and the newer": [(set_all, "tf32"), (set_newer, "ieee")],
    "all, and the elder": [(set_all, "tf32"), (set_elder, True)],
    "cuda": [(set_cuda, "tf32")],
}


def test_tf32_is_the_default_as_in_torch():
    assert products.tf32() and torch.backends.cudnn.allow_tf32


def test_follows_the_old_flag():
    torch.backends.cudnn.allow_tf32 = False
    assert not products.tf32()
    torch.backends.cudnn.allow_tf32 = True
    assert products.tf32()


@pytest.mark.parametrize("value", ["ieee", "tf32"])
def test_follows_the_new_flag(value):
    """Also where the old one cannot be read any more, because convolutions differ."""
    RNN.fp32_precision = value
    torch.backends.cudnn.conv.fp32_precision = "tf32" if value == "ieee" else "ieee"
    assert products.tf32() == (value == "tf32")


@pytest.mark.parametrize("rnn", ["tf32", "ieee"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_products_follow_the_flag_of_recurrent_layers(settings, rnn):
    """Nobody reads contradicting flags meanwhile. TunableOp reads the older flag at every product."""
    for setter, value in settings:
        setter(value)
    RNN.fp32_precision = rnn
    before = state()
    with pytest.raises(KeyError), products.as_recurrent():
        assert (MATMUL.fp32_precision == "tf32") == (rnn == "tf32")
        inside = state()
        assert [was for was, now in zip(before, inside, strict=True) if now == "raises" != was] == []
        assert (inside == before) == ((before[0] == "tf32") == (rnn == "tf32"))
        with products.as_recurrent():
            assert state() == inside
        raise KeyError
    assert state() == before


@pytest.mark.parametrize("rnn", ["tf32", "ieee"])
def test_what_was_inherited_is_inherited_afterwards(rnn):
    set_all("ieee" if rnn == "tf32" else "tf32")
    RNN.fp32_precision = rnn
    with products.as_recurrent():
        assert MATMUL.fp32_precision == rnn
    for value in ("tf32", "ieee"):
        set_all(value)
        assert MATMUL.fp32_precision == ONEDNN.fp32_precision == value


def test_threads_wait_for_each_other():
    """Whoever multiplies finds the flag as recurrent layers have it, also when another thread takes it back."""
    RNN.fp32_precision, seen = "tf32", []

    def multiply():
        for _ in range(200):
            with products.as_recurrent():
                time.sleep(0)  # another thread's turn
                seen.append(MATMUL.fp32_precision)

    threads = [threading.Thread(target=multiply) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert seen == ["tf32"] * 800 and MATMUL.fp32_precision == "none"


def test_the_plan_follows_the_flag():
    from fusedlstm.engines import launch

    like, weight_hh, hx = torch.empty(0), [torch.empty(2048, 512)], torch.empty(1, 16, 512)
    for value in ("tf32", "ieee"):
        RNN.fp32_precision = value
        assert launch.plan_for("lstm", like, weight_hh, hx, "fwd", "dense").precision == value


@pytest.mark.parametrize(
    ("added", "batch"), [(None, ()), ((4,), ()), ((3, 4), ()), (None, (2,))], ids=["alone", "row", "matrix", "batch"]
)
def test_product_op(added, batch):
    """The op that a GPU takes, on a CPU: numbers, gradients, twice."""
    a, b = torch.randn(*batch, 3, 5, dtype=torch.float64), torch.randn(*batch, 5, 4, dtype=torch.float64)
    tensors = [a, b] if added is None else [a, b, torch.randn(*added, dtype=torch.float64)]
    tensors = [x.requires_grad_() for x in tensors]

    def run(a, b, added=None):
        return torch.ops.fusedlstm.product(a, b, added)

    torch.testing.assert_close(run(*tensors), a @ b + (tensors[2] if added else 0))
    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors)
    torch.library.opcheck(torch.ops.fusedlstm.product, (*tensors, None)[:3])


def test_products_under_transforms(monkeypatch):
    """As on a GPU: samples, many gradients at once and their second derivatives, tangents."""
    a, b = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    gs, x, found = torch.randn(2, 3, 4, dtype=torch.float64), a[0].clone().requires_grad_(), []
    product, op = products.product, torch.ops.fusedlstm.product
    monkeypatch.setattr(Tensor, "is_cuda", True)
    monkeypatch.setattr(torch, "float32", torch.float64)
    for multiply in (product, torch.matmul):
        first = torch.autograd.grad(multiply(x, b).sin(), (x, b), gs, is_grads_batched=True, create_graph=True)
        found.append([*first, *torch.autograd.grad(sum(g.sin().sum() for g in first), (x, b))])
        sine = torch.func.grad(lambda x, w, multiply=multiply: multiply(x, w).sin().sum(), (0, 1))
        found[-1] += [*torch.vmap(sine, in_dims=(0, None))(a, b), *torch.func.jvp(sine, (x, b), (a[1], b.cos()))[1]]
        with torch.no_grad():
            found[-1] += [*torch.func.jvp(lambda x, multiply=multiply: multiply(x, b), (x,), (a[1],))]
    torch.testing.assert_close(*found)
    torch.testing.assert_close(torch.vmap(lambda x: op(x, b, None))(a), a @ b)
    with (
        torch.no_grad(),
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="::product: expected tensors without"),
    ):
        op(forward_ad.make_dual(x, a[1]), b, None)


def test_sums_of_products_under_vmap():
    """Never a sum over samples in a total that they share."""
    total, a, b = torch.randn(2, 3, 4), torch.randn(2, 3, 5), torch.randn(5, 4)
    expected, before = total + a @ b, total.clone()
    for add, text in (
        (torch.ops.fusedlstm.add_product, "Batching rule"),
        (products.add_product, "doesn't match the broadcast shape"),
    ):
        with pytest.raises(RuntimeError, match=text):
            torch.vmap(lambda a, add=add: add(total[0], a, b))(a)
    assert torch.equal(total, before)
    torch.vmap(lambda total, a: (products.add_product(total, a, b), total)[1])(total, a)
    torch.testing.assert_close(total, expected)
