"""`python -m fusedlstm`: what every command says of itself, what `info` reports, and how errors end."""

import contextlib
import io
import os
import re
import shlex
import sys
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from torch.utils import collect_env

import fusedlstm
from fusedlstm import __main__ as command
from fusedlstm import cells, commands, inspect, timing, weights
from fusedlstm.commands import bench
from fusedlstm.commands import info as info_command
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


@pytest.mark.parametrize("name", ["", *command.COMMANDS])
def test_help_teaches(name, capsys, monkeypatch):
    """It fits a terminal, shows every default, and its examples are right."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(commands, "device", str)  # an example may name a GPU
    parser = command.parser()
    with contextlib.suppress(SystemExit):
        parser.parse_args([*filter(None, [name]), "--help"])
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    examples = re.findall(r"^  .*python -m (fusedlstm .*)", said.partition("\nexamples:\n")[2], re.M)
    assert len(examples) >= 2
    for example in examples:
        args = parser.parse_args(shlex.split(example, comments=True)[1:])
        assert not name or args.command == name
    options = [] if not name else parser._subparsers._group_actions[0].choices[name]._actions
    for option in options:
        assert option.help, option.dest
        shown = option.default in (None, False, "==SUPPRESS==") or f"{option.default})" in " ".join(said.split())
        assert shown, option.dest


def test_the_page_lists_every_command():
    page = Path(__file__).resolve().parents[2] / "docs" / "command_line.md"
    assert re.findall(r"^\| `(\w+)` \|", page.read_text(), re.M) == [*command.COMMANDS]


def test_what_is_wider_than_a_terminal_is_broken_below_its_second_column():
    text = "grid           64 programs a group x 2 groups\n\nshort\n" + "a " * 20 + "\n" + "x" * 40
    assert commands.fitted(text, 30) == (
        "grid           64 programs a\n  group x 2 groups\n\nshort\n" + "a " * 14 + "a\na a a a a\n" + "x" * 40
    )
    assert commands.fitted("grid\n", 30) == "grid\n"
    assert commands.fitted("grid           64 programs a group x 2 groups", 45) == (
        "grid           64 programs a group x 2 groups"
    )
    assert commands.fitted("  grid      64 programs a group x 2 groups", 36) == (
        "  grid      64 programs a group x 2\n            groups"
    )


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_what_takes_more_than_two_seconds(monkeypatch):
    waits, seen, told = [], [], threading.Event()

    class Event:
        """Ends when the text was shown twice."""

        def wait(self, seconds):
            told.wait()
            waits.append(seconds)
            return len(waits) > 2

        def set(self):
            seen.append(terminal.getvalue())

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(commands, "threading", SimpleNamespace(Event=Event, Thread=threading.Thread))
    with commands.working("measuring") as tell:
        tell("round 3 of 9")
        told.set()
        while len(waits) < 3:
            time.sleep(0.001)
    assert waits == [2.0, 1.0, 1.0]
    assert re.search(r"measuring round 3 of 9, \d s", seen[0]) and terminal.getvalue().endswith(commands.CLEAR)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with commands.working("measuring") as tell:
        tell("round 3 of 9")
    assert not sys.stderr.getvalue()


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
    monkeypatch.setattr(info_command, "gpus", lambda: range(0))
    call = tuned.Call("lstm", 2, 3, 4, 0, 1, 1, "fp32", "tf32", "dense", True)
    tuned.store(None, {call: {"ms": {}}, call._replace(batch=3): {"ms": {}}})
    said, facts = info(capsys)
    assert "FUSEDLSTM_BACKEND=reference" in facts["environment"] and "TRITON_INTERPRET=1" in facts["environment"]
    assert facts["tuning file"] == f"{tuned.path()}, 2 choices for this machine"
    assert facts["GPU"] == "none that torch can use"
    assert "cpu, fp32, fp16, bf16: reference: FUSEDLSTM_BACKEND asks for it" in said


def test_info_describes_a_gpu(capsys, monkeypatch):
    gpu = SimpleNamespace(name="NVIDIA L4", major=8, minor=9, multi_processor_count=58)
    monkeypatch.setattr(info_command, "gpus", lambda: range(1))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(info_command.engines, "why_not_triton", lambda *args, **more: None)
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
    monkeypatch.setattr(collect_env, "run", lambda *args: 1 / 0)
    monkeypatch.setattr(collect_env, "get_nvidia_driver_version", lambda run: run("nvidia-smi"))
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
        (["bench"], "--hidden"),
        (["bench", "--hidden", "8", "--seconds", "soon"], "--seconds: expected a positive number, got 'soon'"),
        (
            ["bench", "--hidden", "8", "--device", "cpu", "--backend", "triton"],
            "backend='triton' cannot serve this call: the kernels need",
        ),
        (["convert", "nowhere.pt", "--out", "x.pt"], "No such file or directory: 'nowhere.pt'"),
        (["convert", "nowhere.npz", "--out", "x.pt"], "nowhere.npz: expected --from with a file of numpy"),
        (["convert", __file__, "--from", "keras.LSTM", "--out", "x.pt"], "expected a file of torch.save, got"),
        (["convert", __file__, __file__, "--out", "x.pt"], "expected one file without --from, got 2"),
        (["convert", __file__, "--out", "x.onnx"], "--out: expected a file of torch, .safetensors or .npz, got .onnx"),
        (["convert", __file__, "--to", "haste.Toaster", "--out", "x.pt"], "--to: invalid choice: 'haste.Toaster'"),
        ([], "COMMAND"),
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


def test_an_interrupt_ends_without_a_traceback(capsys, monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(info_command, "run", interrupted)
    with pytest.raises(SystemExit) as stop:
        command.main(["info"])
    assert stop.value.code == 130 and capsys.readouterr().err == "\nstopped\n"


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
        fusedlstm.LayerNormGRU(3, 4),
        fusedlstm.ResetBeforeGRU(3, 4),
        fusedlstm.CoupledLSTM(3, 4, num_heads=2),
        fusedlstm.RNN(3, 4, nonlinearity="relu", dtype=torch.bfloat16),
    ],
    ids=lambda module: module.cell,
)
def test_layers_are_known_by_names_and_shapes(module, tmp_path):
    """What has the shapes of a GRU must be named, and so must the rectifier."""
    torch.save({f"model.rnn.{name}": p for name, p in module.state_dict().items()}, tmp_path / "file.pt")
    named = module.cell if module.cell in ("coupled", "rnn_relu", "gru_reset_before") else None
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


# What `bench` measures.


@pytest.mark.parametrize("cell", [name for name, of in cells.CELLS.items() if of.aten or name in bench.STEPS])
def test_bench_compares_every_cell_with_a_rival_that_computes_the_same(cell, capsys):
    sizes = ["--hidden", "4", "--input", "3", "--steps", "5", "--batch", "2", "--layers", "2", "--directions", "2"]
    command.main(["bench", "--cell", cell, *sizes, "--seconds", "0.001", "--device", "cpu"])
    said = capsys.readouterr().out
    assert float(re.search(r"difference +at most (\S+) of", said)[1]) < 1e-5
    ours, theirs, again = re.findall(r"^(\S.*?)  +[\d.e-]+  +\S+ to \S+ +([\d.]+) *(?:\S+ to \S+)?$", said, re.M)
    name = ours[0].removeprefix("fusedlstm.")
    assert getattr(fusedlstm, name).__name__ == name
    assert theirs == (f"torch.nn.{name}" if hasattr(torch.nn, name) else "a loop", "1.00")
    assert again[0] == f"{theirs[0]} again"
    assert "2 layers" not in said and "bidirectional=True), training, T=5, B=2, fp32, cpu" in said
    assert torch.__version__ in said and "threads" in said and ours[0] in said.splitlines()[-1]


def test_bench_measures_inference_without_gradients(capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(timing, "take", lambda calls, *more: seen.extend(calls.values()) or fixed(1.0, 2.0, 2.1))
    command.main(["bench", "--hidden", "4", "--pass", "inference", "--device", "cpu"])
    assert [len(call()) for call in seen] == [1, 1, 1] and not seen[0]()[0].requires_grad
    command.main(["bench", "--hidden", "4", "--device", "cpu"])
    assert [len(call()) for call in seen[3:]] == [6, 6, 6]  # of the output, and those of x and four parameters


def fixed(*ms):
    """Samples in which the second of two rounds takes a tenth longer for all."""
    names = ("fusedlstm.LSTM", "torch.nn.LSTM", "torch.nn.LSTM again")
    return timing.Samples({name: [one, 1.1 * one] for name, one in zip(names, ms, strict=True)}, "")


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        ((1.0, 2.0, 1.9), "fusedlstm.LSTM is 2.00 times as fast as torch.nn.LSTM (2.00 to 2.00)."),
        ((2.0, 1.0, 1.1), "fusedlstm.LSTM takes 2.00 times as long as torch.nn.LSTM (2.00 to 2.00)."),
        ((0.95, 1.0, 0.9), "fusedlstm.LSTM is as fast as torch.nn.LSTM: the difference is within the noise."),
        ((1.05, 1.0, 1.1), "fusedlstm.LSTM is as fast as torch.nn.LSTM: the difference is within the noise."),
    ],
)
def test_bench_knows_noise_from_a_difference(ms, text, capsys, monkeypatch):
    monkeypatch.setattr(timing, "take", lambda *args: fixed(*ms))
    command.main(["bench", "--hidden", "4", "--device", "cpu"])
    assert capsys.readouterr().out.splitlines()[-1] == text


def test_bench_says_for_which_cells_it_has_a_rival(capsys):
    with pytest.raises(SystemExit):
        command.main(["bench", "--cell", "layernorm_gru", "--hidden", "4", "--device", "cpu"])
    assert "--cell: expected peephole, coupled" in capsys.readouterr().err


def test_bench_refuses_to_time_what_computes_something_else(capsys, monkeypatch):
    monkeypatch.setitem(bench.STEPS, "coupled", lambda preact, state: (preact[:, :4], state[1]))
    with pytest.raises(SystemExit) as stop:
        command.main(["bench", "--cell", "coupled", "--hidden", "4", "--device", "cpu"])
    assert stop.value.code == 2 and "expected the results of a loop, got others" in capsys.readouterr().err


# What `convert` makes of a file.


def as_user(*arguments):
    command.main(["convert", *map(str, arguments)])


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".safetensors"])
@pytest.mark.parametrize("kind", weights.KINDS)
def test_convert_goes_both_ways(kind, suffix, tmp_path, capsys):
    heads = {"num_heads": 6} if kind == "haste.IndRNN" else {"num_heads": 2} if weights.KINDS[kind].has_heads else {}
    module = weights.KINDS[kind].cls(3, 6, 2, bidirectional=True, **heads)
    for name in ("bias_hh_l0", "bias_hh_l1", "bias_hh_l0_reverse", "bias_hh_l1_reverse"):
        torch.nn.init.zeros_(getattr(module, name))  # which many libraries have not
    first, theirs, back = tmp_path / "first.pt", tmp_path / f"theirs{suffix}", tmp_path / "back.pt"
    torch.save({f"model.rnn.{name}": p for name, p in module.state_dict().items()}, first)
    as_user(first, "--to", kind, "--cell", module.cell, "--out", theirs)
    assert f"weights of {kind}, " in capsys.readouterr().out
    as_user(theirs, "--from", kind, "--out", back)
    (found,) = checkpoint.layers(back, module.cell).values()
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(found(x)[0], module(x)[0])


def test_convert_keeps_names_unless_there_is_one_layer(tmp_path, capsys):
    file, both, one = tmp_path / "file.pt", tmp_path / "both.pt", tmp_path / "new" / "one.pt"
    model = Model()
    torch.save({"epoch": 3, "state": {"model": model.state_dict()}}, file)
    as_user(file, "--out", both)
    said = capsys.readouterr().out
    assert re.search(r"^encoder +LSTM\(3, 6, num_layers=2, bidirectional=True\) +1,488$", said, re.M)
    names = "encoder.weight_ih_l0 to decoder.weight_hh_l0"
    assert f"{both}: a state_dict, 18 arrays from {names}" in said and len(said.splitlines()[1]) <= 80
    found = torch.load(both, weights_only=True)
    expected = {name: p for name, p in model.state_dict().items() if not name.startswith("head")}
    assert found.keys() == expected.keys() and all(torch.equal(found[name], p) for name, p in expected.items())
    as_user(file, "--name", "decoder", "--out", one)
    torch.nn.GRU(12, 5, bias=False).load_state_dict(torch.load(one, weights_only=True))


def test_convert_writes_nothing_over_by_what_cannot_be_written(tmp_path, capsys, monkeypatch):
    torch.save(fusedlstm.GRU(3, 4).state_dict(), tmp_path / "a.pt")
    kept = tmp_path / "kept.safetensors"
    kept.write_text("mine")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(SystemExit):
        as_user(tmp_path / "a.pt", "--force", "--out", kept)
    assert kept.read_text() == "mine" and "safetensors" in capsys.readouterr().err


def test_safetensors(tmp_path, capsys):
    """A state_dict there and back, and pictures of it."""
    module, file = fusedlstm.LayerNormGRU(3, 4, 2, bidirectional=True), tmp_path / "a.safetensors"
    torch.save({"model": {f"rnn.{name}": p for name, p in module.state_dict().items()}}, tmp_path / "a.pt")
    as_user(tmp_path / "a.pt", "--out", file)
    (found,) = checkpoint.layers(file).values()
    assert type(found) is fusedlstm.LayerNormGRU
    assert all(torch.equal(p, module.state_dict()[name]) for name, p in found.state_dict().items())
    command.main(["inspect", str(file), "--out", str(tmp_path / "pictures")])
    assert [*(tmp_path / "pictures").glob("*.png")] and "LayerNormGRU" in capsys.readouterr().out


def test_convert_takes_the_lists_of_keras_and_the_modules_of_haste(tmp_path):
    draw = np.random.default_rng(0).standard_normal
    layers = [[draw(s) for s in [(k, 12), (4, 12), (2, 12)] * 2] for k in (3, 8)]
    for number, layer in enumerate(layers):
        np.savez(tmp_path / f"{number}.npz", *layer)
    as_user(tmp_path / "0.npz", tmp_path / "1.npz", "--from", "keras.GRU", "--out", tmp_path / "gru.pt")
    gru = weights.load("keras.GRU", *layers)
    for name, value in torch.load(tmp_path / "gru.pt", weights_only=True).items():
        assert torch.equal(value, gru.state_dict()[name])
    (arrays,) = weights.dump("haste.LSTM", fusedlstm.LSTM(3, 4))
    other = {"a.rnn1.kernel": 0, "a.rnn1.recurrent_kernel": 0, "a.rnn1.bias": 0, "head.weight": torch.zeros(2)}
    torch.save(other | {f"a.rnn1.{k}": torch.as_tensor(v) for k, v in arrays.items()}, tmp_path / "haste.pt")
    as_user(tmp_path / "haste.pt", "--from", "haste.LSTM", "--out", tmp_path / "lstm.pt")
    fusedlstm.LSTM(3, 4).load_state_dict(torch.load(tmp_path / "lstm.pt", weights_only=True))


def test_convert_takes_the_rectifier_if_it_is_named(tmp_path):
    np.savez(tmp_path / "rnn.npz", np.eye(3), np.eye(3), np.zeros(3))
    as_user(tmp_path / "rnn.npz", "--from", "keras.SimpleRNN", "--cell", "rnn_relu", "--out", tmp_path / "rnn.pt")
    as_user(tmp_path / "rnn.pt", "--cell", "rnn_relu", "--to", "keras.SimpleRNN", "--out", tmp_path / "back.npz")
    assert np.array_equal(np.load(tmp_path / "back.npz")["recurrent_kernel"], np.eye(3))


def test_convert_takes_onnx(tmp_path, capsys):
    tensors = {"W": torch.randn(1, 4, 3), "R": torch.randn(1, 4, 4)}
    node = onnx.helper.make_node("RNN", ["X", "W", "R"], ["Y"], hidden_size=4, name="node")
    graph = onnx.helper.make_graph(
        [node], "graph", [], [], [onnx.numpy_helper.from_array(x.numpy(), name) for name, x in tensors.items()]
    )
    onnx.save(onnx.helper.make_model(graph), tmp_path / "model.onnx")
    as_user(tmp_path / "model.onnx", "--out", tmp_path / "rnn.pt")
    assert re.search(r"^node +RNN\(3, 4, bias=False\) +28$", capsys.readouterr().out, re.M)
    found = torch.load(tmp_path / "rnn.pt", weights_only=True)
    assert torch.equal(found["weight_ih_l0"], tensors["W"][0]) and torch.equal(found["weight_hh_l0"], tensors["R"][0])


def test_convert_writes_over_nothing_and_runs_no_code(tmp_path, capsys):
    file, kept = tmp_path / "module.pt", tmp_path / "kept.pt"
    module = torch.nn.Sequential(torch.nn.LSTM(3, 4))
    torch.save(module, file)
    kept.write_text("mine")
    for options, text, then in [
        (["--out", tmp_path / "x.pt"], "objects whose code runs", "Pass --trust if you trust whoever made the file."),
        (["--trust", "--out", kept], f"expected a new file, got {kept}", "Pass --force to write over it."),
        (["--trust", "--name", "1", "--out", kept], "--name: expected one of 0, got '1'", " lists what it takes."),
        (["--trust", "--to", "keras.GRU", "--out", kept], "module: expected a GRU, got LSTM", " lists what it takes."),
    ]:
        with pytest.raises(SystemExit) as stop:
            as_user(file, *options)
        error, last = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and text in error and last.endswith(then)
    assert kept.read_text() == "mine" and not (tmp_path / "x.pt").exists()
    as_user(file, "--trust", "--force", "--out", kept)
    module[0].load_state_dict(torch.load(kept, weights_only=True))


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.onnx", b"no model", "expected a model in the ONNX format, got another file"),
        ("a.safetensors", b"no tensors", "expected a file of safetensors, got another"),
        ("a.npz", b"no archive", "expected a file of numpy.savez with numbers, got another"),
        ("a.npz", b"", "expected a file of numpy.savez with numbers, got another"),
        ("a.npz", b"PK\x03\x04 and no more", "expected a file of numpy.savez with numbers, got another"),
    ],
)
def test_convert_says_what_is_no_such_file(name, content, text, tmp_path, capsys):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(SystemExit):
        as_user(file, *(["--from", "keras.LSTM"] if name.endswith("npz") else []), "--out", tmp_path / "x.pt")
    error, _ = capsys.readouterr().err.splitlines()
    assert f"{file}: {text}" in error


def test_convert_says_which_array_is_missing(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", kernel=np.zeros((3, 4)), bias=np.zeros(4))
    np.savez(tmp_path / "b.npz", recurrent_kernel=np.zeros((3, 4)), bias=np.zeros(4))
    for name, text in (
        ("a.npz", "a.npz: expected an array recurrent_kernel of haste.LSTM, got kernel, bias"),
        ("b.npz", "expected the arrays kernel, recurrent_kernel, bias, got recurrent_kernel, bias"),
    ):
        with pytest.raises(SystemExit):
            as_user(tmp_path / name, "--from", "haste.LSTM", "--out", tmp_path / "x.pt")
        assert text in capsys.readouterr().err
