"""The report: grouping of runs, comparison, sections, and the command."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from fitting import fit, module
from lightning import Callback
from lightning.pytorch.loggers import CSVLogger
from run_folders import FINDING, change, metrics, write_run

from lightning_grpo.errors import RunError, UserError
from lightning_grpo.record.reader import read_run
from lightning_grpo.report import command, comparison, curves, findings, header, page, phases, plan
from lightning_grpo.report.arms import arms, run_names
from lightning_grpo.report.callback import Report
from lightning_grpo.report.charts import chart
from lightning_grpo.report.markup import duration, number, script_json
from lightning_grpo.report.series import POINTS, curve, smooth
from lightning_grpo.report.statistics import paired_interval
from lightning_grpo.stopping import Stopped

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u2028"


def figures(html: str) -> list[dict]:
    """The plotly figures of a page or of a section."""
    return [json.loads(text) for text in re.findall(r'<script type="application/json">(.*?)</script>', html)]


def seeds(tmp_path, name, count, **changes):
    return [read_run(write_run(tmp_path / name / f"seed{i}", seed=i, **changes)) for i in range(count)]


# ── Statistics ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("draw", ["normal", "exponential", "coarse"])
@pytest.mark.parametrize("pairs", [4, 5, 6])
def test_equal_arms_do_not_win_more_often_than_the_level_allows(draw, pairs):
    random = np.random.default_rng(pairs)
    wins = 0
    for _ in range(200):
        a, b = {
            "normal": lambda: random.normal(0.6, 0.05, (2, pairs)),
            "exponential": lambda: random.exponential(0.1, (2, pairs)),
            "coarse": lambda: random.binomial(64, 0.7, (2, pairs)) / 64,
        }[draw]()
        interval = paired_interval(b - a)
        wins += interval is not None and interval.excludes_zero
    assert wins <= 0.05 * 200


def test_a_true_difference_is_found_and_its_interval_has_the_level():
    random = np.random.default_rng(0)
    intervals = [paired_interval(random.normal(0.15, 0.05, 8)) for _ in range(200)]
    assert np.mean([interval.low > 0 for interval in intervals]) >= 0.95
    assert np.mean([interval.low <= 0.15 <= interval.high for interval in intervals]) >= 0.93


@pytest.mark.parametrize("pairs", [0, 1, 2, 3])
def test_too_few_pairs_have_no_interval(pairs):
    assert paired_interval(np.linspace(0.1, 0.2, pairs)) is None


def test_equal_differences_have_an_interval_without_width():
    interval = paired_interval(np.zeros(4))
    assert (interval.low, interval.high) == (0.0, 0.0)
    assert not interval.excludes_zero


# ── Arms ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_runs_that_differ_in_their_seed_are_one_arm(tmp_path):
    found = arms(seeds(tmp_path, "a", 3) + seeds(tmp_path, "b", 2, lr=3e-5))
    assert [(arm.name, len(arm.runs)) for arm in found] == [("lr 1e-05", 3), ("lr 3e-05", 2)]


def test_arms_that_differ_in_several_options_are_named_by_their_folders(tmp_path):
    found = arms(seeds(tmp_path, "a", 1) + seeds(tmp_path, "b", 1, lr=3e-5, steps=20))
    assert [arm.name for arm in found] == ["a/seed0", "b/seed0"]


def test_runs_without_a_configuration_are_arms_of_their_own(tmp_path):
    runs = seeds(tmp_path, "a", 2)
    for run in runs:
        run.config = {}
    assert [arm.name for arm in arms(runs)] == ["seed0", "seed1"]
    assert "model.optimizer.lr" not in comparison.render([*runs, read_run(write_run(tmp_path / "b"))])


def test_names_are_short_and_distinct(tmp_path):
    folders = [tmp_path / run / "logs" / f"version_{i}" for run, i in (("x", 0), ("y", 0), ("y", 1))]
    runs = [read_run(write_run(folder)) for folder in folders]
    assert run_names(runs[:2]) == ["x", "y"]
    assert run_names(runs[1:]) == ["y/version_0", "y/version_1"]


# ── Comparison ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_better_arm_is_named_with_its_interval(tmp_path):
    html = comparison.render(seeds(tmp_path, "a", 6) + seeds(tmp_path, "b", 6, lr=3e-5, gain=0.8))
    found = re.search(r"Held-out pass@1, last: lr 3e-05 is (0\.\d+) higher than lr 1e-05 \(95 % interval", html)
    assert 0.15 < float(found[1]) < 0.25
    assert "<td>model.optimizer.lr</td><td>1e-05</td><td>3e-05</td>" in html


def test_equal_arms_have_no_winner(tmp_path):
    html = comparison.render(seeds(tmp_path, "a", 6, gain=0.6) + seeds(tmp_path, "b", 6, lr=3e-5, gain=0.601))
    assert "no difference between lr 3e-05 and lr 1e-05 was found" in html


def test_of_few_or_unpaired_seeds_nothing_is_concluded(tmp_path):
    base, other = seeds(tmp_path, "a", 3), seeds(tmp_path, "b", 3, lr=3e-5, gain=0.9)
    assert "over 3 seeds, from which nothing can be concluded. Run at least 4 seeds of both." in comparison.render(
        base + other
    )
    assert "can&#x27;t be compared: no seed occurs in both" in comparison.render([base[0], other[1]])


def test_pairs_are_compared_up_to_the_step_that_both_have_reached(tmp_path):
    long, short = seeds(tmp_path, "a", 4, steps=80), seeds(tmp_path, "b", 4, lr=3e-5, steps=40)
    base, other = arms(long + short)
    found = {each.measure.name: each for each in comparison.compare(base, other)}
    expected = [[line["val/pass@1"] for line in metrics(80, seed=i) if "val/pass@1" in line][3] for i in range(4)]
    assert found["held-out pass@1, last"].base == pytest.approx(expected)


def test_with_several_arms_the_intervals_are_wider(tmp_path):
    runs = [seeds(tmp_path, f"{lr}", 5, lr=lr) for lr in (1e-5, 2e-5, 3e-5)]
    assert "97.5 % interval" in comparison.render([run for arm in runs for run in arm])


def test_one_arm_is_not_compared(tmp_path):
    assert comparison.render(seeds(tmp_path, "a", 3)) == ""


# ── Sections ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_curve_over_runs_has_their_mean_and_range():
    runs = [[{"step": 1, "x": 1.0}, {"step": 2, "x": 3.0}], [{"step": 1, "x": 2.0}, {"step": 2, "x": None}]]
    found = curve(runs, "x")
    assert found.steps.tolist() == [1, 2]
    assert found.mean.tolist() == [1.5, 3.0]
    assert (found.low.tolist(), found.high.tolist()) == ([1.0, 3.0], [2.0, 3.0])
    assert curve(runs, "y") is None


def test_a_long_run_is_thinned_out_to_the_means_and_the_range_of_intervals():
    values = np.random.default_rng(0).random(10 * POINTS)
    found = curve([[{"step": i + 1, "x": value} for i, value in enumerate(values)]], "x")
    parts = values.reshape(POINTS, 10)
    assert found.mean == pytest.approx(parts.mean(1))
    assert found.low == pytest.approx(parts.min(1))
    assert found.high == pytest.approx(parts.max(1))


def test_the_moving_average_is_centred_and_shorter_at_both_ends():
    line = np.linspace(0, 1, 30)
    assert smooth(line, 7)[3:-3] == pytest.approx(line[3:-3])
    assert smooth(np.array([0.0, 3.0, 0.0]), 3) == pytest.approx([1.5, 1, 1.5])
    assert smooth(line, 1) == pytest.approx(line)


def test_every_metric_is_drawn_once(tmp_path):
    run = read_run(write_run(tmp_path / "run"))
    html = curves.render([run])
    titles = re.findall(r"<figcaption><b>([^<]+)</b>", html)
    assert titles[:2] == ["Reward", "Held-out pass@1"]
    assert len(titles) == len(set(titles))
    assert "sampling/kl" in titles
    reward = figures(html)[0]["data"][0]
    assert reward["y"] == pytest.approx([line["reward"] for line in run.metrics], rel=1e-4)
    assert "nan" not in html.lower().replace("finance", "")


def test_the_time_of_the_phases_is_stacked(tmp_path):
    html = phases.render([read_run(write_run(tmp_path / "run"))])
    stack = figures(html)[0]["data"]
    assert [trace["name"] for trace in stack] == ["rollout", "sync", "update"]
    assert {trace["stackgroup"] for trace in stack} == {"phases"}
    assert "2.20 s (33%)" in html


def test_a_chart_is_described_for_readers_who_cannot_see_it():
    line = {"name": "reward", "x": [1, 2, 3], "y": [0.5, 0.25, 0.75]}
    band = {"hoverinfo": "skip", "x": [1, 2], "y": [0.0, 1.0]}
    bars = {"name": "rollout", "x": [1.5, 2.0], "y": ["a", "<b>"]}
    html = chart("Reward", [band, line, bars], unit="mean")
    label = (
        "Reward (mean). reward: 0.5 at step 1, 0.75 at step 3, minimum 0.25, maximum 0.75. rollout: a 1.5, &lt;b&gt; 2."
    )
    assert f'role="img" aria-label="{label}"' in html


def test_a_long_first_step_does_not_hide_the_others(tmp_path):
    run = read_run(write_run(tmp_path / "run"))
    run.metrics[0]["step_time"] = 100.0
    html = phases.render([run])
    assert "The first step, which includes compilation and allocation, took 2 min." in html
    assert figures(html)[0]["layout"]["yaxis"]["range"] == pytest.approx([0, 7.15])


def test_the_prediction_is_compared_with_the_measurement(tmp_path):
    html = plan.render([read_run(write_run(tmp_path / "run"))])
    assert "<td>rollout, seconds per step</td><td>2.00</td><td>2.20</td><td>×1.10</td>" in html
    assert "<td>memory of update, GiB</td><td>5.20</td><td>4.80</td><td>×0.92</td>" in html
    assert "40 of 40 steps took 4 min; 4 min were predicted." in html
    assert plan.render([read_run(write_run(tmp_path / "other", prediction=None))]) == ""


def test_a_finding_shows_its_evidence_its_remedy_and_its_samples(tmp_path):
    folder = write_run(tmp_path / "run")
    assert findings.render([read_run(folder)]) == ""
    (folder / "config.yaml").write_text("diagnosis: {enabled: true}")
    assert "The diagnosis has found nothing." in findings.render([read_run(folder)])
    (folder / "findings.jsonl").write_text(json.dumps(FINDING) + "\n")
    html = findings.render([read_run(folder)])
    assert "step 30, since step 20" in html
    assert "<p>The entropy fell from 1.9 to 0.05 nats per token.</p>" in html
    assert "<p><b>What to do:</b> Add an entropy bonus.</p>" in html
    assert "model:\n  objective:\n    entropy_coef: 0.01" in html
    assert '<a href="#sample-30-2-1">' in html
    timeline, evidence = figures(html)
    assert timeline["data"][0]["x"] == [20, 30]
    assert evidence["data"][0]["y"] == [0.4, 0.1, 0.05]


def test_the_header_names_damaged_files_and_the_resumed_run(tmp_path):
    parent = write_run(tmp_path / "version_0", steps=20)
    folder = write_run(tmp_path / "version_1", resumed_from={"folder": "../version_0", "step": 10})
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "rew')
    html = header.render([read_run(folder)])
    assert "../version_0, step 10" in html
    assert "metrics.jsonl was left out" in html
    assert parent.exists()


def test_numbers_and_times_are_short():
    values = (0.12345, 12.345, 1234567.0, 1.2e-5, 0, None, float("nan"))
    texts = ["0.123", "12.3", "1.23e+06", "1.20e-05", "0", "–", "–"]
    assert [number(value) for value in values] == texts
    assert [duration(value) for value in (4.2, 45, 720, 12600)] == ["4.2 s", "45 s", "12 min", "3.5 h"]


# ── Page ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Elements(HTMLParser):
    """The elements of a page, and whether each is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "input", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_one_file_whose_elements_are_closed(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "findings.jsonl").write_text(json.dumps(FINDING) + "\n")
    html = page.page([read_run(folder)])
    found = Elements()
    found.feed(html)
    assert not found.open
    # no address that the browser would load
    assert not [attrs for _, attrs in found.seen if "src" in attrs or attrs.get("href", "#")[0] != "#"]
    ids = [attrs["id"] for _, attrs in found.seen if "id" in attrs]
    assert len(ids) == len(set(ids))
    links = {attrs["href"][1:] for tag, attrs in found.seen if tag == "a"}
    assert {"findings", "metrics", "time", "prediction"} <= links
    assert "data-reload" not in html[:1000]


