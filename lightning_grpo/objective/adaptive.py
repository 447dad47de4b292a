"""Controllers that adjust β and the entropy coefficient once per optimizer step, to reach a target."""

from dataclasses import dataclass

from lightning_grpo.errors import UserError
from lightning_grpo.ranges import check_ranges


@dataclass(frozen=True, kw_only=True)
class AdaptiveBeta:
    """Proportional control of the KL (arXiv:1909.08593, §2.2): β ← β·(1 + gain·clip(KL/target − 1, ±clip))."""

    target: float
    """KL to the reference to aim for, in nats per token as measured by the estimator."""
    gain: float = 0.1
    """Share of the clipped relative error by which β changes per step."""
    clip: float = 0.2
    """Bound on the relative error."""

    def __post_init__(self) -> None:
        ranges = {"target": "(0, inf)", "gain": "(0, inf)", "clip": "(0, inf)"}
        check_ranges(self, ranges, prefix="adaptive_beta.")
        if self.gain * self.clip >= 1:
            raise UserError(
                f"adaptive_beta.gain is {self.gain} and adaptive_beta.clip is {self.clip}: a step could make β 0 or "
                "negative; set them so that their product is below 1"
            )

    def step(self, beta: float, kl: float) -> float:
        """Return β for the next step, after a step whose mean KL was ``kl``."""
        return beta * (1 + self.gain * min(max(kl / self.target - 1, -self.clip), self.clip))


@dataclass(frozen=True, kw_only=True)
class AdaptiveEntropy:
    """Integral control of the entropy bonus (Skywork-OR1, arXiv:2505.22312).

    After a step whose entropy is at most ``target`` the coefficient increases by ``delta``, otherwise it decreases by
    ``delta``. The bonus applies only if the entropy of the previous step was at most ``target``, so it never applies in
    the first step.
    """

    target: float = 0.2
    """Mean entropy to aim for, in nats per token."""
    delta: float = 0.005
    """Change of the coefficient per step."""
    minimum: float = 0.0
    """Smallest coefficient."""
    maximum: float = 1.0
    """Largest coefficient."""

    def __post_init__(self) -> None:
        ranges = dict.fromkeys(("target", "delta", "minimum", "maximum"), "[0, inf)")
        check_ranges(self, ranges, prefix="adaptive_entropy.")
        if not 0 <= self.minimum <= self.maximum:
            raise UserError(
                f"adaptive_entropy.minimum is {self.minimum} and maximum is {self.maximum}; set 0 ≤ minimum ≤ maximum"
            )

    def step(self, coef: float, entropy: float) -> float:
        """Return the coefficient for the next step, after a step whose mean entropy was ``entropy``."""
        moved = coef + (self.delta if entropy <= self.target else -self.delta)
        return min(max(moved, self.minimum), self.maximum)
