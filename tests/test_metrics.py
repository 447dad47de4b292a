"""Metrics are true means: over elements, not over batches of them."""

import math
import os
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_grpo.metrics import (
    EffectiveShare,
    Max,
    Mean,
    Min,
    NormRatio,
    Percentile,
    Percentile99,
    Spread,
    Total,
    Window,
)
from lightning_grpo.monitor.observe import (
    observe_completions,
    observe_groups,
    observe_repetition,
    observe_rewards,
    observe_sources,
    pass_at,
    powers_of_two,
    reward_length_correlation,
    variance_shares,
)
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
    observe_rewards(window, rewards, rewards * torch.tensor([1.0, 0.5]), ["one", "two"])
    totals = torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [2.0, 0.0]])
    observe_groups(window, totals, totals >= 1)
    values = window.reduce()
    assert values["completions/mean_length"] == 4
    assert values["completions/clipped_ratio"] == pytest.approx(1 / 3)
    assert values["completions/mean_terminated_length"] == 3
    assert (values["completions/min_length"], values["completions/max_length"]) == (2, 6)
    assert values["reward"] == pytest.approx(2 / 3)
    assert values["rewards/two/mean"] == 2 and values["rewards/two/std"] == 0
    assert values["rewards/two/contribution"] == 1
    assert values["frac_reward_zero_std"] == 0.5
    assert values["group_reward_std"] == pytest.approx(3 * math.sqrt(0.5) / 4)
    assert [values[f"groups/{kind}"] for kind in ("all_right", "all_wrong", "mixed")] == [0.25, 0.25, 0.5]
    # TRL's: of all completions, 1, 1 and 0
    assert values["reward_std"] == pytest.approx(math.sqrt(1 / 3))


@given(st.integers(1, 4), st.integers(0, 1000))
def test_parts_of_any_size_give_the_metrics_of_the_whole(parts, seed):
    random = torch.Generator().manual_seed(seed)
    x, y = torch.rand(2, 23, generator=random, dtype=torch.float64)
    window = Window()
    for a, b in zip(x.split(23 // parts + 1), y.split(23 // parts + 1), strict=True):
        window.add({"p90": Percentile(a, torch.tensor(0.9)), "ess": EffectiveShare.of(a.log(), a >= 0)})
        window.add({"ratio": NormRatio(a.square().sum(), b.square().sum())})
    assert window.reduce() == pytest.approx(
        {
            "p90": float(x.quantile(0.9)),
            "ess": float(x.sum() ** 2 / (23 * x.square().sum())),
            "ratio": float(x.norm() / y.norm()),
        }
    )


def test_masked_values_are_not_looked_at():
    x, mask = torch.tensor([1.0, torch.nan, 3.0, torch.inf]), torch.tensor([True, False, True, False])
    assert float(Spread.masked(x, mask).compute()) == pytest.approx(math.sqrt(2))
    assert float(EffectiveShare.of(x.log(), mask).compute()) == pytest.approx(16 / 20)


@pytest.mark.parametrize("shift", [0.0, 2000.0, -2000.0])
def test_the_effective_share_does_not_depend_on_the_scale_of_the_weights(shift):
    log_weights = torch.tensor([1.0, 1.0, 1.0, 9.0], dtype=torch.float64).log() + shift
    window = Window()
    for part in log_weights.split(1):
        window.add({"ess": EffectiveShare.of(part, torch.tensor([True]))})
    window.add({"ess": EffectiveShare.of(log_weights, torch.zeros(4, dtype=torch.bool))})
    assert window.so_far("ess") == pytest.approx(12**2 / 84 / 4)
    assert window.so_far("absent") is None
    assert window.reduce() == {"ess": pytest.approx(12**2 / 84 / 4)}


def test_lengths_have_exact_percentiles():
    lengths = torch.arange(1, 102)
    window = Window()
    for part in lengths[torch.randperm(101, generator=torch.Generator().manual_seed(0))].split(30):
        observe_completions(window, part, torch.zeros(len(part), dtype=torch.bool))
    values = window.reduce()
    assert [values[f"completions/p{p}_length"] for p in (10, 50, 90, 99)] == pytest.approx([11, 51, 91, 100])


def test_repetition_counts_what_occurred_earlier():
    window = Window()
    ids = torch.stack([torch.full((9,), 7), torch.arange(9), torch.ones(9, dtype=torch.long)])
    mask = torch.arange(9) < torch.tensor([[8], [9], [3]])
    # of five 4-grams four are the first one again; all distinct; too short to have any
    observe_repetition(window, ids, mask)
    assert window.reduce()["completions/repetition"] == pytest.approx((4 / 5 + 0) / 2)
    ids = torch.randint(0, 3, (1, 200), generator=torch.Generator().manual_seed(0))
    grams = [tuple(ids[0, i : i + 4].tolist()) for i in range(197)]
    observe_repetition(window, ids, torch.ones_like(ids).bool())
    assert window.reduce()["completions/repetition"] == pytest.approx(1 - len(set(grams)) / 197)
    observe_repetition(window, ids[:, :3], torch.ones(1, 3).bool())
    assert window.reduce() == {}


def test_figures_of_tokens_are_not_rounded_to_the_default_type():
    """Lightning's precision bf16-true makes it bfloat16."""
    lengths, ids = torch.tensor([1000, 1003]), torch.ones(1, 3010, dtype=torch.long)
    window, default = Window(), torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        observe_completions(window, lengths, torch.tensor([False, True]))
        observe_repetition(window, ids, ids.bool())
    finally:
        torch.set_default_dtype(default)
    values = window.reduce()
    assert values["completions/p90_length"] == pytest.approx(1002.7, abs=1e-9)
    assert values["completions/repetition"] == pytest.approx(3006 / 3007, abs=1e-12)


def test_variance_shares_of_contributions():
    window, nan = Window(), float("nan")
    contributions = torch.tensor(
        [[2.0, 0.5, 3.0, nan], [-2.0, -0.5, 3.0, nan], [2.0, 0.5, nan, nan], [-2.0, -0.5, 3, nan]]
    )
    observe_rewards(window, contributions, contributions, ["a", "b", "c", "never"])
    values = window.reduce()
    shares = variance_shares(values, ["a", "b", "c", "never"])
    assert shares == pytest.approx(
        {f"rewards/{name}/variance_share": x for name, x in {"a": 16 / 17, "b": 1 / 17, "c": 0, "never": 0}.items()}
    )
    assert all(name.startswith("reward") for name in values)
    window = Window()
    observe_rewards(window, contributions[:, :1], contributions[:, :1], ["a"])
    values = window.reduce()
    assert variance_shares(values, ["a"]) == {} and "rewards/a/contribution" not in values


def test_the_correlation_of_reward_and_length_is_within_groups():
    """Long groups have high rewards, but within each group shorter is better."""
    lengths = torch.tensor([[1, 2, 3], [11, 12, 13], [5, 5, 9]])
    totals = torch.tensor([[0.3, 0.2, 0.1], [1.3, 1.2, 1.1], [1.0, torch.nan, 1.0]])
    whole = reward_length_correlation(totals, lengths)
    parts = reward_length_correlation(totals[:1], lengths[:1]).merge(reward_length_correlation(totals[1:], lengths[1:]))
    # the deviations of the third group: 0, 0 in the reward, and −2, 2 in the length
    assert float(whole.compute()) == pytest.approx(-0.4 / math.sqrt(0.04 * (4 + 8)), rel=1e-6)
    assert float(parts.compute()) == pytest.approx(float(whole.compute()))
    window = Window()
    window.add({"none": reward_length_correlation(torch.full((2, 3), 0.1), torch.tensor([[1, 2, 3], [4, 5, 6]]))})
    assert window.reduce() == {}


def test_groups_of_each_source():
    window = Window()
    totals, lengths = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]), torch.tensor([[2, 4], [6, 6], [9, 9]])
    observe_sources(window, ["a", "a", ""], totals, lengths, totals >= 1)
    observe_sources(window, ["b/c"], torch.tensor([[0.0, 3.0]]), torch.tensor([[1, 2]]), torch.tensor([[False, True]]))
    assert window.reduce() == {
        **{"sources/a/reward": 0.75, "sources/a/mean_length": 4.5, "sources/a/mixed": 0.5},
        **{"sources/b/c/reward": 1.5, "sources/b/c/mean_length": 1.5, "sources/b/c/mixed": 1.0},
    }