def test_whatever_a_run_contains_is_escaped(tmp_path):
    folder = write_run(tmp_path / "run")
    change(folder, **dict.fromkeys(("model", "machine", "started", "seed"), HOSTILE))
    hostile = FINDING | dict.fromkeys(("rule", "message", "advice", "source", "severity"), HOSTILE)
    hostile |= {"change": {HOSTILE: HOSTILE}, "evidence": {HOSTILE: [[1, 2], [2, HOSTILE]]}}
    (folder / "findings.jsonl").write_text(json.dumps(hostile) + "\n")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 41, HOSTILE: 1.0}) + "\n" + HOSTILE)
    config = {"data": {"source": HOSTILE}, HOSTILE: HOSTILE}
    (folder / "config.yaml").write_text(json.dumps(config))
    html = page.page([read_run(folder), read_run(write_run(tmp_path / "other"))])
    found = Elements()
    found.feed(html)
    assert not found.open
    assert "img" not in {tag for tag, _ in found.seen}
    assert json.loads(script_json({"x": HOSTILE})) == {"x": HOSTILE}
    assert "<" not in script_json(HOSTILE)


DAMAGED = [None, [], "x", {"x": []}, -1, 10**30, {"init_args": "x"}]


@pytest.mark.parametrize("value", DAMAGED, ids=str)
def test_a_run_with_damaged_values_has_a_report(tmp_path, value):
    names = ("prediction", "resumed_from", "max_steps", "machine", "model", "started", "seed")
    folder = write_run(tmp_path / "run")
    change(folder, **dict.fromkeys(names, value))
    with (folder / "findings.jsonl").open("w") as file:
        for name in FINDING:
            if name != "step":
                file.write(json.dumps(FINDING | {name: value}) + "\n")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 41, "reward": value, "step_time": value, "completion_tokens": value}) + "\n")
    (folder / "config.yaml").write_text(json.dumps({"data": value, "model": value, "seed_everything": value}))
    other = write_run(tmp_path / "other", seed=1, prediction={"step_seconds": {"update": value}})
    for runs in ([folder], [folder, other]):
        html = "".join(section.render([read_run(path) for path in runs]) for section in page.SECTIONS)
        assert '<section id="metrics">' in html


