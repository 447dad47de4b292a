"""Rules about what the policy writes: entropy, distance from its start, repetition, truncation."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lightning_grpo.diagnosis.finding import Finding
from lightning_grpo.diagnosis.history import History, Row
from lightning_grpo.diagnosis.remedies import epsilon_high, learning_rate, longer_completions, raised_beta
from lightning_grpo.diagnosis.rule import Rule
from lightning_grpo.diagnosis.statistics import shift, trend


def reward_shift(history: History, count: int = 5) -> float:
    """By how many standard errors the reward has risen since the start."""
    return shift(history.start("reward").values, history.last("reward", count).values)


@dataclass(frozen=True, kw_only=True)
class EntropyCollapse(Rule):
    """The policy has become nearly deterministic before its reward is high, so that groups hold copies of one answer
    and nothing is left to learn from. Measured against the run's own start, as models start anywhere from 0.1 to 5
    nats."""

    name: ClassVar[str] = "entropy_collapse"
    source: ClassVar[str] = "DAPO (arXiv:2503.14476), arXiv:2505.22617"
    needs: ClassVar[tuple[str, ...]] = ("entropy",)
    ranges: ClassVar[dict[str, str]] = {"share": "(0, 1)", "sudden": "(0, 1)", "unsolved": "(0, 1]"}

    share: float = 0.1
    """Share of the entropy at the start that counts as collapsed."""
    sudden: float = 0.25
    """Share of the entropy ten steps ago that counts as a sudden fall."""
    unsolved: float = 0.25
    """Share of groups without a correct completion up to which a low entropy is a success."""

    def check(self, history: History) -> Finding | None:
        start, recent = history.start("entropy").median, history.last("entropy", 12)
        if start <= 0:
            return None
        now, before = float(np.median(recent.values[-3:])), float(np.median(recent.values[:3]))
        collapsed = now < self.share * start and not self._succeeded(history)
        fell = now < self.sudden * before and now < 0.5 * start and not self._succeeded(history)
        if not collapsed and not fell:
            return None
        return self.finding(
            history,
            f"the entropy fell to {now:.3g} nats per token, {now / start:.0%} of its {start:.3g} at the start"
            + (f", within {int(recent.steps[-1] - recent.steps[0])} steps" if fell else "")
            + ", while the reward did not rise accordingly",
            evidence=["entropy", "reward", "frac_reward_zero_std"],
            change={**learning_rate(history, 1 / 3), **epsilon_high(history)},
            advice="resume from a checkpoint before the fall, with a lower learning rate"
            + (", and set entropy_coef to 0" if history.option("model.objective.entropy_coef", 0) < 0 else ""),
            severity="critical" if collapsed and reward_shift(history) < 3 else "warning",
            extent=start / max(now, 1e-9),
        )

    def choose(self, rows: Sequence[Row]) -> Iterable[Row]:
        """Completions that are copies of others in their group."""
        seen: set[tuple[int, ...]] = set()
        for row in rows:
            key = (row["rollout"], row["group"], *row["completion_ids"])
            if key in seen:
                yield row
            seen.add(key)

    def _succeeded(self, history: History) -> bool:
        """Whether the reward has risen, and few groups are unsolved as far as is known."""
        wrong = history.last("groups/all_wrong", 5)
        return reward_shift(history) >= 3 and (len(wrong) == 0 or wrong.median <= self.unsolved)


@dataclass(frozen=True, kw_only=True)
class EntropyExplosion(Rule):
    """The policy becomes more random while its reward does not rise: steps are too large, the entropy bonus is too
    strong, or the samples are wrong."""

    name: ClassVar[str] = "entropy_explosion"
    source: ClassVar[str] = "arXiv:2505.22617"
    needs: ClassVar[tuple[str, ...]] = ("entropy",)
    ranges: ClassVar[dict[str, str]] = {"factor": "(1, inf)", "least": "[0, inf)"}

    after: int = 5
    factor: float = 2.0
    """Growth over the run's own start."""
    least: float = 0.3
    """Smallest growth in nats that counts."""

    def check(self, history: History) -> Finding | None:
        start, now = history.start("entropy", 5).median, history.last("entropy", 3).median
        if now < max(self.factor * start, start + self.least) or reward_shift(history) >= 3:
            return None
        bonus = history.option("model.objective.entropy_coef", 0.0)
        return self.finding(
            history,
            f"the entropy rose to {now:.3g} nats per token, {now / start:.1f} times its {start:.3g} at the start, "
            "while the reward did not rise",
            evidence=["entropy", "reward", "grad_norm"],
            change={"model.objective.entropy_coef": bonus / 10} if bonus > 0 else learning_rate(history, 1 / 3),
            advice="resume from a checkpoint before the rise, with "
            + ("a smaller entropy bonus" if bonus > 0 else "a lower learning rate"),
            severity="critical" if reward_shift(history) <= -3 else "warning",
            extent=now,
        )


