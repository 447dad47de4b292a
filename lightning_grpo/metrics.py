"""Metrics that merge over micro-batches and ranks, and `Window`, which collects them over an optimizer step."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

BINS_PER_DECADE = 100
BINS = 10 * BINS_PER_DECADE + 1


class Mean(NamedTuple):
    """A mean, stored as sum and count, which are added when merging over micro-batches and ranks."""

    value: Tensor
    count: Tensor  # type: ignore[assignment]  # not tuple.count

    def merge(self, other: "Mean") -> "Mean":
        return Mean(self.value + other.value, self.count + other.count)

    def compute(self) -> Tensor:
        """The mean; NaN if the count is 0."""
        return self.value / self.count


class Min(NamedTuple):
    """A minimum over micro-batches and ranks; +inf if there were no values."""

    value: Tensor

    def merge(self, other: "Min") -> "Min":
        return Min(torch.minimum(self.value, other.value))

    def compute(self) -> Tensor:
        return self.value


class Max(NamedTuple):
    """A maximum over micro-batches and ranks; −inf if there were no values."""

    value: Tensor

    def merge(self, other: "Max") -> "Max":
        return Max(torch.maximum(self.value, other.value))

    def compute(self) -> Tensor:
        return self.value


class Percentile99(NamedTuple):
    """The 99th percentile, from counts in logarithmic bins, which are added over micro-batches and ranks."""

    counts: Tensor
    """[BINS], values up to 1e-8 in the first bin, and 100 or more in the last."""

    @classmethod
    def of(cls, x: Tensor, mask: Tensor) -> "Percentile99":
        """Count the values ``x`` ≥ 0 of any shape whose ``mask`` is True. NaN counts as large."""
        index = (torch.log10(x.detach().clamp(min=1e-9)) + 8) * BINS_PER_DECADE
        index = index.nan_to_num(nan=BINS).clamp(-1, BINS - 2).long() + 1
        counts = torch.zeros(BINS, dtype=torch.float32, device=x.device)
        return cls(counts.scatter_add_(0, index.flatten(), mask.flatten().to(counts.dtype)))

    @property
    def count(self) -> Tensor:  # type: ignore[override]
        return self.counts.sum()

    def merge(self, other: "Percentile99") -> "Percentile99":
        return Percentile99(self.counts + other.counts)

    def compute(self) -> Tensor:
        """The 99th percentile up to the width of a bin, 2.3 %; 0 below 1e-8."""
        index = (self.counts.cumsum(0) < 0.99 * self.count).sum()
        return torch.where(index == 0, 0.0, 10.0 ** ((index - 0.5) / BINS_PER_DECADE - 8))


class Spread(NamedTuple):
    """A standard deviation with Bessel's correction, stored as sums, which are added when merging."""

    value: Tensor
    square: Tensor
    count: Tensor  # type: ignore[assignment]  # not tuple.count

    @classmethod
    def of(cls, x: Tensor) -> "Spread":
        """Accumulate the values of ``x`` that are not NaN."""
        values = x[~x.isnan()].double()
        return cls(values.sum(), values.square().sum(), torch.tensor(values.numel()))

    def merge(self, other: "Spread") -> "Spread":
        return Spread(*(a + b for a, b in zip(self, other, strict=True)))

    def compute(self) -> Tensor:
        """The standard deviation; 0 for a single value, NaN for none."""
        variance = (self.square - self.value**2 / self.count) / (self.count - 1).clamp(min=1)
        return variance.clamp(min=0).sqrt()


class Total(NamedTuple):
    """A sum over micro-batches and ranks."""

    value: Tensor

    def merge(self, other: "Total") -> "Total":
        return Total(self.value + other.value)

    def compute(self) -> Tensor:
        return self.value


Metric = Mean | Min | Max | Percentile99 | Spread | Total


class Window:
    """Collects the metrics of an optimizer step; `reduce` merges them over ranks and clears the window.

    Values stay on their device until then, so that collecting never synchronizes with a GPU.
    """

    def __init__(self) -> None:
        self.metrics: dict[str, Metric] = {}
        self.started = time.perf_counter()
        self.paused_at: float | None = None

    def pause(self) -> None:
        """Exclude the time until `go_on` from the step."""
        self.paused_at = time.perf_counter()

    def go_on(self) -> None:
        """Continue after `pause`."""
        if self.paused_at is not None:
            self.started += time.perf_counter() - self.paused_at
            self.paused_at = None

    def add(self, metrics: Mapping[str, Metric]) -> None:
        """Merge ``metrics`` with those of the same name."""
        for name, metric in metrics.items():
            earlier: Any = self.metrics.get(name)
            self.metrics[name] = metric if earlier is None else earlier.merge(metric)

    def mean(self, name: str, values: Tensor) -> None:
        """Add the elements of ``values`` (any shape) to the mean ``name``, except NaN ("does not apply")."""
        values = values.double()
        applies = ~values.isnan()
        self.add({name: Mean(values.where(applies, 0.0).sum(), applies.sum())})

    def seconds(self, name: str, seconds: float) -> None:
        """Add to ``time/{name}``. The value of the slowest rank is reported."""
        earlier = self.metrics.get(f"time/{name}")
        total = seconds + (float(earlier.compute()) if earlier else 0.0)
        self.metrics[f"time/{name}"] = Max(torch.tensor(total, dtype=torch.float64))

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds spent inside to ``time/{name}``."""
        start = time.perf_counter()
        yield
        self.seconds(name, time.perf_counter() - start)

    def stop_clock(self) -> None:
        """Add ``step_time``, the seconds since the window was created, and ``time/update``, those of no other phase."""
        total = time.perf_counter() - self.started
        phases = sum(float(metric.compute()) for name, metric in self.metrics.items() if name.startswith("time/"))
        self.seconds("update", total - phases)
        self.add({"step_time": Max(torch.tensor(total, dtype=torch.float64))})

    def reduce(self) -> dict[str, float]:
        """Return all metrics that have values, merged over ranks, and clear the window. Every rank must call it."""
        local = {name: type(m)(*(part.detach().double().cpu() for part in m)) for name, m in self.metrics.items()}
        self.metrics = {}
        ranks: list[Any] = [local]
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
