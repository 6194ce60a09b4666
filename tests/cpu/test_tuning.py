"""The file of measured choices, who reads it, and the errors of `tune`. tests/kernels tests the measuring itself."""

import dataclasses
import functools
import json
import multiprocessing
import os
import pathlib
import stat
import sys
import types

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import fusedlstm
from fusedlstm import __main__ as command_line
from fusedlstm import cells, engines, functional, tuning
from fusedlstm.engines import launch
from fusedlstm.plan import candidates, choice, devices, tuned
from fusedlstm.plan.devices import DEVICES
from fusedlstm.plan.problem import Problem
from fusedlstm.plan.tuned import Call

SM_90 = DEVICES["sm_90"]
PLACE = tuned._place  # the fixture replaces it
HERE = tuned.Place("gpu 0", 132, "13.0", "2.13.0", "3.7.1", "0.1.0")
PROBLEM = Problem("lstm", 64, 512, "bf16", 1, "fwd", "tf32", "dense")
CALL = Call("lstm", 64, 512, 512, 0, 1, 1, "bf16", "tf32", "dense", True)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSEDLSTM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FUSEDLSTM_TUNING", raising=False)
    monkeypatch.delenv("FUSEDLSTM_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(tuned, "place", lambda index: HERE._replace(device=f"gpu {index}"))
    monkeypatch.setattr(launch, "device_limits", lambda index: SM_90)
    tuned.forget()
    tuned._warned.clear()
    yield tmp_path / "cache"
    tuned.forget()


def second_best():
    return candidates(PROBLEM._replace(device_limits=SM_90, protocol="data"))[1]


def stored(p, **changes):
    return {"plan": {name: getattr(p, name) for name in tuned.FIELDS} | changes, "ms": {"a": 1.0}}


def plan_of(problem=PROBLEM):
    return launch._cached_plan(problem, 0, tuned.generation(), devices.sms())


def test_a_stored_plan_overrides_the_prediction(monkeypatch):
    predicted, wanted = plan_of(), second_best()
    assert predicted != wanted
    file = tuned.store(0, {PROBLEM: stored(wanted)})
    assert plan_of() == wanted
    assert plan_of(PROBLEM._replace(batch=63)) != wanted, "for the very sizes only"
    monkeypatch.setenv("FUSEDLSTM_TUNING", "0")
    assert plan_of() == predicted
    monkeypatch.delenv("FUSEDLSTM_TUNING")
    assert plan_of() == wanted
    assert tuned.clear() and not file.exists() and not tuned.clear()
    assert plan_of() == predicted


@pytest.mark.parametrize("field", tuned.Place._fields)
def test_a_choice_counts_only_where_it_was_measured(monkeypatch, field):
    tuned.store(0, {PROBLEM: stored(second_best())})
    other = HERE._replace(**{field: 108 if field == "num_sms" else "another"})
    monkeypatch.setattr(tuned, "place", lambda index: other)
    tuned.forget()
    assert plan_of() != second_best()


CHANGED = {  # each field of a problem or a call
    **{"cell": "gru", "dtype": "fp16", "pass_": "bwd", "precision": "ieee", "layout": "packed", "stack": True},
    **{"batch": 65, "hidden": 513, "directions": 2, "heads": 2, "input_size": 7, "proj_size": 3, "layers": 2},
    "training": False,
}


@pytest.mark.parametrize("what", [PROBLEM, CALL], ids=["problem", "call"])
@pytest.mark.parametrize("field", CHANGED)
def test_every_field_is_part_of_the_key(field, what):
    not_kept = ("device_limits", "protocol", "input_size") if what == PROBLEM else ()
    assert {*what._fields} - {*not_kept} <= {*CHANGED}
    tuned.store(0, {what: stored(second_best())})
    if field in what._fields and field not in not_kept:
        assert tuned.find(0, what) and tuned.find(0, what._replace(**{field: CHANGED[field]})) is None


def test_choices_of_others_stay(folder):
    tuned.store(1, {PROBLEM: stored(second_best())})
    tuned.store(0, {CALL: {"ms": {"triton": 1.0, "torch": 2.0}}})
    tuned.store(0, {PROBLEM: stored(second_best())})
    assert tuned.find(1, PROBLEM) and tuned.find(0, PROBLEM) and tuned.find(0, CALL)
    assert {p.name for p in folder.iterdir()} <= {"tuning.json", "tuning.lock"}, "nothing is left beside it"
    with pytest.raises(TypeError):
        tuned.store(0, {PROBLEM: {"plan": object()}})
    assert {p.name for p in folder.iterdir()} <= {"tuning.json", "tuning.lock"}
    assert tuned.find(0, PROBLEM), "and a file that could not be written leaves the old one"


def once(text):
    """Look up twice: one warning."""
    with pytest.warns(RuntimeWarning, match=text) as seen:
        found = plan_of()
        tuned.forget()
        assert plan_of() == found
    assert len(seen) == 1
    return found


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '{"format": 1}',
        '{"format": 1, "choices": {"a": {"b": 3}}}',
        pytest.param("[" * 100_000, id="deep"),
        pytest.param('{"format": ' + "1" * 5000 + "}", id="a long number"),
    ],
)
def test_a_corrupt_file_is_ignored_with_one_warning_and_replaced(folder, content):
    predicted = plan_of()
    folder.mkdir()
    tuned.path().write_text(content)
    tuned.forget()
    assert once("no choices of fusedlstm.tune, ignored") == predicted
    tuned.store(0, {PROBLEM: stored(second_best())})
    assert plan_of() == second_best() and json.loads(tuned.path().read_text())["format"] == tuned.FORMAT


