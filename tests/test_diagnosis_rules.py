"""Each rule of the diagnosis fires on its fault and not on what resembles it."""

import math

import numpy as np
import pytest
from histories import only, rising, run

from lightning_grpo.diagnosis import rules as built_in
from lightning_grpo.diagnosis.rules.policy import repetition
from lightning_grpo.diagnosis.statistics import noise, shift, trend

DIFFERENCE = "sampling/sampling_logp_difference/mean"
NOISE = np.random.default_rng(1).normal(size=1000)

FAULTS = {
    "StaleWeights": ({DIFFERENCE: lambda n: 0.008 * (1 + 0.5 * n)}, {}),
    "EngineMismatch": ({"sampling/ess": 0.2, "sampling/chi2": 3.0}, {}),
    "EngineMismatch, only relative to its start": ({DIFFERENCE: lambda n: 0.05 + 0.002 * NOISE[n]}, {}),
    "EngineMismatch, KL alone": ({"sampling/kl": 0.3}, {}),
    "FewEffectiveSamples": ({"sampling/sequence_ess": 0.1}, {}),
    "StaleSamples": ({"staleness": lambda n: float(n)}, {}),
    "NonFinite": ({"loss": math.nan, "grad_norm": math.nan}, {}),
    "NonFinite, KL": ({"kl": math.inf}, {}),
    "NonFinite, gradients": ({"grad_norm": math.inf}, {}),
    "NoUpdate": ({"grad_norm": 0.0}, {}),
    "NoUpdate, rounding": ({"update_ratio": 0.0}, {"model.dtype": "bfloat16"}),
    "LearningRateHigh": ({"reward": lambda n: 0.02, "grad_norm": 40.0, "entropy": 3.0}, {}),
    "LearningRateLow": (
        {"reward": lambda n: 0.3 + 0.03 * NOISE[n], "entropy": lambda n: 0.6 + 0.005 * NOISE[n + 200]},
        {},
    ),
    "LearningRateLow, lost to rounding": (
        {
            "reward": lambda n: 0.3 + 0.03 * NOISE[n],
            "entropy": lambda n: 0.6 + 0.005 * NOISE[n + 200],
            "update_ratio": 1e-5,
        },
        {"model.dtype": "bfloat16"},
    ),
    "Clipping": ({"clip_ratio/region_mean": 0.5}, {}),
    "GradientSpikes": ({"grad_norm": lambda n: 60.0 if n % 5 == 0 else 1.0}, {}),
    "SmallBatch": (
        {"noise_scale/signal": lambda n: 1e-4 * NOISE[n], "reward": lambda n: 0.3 + 0.03 * NOISE[n]},
        {},
    ),
    "SmallBatch, a single prompt": (
        {"reward": lambda n: 0.3 + 0.1 * NOISE[n]},
        {"model.num_generations": 256},
    ),
    "EntropyCollapse": ({"entropy": lambda n: 0.5 * 0.8**n, "reward": lambda n: 0.28 + 0.03 * NOISE[n]}, {}),
    "EntropyExplosion": ({"entropy": lambda n: 0.6 + 0.1 * n, "reward": lambda n: 0.25 + 0.03 * NOISE[n]}, {}),
    "KLRunaway": ({"kl": lambda n: 0.02 * 1.2**n}, {"model.objective.beta": 0.001}),
    "Repetition": ({"completions/repetition": 0.5}, {}),
    "Truncation": ({"completions/clipped_ratio": 0.3}, {}),
    "Truncation, of all": (
        {"completions/clipped_ratio": 1.0, "completions/truncated_reward": 0.1, "reward": 0.1},
        {},
    ),
    "DeadGroups": ({"frac_reward_zero_std": 0.8, "groups/all_wrong": 0.8}, {}),
    "DeadReward": ({"rewards/format/mean": 0.0, "rewards/format/std": 0.0}, {}),
    "DominatingReward": ({"rewards/correct/variance_share": 0.02, "rewards/format/variance_share": 0.98}, {}),
    "HeldOutFalls": ({"val/pass@1": lambda n: 0.5 - 0.01 * n}, {}),
    "RewardHacking": (
        {
            "rewards/correct/mean": lambda n: 0.4 * 0.9**n,
            "reward": lambda n: 0.4 + 0.05 * n,
            "rewards/format/mean": lambda n: 0.1 * n,
        },
        {},
    ),
    "LengthHacking": ({"completions/mean_length": 180.0, "reward_length_correlation": 0.8}, {}),
    "SlowerSteps": ({"step_time": lambda n: 4 + 0.3 * n, "time/reward": lambda n: 0.1 + 0.3 * n}, {}),
    "MemoryGrowth": ({"memory/gib": lambda n: 11.5 + 0.15 * n}, {}),
}
HARMLESS = {
    "StaleWeights, older samples": ({DIFFERENCE: lambda n: 0.008 * (1 + 0.5 * n), "staleness": 3.0}, {}),
    "StaleWeights, noisy": ({DIFFERENCE: lambda n: 0.012 * math.exp(0.5 * NOISE[n])}, {}),
    "EngineMismatch, noisy": ({DIFFERENCE: lambda n: 0.012 * math.exp(0.3 * NOISE[n])}, {}),
    "FewEffectiveSamples, one step of many": ({"sampling/sequence_ess": lambda n: 0.05 if n % 5 == 0 else 0.7}, {}),
    "StaleSamples, one rollout ahead": ({"staleness": 1.0, "staleness_max": 2.0}, {}),
    "NonFinite, a metric without a value": ({"kl": math.nan}, {}),
    "NonFinite, steps that float16 training skips": (
        {"grad_norm": lambda n: math.inf if n % 20 < 2 else 1.0},
        {},
    ),
    "NoUpdate, no signal": ({"grad_norm": 0.0, "frac_reward_zero_std": 1.0}, {}),
    "LearningRateHigh, a dip": ({"reward": lambda n: 0.05 if n < 3 else rising(30 + n) + 0.2, "grad_norm": 40.0}, {}),
    "LearningRateHigh, harder prompts": ({"reward": lambda n: 0.02}, {}),
    "LearningRateLow, a solved task": (
        {"reward": lambda n: 0.9 + 0.03 * NOISE[n], "entropy": lambda n: 0.3 + 0.005 * NOISE[n]},
        {},
    ),
    "GradientSpikes, clipped": (
        {"grad_norm": lambda n: 60.0 if n % 5 == 0 else 1.0},
        {"trainer.gradient_clip_val": 1.0},
    ),
    "SmallBatch, but the reward rises": (
        {"noise_scale/signal": lambda n: 1e-4 * NOISE[n], "reward": lambda n: 0.3 + 0.01 * n},
        {},
    ),
    "EntropyCollapse, solved": (
        {"entropy": lambda n: 0.5 * 0.95**n, "reward": lambda n: min(1.0, 0.4 + 0.02 * n), "groups/all_wrong": 0.0},
        {},
    ),
    "EntropyExplosion, while the reward rises": (
        {"entropy": lambda n: 0.6 + 0.1 * n, "reward": lambda n: 0.5 + 0.01 * n},
        {},
    ),
    "KLRunaway, linear": ({"kl": lambda n: 0.02 * n}, {}),
    "Repetition, of short answers": ({"completions/repetition": 0.6, "completions/mean_length": 6.0}, {}),
    "Truncation, rewarded alike": (
        {"completions/clipped_ratio": 0.2, "completions/truncated_reward": lambda n: rising(30 + n) + 0.2},
        {},
    ),
    "DeadReward, always earned": ({"rewards/format/mean": 1.0, "rewards/format/std": 0.0}, {}),
    "DominatingReward, the other is earned": (
        {"rewards/correct/variance_share": 1.0, "rewards/format/variance_share": 0.0, "rewards/format/std": 0.0},
        {},
    ),
    "HeldOutFalls, noise": ({"val/pass@1": lambda n: 0.5 + 0.03 * NOISE[n]}, {}),
    "LengthHacking, longer answers": ({"completions/mean_length": 180.0, "reward_length_correlation": 0.2}, {}),
    "SlowerSteps, longer answers": (
        {"step_time": lambda n: 4 + 0.3 * n, "completions/mean_length": lambda n: 100 * (1 + 0.075 * n)},
        {},
    ),
    "SlowerSteps, other work on the machine": ({"step_time": lambda n: 8.0 if n % 20 < 6 else 4.0}, {}),
    "MemoryGrowth, a small process": ({"memory/gib": lambda n: 0.5 + 0.003 * n}, {}),
    "MemoryGrowth, jumps": ({"memory/gib": lambda n: 11.5 + 0.5 * (n // 4) + 0.001 * n}, {}),
    "MemoryGrowth, a plateau": ({"memory/gib": lambda n: 11.5 + 1.5 * (1 - 0.7**n)}, {}),
}


def rule(case: str):
    return getattr(built_in, case.split(",")[0])


@pytest.mark.parametrize("case", FAULTS)
def test_a_rule_recognizes_its_fault_within_twenty_steps(case):
    changes, options = FAULTS[case]
    slow = {"HeldOutFalls": 60, "SmallBatch": 30}
    slow |= dict.fromkeys(("LearningRateLow", "LearningRateLow, lost to rounding", "SmallBatch, a single prompt"), 1)
    at = slow.get(case, 30)
    findings, _ = run({"LearningRateLow": 120, "HeldOutFalls": 160}.get(case, at + 30), rules=only(rule(case)), at=at,
                      changes=changes, options=options)  # fmt: skip
    found = [finding for finding in findings if finding.step >= at]
    assert found, "no finding"
    assert found[0] == findings[0], "found before the fault"
    if case not in slow:
        assert found[0].step < at + 20
    assert found[0].since <= found[0].step and found[0].evidence
    assert all(path.split(".")[0] in ("model", "data", "trainer") for path in found[0].change)


@pytest.mark.parametrize("case", HARMLESS)
def test_a_rule_is_silent_about_what_resembles_its_fault(case):
    changes, options = HARMLESS[case]
    findings, history = run(100, rules=only(rule(case)), changes=changes, options=options)
    assert findings == []
    assert rule(case)().why_not(history) is None


def test_each_rule_has_a_case_of_both_kinds():
    names = {kind.__name__ for kind in built_in.RULES}
    assert {case.split(",")[0] for case in FAULTS} == names
    assert names - {case.split(",")[0] for case in HARMLESS} == {"Clipping", "DeadGroups", "RewardHacking"}


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_run_raises_nothing_in_400_steps(seed):
    findings, _ = run(400, seed=seed)
    assert findings == []


@pytest.mark.parametrize("start", [0.08, 0.3, 0.9, 4.0])
def test_an_entropy_collapse_is_recognized_wherever_the_entropy_starts(start):
    flat = {"reward": lambda n: 0.2 + 0.03 * NOISE[n], "groups/all_wrong": 0.6}
    stays = flat | {"entropy": lambda n: start * (1 + 0.05 * NOISE[n])}
    falls = flat | {"entropy": lambda n: start * (1 if n < 30 else 0.8 ** (n - 30))}
    assert run(80, rules=only(built_in.EntropyCollapse), at=1, changes=stays)[0] == []
    findings, _ = run(80, rules=only(built_in.EntropyCollapse), at=1, changes=falls)
    assert 31 < findings[0].step < 51
    assert [finding.severity for finding in findings[:2]] == ["warning", "critical"]


def test_rules_wait_for_the_end_of_the_warm_up():
    def learning_rate(n: int) -> float:
        return 1e-6 * min(n, 25)

    changes = {"frac_reward_zero_std": 1.0, "groups/all_wrong": 1.0, "learning_rate": learning_rate}
    findings, history = run(60, rules=only(built_in.DeadGroups, after=10), at=1, changes=changes)
    assert history.warmup_end == 26
    assert [finding.step for finding in findings] == [36]


class Level(built_in.Clipping):
    """Finds what the metric says: 0 nothing, 1 and more a warning, 10 something critical."""

    name = "level"

    def check(self, history):
        level = history.latest["clip_ratio/region_mean"]
        severity = "critical" if level >= 10 else "warning"
        return self.finding(history, "a level", severity=severity, extent=level) if level else None


def test_a_finding_is_repeated_only_if_it_worsens_or_recurs():
    levels = [1] * 5 + [3] * 5 + [5] * 5 + [0] * 5 + [5] * 5 + [0] * 25 + [1] * 5 + [10] * 5
    findings, _ = run(60, rules=only(Level, after=0), at=1, changes={"clip_ratio/region_mean": lambda n: levels[n]})
    # new; five times as large; recurred after more than 20 steps, not after five; critical
    assert [finding.step for finding in findings] == [1, 11, 51, 56]


def test_a_large_kl_that_grows_slowly_does_not_run_away():
    changes = {"kl": lambda n: 0.7 + 0.0003 * n + 0.002 * NOISE[n]}
    assert run(400, rules=only(built_in.KLRunaway), at=1, changes=changes)[0] == []


def test_dead_groups_of_a_solved_task_are_only_noted():
    findings, _ = run(90, rules=only(built_in.DeadGroups), at=60, changes={
        "frac_reward_zero_std": 0.9, "groups/all_right": 0.9, "reward": 0.98,
    })  # fmt: skip
    assert [finding.severity for finding in findings] == ["note"]


def test_trend():
    random = np.random.default_rng(0)
    assert trend(np.arange(20) + random.normal(size=20)) > 2.6
    assert trend(-np.arange(20.0)) < -2.6
    assert abs(trend(np.zeros(20))) == 0
    flat = [trend(random.normal(size=20)) for _ in range(1000)]
    assert np.mean(np.abs(flat) > 2.576) == pytest.approx(0.01, abs=0.01)


def test_noise_ignores_a_trend_and_outliers():
    random = np.random.default_rng(0)
    x = 0.1 * np.arange(2000) + random.normal(size=2000)
    x[::100] += 50
    assert noise(x) == pytest.approx(1.0, rel=0.1)
    assert noise([1.0, 1.0]) == 0


def test_shift_counts_standard_errors():
    random = np.random.default_rng(0)
    shifts = [shift(random.normal(size=20), random.normal(size=20)) for _ in range(1000)]
    assert np.std(shifts) == pytest.approx(1.0, abs=0.25)
    assert shift([0.0, 0.0, 0.0], [1.0, 1.0, 1.0]) == math.inf
    assert shift([1.0, 1.0, 1.0], [1.0, 1.0, 1.0]) == 0


@pytest.mark.parametrize(("ids", "share"), [([1, 2, 3, 4, 5], 0.0), ([7] * 13, 0.9), ([1, 2], 0.0)])
def test_repetition_is_the_share_of_repeated_4_grams(ids, share):
    assert repetition(ids) == pytest.approx(share)