@dataclass(frozen=True, kw_only=True)
class KLRunaway(Rule):
    """The KL to the initial policy is large and accelerates: the policy leaves the region that the model was trained
    for, and the penalty does not hold it."""

    name: ClassVar[str] = "kl_runaway"
    source: ClassVar[str] = "rldoctor 0.2 (0.5 and 2 nats), Schulman 2020 (k3)"
    needs: ClassVar[tuple[str, ...]] = ("kl",)
    ranges: ClassVar[dict[str, str]] = {"large": "(0, inf)", "growth": "(1, inf)", "extreme": "(0, inf)"}

    large: float = 0.5
    """KL in nats per token from which acceleration is reported."""
    growth: float = 1.2
    """Growth within 15 steps that counts."""
    extreme: float = 2.0
    """KL in nats per token that is critical if the reward does not rise."""

    def check(self, history: History) -> Finding | None:
        values = history.last("kl", 15).values
        now, middle, before = (float(np.median(values[places])) for places in (slice(-3, None), slice(6, 9), slice(3)))
        accelerates = now - middle > 1.5 * max(middle - before, 0.0) and now > self.growth * before
        accelerates = accelerates and trend(values) > 2.6
        is_extreme = now > self.extreme and reward_shift(history) < 3
        if now < self.large or not (accelerates or is_extreme):
            return None
        return self.finding(
            history,
            f"the KL to the initial policy is {now:.3g} nats per token, {before:.3g} {len(values)} steps ago",
            evidence=["kl", "reward", "beta", "entropy"],
            change={**raised_beta(history), **learning_rate(history, 1 / 3)},
            advice="raise beta, or lower the learning rate",
            severity="critical" if is_extreme else "warning",
            extent=now,
        )


@dataclass(frozen=True, kw_only=True)
class Repetition(Rule):
    """Completions repeat themselves more and more, the usual form of a degenerate policy, or of a reward that pays for
    it."""

    name: ClassVar[str] = "repetition"
    source: ClassVar[str] = "Holtzman et al. 2020 (arXiv:1904.09751); trl's repetition penalty reward"
    needs: ClassVar[tuple[str, ...]] = ("completions/repetition",)
    ranges: ClassVar[dict[str, str]] = {"share": "(0, 1]", "factor": "(1, inf)", "least_length": "[0, inf)"}

    share: float = 0.3
    """Mean share of a completion's token 4-grams that occurred earlier in it."""
    factor: float = 1.5
    """Growth over the run's own start."""
    least_length: float = 12.0
    """Mean tokens per completion below which repetition means nothing."""

    def check(self, history: History) -> Finding | None:
        start, now = history.start("completions/repetition").median, history.last("completions/repetition", 5).median
        length = history.last("completions/mean_length", 5)
        if now < max(self.share, self.factor * start) or (len(length) and length.median < self.least_length):
            return None
        return self.finding(
            history,
            f"{now:.0%} of the token 4-grams of a completion occurred earlier in it, {start:.0%} at the start",
            evidence=["completions/repetition", "completions/mean_length", "reward"],
            advice="read the completions named here; if they earn reward, add RepetitionPenalty to the rewards, "
            "otherwise lower the learning rate",
            extent=now,
        )

    def choose(self, rows: Sequence[Row]) -> Iterable[Row]:
        return sorted(rows, key=lambda row: repetition(row["completion_ids"]), reverse=True)


def repetition(ids: Sequence[int], n: int = 4) -> float:
    """The share of the n-grams of a completion that occurred earlier in it."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@dataclass(frozen=True, kw_only=True)
class Truncation(Rule):
    """Many completions end at the length limit and lose their reward by it: what they are punished for is their
    length, not their content."""

    name: ClassVar[str] = "truncation"
    source: ClassVar[str] = "DAPO (arXiv:2503.14476, overlong), trl#5697; limits of rldoctor 0.2"
    needs: ClassVar[tuple[str, ...]] = ("completions/clipped_ratio",)
    ranges: ClassVar[dict[str, str]] = {"share": "(0, 1]", "jump": "(0, 1]", "patience": "[0, inf)"}

    share: float = 0.15
    """Share of truncated completions that counts."""
    jump: float = 0.3
    """Increase of the share over the run's own start that counts in any case."""
    patience: int = 20
    """Steps before a share that is not falling is reported, as many policies learn to write shorter answers first."""

    def check(self, history: History) -> Finding | None:
        start, recent = history.start("completions/clipped_ratio"), history.last("completions/clipped_ratio", 10)
        now = float(np.median(recent.values[-5:]))
        jumped = now > start.median + self.jump and reward_shift(history) < 3
        falls = now < 0.9 * start.median or trend(recent.values) < -1.0
        harmful = now >= self.share and not falls and len(history.steps) >= self.patience and self._is_harmful(history)
        if not (jumped or harmful):
            return None
        cost = history.last("completions/truncated_reward", 5)
        return self.finding(
            history,
            f"{now:.0%} of the completions are truncated at the length limit, {start.median:.0%} at the start"
            + (f"; their mean reward is {cost.median:.3g}, that of all {history.last('reward', 5).median:.3g}"
               if len(cost) else ""),
            evidence=["completions/clipped_ratio", "completions/truncated_reward", "reward", "completions/mean_length"],
            change=longer_completions(history),
            advice="raise max_completion_length, or reward shorter answers (LengthPenalty)",
            extent=now,
        )  # fmt: skip

    def _is_harmful(self, history: History) -> bool:
        """Whether truncated completions get less reward; if that is not logged, whether the reward does not rise."""
        truncated, reward = history.last("completions/truncated_reward", 5), history.last("reward", 5)
        if len(truncated) == 0 or len(reward) == 0:
            return reward_shift(history) < 3
        return truncated.median < reward.median - 0.25 * max(history.last("reward_std", 10).median, 1e-9)

    def choose(self, rows: Sequence[Row]) -> Iterable[Row]:
        return sorted((row for row in rows if row["truncated"]), key=lambda row: row["reward"] or 0.0)