@pytest.mark.parametrize("ms", [10**400, "a", None, [], {}, -(10**400)], ids=lambda ms: str(ms)[:8])
def test_no_choice_of_an_engine_breaks_a_forward(ms):
    tuned.store(0, {CALL: {"ms": {"triton": ms, "torch": 1.0}}})
    with pytest.warns(RuntimeWarning, match="ignored the choice"):
        assert tuned.engine(CALL, 0) is None


@pytest.mark.parametrize("wrong", [{}, [], 10**400, "a", None], ids=lambda wrong: str(wrong)[:8])
def test_no_choice_of_a_plan_breaks_a_forward(wrong):
    predicted = plan_of()
    for field in tuned.FIELDS:
        tuned._warned.clear()
        tuned.store(0, {PROBLEM: stored(second_best(), **{field: wrong})})
        with pytest.warns(RuntimeWarning, match="ignored the choice"):
            assert plan_of() == predicted


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_not_waited_for(folder):
    predicted = plan_of()
    folder.mkdir()
    os.mkfifo(tuned.path())
    assert once("expected a regular file") == predicted


def _store_many(first):
    for k in range(first, first + 20):
        tuned.store(0, {PROBLEM._replace(batch=k): {"plan": {}, "ms": {}}})


@pytest.mark.skipif(sys.platform == "win32", reason="there are no locks")
def test_processes_that_store_at_once_lose_nothing(folder):
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_store_many, args=(100 * k,)) for k in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    tuned.forget()
    assert sum(map(len, tuned.everything().values())) == 80


@pytest.mark.skipif(sys.platform == "win32", reason="no process can be forked")
def test_what_another_process_stored_since_a_look_up_stays():
    tuned.store(0, {PROBLEM: stored(second_best())})
    assert tuned.find(0, PROBLEM)
    other = multiprocessing.get_context("fork").Process(target=_store_many, args=(100,))
    other.start()
    other.join()
    tuned.store(0, {CALL: {"ms": {}}})
    assert sum(map(len, tuned.everything().values())) == 22


def test_a_file_of_another_format_is_ignored_and_never_discarded(folder):
    predicted, content = plan_of(), '{"format": 99, "choices": {"a": 1}}'
    folder.mkdir()
    tuned.path().write_text(content)
    tuned.forget()
    assert once("expected format 1") == predicted
    with pytest.raises(RuntimeError, match=r"tuning\.json: expected choices .* in format 1, got format 99"):
        tuned.store(0, {PROBLEM: stored(second_best())})
    assert tuned.path().read_text() == content and {p.name for p in folder.iterdir()} <= {"tuning.json", "tuning.lock"}


def test_the_file_can_be_read_by_others(monkeypatch):
    file = tuned.store(0, {PROBLEM: stored(second_best())})
    assert os.name == "nt" or stat.S_IMODE(file.stat().st_mode) == 0o644