def test_a_run_without_a_step_has_a_report(tmp_path):
    folder = write_run(tmp_path / "run", steps=0)
    assert "<h1>run</h1>" in page.page([read_run(folder)])


# ── Command ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_command_writes_beside_the_logs_or_where_it_is_asked_to(tmp_path, capsys):
    folder = write_run(tmp_path / "run" / "logs" / "version_0")
    command.main([str(tmp_path / "run")])
    assert capsys.readouterr().out == f"report: {folder / 'report.html'}\n"
    assert (folder / "report.html").read_text().startswith("<!doctype html>")
    command.main([str(folder), "--out", str(tmp_path / "new" / "x.html")])
    assert (tmp_path / "new" / "x.html").exists()
    assert not list(tmp_path.rglob("*.partial"))


def test_fit_writes_the_report_and_prints_its_path(tmp_path, tiny_model_path, capsys):
    settings = {"logger": CSVLogger(tmp_path, "logs"), "callbacks": [Report()], "log_every_n_steps": 1}
    fit(tmp_path, module(tiny_model_path), steps=2, **settings)
    path = tmp_path / "logs" / "version_0" / "report.html"
    assert f"report: {path}\n" in capsys.readouterr().out
    assert figures(path.read_text())[0]["data"][0]["x"] == [1, 2]


