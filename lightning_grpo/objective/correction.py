"""Rollout correction: importance weights for the difference between the engine's and the trainer's probabilities.

ρ = π_old/π_rollout, with π_rollout from the log-probs that the engine reports for the tokens it sampled.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_grpo.objective.tensors import LOG_LIMIT, sequence_mean
from lightning_grpo.ranges import check_ranges


@dataclass(frozen=True, kw_only=True)
class RolloutCorrection:
    """Computes ρ and keeps it within bounds.

    Truncated importance sampling (TIS) is level token, mode truncate, bounds (none, 2); IcePop (Ring-1T,
    arXiv:2510.18855) is level token, mode mask, bounds (0.5, 5); masked sequence importance sampling is level sequence,
    mode mask. A token that the engine could not score (its rollout log-prob is NaN) has ρ = 1.
    """

    level: Literal["token", "sequence", "geometric"] = "token"
    """The ratio of each token, their product over the completion, or their geometric mean over the completion."""
    mode: Literal["truncate", "mask"] = "truncate"
    """Outside the bounds, clamp ρ to them (truncate), or drop the token or completion by setting ρ = 0 (mask)."""
    lower: float | None = None
    """Lower bound of ρ. None: no bound."""
    upper: float | None = 2.0
    """Upper bound of ρ. None: no bound."""

    def __post_init__(self) -> None:
        check_ranges(self, {"lower": "[0, 1]", "upper": "[1, inf)"}, prefix="rollout_correction.")

    def weight(self, old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor) -> Tensor:
        """Return ρ within its bounds: [N, T] at token level, else [N, 1].

        Args:
            old_logprobs: [N, T], of the trainer; equal to ``rollout_logprobs`` at masked positions.
            rollout_logprobs: [N, T], of the engine; NaN for tokens that it could not score.
            mask: [N, T] bool.
        """
        log_ratio = (old_logprobs - rollout_logprobs).masked_fill(rollout_logprobs.isnan(), 0.0)
        if self.level == "sequence":
            log_ratio = log_ratio.sum(1, keepdim=True)
        elif self.level == "geometric":
            log_ratio = sequence_mean(log_ratio, mask)
        ratio = log_ratio.clamp(-LOG_LIMIT, LOG_LIMIT).exp()
        lower = 0.0 if self.lower is None else self.lower
        upper = float("inf") if self.upper is None else self.upper
        if self.mode == "truncate":
            return ratio.clamp(lower, upper)
        return torch.where((ratio >= lower) & (ratio <= upper), ratio, 0.0)
