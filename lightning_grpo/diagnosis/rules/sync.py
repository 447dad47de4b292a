"""Rules about the engine: whether it samples from the policy that is trained."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lightning_grpo.diagnosis.finding import Finding, Severity
from lightning_grpo.diagnosis.history import History, Row
from lightning_grpo.diagnosis.remedies import learning_rate
from lightning_grpo.diagnosis.rule import Rule
from lightning_grpo.diagnosis.statistics import noise, trend

DIFFERENCE = "sampling/sampling_logp_difference/mean"
SEQUENCE_ESS = "sampling/sequence_ess"
CORRECTION = {"model.objective.rollout_correction": {"level": "token", "mode": "truncate", "upper": 2.0}}


def by_difference(rows: Sequence[Row]) -> Iterable[Row]:
    """Rows by the difference between the engine's and the trainer's log-probs, the largest first, if both are known."""

    def difference(row: Row) -> float:
        pairs = zip(row["engine_logprobs"], row["trainer_logprobs"], strict=True)
        return max((abs(engine - trainer) for engine, trainer in pairs), default=0.0)

    known = [row for row in rows if row.get("engine_logprobs") and row.get("trainer_logprobs")]
    return sorted(known, key=difference, reverse=True)


@dataclass(frozen=True, kw_only=True)
class StaleWeights(Rule):
    """The difference between engine and trainer grows with every update although the samples count as recent, as it
    does when weights or adapters no longer reach the engine."""

    name: ClassVar[str] = "stale_weights"
    severity: ClassVar[Severity] = "critical"
    source: ClassVar[str] = "verl#7495, trl#5312, ms-swift#9855"
    needs: ClassVar[tuple[str, ...]] = (DIFFERENCE,)
    ranges: ClassVar[dict[str, str]] = {"factor": "(1, inf)", "least": "[0, inf)", "window": "[6, inf)"}

    factor: float = 2.0
    """Growth of the mean difference of log-probs over its own start."""
    least: float = 0.01
    """Smallest mean difference in nats that counts."""
    window: int = 10
    """Latest steps in which it must grow."""

    def check(self, history: History) -> Finding | None:
        recent, start = history.last(DIFFERENCE, self.window), history.start(DIFFERENCE).median
        now = float(np.median(recent.values[-3:]))
        if now < max(self.least, self.factor * start) or trend(recent.values) < 2.6 or is_stale(history):
            return None
        return self.finding(
            history,
            f"the engine's log-probs differ from the trainer's by {now:.3g} nats per token, {start:.3g} at the start, "
            f"and the difference has grown for {len(recent)} steps: the engine seems to sample with old weights",
            evidence=[DIFFERENCE, "sampling/kl", "staleness"],
            advice="check that every weight sync reaches the engine (the sync report is in the terminal), and restart "
            "from the last checkpoint before the difference grew",
            extent=now,
        )

    def choose(self, rows: Sequence[Row]) -> Iterable[Row]:
        return by_difference(rows)


def is_stale(history: History) -> bool:
    """Whether the engine reports that its samples are getting older, so that a difference is expected."""
    start, recent = history.start("staleness", 5), history.last("staleness", 5)
    return len(recent) > 0 and recent.median > start.median + 0.5


@dataclass(frozen=True, kw_only=True)
class EngineMismatch(Rule):
    """Engine and trainer compute different probabilities for the same tokens, so that samples count as off-policy: by
    verl's limits, or by a sudden change of the run's own level."""

    name: ClassVar[str] = "engine_mismatch"
    source: ClassVar[str] = "verl (rollout correction), verl#891, trl#4772"
    needs: ClassVar[tuple[str, ...]] = (
        "sampling/ratio/mean|sampling/importance_sampling_ratio/mean|sampling/ess|sampling/chi2|sampling/k1|"
        f"sampling/kl|{DIFFERENCE}",
    )
    ranges: ClassVar[dict[str, str]] = {
        "least_ess": "[0, 1]",
        "largest_std": "[0, inf)",
        "largest_kl": "[0, inf)",
        "largest_chi2": "[0, inf)",
        "jump": "(1, inf)",
        "least_jump": "[0, inf)",
    }

    after: int = 3
    least_ess: float = 0.3
    """Smallest effective sample size, as a share of the tokens."""
    largest_std: float = 1.0
    """Largest standard deviation of the ratio between trainer and engine."""
    largest_kl: float = 0.1
    """Largest KL between engine and trainer, in nats per token."""
    largest_chi2: float = 1.0
    """Largest χ² divergence."""
    jump: float = 3.0
    """Factor over the run's own start."""
    least_jump: float = 0.02
    """Smallest mean difference of log-probs, in nats, that counts as a jump."""

    def check(self, history: History) -> Finding | None:
        limits = {
            "sampling/ratio/mean": (0.5, 2.0),
            "sampling/importance_sampling_ratio/mean": (0.5, 2.0),
            "sampling/ess": (self.least_ess, math.inf),
            "sampling/ratio/std": (-math.inf, self.largest_std),
            "sampling/k1": (-self.largest_kl, self.largest_kl),
            "sampling/kl": (-math.inf, self.largest_kl),
            "sampling/chi2": (-math.inf, self.largest_chi2),
        }
        recent = {name: history.last(name, 3).median for name in limits if name in history}
        outside = {name: x for name, x in recent.items() if not limits[name][0] <= x <= limits[name][1]}
        start, now = history.start(DIFFERENCE), history.last(DIFFERENCE, 3).median
        jumped = (
            len(start) >= 5
            and now > max(self.least_jump, self.jump * start.median)
            and now > start.median + 6 * noise(start.values)
            and not is_stale(history)
        )
        if not outside and not jumped:
            return None
        parts = [f"{name} is {x:.3g}" for name, x in outside.items()]
        if jumped:
            parts.append(f"the mean difference of log-probs is {now:.3g} nats, {start.median:.3g} at the start")
        corrected = bool(history.option("model.objective.rollout_correction"))
        return self.finding(
            history,
            f"engine and trainer disagree about the probabilities of the same tokens: {', '.join(parts)}",
            evidence=[DIFFERENCE, *outside],
            change=None if corrected else CORRECTION,
            advice="run the engine with the trainer's data type (dtype: float32) and the training temperature, without "
            "top_p, top_k or min_p"
            + ("" if corrected else "; until the cause is found, correct for the difference by rollout_correction"),
            extent=now if jumped else max(abs(x) for x in outside.values()),
        )

    def choose(self, rows: Sequence[Row]) -> Iterable[Row]:
        return by_difference(rows)


