"""Metrics that merge over micro-batches and ranks, and `Window`, which collects them over an optimizer step."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, distributed

BINS_PER_DECADE = 100
BINS = 10 * BINS_PER_DECADE + 1


class Mean(NamedTuple):
    """Parts of a mean: merge over micro-batches and ranks by addition, then divide once."""

    value: Tensor
    count: Tensor

    def merge(self, other: "Mean") -> "Mean":
        return Mean(self.value + other.value, self.count + other.count)

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
        place = (torch.log10(x.detach().clamp(min=1e-9)) + 8) * BINS_PER_DECADE
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
        return torch.where(place == 0, 0.0, 10.0 ** ((place - 0.5) / BINS_PER_DECADE - 8))


class Spread(NamedTuple):
    """Parts of a standard deviation (Bessel's): merge by addition."""

    value: Tensor
    square: Tensor
    count: Tensor

    @classmethod
    def of(cls, x: Tensor) -> "Spread":
        """Of the values ``x`` that are not NaN."""
        known = x[~x.isnan()].double()
        return cls(known.sum(), known.square().sum(), torch.tensor(known.numel()))

    def merge(self, other: "Spread") -> "Spread":
        """Of both together."""
        return Spread(*(mine + its for mine, its in zip(self, other, strict=True)))

    def compute(self) -> Tensor:
        """The standard deviation; 0 of a single element, NaN of none."""
        variance = (self.square - self.value**2 / self.count) / (self.count - 1).clamp(min=1)
        return variance.clamp(min=0).sqrt()


class Total(NamedTuple):
    """A sum over micro-batches and ranks."""

    value: Tensor

    def merge(self, other: "Total") -> "Total":
        """Of both together."""
        return Total(self.value + other.value)

    def compute(self) -> Tensor:
        """The sum."""
        return self.value


Metric = Mean | Min | Max | Percentile99 | Spread | Total


class Window:
    """Collects metrics; `reduce` returns them over all ranks and empties it.

    Values stay on their device until then, so that collecting never waits for a GPU.
    """

    def __init__(self) -> None:
        self.metrics: dict[str, Metric] = {}
        self.started = time.perf_counter()
        self.paused_at: float | None = None

    def pause(self) -> None:
        """Stop the clock until `go_on`: what happens meanwhile is no part of the step."""
        self.paused_at = time.perf_counter()

    def go_on(self) -> None:
        """Let the clock run again after `pause`."""
        if self.paused_at is not None:
            self.started += time.perf_counter() - self.paused_at
            self.paused_at = None

    def add(self, metrics: Mapping[str, Metric]) -> None:
        """Merge with what is there: sums and counts add up, minima and maxima are taken."""
        for name, metric in metrics.items():
            self.metrics[name] = self.metrics[name].merge(metric) if name in self.metrics else metric

    def mean(self, name: str, values: Tensor) -> None:
        """Add every element of ``values`` (any shape) to the mean ``name``; NaN means "does not apply"."""
        values = values.double()
        known = ~values.isnan()
        self.add({name: Mean(values.where(known, 0.0).sum(), known.sum())})

    def seconds(self, name: str, seconds: float) -> None:
        """Add to the seconds ``time/{name}``; of several ranks the slowest is reported."""
        earlier = self.metrics.get(f"time/{name}")
        self.metrics[f"time/{name}"] = Max(
            torch.tensor(seconds + (float(earlier.value) if earlier else 0.0), dtype=torch.float64)
        )

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds spent inside to ``time/{name}``."""
        start = time.perf_counter()
        yield
        self.seconds(name, time.perf_counter() - start)

    def stop_clock(self) -> None:
        """Add ``step_time``, the seconds since the window was opened, and what no phase claims as ``time/update``."""
        total = time.perf_counter() - self.started
        phases = sum(float(metric.value) for name, metric in self.metrics.items() if name.startswith("time/"))
        self.seconds("update", total - phases)
        self.add({"step_time": Max(torch.tensor(total, dtype=torch.float64))})

    def reduce(self) -> dict[str, float]:
        """All metrics over all ranks; those without a single element are left out. Call it on every rank."""
        local = {name: type(m)(*(part.detach().double().cpu() for part in m)) for name, m in self.metrics.items()}
        self.metrics = {}
        ranks = [local]
        if distributed.is_available() and distributed.is_initialized():
            ranks = [None] * distributed.get_world_size()
            distributed.all_gather_object(ranks, local)
        for rank in ranks:
            self.add(rank)
        merged, self.metrics = self.metrics, {}
        return {name: float(metric.compute()) for name, metric in merged.items() if not _empty(metric)}


def _empty(metric: Metric) -> bool:
    if isinstance(metric, Total):
        return False
    if isinstance(metric, Min | Max):
        return float(metric.value) == (float("inf") if isinstance(metric, Min) else float("-inf"))
    return float(metric.count) == 0
