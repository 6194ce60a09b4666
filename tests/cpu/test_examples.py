"""examples/: they run, and what they claim of themselves holds."""

import argparse
import datetime
import importlib.util
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_recall_rewards_memory_alone():
    """Who remembers the cue is always right; who does not, by chance; an episode begins after every bell."""
    recurrent_policy = example("recurrent_policy")
    env = recurrent_policy.Recall(50, torch.Generator().manual_seed(1))
    cue, rewards, bells, waited = torch.zeros(50, dtype=torch.long), 0, 0, torch.zeros(50)
    for _ in range(100):
        lights, begins = env.observe(), env.begins.clone()
        assert (lights[:, :4].sum(1) == begins).all()
        cue = torch.where(begins, lights[:, :4].argmax(1), cue)
        waited = torch.where(begins, 0, waited + 1)
        rings = lights[:, 4] == 1
        assert ((waited[rings] > recurrent_policy.SHORTEST) & (waited[rings] <= recurrent_policy.LONGEST + 1)).all()
        reward = env.step(cue)
        assert torch.equal(reward == 1, rings) and torch.equal(env.begins, rings)
        rewards, bells = rewards + reward.sum(), bells + rings.sum()
    assert rewards == bells > 100


def test_recurrent_policy_learns_alike_in_both_forms():
    """The same gradients on a rollout that continues episodes and ends others; then the same curve."""
    recurrent_policy = example("recurrent_policy")
    torch.manual_seed(0)
    policy = recurrent_policy.Policy(8)
    env = recurrent_policy.Recall(6, torch.Generator().manual_seed(0))
    stream = recurrent_policy.fusedlstm.Stream(policy.lstm)
    recurrent_policy.play(policy, stream, env, 7)
    rollout = recurrent_policy.play(policy, stream, env, 20)
    assert rollout.begins.any() and rollout.state[0].any()
    found = []
    for hidden_states in (recurrent_policy.in_one_call, recurrent_policy.in_a_loop):
        output = hidden_states(policy.lstm, rollout)
        found.append([output, *torch.autograd.grad(output.square().sum(), list(policy.lstm.parameters()))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_recurrent_policy_prints_both_curves(capsys):
    example("recurrent_policy").main(["--updates", "6", "--steps", "20", "--batch", "8", "--hidden-size", "8"])
    printed = capsys.readouterr().out
    assert "resets=" in printed and "a loop over LSTMCell" in printed and "median update" in printed
    rows = re.findall(r"(\d+\.\d)%[^%\n]*?(\d+\.\d)%", printed)
    assert rows and all(a == b for a, b in rows)


def test_data_parallel_marks_two_steps_of_each_sequence():
    data_parallel = example("data_parallel")
    x, lengths, sums = data_parallel.draw(torch.Generator().manual_seed(0), 12, 50)
    steps = torch.arange(12)[:, None]
    assert ((x[..., 1] * (steps < lengths)).sum(0) == 2).all() and (x[..., 1].sum(0) == 2).all()
    assert {*lengths.tolist()} == {*range(data_parallel.SHORTEST, 13)}
    torch.testing.assert_close(sums, x.prod(-1).sum(0))


def test_data_parallel_learns(capsys, tmp_path):
    """Two processes print the same: `test_distributed.py`."""
    data_parallel = example("data_parallel")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    data_parallel.train(data_parallel.parsed([]))
    torch.distributed.destroy_process_group()
    printed = capsys.readouterr().out
    error, limit = (float(re.search(text, printed)[1]) for text in (r"final error (\d\.\d+)", r"below (\d\.\d+);"))
    assert error < limit < 0.1 < float(re.search(r"step .*error (\d\.\d+)", printed)[1])


def test_data_parallel_starts_by_itself_and_by_torchrun():
    script = str(EXAMPLES / "data_parallel.py")
    few = ("--steps", "4", "--batch", "8", "--hidden-size", "8")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    commands = [(script, *few, "--processes", "1"), (*torchrun, script, *few, "--sharded")]
    printed = [
        subprocess.run([sys.executable, *own], capture_output=True, text=True, check=True).stdout for own in commands
    ]
    assert "in 1 process(es)" in printed[0] and "sharded over 2 process(es)" in printed[1]
    errors = [re.findall(r"error (\d\.\d+)", text) for text in printed]
    assert errors[0] == errors[1] and len({*errors[0]}) > 3


def test_gradient_flow_shows_why_an_rnn_forgets(tmp_path, capsys):
    example("gradient_flow").main(["--gap", "10", "--units", "8", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    measured = {
        (kind, name.strip()): tuple(float(x) for x in (one, of_one, ten, of_ten))
        for kind, name, one, of_one, ten, of_ten in re.findall(
            r"(RNN|LSTM), ([^│]*?) *│ +(\S+) \((\S+)\) │ +(\S+) \((\S+)\) │", printed
        )
    }
    for radius in (0.8, 0.9, 1.0, 1.1):
        one, of_one, ten, of_ten = measured["RNN", f"radius {radius}"]
        assert one == of_one == pytest.approx(radius) and ten == of_ten == pytest.approx(radius**10, rel=0.05)
    kept = [measured["LSTM", f"bias {bias}"] for bias in (0, 1, 3)]
    assert [row[2] for row in kept] == sorted(row[2] for row in kept) and all(row[2] >= row[3] for row in kept)
    clipped = dict(re.findall(r"RNN, (radius \S+, \w+ limit|radius \S+, limit \S+) +│[^│]+│ +(\S+) │", printed))
    assert float(clipped["radius 0.8, limit 1"]) == pytest.approx(0.8**10, rel=0.05)  # no help
    assert float(clipped["radius 1.1, no limit"]) == pytest.approx(1.1**10, rel=0.05)
    assert float(clipped["radius 1.1, limit 0.1"]) < 0.1 * 1.1 * 8**0.5
    assert (tmp_path / "gradient_flow.png").stat().st_size > 10_000


def test_numpy_lstm_is_ours_and_learns(tmp_path, capsys):
    numpy_lstm = example("numpy_lstm")
    numpy_lstm.main(["--device", "cpu", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    rows = re.findall(r"│ ([^│]+?) +│ +\[([\d, ]+)\] │ +(\S+) │ (\S+) │ (\S+) │", printed)
    assert len(rows) == 8 and {name: shape for name, shape, *_ in rows}["gradient of U"] == "128, 32"
    for _, _, largest, double, single in rows:
        assert float(double) < 1e-15 * max(1, float(largest)) and 0 < float(single) < 1e-6 * max(1, float(largest))
    assert float(re.search(r"updates are at most (\S+) apart", printed)[1]) < 1e-10
    assert "(all right)" in printed and numpy_lstm.TEXT in printed
    assert (tmp_path / "numpy_lstm.png").stat().st_size > 10_000


@pytest.mark.parametrize("gap", [10, 45])
def test_long_range_answers_follow_from_what_is_shown(gap):
    long_range = example("long_range")
    torch.manual_seed(0)
    x, answer = long_range.adding(gap, 50)
    marked = x[..., 1].t().nonzero()[:, 1].view(50, 2)
    assert (marked[:, 0] < gap // 10).all() and ((marked[:, 1] - gap // 2) < gap // 10).all()
    torch.testing.assert_close(answer[0, :, 0], 0.5 + x.prod(-1).sum(0) / 4)
    x, answer = long_range.order(gap, 50)
    shown = x.argmax(-1).t()
    assert [2 * a + b for a, b in (row[row < 2].tolist() for row in shown)] == answer[0].argmax(-1).tolist()
    x, answer = long_range.copy(gap, 50)
    assert torch.equal(x[:2, :, :4], answer) and (x[2:-2, :, 4] == 1).all() and x[-2, :, 5].all() and len(x) == gap + 4


def test_long_range_judges_by_the_limits_of_the_paper():
    long_range = example("long_range")
    right = torch.tensor([[[0.5], [0.5], [0.5]]])
    loss, wrong = long_range.TASKS["adding"].judge(right + torch.tensor([0.0, 0.039, -0.041])[None, :, None], right)
    assert wrong.tolist() == [False, False, True] and loss == pytest.approx((0.039**2 + 0.041**2) / 3)
    answer = torch.eye(4)[[0, 0, 1]][None]
    logits = torch.tensor([[0.71, 0.29, 0, 0], [0.69, 0.31, 0, 0], [0.9, 0.1, 0, 0]]).clamp_min(1e-6).log()[None]
    assert long_range.TASKS["order"].judge(logits, answer)[1].tolist() == [False, True, True]


def test_long_range_counts_pictures_and_compares(tmp_path, capsys):
    long_range = example("long_range")
    few = ["--gaps", "10", "--layers", "GRU", "LSTM, chrono", "--processes", "1", "--device", "cpu"]
    long_range.main([*few, "--tasks", "order", "--updates", "250", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    rows = re.findall(r"│ order │ (\S[^│]*?) +│ +10 │ +([\d.]+)% │ +([\d.]+) │ +([\d,]+) │ (\d) of 1 │", printed)
    assert [row[0] for row in rows] == ["GRU", "LSTM, chrono"]
    assert all(float(row[1]) < 1 and float(row[2]) < 0.1 and row[4] == "1" for row in rows)
    assert {path.name for path in tmp_path.iterdir()} == {"long_range.png", "long_range_gates.png"}
    long_range.main([*few, "--compare", "--updates", "5"])
    rows = re.findall(r"│ (\S[^│]*?) +│ +([\d.]+) │ ([\d.]+) │ +(\S+) │ +\S+ s │", capsys.readouterr().out)
    assert len(rows) == 2 and all(float(apart) < 1e-6 and ours == theirs for _, ours, theirs, apart in rows)


def test_language_model_reads_strips_that_continue():
    language_model = example("language_model")
    text = language_model.sources(3000)
    assert len(text) == 3000 and text == language_model.sources(4000)[:3000]
    codes = language_model.strips(text, 4, "cpu")
    assert codes.shape == (750, 4)
    assert "".join(language_model.ALPHABET[code] for code in codes.t().flatten()) == text


def test_language_model_learns_writes_and_draws(tmp_path, capsys):
    few = ["--characters", "20000", "--updates", "40", "--steps", "16", "--hidden-size", "32", "--rate", "0.02"]
    example("language_model").main([*few, "--device", "cpu", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    rows = re.findall(r"│ (\S+) +│ +(\d\.\d+) │ +(\d\.\d+) │ +(\d\.\d+) │ +\S+ ms │", printed)
    assert [row[0] for row in rows] == ["without", "weight_dropout=0.4", "zoneout=0.1"]
    assert all(2 < float(row[3]) <= float(row[2]) < 4.5 for row in rows)  # 6.6 before training
    assert len({row[2] for row in rows}) == 3 and "def " in printed
    assert (tmp_path / "language_model.png").stat().st_size > 10_000


def test_language_model_compares_with_torch(capsys):
    few = ["--characters", "20000", "--updates", "12", "--steps", "16", "--hidden-size", "32", "--device", "cpu"]
    example("language_model").main([*few, "--compare"])
    printed = capsys.readouterr().out
    assert float(re.search(r"losses are at most (\S+) apart", printed)[1]) < 1e-5
    assert len({*re.findall(r"│ +\d+ │ +(\d\.\d+) │", printed)}) == 7


def a_series(forecast, seed=0):
    """Of 112 months: the last twelve are the only ones that are forecast."""
    months = torch.arange(112)
    noise = torch.randn(112, generator=torch.Generator().manual_seed(seed))
    values = (50 + 0.1 * months + 5 * (2 * torch.pi * months / 12).sin() + noise).double()
    return forecast.prepared(values, 100, 0, 1)


def test_forecast_is_judged_by_hand():
    forecast = example("forecast")
    deciles = torch.arange(1.0, 10, dtype=torch.float64).expand(3, 9)  # each decile is ten times its share
    found = forecast.judge(deciles, torch.tensor([5.0, 0.0, 9.0], dtype=torch.float64), 2.0)
    # At 5, 0 and 9: errors of the median 0, 5 and 4; pinball losses of decile k are below, summed over k from 1 to 9.
    at_5 = sum(k / 10 * (5 - k) if k < 5 else (1 - k / 10) * (k - 5) for k in range(1, 10))
    at_0 = sum((1 - k / 10) * k for k in range(1, 10))
    at_9 = sum(k / 10 * (9 - k) for k in range(1, 10))
    assert found.mase == pytest.approx((0 + 5 + 4) / 3 / 2) and found.inside == pytest.approx(2 / 3)
    assert found.crps == pytest.approx(2 * (at_5 + at_0 + at_9) / 27 / 2)


def test_forecast_hands_drawn_months_back():
    """A model that adds 1 to the last difference counts upwards, from the one that was known."""
    forecast = example("forecast")

    class Counter(torch.nn.Module):
        def forward(self, rows, state=None):
            state = state or (torch.zeros(1, rows.size(1), 1),) * 2
            return torch.distributions.StudentT(1e6, rows[..., 0] + 1, 1e-6), state

    rows = torch.randn(forecast.READ + 12, 3, 5)
    counted = rows[forecast.READ, :, 0] + torch.arange(1, 13)[:, None]
    torch.testing.assert_close(forecast.draw(Counter(), rows, 4), counted[..., None].expand(-1, -1, 4))


def test_forecast_scales_by_differences_to_a_year_ago():
    forecast = example("forecast")
    series = a_series(forecast)
    known = series.values[:100]
    assert series.scale == pytest.approx(sum(abs(known[k] - known[k - 12]).item() for k in range(12, 100)) / 88)
    for k in (24, 50, 111):
        assert series.targets[k].item() == pytest.approx(
            (series.values[k] - series.values[k - 12]).item() / series.scale
        )
        assert series.rows[k, 0] == series.targets[k - 1] and series.rows[k, 1] == series.targets[k - 12]
    assert list(series.origins) == [100]


def test_forecast_does_not_look_ahead():
    """Other values from the first forecast on change no forecast of that month, and no loss in training."""
    forecast = example("forecast")
    args = argparse.Namespace(updates=3, batch=4, rate=0.01, device="cpu", paths=5)
    series = a_series(forecast)
    other = forecast.prepared(torch.cat([series.values[:100], 1000 + torch.rand(12)]), 100, 0, 1)
    found = []
    for one in (series, other):
        torch.manual_seed(0)
        model = forecast.Forecaster(one.rows.size(1), 4)
        losses, _ = forecast.train(model, [one], args, "")
        deciles = [forecast.of_lstm([model], one, args), forecast.of_naive(one)]
        found.append([torch.tensor(losses), *deciles, forecast.of_classic("SARIMA", one, forecast.tqdm(disable=True))])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    assert found[0][1].shape == (1, 12, 9) and (found[0][1].diff(dim=-1) >= 0).all()


@pytest.mark.parametrize(("months", "other"), [("11", "12 to 173"), ("174", "12 to 173")])
def test_forecast_says_how_many_months_it_can_forecast(months, other, capsys):
    with pytest.raises(SystemExit):
        example("forecast").main(["--months", months])
    assert f"--months: expected {other}, so that turnover" in capsys.readouterr().err


def test_forecast_beats_seasonal_naive_and_draws(tmp_path, capsys):
    few = [
        "--series",
        "co2",
        "--months",
        "18",
        "--updates",
        "40",
        "--networks",
        "2",
        "--paths",
        "20",
        "--device",
        "cpu",
    ]
    example("forecast").main([*few, "--out", str(tmp_path)])
    rows = re.findall(r"│ (\S+) +│ (\S+) +│ +([\d.]+) │ +([\d.]+) │ +([\d.]+)% │", capsys.readouterr().out)
    scores = {(series, model): tuple(map(float, numbers)) for series, model, *numbers in rows}
    assert [model for _, model in scores] == ["seasonal-naive", "smoothing", "SARIMA", "LSTM"] * 2
    for series in ("co2", "mean"):
        for k in range(2):
            assert scores[series, "LSTM"][k] < 0.7 * scores[series, "seasonal-naive"][k]
    assert (tmp_path / "forecast.png").stat().st_size > 10_000


@pytest.mark.parametrize(("name", "few"), [("forecast", ["--series", "turnover", "--batch", "8"]), ("anomaly", [])])
def test_forecast_and_anomaly_compare_with_torch(name, few, capsys):
    example(name).main([*few, "--compare", "--updates", "10", "--hidden-size", "8", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert float(re.search(r"losses are at most (\S+) apart", printed)[1]) < 1e-5
    assert len({*re.findall(r"│ +\d+ │ +(\d\.\d+) │", printed)}) == 6


def test_anomaly_knows_calm_years():
    anomaly = example("anomaly")
    assert anomaly.calm(1950, 1982) == [1950, 1955, 1956, 1960, 1961, 1962, 1967, 1971, 1974, 1975, 1979, 1980, 1981]
    spans = [event.months for event in anomaly.EVENTS]
    assert all(span.last - span.first >= 4 for span in spans)
    assert all(a.last < b.first for a, b in itertools.pairwise(spans))
    strong = [anomaly.name_of(event.months.first) for event in anomaly.EVENTS if event.strong]
    assert strong == ["1957-04", "1965-06", "1972-05", "1982-05", "1986-09", "1991-06", "1997-05"]
    assert anomaly.month_of("1950-01") == 0 and anomaly.month_of("2010-12") == 61 * 12 - 1


def test_anomaly_learns_from_calm_years_alone():
    anomaly = example("anomaly")
    years = anomaly.calm(1950, 1974)
    values = torch.randn(61 * 12, generator=torch.Generator().manual_seed(0))
    parts = anomaly.parts_of(anomaly.distances(values, years), years)
    assert [len(part) for part in parts] == [12, 24, 36, 12, 12]
    of_year = torch.cat(parts).view(-1, 12)
    torch.testing.assert_close(of_year.mean(0), torch.zeros(12))
    torch.testing.assert_close(of_year[0] - of_year[1], values[:12] - values[60:72])  # 1950 and 1955
    other = torch.full_like(values, 100)
    other[anomaly.months_of(years)] = values[anomaly.months_of(years)]
    for a, b in zip(parts, anomaly.parts_of(anomaly.distances(other, years), years), strict=True):
        assert torch.equal(a, b)


def test_anomaly_measures_errors_of_six_predictions():
    """A model that continues a straight line is wrong about a month that leaves it, and after that month."""
    anomaly = example("anomaly")

    class Line(torch.nn.Module):
        def forward(self, distance):
            return distance[..., None] + torch.arange(1.0, 7)

    distance = torch.arange(60.0)
    distance[40] += 9
    error = anomaly.errors(Line(), distance, "cpu")
    wrong = torch.zeros(60, 6)
    wrong[40] = 9
    for k in range(6):
        wrong[: 24 + k, k] = torch.nan
        wrong[41 + k, k] = -9
    torch.testing.assert_close(error, wrong, equal_nan=True)


def test_anomaly_judges_alarms_by_hand():
    anomaly = example("anomaly")
    error = torch.ones(61 * 12, 2) * torch.tensor([2.0, 3.0])
    error[anomaly.month_of("1974-03")] *= 2
    share = 60 / (59 + 4)  # the squares of five years that are held out are 1 but for one of 4
    assert anomaly.scored(error)[[0, anomaly.month_of("1974-03")]].tolist() == pytest.approx([share, 4 * share])
    high = [
        "1976-06",
        "1982-04",
        "1982-05",
        "1982-10",
        "1983-04",
        "1984-01",
        "1984-07",
        "1997-05",
        "1998-03",
        "2008-07",
    ]
    score = anomaly.scored(error)
    score[[anomaly.month_of(month) for month in high]] = 5 * share
    score[anomaly.month_of("1990-01")] = score[anomaly.month_of("1974-03")]  # as high as the threshold, not above
    threshold, found = anomaly.alarms(score)
    assert threshold == pytest.approx(4 * share)
    spans = ["1982-04 to 1982-10", "1983-04", "1984-01", "1984-07", "1997-05", "1998-03", "2008-07"]
    assert [str(alarm) for alarm in found] == spans
    judged = anomaly.judge(found)
    first = [None if month is None else anomaly.name_of(month) for month in judged.first]
    assert first == ["1982-04", None, None, None, "1997-05", None, None, None, None]
    assert [str(alarm) for alarm in judged.false] == ["1984-01", "1984-07", "2008-07"]


def test_anomaly_finds_strong_el_ninos_and_draws(tmp_path, capsys):
    anomaly = example("anomaly")
    anomaly.main(["--networks", "2", "--device", "cpu", "--out", str(tmp_path)])
    printed = " ".join(capsys.readouterr().out.split())
    assert "LSTM: 4 of 4 strong ones found" in printed
    assert len(re.findall(r"│ \d{4}-\d\d to \d{4}-\d\d │", printed)) == len(anomaly.TEST_EVENTS) == 9
    one, six, mean = map(float, re.search(r"off by (\S+) °C one.*by (\S+) °C 6.*by (\S+) °C", printed).groups())
    assert one < six < mean
    assert (tmp_path / "anomaly.png").stat().st_size > 10_000


def test_seq2seq_tests_days_that_are_not_in_training():
    seq2seq = example("seq2seq")
    seen, unseen = seq2seq.split_days()
    assert len({*seen, *unseen}) == len(seen) + len(unseen) == 36525 and len(unseen) == 3652
    assert min(seen + unseen) == datetime.date(1950, 1, 1) and max(seen + unseen) == datetime.date(2049, 12, 31)


def test_seq2seq_a_text_stands_for_one_day():
    seq2seq = example("seq2seq")
    days = [datetime.date(1950, 1, 1) + datetime.timedelta(k) for k in range(0, 36525, 29)]
    texts = [case(seq2seq.written(day, way)) for day in days for way in seq2seq.WAYS for case in seq2seq.CASES[1:]]
    owners = dict(zip(texts, [day for day in days for _ in range(2 * len(seq2seq.WAYS))], strict=True))
    assert all(owners[seq2seq.written(day, way).lower()] == day for day in days for way in seq2seq.WAYS)
    assert {*"".join(texts)} <= {*seq2seq.LETTERS}
    spoken = [seq2seq.written(datetime.date(2021, 3, day), "{nth}") for day in (1, 2, 3, 4, 11, 12, 13, 21, 22, 23, 31)]
    assert spoken == ["1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "22nd", "23rd", "31st"]
    ways = ("%A, {nth} of %B %Y", "%b {day}, %y", "{day}/{month}/%y")
    found = [seq2seq.written(datetime.date(2021, 3, 3), way) for way in ways]
    assert found == ["Wednesday, 3rd of March 2021", "Mar 3, 21", "3/3/21"]


def test_seq2seq_reads_alike_alone_in_a_batch_and_with_a_teacher():
    seq2seq = example("seq2seq")
    torch.manual_seed(0)
    model = seq2seq.Model(8)
    texts = ["3/3/21", "Wednesday, 3rd of March 2021", "MAR 3, 21"]
    answers, weights = model.read(texts)
    assert weights.shape == (10, 3, 28) and {*map(len, answers)} == {10}
    torch.testing.assert_close(weights.sum(-1), torch.ones(10, 3))
    for k, text in enumerate(texts):
        answer, own = model.read([text])
        assert answer == [answers[k]] and not weights[:, k, len(text) :].any()
        torch.testing.assert_close(own[:, 0], weights[:, k, : len(text)])
    codes, lengths = seq2seq.coded(texts, seq2seq.LETTERS, "cpu")
    wrote, _ = seq2seq.coded(answers, seq2seq.DIGITS, "cpu")
    before = torch.cat([torch.full((1, 3), seq2seq.BEGIN), wrote[:-1]])
    assert torch.equal(model(codes, lengths, before).argmax(-1), wrote)


def test_seq2seq_learns_reads_and_draws(tmp_path, capsys):
    few = ["--updates", "120", "--batch", "32", "--hidden-size", "32", "--rate", "0.01", "--device", "cpu"]
    example("seq2seq").main([*few, "--read", "3rd of March 2021", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert len(re.findall(r"│ (\S[^│]*?) +│ [\d-]{10} │ +[\d.]+% │", printed)) == 15
    assert float(re.search(r"Of 3,652 days, ([\d.]+)% are read", printed)[1]) > 80
    assert re.search(r"3rd of March 2021 is read as [\d-]{10}", printed)
    assert (tmp_path / "seq2seq.png").stat().st_size > 10_000


def test_seq2seq_compares_with_torch(capsys):
    few = ["--updates", "8", "--batch", "16", "--hidden-size", "16", "--device", "cpu"]
    example("seq2seq").main([*few, "--compare"])
    printed = capsys.readouterr().out
    assert float(re.search(r"losses are at most (\S+) apart", printed)[1]) < 1e-5
    assert len({*re.findall(r"│ +\d+ │ +(\d\.\d+) │", printed)}) > 4


def test_seq2seq_names_what_it_cannot_read(capsys):
    with pytest.raises(SystemExit):
        example("seq2seq").main(["--read", "3 März 2021"])
    assert "--read: expected letters and digits of English dates, got 'ä'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def classify():
    """The example with a tenth of its words."""
    module = example("classify")
    few = dict([*module.collected().items()][::10])
    module.collected = lambda: few
    return module


def test_classify_splits_words_by_how_they_begin(classify):
    words = classify.collected()
    seen, unseen = classify.split(words)
    assert {*seen, *unseen} == {*words} and len(seen) + len(unseen) == len(words) > 2000
    assert 0.05 < len(unseen) / len(words) < 0.25
    assert not {word[:4] for word in seen} & {word[:4] for word in unseen}
    assert len({*words.values()}) == 24 and all(word.isalpha() and word.islower() and len(word) > 2 for word in words)


def test_classify_takes_words_that_one_language_has():
    classify = example("classify")
    words = {"da": "mandag fredag", "sv": "måndag fredag", "tr": "Temmuz/ay, {0} km²"}
    classify.LANGUAGES = [*words]
    classify.localedata.load = lambda code: {kind: {"wide": {1: words[code]}} for kind in classify.KINDS}
    assert classify.collected() == {"mandag": 0, "måndag": 1, "temmuz": 2}


def test_classify_reads_a_word_alone_and_in_a_batch_alike(classify):
    torch.manual_seed(0)
    model = classify.Model(26, 8, 0.5)
    alphabet = "".join(map(chr, range(97, 123)))
    words = ["uge", "straatsburg", "måned"]
    together = classify.predicted(model, words, alphabet, "cpu")
    for word, chances in zip(words, together, strict=True):
        torch.testing.assert_close(classify.predicted(model, [word], alphabet, "cpu")[0], chances)
    assert not together[0].isclose(together[1]).any()


def test_classify_counts_what_is_taken_for_what(classify):
    answers, found = torch.arange(24).repeat(2), torch.tensor([1, *range(1, 24), *range(24)])
    confusion = classify.confusion_of(answers, found)
    assert confusion[0, :3].tolist() == [0.5, 0.5, 0] and torch.equal(confusion[1:], torch.eye(24)[1:])


def test_classify_learns_and_draws(classify, tmp_path, capsys):
    few = ["--updates", "150", "--hidden-size", "32", "--rate", "0.02", "--device", "cpu"]
    classify.main([*few, "--ask", "hvor er biblioteket", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    rows = dict(re.findall(r"│ (\S[^│]*?) +│ +[\d,]+ │ +([\d.]+)% │ +[\d.]+% │", printed))
    assert [*rows] == ["regression on letters", "regression on triples", "bidirectional LSTM"]
    assert all(25 < float(right) < 95 for right in rows.values())
    assert re.search(r"most often takes \w+ for \w+ \(\d+%\)", printed)
    assert re.search(r"hvor er biblioteket: \w+ \d+%, \w+ \d+%, \w+ \d+%", printed)
    assert (tmp_path / "classify.png").stat().st_size > 10_000


def test_classify_compares_with_torch(classify, capsys):
    classify.main(["--updates", "8", "--batch", "16", "--hidden-size", "16", "--device", "cpu", "--compare"])
    printed = capsys.readouterr().out
    assert float(re.search(r"losses are at most (\S+) apart", printed)[1]) < 1e-5
    assert len({*re.findall(r"│ +\d+ │ +(\d\.\d+) │", printed)}) > 4
