"""Masked arithmetic. Shapes: N completions, T tokens."""

import torch
from torch import Tensor

from lightning_grpo.metrics import Max, Mean, Min

LOG_LIMIT = 20.0


def fill(x: Tensor, mask: Tensor, value: float = 0.0) -> Tensor:
    """Return ``x`` with ``value`` at masked positions, whose former values (NaN included) reach no gradient.

    A half-precision ``x`` is returned in float32.
    """
    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
    return torch.where(mask, x, torch.full_like(x, value))


def has_tokens(mask: Tensor) -> Tensor:
    """[N, 1] bool: which completions have any token."""
    return mask.any(dim=1, keepdim=True)


def sequence_mean(x: Tensor, mask: Tensor) -> Tensor:
    """[N, 1]: the mean of ``x`` [N, T] over each completion's tokens; 0 for a completion without tokens."""
    return (x * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)


def exp(x: Tensor) -> Tensor:
    """eˣ, continued by its tangent above x = 20: an outlier gives a large gradient, and never inf · 0 = NaN."""
    bounded = x.clamp(max=LOG_LIMIT)
    return bounded.exp() * (1 + (x - bounded))


def mean_metric(x: Tensor, mask: Tensor) -> Mean:
    """The mean of ``x`` [N, T] over tokens, or of ``x`` [N, 1] over the completions that have tokens."""
    if x.shape[1] == 1:
        mask = has_tokens(mask)
    return Mean(fill(x.detach(), mask).sum(), mask.sum().to(x.dtype if x.is_floating_point() else torch.float32))


def extremes(x: Tensor, mask: Tensor) -> tuple[Min, Max]:
    """The minimum and maximum of ``x`` [N, T] over tokens, or of ``x`` [N, 1] over the completions that have tokens."""
    if x.shape[1] == 1:
        mask = has_tokens(mask)
    inf = x.new_full((1,), float("inf"))
    x = x.detach()
    return (
        Min(torch.cat([fill(x, mask, float("inf")).flatten(), inf]).amin()),
        Max(torch.cat([fill(x, mask, float("-inf")).flatten(), -inf]).amax()),
    )
