"""Rules about the optimizer: learning rate, gradients, batch size."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from lightning_grpo.diagnosis.finding import Finding, Severity
from lightning_grpo.diagnosis.history import History
from lightning_grpo.diagnosis.remedies import larger_batch, learning_rate
from lightning_grpo.diagnosis.rule import Rule
from lightning_grpo.diagnosis.statistics import noise, shift, trend

DEAD = "frac_reward_zero_std"


@dataclass(frozen=True, kw_only=True)
class NonFinite(Rule):
    """A loss, gradient, KL or reward that is NaN or infinite breaks the weights if its step is taken, and all samples
    after it."""

    name: ClassVar[str] = "nonfinite"
    severity: ClassVar[Severity] = "critical"
    source: ClassVar[str] = "verl#747, unsloth#3006"
    advice: ClassVar[str] = (
        "resume from the last checkpoint with a lower learning rate and a clipped gradient; use bf16-mixed for 16-mixed"
    )

    after: int = 0
    metrics: tuple[str, ...] = ("loss", "grad_norm", "kl", "entropy", "reward")
    """Metrics that must be finite."""
    skipped: int = 3
    """Steps for which the gradient alone may be infinite: float16 training skips them and lowers its loss scale."""

    def is_due(self, history: History) -> bool:
        return True

    def check(self, history: History) -> Finding | None:
        latest = {name: x for name in self.metrics if (x := history.latest.get(name)) is not None}
        # a metric that has no value in a step is NaN, but loss and gradient always have one
        broken = {
            name: x for name, x in latest.items() if math.isinf(x) or (math.isnan(x) and name in ("loss", "grad_norm"))
        }
        last_finite = history.last("grad_norm", 1).steps
        if len(last_finite) and history.step - int(last_finite[0]) < self.skipped:
            broken.pop("grad_norm", None)
        if not broken:
            return None
        listed = ", ".join(f"{name} is {x}" for name, x in broken.items())
        return self.finding(
            history,
            f"{listed} at step {history.step}",
            evidence=[name for name in self.metrics if name in history],
            change=self.change(history),
            advice=self.advice,
        )

    @staticmethod
    def change(history: History) -> dict[str, Any]:
        """A lower learning rate, and a clipped gradient."""
        is_clipped = history.option("trainer.gradient_clip_val")
        return learning_rate(history, 1 / 3) | ({} if is_clipped else {"trainer.gradient_clip_val": 1.0})


@dataclass(frozen=True, kw_only=True)
class NoUpdate(Rule):
    """The gradient is exactly 0, or a step changes no weight, although rewards differ within groups: the loss does not
    reach the parameters, or the learning rate is 0."""

    name: ClassVar[str] = "no_update"
    severity: ClassVar[Severity] = "critical"
    source: ClassVar[str] = "trl#2703, trl#3857"
    needs: ClassVar[tuple[str, ...]] = ("grad_norm",)
    ranges: ClassVar[dict[str, str]] = {"steps": "[1, inf)"}

    after: int = 3
    steps: int = 3
    """Latest steps without an update."""

    def check(self, history: History) -> Finding | None:
        norms, dead = history.last("grad_norm", self.steps).values, history.last(DEAD, self.steps).values
        moved, rates = history.last("update_ratio", self.steps).values, history.last("learning_rate", self.steps).values
        if len(dead) == 0 or dead.max() > 0.9:  # without a difference in rewards, a gradient of 0 is right
            return None
        stopped = {
            "the gradient is exactly 0": bool((norms == 0).all()),
            "the learning rate is 0": len(rates) == self.steps and bool((rates == 0).all()),
            "the steps change no weight": len(moved) == self.steps and bool((moved == 0).all()),
        }
        causes = [cause for cause, applies in stopped.items() if applies]
        if not causes:
            return None
        is_low = history.option("model.dtype") in ("bfloat16", "float16") and norms.max() > 0
        return self.finding(
            history,
            f"{' and '.join(causes)} in the last {self.steps} steps, although rewards differ within "
            f"{1 - dead.max():.0%} of the groups",
            evidence=["grad_norm", "update_ratio", "learning_rate", DEAD],
            change={"model.dtype": "float32", "trainer.precision": "bf16-mixed"} if is_low else {},
            advice="keep the weights in float32, so that small updates are not lost to rounding"
            if is_low
            else "check that the parameters are trained (requires_grad, LoRA's target_modules), and the schedule",
        )


@dataclass(frozen=True, kw_only=True)
class LearningRateHigh(Rule):
    """The reward has fallen far below its best level and does not recover, and the optimizer's steps were large: they
    have left the region in which the gradient is valid."""

    name: ClassVar[str] = "learning_rate_high"
    source: ClassVar[str] = "Unsloth and open-r1 recipes; Schulman et al. 2017 (arXiv:1707.06347)"
    needs: ClassVar[tuple[str, ...]] = ("reward",)
    ranges: ClassVar[dict[str, str]] = {
        "window": "[10, inf)",
        "share": "(0, 1)",
        "errors": "(0, inf)",
        "steps": "[3, inf)",
    }

    after: int = 8
    window: int = 30
    """Latest steps that contain the fall; what takes longer has other causes."""
    share: float = 0.35
    """Fall of the reward, relative to its best level above the lowest."""
    errors: float = 4.0
    """Fall in standard errors."""
    steps: int = 4
    """Latest steps in which the reward stays low."""

    def check(self, history: History) -> Finding | None:
        reward = history.last("reward", self.window)
        low, earlier = reward.values[-self.steps :], reward.values[: -self.steps]
        if len(earlier) < 4:
            return None
        windows = np.lib.stride_tricks.sliding_window_view(earlier, 4)
        best = int(np.median(windows, axis=1).argmax())
        level, now = float(np.median(windows[best])), float(np.median(low))
        floor = min(0.0, float(reward.values.min()))
        error = math.sqrt(math.pi / 2) * noise(earlier) * math.sqrt(1 / 4 + 1 / self.steps)
        least = self.share * (level - floor)
        if level - now < max(least, self.errors * error) or low.max() > level - least:
            return None
        reasons = self._reasons(history, int(reward.steps[best]))
        if not reasons:
            return None
        return self.finding(
            history,
            f"the reward fell from {level:.3g} at step {reward.steps[best]} to {now:.3g} and does not recover; "
            + ", ".join(reasons),
            since=int(reward.steps[best]),
            evidence=["reward", "grad_norm", "update_ratio", "entropy", "clip_ratio/region_mean", "learning_rate"],
            change={
                **learning_rate(history, 1 / 3),
                "trainer.gradient_clip_val": None if history.option("trainer.gradient_clip_val") else 1.0,
            },
            advice=f"resume from a checkpoint before step {reward.steps[best]} with a lower learning rate",
            severity="critical" if level - now > 0.7 * (level - floor) else "warning",
            extent=level - now,
        )

    @staticmethod
    def _reasons(history: History, best: int) -> list[str]:
        """Signs that the optimizer's steps were large, since shortly before step ``best``."""
        reasons = []
        for name, words in (
            ("update_ratio", "an update relative to the weights"),
            ("grad_norm", "the gradient's norm"),
            ("learning_rate", "the learning rate"),
        ):
            before, since = history.series(name).between(best - 30, best), history.series(name).between(best + 1)
            if len(before) < 3 or len(since) == 0:
                continue
            largest = float(since.values.max())
            if largest > max(3 * before.median, 2 * before.values.max()):
                reasons.append(f"{words} reached {largest:.3g}, {before.median:.3g} before")
        clipped = history.series("clip_ratio/region_mean").between(best)
        if len(clipped) and clipped.values.max() > 0.2:
            reasons.append(f"{clipped.values.max():.0%} of the tokens were clipped")
        entropy, now = history.series("entropy").between(best - 5, best + 3).median, history.last("entropy", 3).median
        if entropy > 0 and not 0.4 < now / entropy < 2.5:
            reasons.append(f"the entropy went from {entropy:.3g} to {now:.3g}")
        return reasons


