"""Masks that select the tokens and completions of the policy term. Shapes: N completions, T tokens."""

import torch
from torch import Tensor

from lightning_grpo.objective.tensors import sequence_mean


def loss_mask(completion_mask: Tensor, truncated: Tensor, *, drop_truncated: bool) -> Tensor:
    """[N, T] bool: the tokens in the loss.

    Args:
        completion_mask: [N, T], the tokens that the policy sampled: no padding, no tool output.
        truncated: [N] bool, True if the completion was cut off at the length limit.
        drop_truncated: exclude those completions, whose result is unknown (overlong filtering, arXiv:2503.14476, §3.4).
            They still count in means over completions.
    """
    mask = completion_mask.bool()
    return mask & ~truncated[:, None] if drop_truncated else mask


def top_entropy_mask(entropy: Tensor, mask: Tensor, quantile: float) -> Tensor:
    """[N, T] bool: the ``quantile`` of tokens with the highest entropy (arXiv:2506.01939; 0.2 there).

    The threshold is taken over the tokens given, by design those of one micro-batch.
    """
    if not mask.any():
        return mask
    # Compare in one precision, so that a token whose entropy equals the threshold is kept.
    entropy = entropy.float()
    threshold = torch.quantile(entropy[mask], 1 - quantile)
    return (entropy >= threshold) & mask


def off_policy_mask(
    logprobs: Tensor, behavior_logprobs: Tensor, advantages: Tensor, mask: Tensor, threshold: float
) -> Tensor:
    """Bool, shaped like ``advantages`` ([N, 1] or [N, T]): True if A ≥ 0 or the policy is near the sampling policy.

    It is near if the mean of (log π_rollout − log π) over the completion is at most ``threshold`` (DeepSeek-V3.2,
    arXiv:2512.02556).
    """
    # A token that the engine could not score (NaN) counts as unchanged.
    drift = (behavior_logprobs - logprobs.detach()).masked_fill(behavior_logprobs.isnan(), 0.0)
    distance = sequence_mean(drift, mask)
    return (advantages >= 0) | (distance <= threshold)