def test_without_a_home_directory_a_forward_does_without_choices(monkeypatch, capsys):
    predicted = plan_of()

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    for name in ("FUSEDLSTM_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pathlib.Path, "home", no_home)
    tuned.forget()
    assert once("FUSEDLSTM_CACHE: expected a folder .* home directory") == predicted
    with pytest.raises(RuntimeError, match="FUSEDLSTM_CACHE: expected a folder"):
        tuned.store(0, {PROBLEM: stored(second_best())})
    with pytest.raises(SystemExit, match="2"):
        command_line.main(["tune", "--show"])
    assert "tune: error: FUSEDLSTM_CACHE: expected a folder" in capsys.readouterr().err


def test_a_place_that_cannot_be_told_has_no_choices(monkeypatch):
    predicted = plan_of()
    tuned.store(0, {PROBLEM: stored(second_best())})

    def place(index):
        raise RuntimeError("no driver")

    monkeypatch.setattr(tuned, "place", place)
    tuned.forget()
    assert once("ignored: RuntimeError: no driver") == predicted


def test_a_place_needs_no_metadata_of_triton(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: 1 / 0)
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__="3.7.1+own"))
    assert PLACE.__wrapped__(None, None).triton == "3.7.1+own"
    monkeypatch.setitem(sys.modules, "triton", None)
    assert PLACE.__wrapped__(None, None).triton == "none"


@pytest.mark.parametrize(
    ("options", "steps", "training", "inference"),
    [
        ({}, 2, True, True),
        ({"batch_first": True}, 2, True, True),
        ({"grad_clip": 1.0}, 2, False, True),
        ({"save": "states"}, 2, False, False),
        ({}, 1, False, False),
        ({"batch_first": True}, 1, False, False),
    ],
    ids=str,
)
def test_an_engine_is_chosen_only_for_what_its_key_tells(options, steps, training, inference):
    module = fusedlstm.LSTM(3, 5, **options)
    input = torch.randn(4, steps, 3) if module.batch_first else torch.randn(steps, 4, 3)
    run = tuning._Run(module, input, None, None, None)
    for mode, expected in ((True, training), (False, inference)):
        call = run.call(torch.float32, False, mode)
        assert (call is not None) == expected
        assert not expected or (call.batch, call.training) == (4, mode)
    packed = pack_padded_sequence(torch.randn(steps, 2, 3), torch.tensor([steps, 1]))
    plain = tuning._Run(fusedlstm.LSTM(3, 5), packed, None, None, None).call(torch.float32, False, True)
    assert (plain is None) == (steps == 1)


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        ({"plan": {}}, "KeyError"),
        ({}, "KeyError"),
        ({"plan": 3}, "TypeError"),
        (stored(second_best(), block_b=4096), "no such plan fits NVIDIA H200"),
        (stored(second_best(), protocol="telepathy"), "no such plan fits|PlanError|KeyError"),
    ],
    ids=["no fields", "no plan", "no dictionary", "too large", "no such protocol"],
)
def test_a_choice_that_does_not_fit_is_ignored_with_one_warning(choice, text):
    predicted = plan_of()
    tuned.store(0, {PROBLEM: choice})
    assert once(text) == predicted


def test_limits_are_checked_when_a_choice_is_read(monkeypatch):
    """A plan of a device with more shared memory is no plan of this one."""
    wanted = next(p for p in candidates(PROBLEM._replace(device_limits=SM_90)) if p.smem_bytes > 60 << 10)
    tuned.store(0, {PROBLEM: stored(wanted)})
    assert plan_of() == wanted
    monkeypatch.setattr(launch, "device_limits", lambda index: dataclasses.replace(SM_90, smem_bytes=48 << 10))
    tuned.forget()
    assert once("no such plan fits").smem_bytes <= 48 << 10