@dataclass(frozen=True, kw_only=True)
class LearningRateLow(Rule):
    """Rewards differ within groups, so there is a signal, but neither the reward nor the entropy has changed since the
    start: the steps are too small, or lost to rounding."""

    name: ClassVar[str] = "learning_rate_low"
    source: ClassVar[str] = "learning rates of published recipes (docs/tuning.md)"
    needs: ClassVar[tuple[str, ...]] = ("reward", DEAD)
    ranges: ClassVar[dict[str, str]] = {
        "patience": "[1, inf)",
        "tiny_update": "[0, inf)",
        "lost_update": "[0, inf)",
        "mixed": "(0, 1]",
        "change": "[0, inf)",
    }

    after: int = 15
    patience: int = 50
    """Steps without a change after which it is reported, if the size of the updates is not known to be tiny."""
    tiny_update: float = 1.5e-6
    """Size of an update relative to the weights that changes nothing within some tens of steps. It is 5e-6 to 2e-5 with
    Adam at learning rates of 5e-7 to 1e-6."""
    lost_update: float = 1e-4
    """The same for weights in bfloat16, whose neighboring values are 4e-3 to 8e-3 apart: most weights do not move."""
    mixed: float = 0.3
    """Smallest share of groups with different rewards."""
    change: float = 0.03
    """Relative change of the entropy that shows that the policy moves."""

    def check(self, history: History) -> Finding | None:
        steps = history.count("reward")
        update = history.last("update_ratio", 10)
        is_low = history.option("model.dtype") in ("bfloat16", "float16")
        tiny = len(update) > 0 and update.median < (self.lost_update if is_low else self.tiny_update)
        if history.last(DEAD, 20).median > 1 - self.mixed or (steps < self.patience and not tiny):
            return None
        count = min(20, steps // 2)
        before, now = history.start("reward", count).values, history.last("reward", count).values
        if abs(shift(before, now)) >= 2.5 or abs(trend(history.series("reward").values[-2 * count :])) > 2.6:
            return None
        entropy_before, entropy_now = history.start("entropy", count), history.last("entropy", count)
        if (
            len(entropy_now)
            and abs(entropy_now.median / entropy_before.median - 1) > self.change
            and abs(shift(entropy_before.values, entropy_now.values)) > 2.5
        ):
            return None
        return self.finding(
            history,
            f"the reward has not changed in {steps} steps ({np.median(before):.3g} → {np.median(now):.3g}), although "
            f"rewards differ within {1 - history.last(DEAD, 20).median:.0%} of the groups"
            + (f"; a step changes the weights by {update.median:.1g} of their norm" if len(update) else ""),
            since=int(history.start("reward", 1).steps[0]),
            evidence=["reward", "entropy", "update_ratio", "grad_norm", "learning_rate"],
            change={
                **learning_rate(history, 3.0),
                **({"model.dtype": "float32", "trainer.precision": "bf16-mixed"} if is_low else {}),
            },
            advice="raise the learning rate" + (", and keep the weights in float32" if is_low else ""),
        )


@dataclass(frozen=True, kw_only=True)
class Clipping(Rule):
    """A large share of the tokens lies outside of the clip range, so that their gradient is 0: the policy moves too far
    per rollout."""

    name: ClassVar[str] = "clipping"
    source: ClassVar[str] = "rldoctor 0.2 (0.1, 0.2 and 0.4); GSPO clips 15 % (arXiv:2507.18071)"
    needs: ClassVar[tuple[str, ...]] = ("clip_ratio/region_mean",)
    ranges: ClassVar[dict[str, str]] = {"share": "(0, 1]"}

    share: float = 0.3
    """Share of clipped tokens, as a median over ten steps."""

    def check(self, history: History) -> Finding | None:
        now = history.last("clip_ratio/region_mean", 10).median
        if now < self.share:
            return None
        return self.finding(
            history,
            f"{now:.0%} of the tokens are clipped",
            evidence=["clip_ratio/region_mean", "reward"],
            change=learning_rate(history, 1 / 3),
            advice="lower the learning rate, or take fewer optimizer steps per rollout",
            extent=now,
        )


@dataclass(frozen=True, kw_only=True)
class GradientSpikes(Rule):
    """Single steps have gradients many times as large as the others, and nothing limits them."""

    name: ClassVar[str] = "gradient_spikes"
    source: ClassVar[str] = "rldoctor 0.2 (8 σ and 3 times the median)"
    needs: ClassVar[tuple[str, ...]] = ("grad_norm",)
    ranges: ClassVar[dict[str, str]] = {"sigmas": "(0, inf)", "factor": "(1, inf)", "count": "[1, inf)"}

    after: int = 20
    sigmas: float = 8.0
    """Distance from the median in standard deviations."""
    factor: float = 5.0
    """Multiple of the median."""
    count: int = 2
    """Spikes within ten steps."""

    def check(self, history: History) -> Finding | None:
        recent, before = history.last("grad_norm", 10), history.last("grad_norm", 40).values[:-10]
        # groups without a signal make most gradients small, and each of the others a spike
        if history.last(DEAD, 40).median > 0.5 or history.option("trainer.gradient_clip_val"):
            return None
        middle, sigma = float(np.median(before)), noise(before)
        limit = max(self.factor * middle, middle + self.sigmas * sigma)
        spikes = recent.steps[recent.values > limit]
        if len(spikes) < self.count:
            return None
        return self.finding(
            history,
            f"the gradient's norm exceeded {limit:.3g} in {len(spikes)} of the last {len(recent)} steps; its median "
            f"is {middle:.3g}",
            since=int(spikes[0]),
            evidence=["grad_norm", "reward"],
            change={"trainer.gradient_clip_val": float(f"{2 * middle:.1g}")},
            advice="clip the gradient at about twice its median",
            extent=float(recent.values.max()),
        )


@dataclass(frozen=True, kw_only=True)
class SmallBatch(Rule):
    """The gradient of a step is almost only noise, and the reward does not rise: it comes from the completions of a
    single prompt, or its noise scale, the batch at which signal and noise are equal, is many times the batch."""

    name: ClassVar[str] = "small_batch"
    source: ClassVar[str] = "McCandlish et al. 2018 (arXiv:1812.06162)"
    needs: ClassVar[tuple[str, ...]] = ("reward",)
    ranges: ClassVar[dict[str, str]] = {"factor": "(1, inf)"}

    after: int = 20
    factor: float = 30.0
    """Noise scale relative to the batch."""

    def check(self, history: History) -> Finding | None:
        batch, group = history.info.get("completions_per_step"), history.option("model.num_generations")
        if not batch or trend(history.last("reward", 30).values) > 2:
            return None
        if group and batch < 2 * group:
            return self.finding(
                history,
                f"the {batch} completions of a step belong to a single prompt, so that its gradient is mostly noise",
                evidence=["reward", "grad_norm", DEAD],
                change=larger_batch(history, 8),
                advice="use more prompts per step",
            )
        noises, signals = history.last("noise_scale/noise", 30).values, history.last("noise_scale/signal", 30).values
        if len(noises) < self.after or noises.mean() <= 0 or history.last(DEAD, 20).median > 0.75:
            return None
        # the estimate of the signal may be negative: it is then too small to be measured with these steps
        smallest = signals.std() / math.sqrt(len(signals))
        scale = float(noises.mean() / max(signals.mean(), smallest, 1e-30))
        if scale < self.factor * batch:
            return None
        return self.finding(
            history,
            f"the noise scale of the gradient is about {scale:,.0f} completions, and a step has {batch}",
            evidence=["noise_scale/noise", "noise_scale/signal", "reward"],
            change=larger_batch(history, scale / (self.factor * batch)),
            advice="use more prompts per step",
            extent=scale / batch,
        )
