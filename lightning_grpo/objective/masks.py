"""Which tokens and completions take part in the policy term. Shapes: N completions, T tokens."""

import torch
from torch import Tensor

from lightning_grpo.objective.tensors import sequence_mean


def loss_mask(completion_mask: Tensor, truncated: Tensor, *, drop_truncated: bool) -> Tensor:
    """[N, T] bool: the tokens that the loss is about.

    Args:
        completion_mask: [N, T], the policy's own tokens: no padding, no tool output.
        truncated: [N] bool, True where the completion ended for its length.
        drop_truncated: leave those completions out (overlong filtering, arXiv:2503.14476, §3.4): what they would have
            come to is unknown. They still count in means over completions.
    """
    mask = completion_mask.bool()
    return mask & ~truncated[:, None] if drop_truncated else mask


def top_entropy_mask(entropy: Tensor, mask: Tensor, quantile: float) -> Tensor:
    """[N, T] bool: the ``quantile`` of tokens with the highest entropy (arXiv:2506.01939; 0.2 there).

    Local by intent: the threshold is that of the tokens given, here one micro-batch.
    """
    if not mask.any():
        return mask
    # both sides of the comparison in one precision: a token that is the threshold itself stays
    entropy = entropy.float()
    threshold = torch.quantile(entropy[mask], 1 - quantile)
    return (entropy >= threshold) & mask


def off_policy_mask(
    logprobs: Tensor, behavior_logprobs: Tensor, advantages: Tensor, mask: Tensor, threshold: float
) -> Tensor:
    """Bool, shaped as ``advantages`` ([N, 1] or [N, T]): keep A ≥ 0, or completions still near their sampler.

    Near: the completion's mean of (log π_rollout − log π) is at most ``threshold`` (DeepSeek-V3.2, arXiv:2512.02556).
    """
    # a token that the engine could not score (NaN) is no evidence of drift
    drift = (behavior_logprobs - logprobs.detach()).masked_fill(behavior_logprobs.isnan(), 0.0)
    distance = sequence_mean(drift, mask)
    return (advantages >= 0) | (distance <= threshold)
