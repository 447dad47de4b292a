"""Estimators of KL(π‖π_ref), the distance from the reference policy, from the log-probs of the sampled tokens.

http://joschu.net/blog/kl-approx.html; x = log π_ref − log π.
"""

from typing import Literal

import torch
from torch import Tensor

from lightning_grpo.objective.tensors import exp, fill

KLEstimator = Literal["k1", "abs", "k2", "k3"]


def kl_divergence(logprobs: Tensor, ref_logprobs: Tensor, estimator: KLEstimator = "k3") -> Tensor:
    """Return the estimate for each token, [N, T].

    - k1: −x. Unbiased. For the reward; in a loss its expected gradient is zero.
    - abs: |x|.
    - k2: x²/2. Biased; in a loss, on-policy, its gradient is that of the true KL.
    - k3: eˣ − x − 1. Unbiased and never negative; in a loss its gradient is that of the forward KL (arXiv:2512.21852).
    """
    x = ref_logprobs - logprobs
    if estimator == "k1":
        return -x
    if estimator == "abs":
        return x.abs()
    if estimator == "k2":
        return x.square() / 2
    return exp(x) - x - 1


def kl_penalty(
    logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, *, beta: float, estimator: KLEstimator = "k1"
) -> Tensor:
    """Return β · Σ_t KL_t, [N], to be subtracted from the rewards (RLHF, arXiv:2203.02155).

    Args:
        logprobs: [N, T], of the sampling policy.
        ref_logprobs: [N, T], of the reference.
        mask: [N, T]; masked positions may hold any value.
    """
    mask = mask.bool()
    kl = kl_divergence(fill(logprobs, mask), fill(ref_logprobs, mask), estimator)
    return beta * kl.detach().sum(1)


def append_kl(
    rewards: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    *,
    beta: float,
    estimator: KLEstimator = "k1",
) -> Tensor:
    """[N, R + 1]: the rewards, and −`kl_penalty` as one more.

    Args:
        rewards: [N, R]; a completion to which no reward applies (all NaN) keeps having none.
        logprobs: [N, T], of the policy that sampled. A token whose log-prob is NaN adds nothing to the KL.
        ref_logprobs: [N, T].
        mask: [N, T].
        beta: β.
        estimator: see `kl_divergence`.
    """
    logprobs = torch.where(logprobs.isnan(), ref_logprobs, logprobs)
    penalty = kl_penalty(logprobs, ref_logprobs, mask, beta=beta, estimator=estimator)
    penalty = penalty.masked_fill(rewards.isnan().all(1), torch.nan)
    return torch.cat([rewards, -penalty[:, None]], dim=1)
