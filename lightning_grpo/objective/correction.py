"""Rollout correction: reweighting for the engine's probabilities not being the trainer's.

ρ = π_old/π_rollout, where π_rollout are the log-probs that the engine reports for what it sampled.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_grpo.objective.tensors import LOG_LIMIT, sequence_mean
from lightning_grpo.ranges import check_ranges


@dataclass(frozen=True, kw_only=True)
class RolloutCorrection:
    """How ρ is formed and bounded.

    Truncated importance sampling (TIS) is level token, mode truncate, bounds (none, 2); IcePop (Ring-1T,
    arXiv:2510.18855) is level token, mode mask, bounds (0.5, 5); masked sequence importance sampling is level sequence,
    mode mask. A token whose rollout log-prob is NaN (the engine could not score it) has ρ = 1.
    """

    level: Literal["token", "sequence", "geometric"] = "token"
    """Ratio of each token, of the whole completion (its product), or the completion's geometric mean."""
    mode: Literal["truncate", "mask"] = "truncate"
    """What happens outside the bounds: ρ is clamped to them, or the token or completion is dropped (ρ = 0)."""
    lower: float | None = None
    """Lower bound of ρ; None: none."""
    upper: float | None = 2.0
    """Upper bound of ρ; None: none."""

    def __post_init__(self) -> None:
        check_ranges(self, {"lower": "[0, 1]", "upper": "[1, inf)"}, prefix="rollout_correction.")


def rollout_ratio(
    old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, level: Literal["token", "sequence", "geometric"]
) -> Tensor:
    """ρ before any bound: [N, T] at token level, else [N, 1]. The log-probs are equal at masked positions."""
    log_rho = (old_logprobs - rollout_logprobs).masked_fill(rollout_logprobs.isnan(), 0.0)
    if level == "sequence":
        log_rho = log_rho.sum(1, keepdim=True)
    elif level == "geometric":
        log_rho = sequence_mean(log_rho, mask)
    return log_rho.clamp(-LOG_LIMIT, LOG_LIMIT).exp()


def bound(ratio: Tensor, correction: RolloutCorrection) -> Tensor:
    """The rollout weight, shaped as ``ratio``."""
    lower = 0.0 if correction.lower is None else correction.lower
    upper = float("inf") if correction.upper is None else correction.upper
    if correction.mode == "truncate":
        return ratio.clamp(lower, upper)
    return torch.where((ratio >= lower) & (ratio <= upper), ratio, 0.0)
