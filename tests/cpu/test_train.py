"""The demo and its command, small."""

import sys

import pytest
import torch
from torch import nn

import fusedlstm
from fusedlstm import __main__ as command
from fusedlstm import train


@pytest.fixture(scope="module")
def data():
    whole = train.load_digits()
    return train.Split(
        train.Digits(whole.train.x[:, :256], whole.train.y[:256]), train.Digits(whole.test.x[:, :64], whole.test.y[:64])
    )


@pytest.fixture
def settings():
    return train.Settings(epochs=2, hidden_size=16, backend="torch")


def test_digits_are_whole_and_split_by_class():
    data = train.load_digits()
    assert data.train.x.shape == (64, 1347, 1)
    assert data.test.x.shape == (64, 450, 1)
    assert (data.train.x.min(), data.train.x.max()) == (0, 1)
    shares = torch.bincount(data.test.y) / torch.bincount(torch.cat([data.train.y, data.test.y]))
    assert shares.numel() == 10
    assert (shares - 0.25).abs().max() < 0.01
    # A sequence that stands in both sets would be read by heart.
    seen = {tuple(column) for column in data.train.x[..., 0].t().tolist()}
    assert not any(tuple(column) in seen for column in data.test.x[..., 0].t().tolist())


def test_forget_bias_is_one(settings):
    lstm = train.build(settings).lstm
    assert isinstance(lstm, fusedlstm.LSTM)
    assert ((lstm.bias_ih_l0 + lstm.bias_hh_l0)[16:32] == 1).all()
    assert ((lstm.bias_ih_l0 + lstm.bias_hh_l0)[:16] != 1).all()


def test_loss_falls_and_a_seed_repeats(data, settings):
    model, curve = train.fit(data, settings)
    assert curve.loss[1] < curve.loss[0] - 0.01
    again, _ = train.fit(data, settings)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    other, _ = train.fit(data, settings._replace(seed=1))
    assert not torch.equal(model.head.weight, other.head.weight)


def test_reported_accuracy_is_of_the_test_set(data, settings):
    model, curve = train.fit(data, settings)
    with torch.no_grad():
        right = sum(int(model(data.test.x[:, k : k + 1]).argmax()) == int(data.test.y[k]) for k in range(64))
    assert curve.accuracy[-1] == pytest.approx(right / 64)


def test_race_compares_the_same_training(data, settings):
    result = train.race(data, settings, epochs=1)
    assert result.loss_difference < 1e-5
    assert min(result.fused_ms, result.torch_ms) > 0
    # Another engine rounds otherwise, and no more than that.
    small = train.Split(train.Digits(data.train.x[:8], data.train.y), data.test)
    assert train.race(small, settings._replace(backend="reference"), epochs=1).loss_difference < 1e-4


def test_race_sees_a_wrong_layer(data, settings, monkeypatch):
    class Wrong(nn.LSTM):
        def __init__(self, *args, backend):
            super().__init__(*args)

        def forward(self, x):
            output, state = super().forward(x)
            return output * 1.01, state

    start = train.build(settings)
    monkeypatch.setattr(train, "build", lambda settings: start)
    monkeypatch.setattr(train, "LSTM", Wrong)
    assert train.race(data, settings, epochs=1).loss_difference > 1e-4


def test_train_command(data, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(train, "load_digits", lambda device: data)
    out = tmp_path / "new" / "folder"
    command.main(
        ["train", "--epochs", "2", "--hidden", "16", "--backend", "torch", "--device", "cpu", "--out", str(out)]
    )
    said = capsys.readouterr()
    assert "engine: torch, on cpu" in said.out
    assert "test accuracy: " in said.out
    assert " after 2 epochs" in said.out
    assert "LSTM of 16 units" in said.out
    assert "fusedlstm.LSTM" in said.out and "torch.nn.LSTM" in said.out
    assert "training: 100%" in said.err  # the progress bar
    png = out / "digits.png"
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    from matplotlib.image import imread

    pixels = torch.from_numpy(imread(png))[..., :3]  # [height, width, RGB]
    assert min(pixels.shape[:2]) > 800
    assert len(pixels.view(-1, 3)[::7].mul(255).byte().unique(dim=0)) > 200  # colours: a blank picture has one


@pytest.mark.parametrize(
    ("module", "package"), [("tqdm", "tqdm"), ("sklearn", "scikit-learn"), ("matplotlib", "matplotlib")]
)
def test_missing_library_names_the_extra(module, package, monkeypatch, tmp_path, capsys):
    for name in [name for name in sys.modules if name == module or name.startswith(module + ".")]:
        monkeypatch.delitem(sys.modules, name)

    class Missing:
        def find_spec(self, name, path=None, target=None):
            if name == module:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    with pytest.raises(SystemExit, match="2"):
        command.main(["train", "--epochs", "1", "--hidden", "4", "--device", "cpu", "--out", str(tmp_path)])
    said = capsys.readouterr().err
    assert f'{package} is not installed: pip install ".[demo]" in a checkout' in said and "Install it" in said
