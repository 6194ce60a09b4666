"""`python -m fusedlstm`: what every command says of itself, what `info` reports, and how errors end."""

import contextlib
import os
import re
import sys
import warnings

import pytest
import torch

import fusedlstm
from fusedlstm import __main__ as command
from fusedlstm import inspect
from fusedlstm.inspect import checkpoint
from fusedlstm.plan import devices, tuned


@pytest.fixture(autouse=True)
def bare(monkeypatch, tmp_path):
    """No setting of whoever runs the tests."""
    for name in os.environ:
        if name.startswith("FUSEDLSTM_") or name == "TRITON_INTERPRET":
            monkeypatch.delenv(name)
    monkeypatch.setenv("FUSEDLSTM_CACHE", str(tmp_path))
    tuned.forget()
    yield
    tuned.forget()


def info(capsys):
    """What `info` prints, by the word that a line begins with."""
    command.main(["info"])
    said = capsys.readouterr().out
    return said, {line[:14].strip(): line[15:] for line in said.splitlines() if not line.startswith(" ")}


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"fusedlstm {fusedlstm.__version__}\n"


@pytest.mark.parametrize("name", ["train", "plan", "tune", "inspect"])
def test_help_shows_every_default(name, capsys):
    with contextlib.suppress(SystemExit):
        command.main([name, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    options = command.parser()._subparsers._group_actions[0].choices[name]._actions
    assert len(options) > 5
    for option in options[1:]:
        assert option.help, option.dest
        assert option.default in (None, False) or f"{option.default})" in said, option.dest


def test_info_is_a_bug_report(capsys):
    said, facts = info(capsys)
    assert facts["fusedlstm"] == fusedlstm.__version__
    assert facts["Python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["torch"].startswith(torch.__version__)
    assert facts["threads"] == str(torch.get_num_threads())
    assert {"Triton", "numpy", "platform", "driver", "cuDNN", "environment", "tuning file"} <= {*facts}
    assert "unknown" not in said
    assert f"FUSEDLSTM_CACHE={os.environ['FUSEDLSTM_CACHE']}" in facts["environment"]
    assert "cpu, fp32, fp16, bf16: torch: auto takes the kernels on a GPU only" in said


def test_info_names_the_settings_and_counts_the_choices(capsys, monkeypatch):
    monkeypatch.setenv("FUSEDLSTM_BACKEND", "reference")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(command, "gpus", lambda: range(0))
    call = tuned.Call("lstm", 2, 3, 4, 0, 1, 1, "fp32", "tf32", "dense", True)
    tuned.store(None, {call: {"ms": {}}, call._replace(batch=3): {"ms": {}}})
    said, facts = info(capsys)
    assert "FUSEDLSTM_BACKEND=reference" in facts["environment"] and "TRITON_INTERPRET=1" in facts["environment"]
    assert facts["tuning file"] == f"{tuned.path()}, 2 choices for this machine"
    assert facts["GPU"] == "none that torch can use"
    assert "cpu, fp32, fp16, bf16: reference: FUSEDLSTM_BACKEND asks for it" in said


def test_info_describes_a_gpu(capsys, monkeypatch):
    from types import SimpleNamespace

    gpu = SimpleNamespace(name="NVIDIA L4", major=8, minor=9, multi_processor_count=58)
    monkeypatch.setattr(command, "gpus", lambda: range(1))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(command.engines, "why_not_triton", lambda *args, **more: None)
    monkeypatch.setattr(torch.version, "hip", None)
    said, facts = info(capsys)
    assert facts["cuda:0"] == "NVIDIA L4, compute capability 8.9, 58 multiprocessors"
    assert "cuda:0, fp32, fp16, bf16: triton: the kernels serve" in said


def test_info_goes_on_where_something_is_missing(capsys, monkeypatch):
    """A fact that cannot be had says so in its line."""
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setitem(sys.modules, "numpy", None)
    monkeypatch.setenv("FUSEDLSTM_BACKEND", "toaster")
    monkeypatch.setenv("FUSEDLSTM_SMS", "many")
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: 1 / 0)
    monkeypatch.setattr(command.collect_env, "run", lambda *args: 1 / 0)
    monkeypatch.setattr(command.collect_env, "get_nvidia_driver_version", lambda run: run("nvidia-smi"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        said, facts = info(capsys)
    assert facts["Triton"] == facts["numpy"] == "not installed"
    assert facts["driver"] == facts["cuDNN"] == "unknown, ZeroDivisionError: division by zero"
    assert facts["tuning file"].startswith("unknown, ValueError: FUSEDLSTM_SMS: expected")
    assert "error: FUSEDLSTM_BACKEND: expected one of" in said


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["train", "--epochs", "0"], "--epochs: expected a whole number from 1, got '0'"),
        (["train", "--hidden", "many"], "--hidden: expected a whole number from 1, got 'many'"),
        (["train", "--backend", "cudnn"], "--backend: invalid choice: 'cudnn'"),
        (["train", "--device", "cuda:99"], "--device: no device 'cuda:99' here"),
        (["train", "--device", "toaster"], "--device: no device 'toaster' here"),
        (
            ["train", "--backend", "triton", "--device", "cpu"],
            "backend='triton' cannot serve this call: the kernels need",
        ),
        (["train", "--device", "cpu", "--out", __file__], "--out: "),
        (["plan"], "--hidden"),
        (["plan", "--hidden", "64", "--arch", "sm_70"], f"arch: {devices.SERVED}, got 'sm_70'"),
        (["plan", "--hidden", "64", "--arch", "toaster"], "arch: expected one of sm_80, "),
        (
            ["plan", "--hidden", "90000", "--cell", "layernorm"],
            "hidden=90000 with 1 direction(s) in fp32, dense, does not fit",
        ),
        (["inspect", "nowhere.pt"], "No such file or directory: 'nowhere.pt'"),
        (["inspect", __file__], f"{__file__}: expected a file of torch.save, got"),
        (["inspect", __file__, "--steps", "0"], "--steps: expected a whole number from 1, got '0'"),
        (["inspect", __file__, "--cell", "toaster"], "--cell: invalid choice: 'toaster'"),
        ([], "command"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_a_wrong_argument_ends_in_an_error_and_what_to_do_next(arguments, text, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    assert stop.value.code == 2
    error, then = capsys.readouterr().err.splitlines()
    assert text in error and error.startswith("python -m fusedlstm")
    assert then.endswith(".")


# What `inspect` finds in a file.


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = fusedlstm.LSTM(3, 6, 2, bidirectional=True)
        self.decoder = torch.nn.GRU(12, 5, bias=False, batch_first=True)
        self.head = torch.nn.Linear(5, 2)


def test_inspect_shows_every_layer_of_a_training_checkpoint(tmp_path, capsys):
    torch.manual_seed(0)
    model = Model()
    torch.save({"epoch": 3, "state": {"model": model.state_dict()}}, tmp_path / "checkpoint.pt")
    out = tmp_path / "out"
    command.main(["inspect", str(tmp_path / "checkpoint.pt"), "--out", str(out), "--steps", "12", "--seed", "5"])
    said = capsys.readouterr().out
    assert "encoder: LSTM(3, 6, num_layers=2, bidirectional=True), with random numbers, seed 5, (12, 4, 3)" in said
    assert "decoder: GRU(12, 5, bias=False), with random numbers, seed 5, (12, 4, 12)" in said
    x = torch.randn(12, 4, 3, generator=torch.Generator().manual_seed(5))
    assert str(inspect.saturation(model.encoder, [x])) in said
    flow = inspect.gradient_flow(model.encoder, x, layer=1, direction=1, probes=16)
    norm = flow.by_distance("c")
    row = [f"{flow.per_step('c'):.3f}", f"{norm[1]:.2g}", f"{norm[10]:.2g}"]
    assert re.search(r"^1 reverse +c +" + " +".join(map(re.escape, row)) + "$", said, re.M)
    places = [f"encoder-layer-{place}-gates" for place in ("0", "0-reverse", "1", "1-reverse")]
    whole = [f"{name}-{kind}" for name in ("encoder", "decoder") for kind in ("gradient-flow", "saturation")]
    assert {path.name for path in out.iterdir()} == {
        f"{name}.png" for name in (*places, "decoder-layer-0-gates", *whole)
    }
    assert said.count("picture: ") == len([*out.iterdir()])


def test_inspect_takes_an_input_and_a_module(tmp_path, capsys):
    torch.manual_seed(0)
    module, x = torch.nn.Sequential(fusedlstm.SLSTM(3, 4, num_heads=2, batch_first=True)), torch.randn(9, 2, 3)
    for name, saved in (("module", module), ("tensors", module.state_dict()), ("input", x)):
        torch.save(saved, tmp_path / f"{name}.pt")
    options = ["--input", str(tmp_path / "input.pt"), "--out", str(tmp_path / "out")]
    command.main(["inspect", str(tmp_path / "module.pt"), "--trust", *options])
    of_module = capsys.readouterr().out
    command.main(["inspect", str(tmp_path / "tensors.pt"), "--cell", "slstm", "--name", "0", *options])
    of_tensors = capsys.readouterr().out
    module[0].batch_first = False
    tables = str(inspect.saturation(module[0], [x]))
    assert tables in of_module and tables in of_tensors
    with pytest.raises(SystemExit):
        command.main(["inspect", str(tmp_path / "tensors.pt"), *options])
    assert "--cell names a cell with heads" in capsys.readouterr().err


@pytest.mark.parametrize(
    "module",
    [
        fusedlstm.LSTM(3, 4, proj_size=2, bidirectional=True),
        fusedlstm.GRU(3, 4, 2),
        fusedlstm.RNN(3, 4),
        fusedlstm.PeepholeLSTM(3, 4, bias=False),
        fusedlstm.LayerNormLSTM(3, 4),
        fusedlstm.CoupledLSTM(3, 4, num_heads=2),
        fusedlstm.RNN(3, 4, nonlinearity="relu", dtype=torch.bfloat16),
    ],
    ids=lambda module: module.cell,
)
def test_layers_are_known_by_names_and_shapes(module, tmp_path):
    """A coupled LSTM has the shapes of a GRU, so it must be named; and so must the rectifier."""
    torch.save({f"model.rnn.{name}": p for name, p in module.state_dict().items()}, tmp_path / "file.pt")
    named = module.cell if module.cell in ("coupled", "rnn_relu") else None
    ((name, found),) = checkpoint.layers(tmp_path / "file.pt", named).items()
    assert name == "model.rnn" and type(found) is type(module) and str(found) == str(module)
    for key, value in module.state_dict().items():
        assert torch.equal(found.state_dict()[key], value)


def test_files_without_a_layer_are_errors(tmp_path, capsys):
    file = tmp_path / "file.pt"
    wrong = fusedlstm.GRU(3, 4).state_dict()
    wrong["bias_hh_l0"] = torch.zeros(7)
    cases = [
        (torch.nn.Linear(2, 3).state_dict(), [], "expected a recurrent layer, got none"),
        (torch.nn.LSTM(2, 3), [], "expected tensors, got objects whose code runs when they are read"),
        (wrong, [], "expected the parameters of the cell gru: size mismatch for bias_hh_l0"),
        (
            fusedlstm.GRU(3, 4).state_dict(),
            ["--cell", "lstm"],
            "expected the parameters of the cell lstm, got weight_ih",
        ),
        (
            {"rnn." + k: v for k, v in fusedlstm.GRU(3, 4).state_dict().items()},
            ["--name", "gru"],
            "one of rnn, got 'gru'",
        ),
    ]
    for saved, options, text in cases:
        torch.save(saved, file)
        with pytest.raises(SystemExit) as stop:
            command.main(["inspect", str(file), "--out", str(tmp_path / "out"), *options])
        assert stop.value.code == 2
        error, then = capsys.readouterr().err.splitlines()
        assert text in error and then.endswith(".")
