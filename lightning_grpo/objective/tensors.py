"""Masked arithmetic and the forms in which metrics leave the objective. Shapes: N completions, T tokens."""

from typing import NamedTuple

import torch
from torch import Tensor

LOG_LIMIT = 20.0
BINS_A_DECADE = 100
BINS = 10 * BINS_A_DECADE + 1


class Sum(NamedTuple):
    """Parts of a mean: merge over micro-batches and ranks by addition, then divide once."""

    value: Tensor
    count: Tensor

    def merge(self, other: "Sum") -> "Sum":
        return Sum(self.value + other.value, self.count + other.count)

    def compute(self) -> Tensor:
        """The mean; NaN where nothing was counted."""
        return self.value / self.count


class Min(NamedTuple):
    """A minimum: merge over micro-batches and ranks by taking the smaller. +inf where there was nothing."""

    value: Tensor

    def merge(self, other: "Min") -> "Min":
        return Min(torch.minimum(self.value, other.value))

    def compute(self) -> Tensor:
        return self.value


class Max(NamedTuple):
    """A maximum: merge over micro-batches and ranks by taking the larger. -inf where there was nothing."""

    value: Tensor

    def merge(self, other: "Max") -> "Max":
        return Max(torch.maximum(self.value, other.value))

    def compute(self) -> Tensor:
        return self.value


class Percentile99(NamedTuple):
    """How many values fell into each of the logarithmic bins: merge over micro-batches and ranks by addition."""

    counts: Tensor
    """[BINS], from 0 … 1e-8 in the first to everything from 100 on in the last."""

    @classmethod
    def of(cls, x: Tensor, mask: Tensor) -> "Percentile99":
        """Of the values ``x`` ≥ 0 where ``mask`` holds; any shape. NaN counts as large."""
        place = (torch.log10(x.detach().clamp(min=1e-9)) + 8) * BINS_A_DECADE
        place = place.nan_to_num(nan=BINS).clamp(-1, BINS - 2).long() + 1
        counts = torch.zeros(BINS, dtype=torch.float32, device=x.device)
        return cls(counts.scatter_add_(0, place.flatten(), mask.flatten().to(counts.dtype)))

    @property
    def count(self) -> Tensor:
        return self.counts.sum()

    def merge(self, other: "Percentile99") -> "Percentile99":
        return Percentile99(self.counts + other.counts)

    def compute(self) -> Tensor:
        """The value that 99 % don't exceed, within the width of a bin, 2.3 %; 0 below 1e-8."""
        place = (self.counts.cumsum(0) < 0.99 * self.count).sum()
        return torch.where(place == 0, 0.0, 10.0 ** ((place - 0.5) / BINS_A_DECADE - 8))


Metric = Sum | Min | Max | Percentile99


def fill(x: Tensor, mask: Tensor, value: float = 0.0) -> Tensor:
    """``x`` where ``mask`` holds and ``value`` elsewhere; what lay there, NaN included, reaches no gradient either.

    A half-precision ``x`` comes back in float32.
    """
    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
    return torch.where(mask, x, torch.full_like(x, value))


def rows(mask: Tensor) -> Tensor:
    """[N, 1] bool: which completions have any token at all."""
    return mask.any(dim=1, keepdim=True)


def sequence_mean(x: Tensor, mask: Tensor) -> Tensor:
    """[N, 1]: the mean of ``x`` [N, T] over each row's tokens, 0 for a row without any."""
    return (x * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)


def exp(x: Tensor) -> Tensor:
    """eˣ, continued by its tangent above x = 20, so that one wild token gives a large gradient and never inf · 0."""
    bounded = x.clamp(max=LOG_LIMIT)
    return bounded.exp() * (1 + (x - bounded))


def mean_metric(x: Tensor, mask: Tensor) -> Sum:
    """Mean over tokens of ``x`` [N, T], or over the completions that have tokens of ``x`` [N, 1]."""
    if x.shape[1] == 1:
        mask = rows(mask)
    return Sum(fill(x.detach(), mask).sum(), mask.sum().to(x.dtype if x.is_floating_point() else torch.float32))


def extremes(x: Tensor, mask: Tensor) -> tuple[Min, Max]:
    """Smallest and largest of ``x`` [N, T] over tokens, or of ``x`` [N, 1] over the completions that have tokens."""
    if x.shape[1] == 1:
        mask = rows(mask)
    inf = x.new_full((1,), float("inf"))
    x = x.detach()
    return (
        Min(torch.cat([fill(x, mask, float("inf")).flatten(), inf]).amin()),
        Max(torch.cat([fill(x, mask, float("-inf")).flatten(), -inf]).amax()),
    )
