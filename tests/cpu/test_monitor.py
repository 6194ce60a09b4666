"""The monitor logs what the functions of `fusedlstm.inspect` return, and the training does not notice it."""

import csv
import warnings

import pytest
import torch
from torch import nn

import fusedlstm
from fusedlstm import inspect, sequences

T, B, I, H = 8, 5, 4, 6


class Writer:
    """As `torch.utils.tensorboard.SummaryWriter`."""

    def __init__(self):
        self.scalars, self.figures = {}, {}

    def add_scalar(self, tag, value, step):
        assert (tag, step) not in self.scalars and isinstance(value, float)
        self.scalars[tag, step] = value

    def add_figure(self, tag, figure, step):
        self.figures[tag, step] = figure


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = fusedlstm.LSTM(I, H, 2, bidirectional=True, dropout=0.2, zoneout=0.1)
        self.gru = nn.GRU(2 * H, H)
        self.head = nn.Linear(H, 1)

    def forward(self, x, **options):
        return self.head(self.gru(self.lstm(x, **options)[0])[0])


def train(monitored, steps=5, **options):
    """Train a little. Returns the parameters, the inputs, and the states in which the model was called."""
    torch.manual_seed(0)
    model, inputs, before = Model(), [], []
    monitor = inspect.Monitor(model, monitored, **options) if monitored is not None else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        inputs.append(torch.randn(T, B, I))
        before.append({name: p.detach().clone() for name, p in model.state_dict().items()})
        loss = model(inputs[-1], lengths=torch.tensor([8, 3, 5, 8, 1])).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.eval()(inputs[-1])  # an evaluation is no step
        model.train()
    if monitor is not None:
        monitor.close()
        model(inputs[-1])
    return [p.detach() for p in model.parameters()], inputs, before


def test_logs_what_the_functions_say():
    writer = Writer()
    _, inputs, before = train(writer, every=2, sequences=3, probes=5)
    assert {step for _, step in writer.scalars} == {step for _, step in writer.figures} == {0, 2, 4}
    assert {tag for tag, _ in writer.figures} == {
        f"{n}/{w}" for n in ("lstm", "gru") for w in ("gradient flow", "saturation")
    }
    model = Model()
    model.load_state_dict(before[2])
    call = {"lengths": torch.tensor([8, 3, 5])}
    units = inspect.saturation(model.lstm, [sequences.packed_from_padded(inputs[2][:, :3], call["lengths"])]).units
    for (layer, direction), own in units.items():
        tag = f"lstm/layer {layer}{' reverse' if direction else ''}"
        flow = inspect.gradient_flow(model.lstm, inputs[2][:, :3], layer=layer, direction=direction, probes=5, **call)
        assert writer.scalars[f"{tag}/shut f", 2] == pytest.approx(float(own.shut["f"].mean()))
        assert writer.scalars[f"{tag}/units that always forget", 2] == float(own.idle["always forget"].double().mean())
        assert writer.scalars[f"{tag}/gradient of c per step", 2] == pytest.approx(flow.per_step("c"), rel=1e-4)
        at_first = float(flow.by_distance("c")[-1])
        assert writer.scalars[f"{tag}/gradient of c at the first step", 2] == pytest.approx(at_first, rel=1e-4)
    assert ("gru/layer 0/open z", 4) in writer.scalars


def test_the_training_does_not_change():
    plain, *_ = train(None)
    monitored, *_ = train(Writer(), every=2)
    assert all(torch.equal(a, b) for a, b in zip(plain, monitored, strict=True))


def test_other_steps_only_count(monkeypatch):
    """Between two logs no layer has a hook, and nothing is kept."""
    torch.manual_seed(0)
    model, writer = Model(), Writer()
    monitor = inspect.Monitor(model, writer, every=1000, figures=False)
    x = torch.randn(T, B, I)
    model(x)
    seen = len(writer.scalars)
    noted = []
    monkeypatch.setattr(inspect.Monitor, "_note", lambda *arguments: noted.append(arguments))
    for _ in range(20):
        model(x)
    assert monitor.step == 21 and len(writer.scalars) == seen > 0 and not noted
    assert not model.lstm._forward_pre_hooks and not model.gru._forward_pre_hooks
    monitor.close()
    assert not model._forward_pre_hooks and not model._forward_hooks


