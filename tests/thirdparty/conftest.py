"""What the tests share: a library trains from one seed with torch's layers and with ours, and the runs are compared.

A process and an environment of their own, made from requirements.txt: the libraries bring hundreds of megabytes.
"""

import functools
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fusedlstm

STOCK = (nn.LSTM, nn.LSTMCell)
OURS = (fusedlstm.LSTM, fusedlstm.LSTMCell)

torch.set_num_threads(1)  # tiny layers: on a busy machine waiting for a second thread takes twenty times the work

Built = Callable[[nn.Module], None]
Train = Callable[[Built], tuple[nn.Module, list[float]]]


def recurrent(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, STOCK + OURS)}


def run(train: Train, prepare: Built) -> tuple[nn.Module, list[float]]:
    """Train from a fixed seed; every parameter of every LSTM must have moved and the losses must be of a training."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    before = {}

    def built(model: nn.Module) -> None:
        prepare(model)
        for name, module in recurrent(model).items():
            before.update({f"{name}.{key}": p.detach().clone() for key, p in module.named_parameters()})

    model, losses = train(built)
    after = dict(model.named_parameters())
    still = [name for name, p in before.items() if torch.equal(p, after[name])]
    assert before and not still, f"did not train: {still or 'no LSTM'}"
    assert np.isfinite(losses).all(), losses
    assert len(losses) >= 3 and len(set(losses)) == len(losses), f"a loss came twice: {losses}"
    return model, losses


@pytest.fixture(params=["patch_torch", "convert"])
def both(request):
    """`both(train)` compares the losses and the final parameters of stock and ours, in either way to get ours.

    `train(built)` builds a model, calls `built(model)`, trains, and returns the model and the loss of every step.
    """

    def both(train: Train) -> None:
        stock, losses_stock = run(train, lambda model: None)
        if request.param == "patch_torch":
            with fusedlstm.patch_torch():
                ours, losses_ours = run(train, lambda model: None)
        else:
            keeps = request.param != "convert"
            ours, losses_ours = run(train, functools.partial(fusedlstm.convert, keep_isinstance=keeps))

        assert all(type(m) in STOCK for m in recurrent(stock).values())
        assert all(isinstance(m, OURS) for m in recurrent(ours).values())
        assert list(recurrent(ours)) == list(recurrent(stock))

        def close(name: str, found: Tensor, expected: Tensor) -> None:
            # Not bits: ours sums packed sequences and single steps in another order, and training carries that on.
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=lambda text: f"{name}: {text}")

        close("losses", torch.tensor(losses_ours), torch.tensor(losses_stock))
        found, expected = ours.state_dict(), stock.state_dict()
        assert found.keys() == expected.keys()
        for name in expected:
            close(name, found[name], expected[name])

    return both
