"""precision.py: float32 products on a GPU follow the flag that torch.nn.LSTM follows. The flags exist without a GPU."""

import pytest
import torch

from fusedlstm import precision

RNN, MATMUL = torch.backends.cudnn.rnn, torch.backends.cuda.matmul


@pytest.fixture(autouse=True)
def flags_as_they_were():
    before = RNN.fp32_precision, torch.backends.cudnn.conv.fp32_precision, MATMUL.fp32_precision
    yield
    RNN.fp32_precision, torch.backends.cudnn.conv.fp32_precision, MATMUL.fp32_precision = before


def test_tf32_is_the_default_as_in_torch():
    assert precision.tf32() and torch.backends.cudnn.allow_tf32


def test_follows_the_old_flag():
    torch.backends.cudnn.allow_tf32 = False
    assert not precision.tf32()
    torch.backends.cudnn.allow_tf32 = True
    assert precision.tf32()


@pytest.mark.parametrize("value", ["ieee", "tf32"])
def test_follows_the_new_flag(value):
    """Also where the old one cannot be read any more, because convolutions differ."""
    RNN.fp32_precision = value
    torch.backends.cudnn.conv.fp32_precision = "tf32" if value == "ieee" else "ieee"
    assert precision.tf32() == (value == "tf32")


@pytest.mark.parametrize(("rnn", "matmul"), [("tf32", "ieee"), ("ieee", "tf32"), ("tf32", "tf32"), ("ieee", "ieee")])
def test_products_follow_the_flag_of_recurrent_layers(rnn, matmul):
    RNN.fp32_precision, MATMUL.fp32_precision = rnn, matmul
    with precision.as_recurrent():
        assert MATMUL.fp32_precision == rnn
    assert MATMUL.fp32_precision == matmul
    with pytest.raises(KeyError), precision.as_recurrent():
        raise KeyError
    assert MATMUL.fp32_precision == matmul


def test_the_plan_follows_the_flag():
    from fusedlstm import launch

    like = torch.empty(0)
    for value in ("tf32", "ieee"):
        RNN.fp32_precision = value
        assert launch.plan_for("lstm", like, 1, 16, 512, 1, "fwd", False).precision == value


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