@pytest.mark.parametrize(
    ("error", "written"), [(RunError("halted"), True), (Stopped(15), False)], ids=["error", "stop"]
)
def test_a_run_that_ends_with_an_error_has_a_report_unless_a_signal_stops_it(tmp_path, tiny_model_path, error, written):
    class Fail(Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 2:
                raise error

    settings = {"logger": CSVLogger(tmp_path, "logs"), "callbacks": [Fail(), Report()], "log_every_n_steps": 1}
    with pytest.raises(type(error)):
        fit(tmp_path, module(tiny_model_path), steps=3, **settings)
    assert (tmp_path / "logs" / "version_0" / "report.html").exists() is written


def test_without_plotly_or_if_it_is_not_wanted_fit_writes_no_report(tmp_path, monkeypatch, capsys):
    trainer = SimpleNamespace(
        is_global_zero=True, fast_dev_run=False, log_dir=str(write_run(tmp_path / "run")), loggers=[]
    )
    monkeypatch.setattr("lightning_grpo.report.callback.find_spec", lambda name: None)
    for report in (Report(enabled=False), Report()):
        assert capsys.readouterr().out == ""
        report.on_fit_start(trainer, None)
        report.on_fit_end(trainer, None)
        assert not (tmp_path / "run" / "report.html").exists()
    assert "pip install 'lightning-grpo[report]'" in capsys.readouterr().out


def test_a_report_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    trainer = SimpleNamespace(is_global_zero=True, fast_dev_run=False, loggers=[], log_dir=str(tmp_path))
    report = Report()
    report.on_fit_start(trainer, None)
    with caplog.at_level(logging.WARNING, logger="lightning_grpo"):
        report.on_fit_end(trainer, None)
    assert "no report was written" in caplog.text


def test_wrong_arguments_are_named(tmp_path):
    with pytest.raises(UserError, match="missing is not a folder; name the folder of a run"):
        command.main([str(tmp_path / "missing")])
    with pytest.raises(UserError, match="--live is 0; set 1 or more seconds"):
        command.main([str(tmp_path), "--live", "0"])


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    folder = write_run(tmp_path / "run")
    place = folder / "config.yaml" / "x.html"
    with pytest.raises(UserError, match=rf"can't be written to {re.escape(str(place))} \(.*\); set another file"):
        command.main([str(folder), "--out", str(place)])


def test_a_live_report_follows_the_run_until_its_end(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run", steps=10, max_steps=11)
    states = []

    def sleep(seconds: float) -> None:
        states.append('data-reload="2"' in (folder / "report.html").read_text())
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"step": 11, "rew' if len(states) == 1 else 'ard": 0.5}\n')

    monkeypatch.setattr(command.time, "sleep", sleep)
    command.main([str(folder), "--live", "2"])
    assert states == [True, True]
    html = (folder / "report.html").read_text()
    assert "data-reload" not in html[:1000]
    assert "11 of 11" in html


def test_ctrl_c_ends_a_live_report_with_a_page_that_is_not_reloaded(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run", steps=10, max_steps=11)

    def sleep(seconds: float) -> None:
        raise Stopped(signal.SIGINT)

    monkeypatch.setattr(command.time, "sleep", sleep)
    command.main([str(folder), "--live", "2"])
    assert "data-reload" not in (folder / "report.html").read_text()[:1000]


def test_a_run_that_writes_nothing_for_long_has_ended(tmp_path):
    run = read_run(write_run(tmp_path / "run", steps=10, max_steps=20))
    assert not command.has_ended(run, patience=100.0)
    assert command.has_ended(run, patience=0.0) is False  # 20 steps are longer
    for file in run.folder.iterdir():
        os.utime(file, (0, 0))
    assert command.has_ended(run, patience=100.0)


def test_the_command_imports_neither_torch_nor_lightning(tmp_path):
    folder = write_run(tmp_path / "run")
    code = (
        "import sys; from lightning_grpo.cli import main; main(['report', sys.argv[1]]); "
        "assert not {'torch', 'lightning', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