@dataclass(frozen=True, kw_only=True)
class FewEffectiveSamples(Rule):
    """Few completions dominate the importance-weighted gradient, because the policy has moved away from the one that
    sampled them: it is as noisy as that of a far smaller batch. Measured against the run's own start, because rounding
    in the engine lowers the effective sample size of long completions from the first step on."""

    name: ClassVar[str] = "few_effective_samples"
    source: ClassVar[str] = "VCPO (arXiv:2602.17616); at 0.2 the gradient's noise is √5 times as large"
    needs: ClassVar[tuple[str, ...]] = (SEQUENCE_ESS,)
    ranges: ClassVar[dict[str, str]] = {"share": "(0, 1)", "fall": "(0, 1)"}

    share: float = 0.2
    """Effective sample size, as a share of the completions, below which a fall counts."""
    fall: float = 0.5
    """Share of its value at the start below which it counts as fallen."""

    def check(self, history: History) -> Finding | None:
        start, now = history.start(SEQUENCE_ESS, 5).median, history.last(SEQUENCE_ESS, 10).median
        if now >= min(self.share, self.fall * start):
            return None
        scaled = bool(history.option("model.objective.ess_scaled_step"))
        return self.finding(
            history,
            f"the effective sample size of a step is {now:.0%} of its completions, {start:.0%} at the start",
            evidence=[SEQUENCE_ESS, "staleness", "grad_norm"],
            change=learning_rate(history, 1 / 3) if scaled else {"model.objective.ess_scaled_step": True},
            advice="use fewer optimizer steps per rollout or a lower learning rate"
            + ("" if scaled else "; ess_scaled_step makes such steps smaller"),
            extent=1 / now,
        )


@dataclass(frozen=True, kw_only=True)
class StaleSamples(Rule):
    """The samples come from policies many optimizer steps old, on which clipping and the ratio no longer help."""

    name: ClassVar[str] = "stale_samples"
    source: ClassVar[str] = "AReaL (arXiv:2505.24298), VCPO (arXiv:2602.17616)"
    needs: ClassVar[tuple[str, ...]] = ("staleness",)
    ranges: ClassVar[dict[str, str]] = {"growth": "(0, inf)", "largest": "(0, inf)"}

    after: int = 6
    growth: float = 4.0
    """Optimizer steps by which the mean age may exceed that at the start."""
    largest: float = 16.0
    """Largest mean age in optimizer steps."""

    def check(self, history: History) -> Finding | None:
        start, now = history.start("staleness", 5).median, history.last("staleness", 3).median
        if now <= min(start + self.growth, self.largest):
            return None
        corrected = bool(history.option("model.objective.rollout_correction"))
        return self.finding(
            history,
            f"the tokens of a step were sampled {now:.1f} optimizer steps ago on average, {start:.1f} at the start",
            evidence=["staleness", "staleness_max", DIFFERENCE],
            change=None if corrected else CORRECTION,
            advice="sync the weights to the engine before every rollout, and use fewer optimizer steps per rollout",
            severity="warning" if corrected else "critical",
            extent=now,
        )