def test_the_path_follows_the_environment(monkeypatch, tmp_path):
    assert tuned.path() == tmp_path / "cache" / "tuning.json"
    monkeypatch.delenv("FUSEDLSTM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuned.path() == tmp_path / "fusedlstm" / "tuning.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tuned.path().parts[-2:] == ("fusedlstm", "tuning.json")


def test_the_engine_is_the_measured_one_else_the_predicted_one(monkeypatch):
    assert engines.fastest(CALL._replace(batch=16), 0)[0] == "triton"
    for ms, expected in (({"triton": 2.0, "torch": 1.0}, "torch"), ({"triton": 1.0, "torch": 2.0}, "triton")):
        tuned.store(0, {CALL: {"ms": ms}})
        engine, why = engines.fastest(CALL, 0)
        assert engine == expected and why.startswith("measured: ")
    half = CALL._replace(dtype="fp16")
    tuned.store(0, {half: {"ms": {"triton": 1.0}}})
    with pytest.warns(RuntimeWarning, match="KeyError"):
        assert engines.fastest(half, 0)[1].startswith("predicted")


def test_without_a_measurement_cudnn_must_be_clearly_faster(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91300)
    for times, expected in (((3.1, 2.0), "torch"), ((2.9, 2.0), "triton"), ((1.0, 2.0), "triton")):
        monkeypatch.setattr("fusedlstm.plan.beside_cudnn", lambda *args, times=times: times)
        assert engines.predicted(CALL, 0)[0] == expected
    monkeypatch.setattr("fusedlstm.plan.beside_cudnn", lambda *args: (9.0, 1.0))
    assert engines.predicted(CALL._replace(layout="ragged"), 0)[0] == "triton"
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 90100)
    assert engines.predicted(CALL, 0) == ("triton", "this cuDNN has no bfloat16")


@pytest.mark.parametrize("training", [True, False])
def test_packed_and_projected_calls_are_compared_with_cudnn_too(training, monkeypatch):
    """If dense kernels are predicted to be far slower, so are packed and projected ones: the loop is the same."""
    from fusedlstm.engines import launch
    from fusedlstm.plan.devices import DEVICES

    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91300)
    monkeypatch.setattr(launch, "device_limits", lambda index: DEVICES["sm_90"])
    small, large = (CALL._replace(batch=b, hidden=h, training=training) for b, h in ((4, 64), (128, 2048)))
    for change in ({}, {"layout": "packed"}, {"proj_size": 16}, {"layout": "packed", "proj_size": 16}):
        assert engines.predicted(small._replace(**change), 0)[0] == "triton", change
        assert engines.predicted(large._replace(**change), 0)[0] == "torch", change
    seen = []
    monkeypatch.setattr("fusedlstm.plan.beside_cudnn", lambda *args: seen.append(args) or (1.0, 1.0))
    engines.predicted(large._replace(layout="packed", proj_size=16), 0)
    assert seen == [("lstm", 128, 2048, "bf16", 1, DEVICES["sm_90"], "tf32", training, "packed", 16)]


