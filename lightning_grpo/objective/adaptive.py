"""Control laws that move β and the entropy coefficient towards a target, once per optimizer step."""

from dataclasses import dataclass

from lightning_grpo.errors import UserError
from lightning_grpo.ranges import check_ranges


@dataclass(frozen=True, kw_only=True)
class AdaptiveBeta:
    """Proportional control of the KL (arXiv:1909.08593, §2.2): β ← β·(1 + gain·clip(KL/target − 1, ±clip))."""

    target: float
    """KL to the reference to hold, in nats per token as the estimator gives it."""
    gain: float = 0.1
    """Share of the clipped error by which β moves in a step."""
    clip: float = 0.2
    """Largest relative error taken into account."""

    def __post_init__(self) -> None:
        ranges = {"target": "(0, inf)", "gain": "(0, inf)", "clip": "(0, inf)"}
        check_ranges(self, ranges, prefix="adaptive_beta.")
        if self.gain * self.clip >= 1:
            raise UserError(
                f"adaptive_beta.gain is {self.gain} and clip {self.clip}: a step could make β 0 or less; set them so "
                "that their product is below 1"
            )

    def step(self, beta: float, kl: float) -> float:
        """β for the next step, after one whose mean KL was ``kl``."""
        return beta * (1 + self.gain * min(max(kl / self.target - 1, -self.clip), self.clip))


@dataclass(frozen=True, kw_only=True)
class AdaptiveEntropy:
    """Integral control of the entropy bonus (Skywork-OR1, arXiv:2505.22312).

    After a step whose entropy was at most ``target`` the coefficient grows by ``delta``, else it shrinks by it. The
    bonus is given only while the last entropy was at most ``target``, so never in the first step.
    """

    target: float = 0.2
    """Mean entropy to hold, in nats per token."""
    delta: float = 0.005
    """Change of the coefficient in a step."""
    minimum: float = 0.0
    """Smallest coefficient."""
    maximum: float = 1.0
    """Largest coefficient."""

    def __post_init__(self) -> None:
        ranges = dict.fromkeys(("target", "delta", "minimum", "maximum"), "[0, inf)")
        check_ranges(self, ranges, prefix="adaptive_entropy.")
        if not 0 <= self.minimum <= self.maximum:
            raise UserError(
                f"adaptive_entropy.minimum is {self.minimum} and maximum {self.maximum}; set 0 ≤ minimum ≤ maximum"
            )

    def step(self, coef: float, entropy: float) -> float:
        """The coefficient for the next step, after one whose mean entropy was ``entropy``."""
        moved = coef + (self.delta if entropy <= self.target else -self.delta)
        return min(max(moved, self.minimum), self.maximum)
