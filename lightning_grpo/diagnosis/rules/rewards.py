"""Rules about rewards: whether they carry a signal, and whether the policy learns what they are meant to measure."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lightning_grpo.diagnosis.finding import Finding, Severity
from lightning_grpo.diagnosis.history import History, Row
from lightning_grpo.diagnosis.remedies import larger_groups, raised_beta
from lightning_grpo.diagnosis.rule import Rule
from lightning_grpo.diagnosis.statistics import noise, shift, trend

DEAD = "frac_reward_zero_std"


@dataclass(frozen=True, kw_only=True)
class DeadGroups(Rule):
    """All completions of most groups get the same reward, so that their advantages are 0: the time to sample them is
    lost. With pass rate p and G completions this happens with probability p^G + (1 − p)^G."""

    name: ClassVar[str] = "dead_groups"
    source: ClassVar[str] = "DAPO (arXiv:2503.14476), trl#3708; limits of rldoctor 0.2"
    needs: ClassVar[tuple[str, ...]] = (DEAD,)
    ranges: ClassVar[dict[str, str]] = {"share": "(0, 1]", "all_dead": "(0, 1]"}

    share: float = 0.75
    """Share of groups without a signal, as a median over ten steps."""
    all_dead: float = 0.98
    """Share from which nothing is learned."""

    def check(self, history: History) -> Finding | None:
        recent = history.last(DEAD, 10)
        now = recent.median
        if now < self.share:
            return None
        solved, gradual = _is_solved(history), history.start("reward").median < 0.9 * history.last("reward", 5).median
        seconds = history.last("time/rollout", 10).median / history.last("step_time", 10).median
        cost = f", which wastes {now * seconds:.0%} of the run's time on sampling them" if seconds > 0 else ""
        if solved:
            advice = "the prompts are solved: use harder prompts, or end the run"
        elif history.last("groups/all_wrong", 10).median > 0.5 or history.last("reward", 10).median <= 0:
            advice = "read the completions named here: if correct ones get no reward, mend the reward; otherwise use "
            advice += "easier prompts"
        else:
            advice = "use prompts with pass rates between 0.15 and 0.85, or larger groups"
        severity: Severity = "note" if solved and gradual else "critical" if now >= self.all_dead else "warning"
        return self.finding(
            history,
            f"in {now:.0%} of the groups all rewards are equal{cost}",
            evidence=[DEAD, "reward", "groups/all_right", "groups/all_wrong", "grad_norm"],
            change={} if solved else larger_groups(history),
            advice=advice,
            severity=severity,
            extent=now,
        )

    def choose(self, rows: Sequence[Row]) -> Iterable[Row]:
        groups = defaultdict(list)
        for row in rows:
            groups[row["rollout"], row["group"]].append(row)
        return [group[0] for group in groups.values() if len({row["reward"] for row in group}) == 1]


def _is_solved(history: History) -> bool:
    """Whether groups are equal because they are all right."""
    right, reward = history.last("groups/all_right", 10), history.last("reward", 10)
    if len(right):
        return right.median > 0.5
    best = history.series("reward").values.max() if len(reward) else 0.0
    return reward.median > 0.9 * best and reward.median > history.start("reward").median > 0


@dataclass(frozen=True, kw_only=True)
class DeadReward(Rule):
    """One of several rewards is the same for all completions, at the lowest value that it had: it carries no signal,
    often because its parser no longer matches. A reward that is always at its highest value is earned, and is not
    reported."""

    name: ClassVar[str] = "dead_reward"
    source: ClassVar[str] = "rldoctor 0.2 (share of the variance below 0.02)"
    needs: ClassVar[tuple[str, ...]] = ("reward",)
    ranges: ClassVar[dict[str, str]] = {"window": "[2, inf)"}

    window: int = 10
    """Latest steps in which it does not vary."""

    def check(self, history: History) -> Finding | None:
        names = history.reward_names
        dead = [name for name in names if self._is_dead(history, name)] if len(names) > 1 else []
        if not dead:
            return None
        value = history.last(f"rewards/{dead[0]}/mean", 1).median
        return self.finding(
            history,
            f"the reward {', '.join(dead)} was {value:.3g} for all completions of the last {self.window} steps",
            evidence=[f"rewards/{name}/{kind}" for name in dead for kind in ("mean", "std")],
            advice="read the completions named here, and check that the reward recognizes what it should; remove it if "
            "it can't be earned",
            extent=len(dead),
        )

    def _is_dead(self, history: History, name: str) -> bool:
        spread, mean = history.last(f"rewards/{name}/std", self.window), history.series(f"rewards/{name}/mean")
        if len(spread) < self.window or spread.values.max() > 1e-6:
            return False
        now = float(mean.values[-1])
        return now <= mean.values.min() + 1e-6 and (now <= 0 or now < mean.values.max() - 1e-6)

    def choose(self, rows: Sequence[Row]) -> Iterable[Row]:
        return rows[:4]


@dataclass(frozen=True, kw_only=True)
class DominatingReward(Rule):
    """One reward causes nearly all of the variance of the sum, so that the others have no effect on the advantages."""

    name: ClassVar[str] = "dominating_reward"
    source: ClassVar[str] = "GDPO (arXiv:2601.05242); rldoctor 0.2 (0.7 of the variance)"
    needs: ClassVar[tuple[str, ...]] = ("reward",)
    ranges: ClassVar[dict[str, str]] = {"share": "(0.5, 1]"}

    share: float = 0.95
    """Share of the variance in eight of the latest ten steps. In single steps a nearly saturated reward has none."""

    def check(self, history: History) -> Finding | None:
        shares = {name: history.last(f"rewards/{name}/variance_share", 10) for name in history.reward_names}
        shares = {name: series for name, series in shares.items() if len(series)}
        if len(shares) < 2:
            return None
        largest = max(shares, key=lambda name: shares[name].median)
        now, least = shares[largest].median, float(np.quantile(shares[largest].values, 0.2))
        others = [name for name in shares if name != largest]
        if least < self.share or all(history.last(f"rewards/{name}/std", 10).median < 1e-6 for name in others):
            return None
        return self.finding(
            history,
            f"the reward {largest} causes {now:.0%} of the variance of the total reward; {', '.join(others)} "
            "hardly counts",
            evidence=[f"rewards/{name}/variance_share" for name in shares],
            change={"model.advantage.aggregation": "normalize_then_sum"} if history.options else {},
            advice=f"multiply the weight of {largest} by {_rounded(math.sqrt((1 - now) / now)):g} so that it counts as "
            "much as the others, or standardize each reward within its group (normalize_then_sum)",
            extent=now,
        )


def _rounded(value: float) -> float:
    return float(f"{max(value, 0.01):.1g}")


@dataclass(frozen=True, kw_only=True)
class HeldOutFalls(Rule):
    """The reward in training rises while that of held-out prompts falls: the policy memorizes prompts or exploits the
    reward."""

    name: ClassVar[str] = "held_out_falls"
    source: ClassVar[str] = "Gao et al. 2022 (arXiv:2210.10760), trl#2959"
    needs: ClassVar[tuple[str, ...]] = ("val/pass@1|val/reward", "reward")
    ranges: ClassVar[dict[str, str]] = {"errors": "(0, inf)", "share": "[0, 1)"}

    after: int = 4
    """Number of evaluations before the rule is checked."""
    errors: float = 3.0
    """Fall below the best evaluations, in standard errors, by the number of samples and by the changes between
    evaluations."""
    share: float = 0.05
    """Fall relative to the best evaluations."""

    def check(self, history: History) -> Finding | None:
        name = "val/pass@1" if "val/pass@1" in history else "val/reward"
        held_out, train = history.series(name), history.series("reward")
        # means of two evaluations each, as the best single one is often a lucky one
        pairs = (held_out.values[1:] + held_out.values[:-1]) / 2
        best = int(pairs[:-2].argmax())
        top, now, step = float(pairs[best]), float(pairs[-1]), int(held_out.steps[best + 1])
        samples = history.option("data.validation_size", 0) * history.option("model.validation_generations", 1)
        error = math.sqrt(max(top * (1 - top), 0.0) / samples) if samples and name == "val/pass@1" else 0.0
        error = max(error, noise(held_out.values))
        at_best, recent = train.between(step - 5, step + 5).values, train.values[-10:]
        if top - now <= max(self.errors * error, self.share * abs(top)) or len(at_best) < 3:
            return None
        if shift(at_best, recent) < 2:
            return None
        return self.finding(
            history,
            f"{name} fell from {top:.3g} at step {step} to {now:.3g}, while the reward in training rose from "
            f"{np.median(at_best):.3g} to {np.median(recent):.3g}",
            since=step,
            evidence=[name, "reward"],
            change=raised_beta(history),
            advice=f"use the checkpoint of step {step} (checkpoint.monitor: {name}), more prompts, or another reward",
            severity="critical" if top - now > 0.25 * abs(top) else "warning",
            extent=top - now,
        )


@dataclass(frozen=True, kw_only=True)
class RewardHacking(Rule):
    """The total reward rises while the first reward, which measures what counts, falls: the policy exploits another
    term of the sum."""

    name: ClassVar[str] = "reward_hacking"
    source: ClassVar[str] = "Gao et al. 2022 (arXiv:2210.10760), open-r1#407"
    needs: ClassVar[tuple[str, ...]] = ("reward",)
    ranges: ClassVar[dict[str, str]] = {"window": "[8, inf)", "share": "(0, 1)"}

    window: int = 15
    """Latest steps in which one rises and the other falls."""
    share: float = 0.2
    """Relative fall of the first reward that counts."""

    def check(self, history: History) -> Finding | None:
        names = history.reward_names
        if len(names) < 2:
            return None
        first, total = history.last(f"rewards/{names[0]}/mean", self.window), history.last("reward", self.window)
        if len(first) < self.window or trend(total.values) < 2.6 or trend(first.values) > -2.6:
            return None
        before, now = float(np.median(first.values[:4])), float(np.median(first.values[-4:]))
        if before - now < self.share * abs(before):
            return None
        risen = [name for name in names[1:] if trend(history.last(f"rewards/{name}/mean", self.window).values) > 2.6]
        return self.finding(
            history,
            f"the reward {names[0]} fell from {before:.3g} to {now:.3g} within {self.window} steps, while the total "
            "reward rose" + (f" by {', '.join(risen)}" if risen else ""),
            since=int(first.steps[0]),
            evidence=["reward", *(f"rewards/{name}/mean" for name in names)],
            change=raised_beta(history),
            advice="read the completions named here, and lower the weight of "
            + (", ".join(risen) or "the other rewards"),
            extent=before - now,
        )

    def choose(self, rows: Sequence[Row]) -> Iterable[Row]:
        return sorted(rows, key=lambda row: row["reward"] or 0.0, reverse=True)


@dataclass(frozen=True, kw_only=True)
class LengthHacking(Rule):
    """Completions grow, and within groups the longer ones get the higher reward: the reward pays for length. A growing
    length alone is no fault, as reasoning grows too."""

    name: ClassVar[str] = "length_hacking"
    source: ClassVar[str] = "Singhal et al. 2023 (arXiv:2310.03716); limits of rldoctor 0.2"
    needs: ClassVar[tuple[str, ...]] = ("completions/mean_length", "reward_length_correlation")
    ranges: ClassVar[dict[str, str]] = {"growth": "(1, inf)", "correlation": "(0, 1]"}

    growth: float = 1.3
    """Growth of the mean length over the run's own start."""
    correlation: float = 0.6
    """Correlation of reward and length within groups, as a median over ten steps."""

    def check(self, history: History) -> Finding | None:
        start, now = history.start("completions/mean_length").median, history.last("completions/mean_length", 5).median
        correlation = history.last("reward_length_correlation", 10).median
        if now < self.growth * start or correlation < self.correlation:
            return None
        return self.finding(
            history,
            f"completions grew from {start:.0f} to {now:.0f} tokens, and reward and length have a correlation of "
            f"{correlation:.2f} within groups",
            evidence=["completions/mean_length", "reward_length_correlation", "reward"],
            advice="check whether the longest completions deserve their reward; if not, add LengthPenalty to the "
            "rewards, or normalize the reward by the length",
            extent=now / start,
        )

    def choose(self, rows: Sequence[Row]) -> Iterable[Row]:
        return sorted(rows, key=lambda row: len(row["completion_ids"]), reverse=True)