class OnGPU(torch.Tensor):
    """A tensor on the CPU that says it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ({}, True),
        ({"backend": "triton"}, False),
        ({"lengths": torch.tensor([2, 3])}, False),
        ({"sequences": "cells"}, False),
        ({"sequences": "all"}, False),
        ({"save": "states"}, False),
    ],
    ids=str,
)
def test_auto_asks_for_the_fastest_engine_where_cudnn_serves(monkeypatch, options, asked):
    calls = []

    def fastest(call, index):
        calls.append(call)
        raise KeyboardInterrupt  # no kernel runs here

    monkeypatch.setattr(engines, "choice", lambda *args, **kwargs: ("triton", "for this test"))
    monkeypatch.setattr(engines, "fastest", fastest)
    monkeypatch.setattr(functional, "_layout", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    assert_asked(calls, fusedlstm.LSTM(5, 7, 2), options, asked)
    if options.get("sequences") != "cells":
        assert_asked(calls, fusedlstm.GRU(5, 7, 2), options, asked)
        assert_asked(calls, fusedlstm.RNN(5, 7, 2, "relu"), options, asked)
    assert_asked(calls, fusedlstm.PeepholeLSTM(5, 7, 2), options, False)


def assert_asked(calls, module, options, asked):
    calls.clear()
    input = torch.randn(3, 2, 5).as_subclass(OnGPU)
    states = tuple(torch.zeros(2, 2, 7) for _ in cells.CELLS[module.cell].states)
    with pytest.raises(KeyboardInterrupt):
        options = dict(options)
        rows = functional.Rows(**{name: options.pop(name) for name in functional.Rows._fields if name in options})
        spec = functional.Spec(cells.CELLS[module.cell], num_layers=2, **options)
        functional.run(spec, input, states, module._flat_weights, rows)
    expected = Call(module.cell, 2, 5, 7, 0, 2, 1, "fp32", launch.precision_of(torch.float32), "dense", True)
    assert calls == ([expected] if asked else [])


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((torch.nn.LSTM(3, 4), torch.zeros(2, 2, 3)), TypeError, "module: expected a Recurrent, got LSTM"),
        ((fusedlstm.LSTM(3, 4), [1.0]), TypeError, "input: expected a Tensor, got list"),
        (
            (fusedlstm.LSTM(3, 4), torch.zeros(2, 2, 3)),
            RuntimeError,
            "tune measures .* need a CUDA or ROCm device, got",
        ),
        ((fusedlstm.LSTM(3, 4), torch.zeros(2, 2, 3), None, 0.0), ValueError, "seconds: expected a positive number"),
    ],
    ids=["module", "input", "device", "seconds"],
)
def test_errors_of_tune_name_what_it_needs(arguments, error, text, folder):
    module, input, *rest = arguments
    with pytest.raises(error, match=text):
        fusedlstm.tune(module, input, rest[0] if rest else None, seconds=rest[1] if rest else 1.0)
    assert not folder.exists()


def test_a_call_that_cannot_run_is_left_out():
    def fails():
        raise ValueError("too large")

    timer = functools.partial(tuning._medians, device=torch.device("cpu"))
    assert list(tuning._timed({"a": fails, "b": lambda: None}, timer, 0.01)) == ["b"]
    with pytest.raises(RuntimeError, match="none of a runs: ValueError: too large"):
        tuning._timed({"a": fails}, timer, 0.0)


def test_command_line_shows_and_clears(capsys):
    command_line.main(["tune", "--show"])
    assert "no choices" in capsys.readouterr().out
    tuned.store(0, {PROBLEM: stored(second_best()), CALL: {"ms": {"triton": 2.0, "torch": 1.0}}})
    command_line.main(["tune", "--show"])
    printed = capsys.readouterr().out
    assert "device=gpu 0" in printed and "batch=64" in printed and "torch" in printed
    command_line.main(["tune", "--clear"])
    assert "removed" in capsys.readouterr().out and not tuned.path().exists()
    with pytest.raises(SystemExit, match="2"):
        command_line.main(["tune"])
    assert "--hidden: expected" in capsys.readouterr().err


def test_command_line_measures_any_cell(monkeypatch, capsys):
    """A module of the cell on the options' sizes; where the kernels cannot run, the error says what can be had."""
    seen = []
    measured = tuning.Measured(PROBLEM, "a plan", "another", {"slow": 2.0, "fast": 1.0})
    monkeypatch.setattr(fusedlstm, "tune", lambda *args, **more: seen.append((*args, more)) or [measured])
    for cell in cells.CELLS:
        command_line.main(
            (
                f"tune --cell {cell} --hidden 8 --input 3 --steps 5 --batch 2 --directions 2 --layers 2 "
                "--dtype bf16 --device cpu"
            ).split()
        )
        module, input, more = seen.pop()
        assert (module.cell, module.hidden_size, module.num_layers, module.bidirectional) == (cell, 8, 2, True)
        assert input.shape == (5, 2, 3) and input.dtype == torch.bfloat16 and more == {"seconds": 20.0}
        printed = capsys.readouterr().out
        assert "plan fwd: a plan (predicted: another)" in printed and printed.index("fast") < printed.index("slow")
    monkeypatch.undo()
    with pytest.raises(SystemExit, match="2"):
        command_line.main(["tune", "--hidden", "8", "--device", "cpu"])
    said = capsys.readouterr().err
    assert "need a CUDA or ROCm device" in said and "python -m fusedlstm plan shows" in said


def test_command_line_explains_bound_runners_up_and_engine(capsys):
    command_line.main(["plan", "--hidden", "1024", "--batch", "128", "--dtype", "bf16"])
    printed = capsys.readouterr().out
    assert "bound" in printed and "set by arithmetic" in printed
    for word in ("tile", "group", "exchange", "schedule"):
        assert word in printed.partition("Words: ")[2]
    assert printed.count("1. ") == 2 and printed.count("3. ") == 2, "runners-up of both passes"
    for title in ("training", "inference"):
        assert f"auto, {title}: t" in printed
    with pytest.raises(SystemExit):
        command_line.main(["plan", "--hidden", "0"])
    assert "--hidden: expected a whole number from 1, got '0'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        command_line.main(["plan", "--hidden", "100", "--heads", "7"])
    assert "num_heads: expected a positive divisor of hidden_size (100), got 7" in capsys.readouterr().err


def test_a_table_has_columns():
    assert choice.table(["name", "value"], [("a", 1), ("long", 2.5)]) == "name  value\na     1\nlong  2.5"
