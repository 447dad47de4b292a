"""Metrics are true means: over elements, not over batches of them."""

import math
import time

import pytest
import torch

from lightning_grpo.metrics import Max, Mean, Min, Percentile99, Spread, Total, Window
from lightning_grpo.monitor.observe import observe_completions, observe_groups, observe_rewards
from lightning_grpo.monitor.terminal import figures, held_out_figures


def test_uneven_parts_merge_to_the_mean_of_all():
    window = Window()
    window.mean("a", torch.tensor([1.0, 2.0, 3.0]))
    window.mean("a", torch.tensor([10.0, float("nan")]))
    window.add({"low": Min(torch.tensor(2.0)), "high": Max(torch.tensor(2.0))})
    window.add({"low": Min(torch.tensor(1.0)), "high": Max(torch.tensor(5.0))})
    assert window.reduce() == {"a": 4.0, "low": 1.0, "high": 5.0}
    assert window.reduce() == {}


def test_nothing_is_left_out_and_nan_is_not_hidden():
    window = Window()
    window.mean("nothing", torch.tensor([float("nan")]))
    window.add({"broken": Mean(torch.tensor(float("nan")), torch.tensor(1)), "none": Min(torch.tensor(math.inf))})
    values = window.reduce()
    assert values.keys() == {"broken"} and math.isnan(values["broken"])


def test_spread_is_the_standard_deviation_of_all_parts():
    x = torch.tensor([1.0, 4.0, 9.0, 16.0, 25.0], dtype=torch.float64)
    parts = [Spread(p.sum(), (p**2).sum(), torch.tensor(len(p))) for p in (x[:1], x[1:])]
    assert float(parts[0].merge(parts[1]).compute()) == pytest.approx(float(x.std()))
    assert float(parts[0].compute()) == 0


@pytest.mark.parametrize("scale", [1e-6, 1e-2, 3.0])
def test_the_99th_percentile_of_all_parts(scale):
    x = scale * torch.randn(5000, generator=torch.Generator().manual_seed(0)).abs()
    window = Window()
    for part in x.split(700):
        counted = torch.cat([part, torch.tensor([1e6, torch.nan])])
        window.add({"p99": Percentile99.of(counted, counted < 1e5)})
    assert window.reduce()["p99"] == pytest.approx(float(x.quantile(0.99)), rel=0.03)


def test_a_percentile_of_nothing_is_left_out_and_nan_is_large():
    values, everything = torch.tensor([0.0, torch.nan]), torch.ones(2, dtype=torch.bool)
    window = Window()
    window.add({"none": Percentile99.of(values, ~everything), "zero": Percentile99.of(values[:1], everything[:1])})
    window.add({"broken": Percentile99.of(values, everything)})
    assert window.reduce() == {"zero": 0.0, "broken": pytest.approx(100, rel=0.03)}


def test_the_clock_gives_the_rest_to_the_update():
    window = Window()
    with window.timed("rollout"):
        sum(range(10**5))
    window.seconds("reward", 0.0)
    window.stop_clock()
    values = window.reduce()
    phases = sum(value for name, value in values.items() if name.startswith("time/"))
    assert phases == pytest.approx(values["step_time"])
    assert values["time/rollout"] > 0 and values["time/update"] > 0


def test_completions_and_rewards():
    window = Window()
    observe_completions(window, torch.tensor([2, 4, 6]), torch.tensor([False, False, True]))
    rewards = torch.tensor([[1.0, float("nan")], [0.0, 2.0], [0.0, float("nan")]])
    observe_rewards(window, rewards, ["one", "two"], torch.tensor([1.0, 0.5]))
    observe_groups(window, torch.tensor([1.0, 1.0, 0.0, 1.0]), 2)
    values = window.reduce()
    assert values["completions/mean_length"] == 4
    assert values["completions/clipped_ratio"] == pytest.approx(1 / 3)
    assert values["completions/mean_terminated_length"] == 3
    assert (values["completions/min_length"], values["completions/max_length"]) == (2, 6)
    assert values["reward"] == pytest.approx(2 / 3)
    assert values["rewards/two/mean"] == 2 and values["rewards/two/std"] == 0
    assert values["frac_reward_zero_std"] == 0.5
    assert values["group_reward_std"] == pytest.approx(0.5 * math.sqrt(0.5))
    # TRL's: of all completions, 1, 1 and 0
    assert values["reward_std"] == pytest.approx(math.sqrt(1 / 3))


def test_totals_add_up():
    window = Window()
    window.add({"tokens": Total(torch.tensor(3))})
    window.add({"tokens": Total(torch.tensor(4))})
    assert window.reduce() == {"tokens": 7.0}


def test_a_paused_clock_stands_still(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    window = Window()
    now[0] += 2
    window.pause()
    now[0] += 1000
    window.go_on()
    window.go_on()
    now[0] += 3
    window.stop_clock()
    assert window.reduce() == {"time/update": 5.0, "step_time": 5.0}


def test_what_a_person_is_shown():
    line = figures({"reward": 0.5, "loss": -0.01, "time/rollout": 1.25, "unknown": 3})
    assert line == "reward 0.500  loss -0.0100  │ rollout 1.2s"
    shown = held_out_figures({"val/reward": 1.0, "val/pass@8": 0.5, "val/rewards/x/std": 0.1})
    assert shown == {"val/reward": 1.0, "val/pass@8": 0.5}