@pytest.mark.parametrize("form", ["packed", "batch_first", "unbatched", "jagged", "with a state", "resets"])
def test_every_form_of_a_call(form):
    torch.manual_seed(0)
    lstm, writer = fusedlstm.LSTM(I, H, batch_first=form == "batch_first"), Writer()
    x, lengths = torch.randn(T, B, I), torch.tensor([8, 3, 5, 8, 1])
    state = (torch.rand(1, B, H), torch.rand(1, B, H))
    resets = torch.rand(T, B) < 0.3
    calls = {
        "packed": (sequences.packed_from_padded(x, lengths),),
        "batch_first": (x.transpose(0, 1),),
        "unbatched": (x[:, 0],),
        "jagged": (sequences.jagged_from_padded(x.transpose(0, 1).contiguous(), lengths, batch_first=True),),
        "with a state": (x, state),
    }
    few = {
        "packed": {"input": x[:, :2], "lengths": lengths[:2]},
        "batch_first": {"input": x[:, :2].transpose(0, 1)},
        "unbatched": {"input": x[:, 0]},
        "jagged": {"input": x[:, :2], "lengths": lengths[:2]},
        "with a state": {"input": x[:, :2], "hx": tuple(s[:, :2] for s in state)},
        "resets": {"input": x[:, :2], "resets": resets[:, :2]},
    }
    with inspect.Monitor(lstm, writer, sequences=2, figures=False):
        if form == "resets":
            lstm(input=x, resets=resets)
        else:
            lstm(*calls[form])
    expected = inspect.gradient_flow(lstm, **few[form], probes=8).per_step("h")
    assert writer.scalars["layer/layer 0/gradient of h per step", 0] == pytest.approx(expected, rel=1e-4)


def test_a_compiled_model_is_monitored():
    torch._dynamo.reset()
    model, writer = Model(), Writer()
    compiled = torch.compile(model, backend="eager")
    with inspect.Monitor(compiled, writer, every=2, figures=False):
        for _ in range(3):
            compiled(torch.randn(T, B, I))
    assert {step for _, step in writer.scalars} == {0, 2}
    assert {tag.partition("/")[0] for tag, _ in writer.scalars} == {"lstm", "gru"}


def test_under_autocast_and_after_an_error():
    """The measures do not depend on autocast. A call that fails is no step, and leaves no hook."""
    torch.manual_seed(0)
    model, x = Model(), torch.randn(T, B, I)
    writers = [Writer(), Writer()]
    with inspect.Monitor(model, writers[0], figures=False):
        model(x)
    with inspect.Monitor(model, writers[1], figures=False) as monitor:
        with pytest.raises(RuntimeError, match="input"):
            model(x[..., :2])
        assert monitor.step == 0
        with torch.autocast("cpu", torch.bfloat16):
            model.lstm(x)  # by itself it is no step
            model(x)
    lstm = [{k: v for k, v in writer.scalars.items() if k[0].startswith("lstm")} for writer in writers]
    assert lstm[0] and lstm[0] == lstm[1]
    assert not model.lstm._forward_pre_hooks and not model._forward_hooks


def test_a_folder(tmp_path):
    rnn = nn.Sequential(fusedlstm.RNN(I, H))
    with inspect.Monitor(rnn, tmp_path / "log", every=2):
        for _ in range(3):
            rnn(torch.randn(T, B, I))
    assert sorted(path.name for path in (tmp_path / "log").iterdir()) == [
        "0-gradient-flow-000000.png",
        "0-gradient-flow-000002.png",
        "0-saturation-000000.png",
        "0-saturation-000002.png",
        "scalars.csv",
    ]
    with (tmp_path / "log" / "scalars.csv").open() as file:
        rows = [*csv.DictReader(file)]
    assert {row["step"] for row in rows} == {"0", "2"}
    assert all(0 <= float(row["value"]) < 2 for row in rows) and {"0/layer 0/shut |h|"} <= {row["tag"] for row in rows}


def test_a_layer_that_is_not_called_is_a_warning():
    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = fusedlstm.LSTM(I, H)

        def forward(self, x):
            return x

    model, writer = Lazy(), Writer()
    with inspect.Monitor(model, writer, every=2), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(torch.zeros(2))
        model(torch.zeros(2))
    assert [str(w.message) for w in caught] == [
        "fusedlstm.inspect.Monitor: expected a call of lstm in step 0, got none, so there is nothing to log"
    ]
    assert not writer.scalars


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="model: expected one with a recurrent layer, got a Linear without"):
        inspect.Monitor(nn.Linear(2, 3), tmp_path)
    with pytest.raises(TypeError, match="to: expected a path or a writer with add_scalar, got int"):
        inspect.Monitor(nn.GRU(2, 3), 7)
    with pytest.raises(ValueError, match="every: expected at least 1, got 0"):
        inspect.Monitor(nn.GRU(2, 3), tmp_path, every=0)
    with pytest.raises(TypeError, match="probes: expected a whole number, got float"):
        inspect.Monitor(nn.GRU(2, 3), tmp_path, probes=1.5)
