"""Surrogates: per-token losses whose gradient is the policy gradient, each with its own limit on large steps.

Shapes: N completions, T tokens. w = π/π_old is the ratio, [N, T] at token level and [N, 1] at sequence level; A are the
advantages, [N, 1] or [N, T]; sg[·] stops the gradient. All inputs are finite at masked positions (w = 1 there).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import log
from typing import ClassVar

import torch
from torch import Tensor

from lightning_grpo.objective.tensors import LOG_LIMIT, exp, sequence_mean
from lightning_grpo.ranges import check_ranges


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The inputs of a surrogate."""

    logprobs: Tensor
    """[N, T], with gradient."""
    old_logprobs: Tensor
    """[N, T], no gradient: of the policy in the denominator of the ratio."""
    behavior_logprobs: Tensor
    """[N, T], no gradient: the engine's (NaN for tokens that it could not score) if given, else old_logprobs."""
    ratio: Tensor
    """w: [N, T] (token level) or [N, 1] (sequence level), with gradient."""
    advantages: Tensor
    """A: [N, 1] or [N, T]."""
    mask: Tensor
    """[N, T] bool."""
    rollout_weight: Tensor | None
    """ρ: [N, T], [N, 1] or None, no gradient."""

    @property
    def log_ratio(self) -> Tensor:
        """[N, T], with gradient."""
        return self.logprobs - self.old_logprobs


class Surrogate(ABC):
    """The per-token loss, before masks, rollout correction, KL and aggregation.

    To define your own, write a subclass that is a frozen keyword-only dataclass with its options as fields, implement
    ``__call__``, and set ``objective.surrogate`` to its class path. The loss of a token with A = 0 must have no
    gradient.
    """

    uses_ratio: ClassVar[bool] = True
    """Whether the loss depends on old log-probs."""
    applies_rollout_weight: ClassVar[bool] = False
    """Whether the loss already contains ρ; otherwise it is multiplied by ρ afterwards."""

    @abstractmethod
    def __call__(self, terms: Terms) -> Tensor:
        """Return the loss, [N, T] or broadcastable to it."""

    def clipped(self, terms: Terms) -> tuple[Tensor, Tensor] | None:
        """Return where the gradient is clipped for a low and for a high ratio, bool [N, T] or [N, 1]; None: never."""
        return None


@dataclass(frozen=True, kw_only=True)
class Clipped(Surrogate):
    """−min(min(w, δ)·A, clip(w, 1−ε, 1+ε_high)·A) of PPO (arXiv:1707.06347, eq. 7) and GRPO (arXiv:2402.03300, eq. 3).

    With ``dual_clip`` = c the loss of a negative advantage is at most −c·A (arXiv:1912.09729).
    """

    epsilon: float = 0.2
    """The lower clip bound of the ratio is 1 − epsilon."""
    epsilon_high: float | None = None
    """The upper clip bound of the ratio is 1 + epsilon_high. None: epsilon."""
    delta: float | None = None
    """Upper bound of the ratio in the unclipped branch (two-sided clipping of INTELLECT-2, arXiv:2505.07291). None: no
    bound."""
    dual_clip: float | None = None
    """c > 1 of the dual clip, usually 3. None: off."""

    def __post_init__(self) -> None:
        # At 1 or below, delta and dual_clip would clip tokens whose ratio is 1.
        ranges = {"epsilon": "[0, inf)", "epsilon_high": "[0, inf)", "delta": "(1, inf)", "dual_clip": "(1, inf)"}
        check_ranges(self, ranges, prefix="Clipped.")

    @property
    def bounds(self) -> tuple[float, float]:
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        return 1 - self.epsilon, 1 + high

    def __call__(self, terms: Terms) -> Tensor:
        w, A = terms.ratio, terms.advantages
        unclipped = w if self.delta is None else w.clamp(max=self.delta)
        loss = -torch.min(unclipped * A, w.clamp(*self.bounds) * A)
        if self.dual_clip is not None:
            loss = torch.where(A < 0, torch.min(loss, -self.dual_clip * A), loss)
        return loss

    def clipped(self, terms: Terms) -> tuple[Tensor, Tensor]:
        low, high = self.bounds
        return (terms.ratio < low) & (terms.advantages < 0), (terms.ratio > high) & (terms.advantages > 0)


@dataclass(frozen=True, kw_only=True)
class Reinforce(Surrogate):
    """−A·log π (Williams 1992), without a ratio or a clip. For on-policy steps."""

    uses_ratio: ClassVar[bool] = False

    def __call__(self, terms: Terms) -> Tensor:
        return -terms.advantages * terms.logprobs


@dataclass(frozen=True, kw_only=True)
class CISPO(Surrogate):
    """−sg[min(w, ε_high)]·A·log π (MiniMax-M1, arXiv:2506.13585). No token loses its gradient."""

    epsilon_high: float = 5.0
    """The largest weight itself, not its distance from 1 (5 in ScaleRL, arXiv:2510.13786)."""

    def __post_init__(self) -> None:
        check_ranges(self, {"epsilon_high": "(0, inf)"}, prefix="CISPO.")

    def __call__(self, terms: Terms) -> Tensor:
        return -terms.ratio.detach().clamp(max=self.epsilon_high) * terms.advantages * terms.logprobs

    def clipped(self, terms: Terms) -> tuple[Tensor, Tensor]:
        high = (terms.ratio > self.epsilon_high) & (terms.advantages > 0)
        return torch.zeros_like(high), high


