"""`python -m fusedlstm`: what every command says of itself, what `info` reports, and how errors end."""

import contextlib
import os
import sys
import warnings

import pytest
import torch

import fusedlstm
from fusedlstm import __main__ as command
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


@pytest.mark.parametrize("name", ["train", "plan", "tune"])
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