@pytest.mark.parametrize("k", [1, 2, 4, 5])
def test_pass_at_k_is_the_share_of_all_subsets(k):
    right = torch.tensor([[i < count for i in range(5)] for count in range(6)])
    shares = [
        sum(any(group[i] for i in subset) for subset in combinations(range(5), k)) / math.comb(5, k)
        for group in right.tolist()
    ]
    assert pass_at(right, k).tolist() == pytest.approx(shares)


def test_powers_of_two():
    assert [powers_of_two(n) for n in (1, 2, 7, 8)] == [[1], [1, 2], [1, 2, 4], [1, 2, 4, 8]]


def test_totals_add_up():
    window = Window()
    window.add({"tokens": Total(torch.tensor(3))})
    window.add({"tokens": Total(torch.tensor(4))})
    assert window.reduce() == {"tokens": 7.0}


def test_the_peak_of_memory_belongs_to_its_phase():
    peaks = iter([1.0, 5.0, 2.0, 7.0, 9.0, 3.0])
    window = Window(lambda: next(peaks))
    with window.timed("rollout"):  # 1 before it, 5 in it
        pass
    window.pause()  # 2, then 7 during the validation
    window.go_on()
    window.stop_clock()
    values = window.reduce()
    assert {name: values[name] for name in values if name.startswith("memory")} == {
        "memory/update": 9.0,
        "memory/rollout": 5.0,
        "memory/gib": 9.0,
    }


ONE_RANK = """
import os
import sys
import torch
from lightning_grpo.metrics import Spread, Window

torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
window = Window()
for i in range(500):
    window.add({f"reward {i}": Spread.of(torch.ones(64))})
torch.ones(100_000).add_(1)  # creates the team of the main thread
before = set(os.listdir("/proc/self/task"))
values = window.reduce()
print(len(values), len(set(os.listdir("/proc/self/task")) - before))
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="lists threads as Linux does")
def test_the_metrics_of_one_rank_start_no_further_openmp_team(tmp_path):
    env = os.environ | {"OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", ONE_RANK, str(tmp_path / "store")]
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["500", "0"]


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