def by_sign(A: Tensor, positive: Tensor, above: float, below: float) -> Tensor:
    """``above`` where ``positive`` is True, ``below`` elsewhere, in the precision of ``A``."""
    return torch.where(positive, A.new_tensor(above), A.new_tensor(below))


@dataclass(frozen=True, kw_only=True)
class SAPO(Surrogate):
    """−(4/τ)·σ(τ·(w − 1))·A, a soft gate instead of a clip (arXiv:2511.20347)."""

    temperature_positive: float = 1.0
    """τ if A > 0."""
    temperature_negative: float = 1.05
    """τ otherwise. The larger τ is, the faster the gradient of an off-policy token decays."""

    def __post_init__(self) -> None:
        ranges = {"temperature_positive": "(0, inf)", "temperature_negative": "(0, inf)"}
        check_ranges(self, ranges, prefix="SAPO.")

    def __call__(self, terms: Terms) -> Tensor:
        w, A = terms.ratio, terms.advantages
        tau = by_sign(A, A > 0, self.temperature_positive, self.temperature_negative)
        return -torch.sigmoid(tau * (w - 1)) * (4 / tau) * A


@dataclass(frozen=True, kw_only=True)
class VESPO(Surrogate):
    """−sg[φ(w_s)]·A·log π with φ(w) = w^k · e^(λ·(1−w)) of the completion's ratio w_s (arXiv:2602.10693).

    log w_s = Σ (log π − log π_old) + Σ log ρ, which includes the rollout weight.
    """

    applies_rollout_weight: ClassVar[bool] = True

    k_positive: float = 2.0
    """k if A ≥ 0."""
    lambda_positive: float = 3.0
    """λ if A ≥ 0."""
    k_negative: float = 3.0
    """k if A < 0."""
    lambda_negative: float = 2.0
    """λ if A < 0."""

    def __post_init__(self) -> None:
        names = ("k_positive", "lambda_positive", "k_negative", "lambda_negative")
        check_ranges(self, dict.fromkeys(names, "[0, inf)"), prefix="VESPO.")

    def __call__(self, terms: Terms) -> Tensor:
        return -self.weight(terms) * terms.advantages * terms.logprobs

    @torch.no_grad()
    def weight(self, terms: Terms) -> Tensor:
        """φ(w_s) with the options for the sign of A, shaped like the advantages."""
        lowest = log(1e-8)
        log_w = (terms.log_ratio.clamp(-LOG_LIMIT, LOG_LIMIT) * terms.mask).sum(1, keepdim=True)
        if terms.rollout_weight is not None:
            log_rho = terms.rollout_weight.log().clamp(lowest, LOG_LIMIT)
            # A weight per completion is added once; weights per token are summed.
            log_w = log_w + (log_rho if log_rho.shape[1] == 1 else (log_rho * terms.mask).sum(1, keepdim=True))
        log_w = log_w.clamp(lowest, LOG_LIMIT)
        A = terms.advantages
        k = by_sign(A, A >= 0, self.k_positive, self.k_negative)
        lam = by_sign(A, A >= 0, self.lambda_positive, self.lambda_negative)
        return (lam + k * log_w - lam * log_w.exp()).exp()


@dataclass(frozen=True, kw_only=True)
class GMPO(Surrogate):
    """−A · geometric mean of the clipped token ratios over the completion (arXiv:2507.20673).

    The clip is in log space, and on one side depending on the sign of A: log w ≤ ε_high if A > 0, log w ≥ −ε if A < 0.
    """

    epsilon: float = 0.4
    """Bound of −log w for negative advantages: by default ratios from e^−0.4."""
    epsilon_high: float | None = None
    """Bound of log w for positive advantages. None: epsilon, by default ratios up to e^0.4."""

    def __post_init__(self) -> None:
        check_ranges(self, {"epsilon": "[0, inf)", "epsilon_high": "[0, inf)"}, prefix="GMPO.")

    def __call__(self, terms: Terms) -> Tensor:
        low, high = self.clipped(terms)
        bounded = torch.where(high, self.high, torch.where(low, -self.epsilon, terms.log_ratio))
        return -exp(sequence_mean(bounded, terms.mask)) * terms.advantages

    @property
    def high(self) -> float:
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    def clipped(self, terms: Terms) -> tuple[Tensor, Tensor]:
        d, A = terms.log_ratio, terms.advantages
        return (d < -self.epsilon) & (A < 0), (d > self.high) & (A > 0)


@dataclass(frozen=True, kw_only=True)
class DPPO(Surrogate):
    """−w·A, or 0 if π has left the trust region |π − μ| ≤ δ in the direction of A's gradient (arXiv:2602.04879).

    This is the binary total-variation form. Unlike a ratio clip it does not bind rare tokens harder than common ones. μ
    is the engine's probability if it is known, else that of the old policy.
    """

    threshold: float = 0.2
    """δ, the largest difference of a token's probability."""

    def __post_init__(self) -> None:
        check_ranges(self, {"threshold": "(0, 1]"}, prefix="DPPO.")

    def __call__(self, terms: Terms) -> Tensor:
        low, high = self.clipped(terms)
        return -terms.ratio * terms.advantages * ~(low | high)

    def clipped(self, terms: Terms) -> tuple[Tensor, Tensor]:
        moved = (terms.logprobs.exp() - terms.behavior_logprobs.exp()).detach()
        low = (moved < -self.threshold) & (terms.advantages < 0)
        return low, (moved > self.threshold) & (terms.advantages > 0)
