"""Metrics that merge over micro-batches and ranks, and `Window`, which collects them over an optimizer step."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, distributed

LOGGED = "logged/"
"""Prefix of what rewards logged, until it is reported."""
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


class Percentile(NamedTuple):
    """An exact percentile of a few values, such as one per completion, which are kept."""

    values: Tensor
    """[n]"""
    share: Tensor
    """Share of the values below the percentile, for example 0.9."""

    @property
    def count(self) -> int:  # type: ignore[override]
        return len(self.values)

    def merge(self, other: "Percentile") -> "Percentile":
        return Percentile(torch.cat([self.values, other.values]), self.share)

    def compute(self) -> Tensor:
        """The percentile, interpolated between two values."""
        return torch.quantile(self.values.double(), self.share.double())


class Percentile99(NamedTuple):
    """The 99th percentile of many values, such as one per token, from counts in logarithmic bins, which are added over
    micro-batches and ranks."""

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
    def of(cls, x: Tensor) -> Self:
        """Accumulate the values of ``x`` that are not NaN."""
        return cls.masked(x, ~x.isnan())

    @classmethod
    def masked(cls, x: Tensor, mask: Tensor) -> Self:
        """Accumulate the values of ``x`` of any shape whose ``mask`` is True."""
        values = x.detach().double().where(mask, 0.0)
        return cls(values.sum(), values.square().sum(), mask.sum())

    def merge(self, other: Self) -> Self:
        return type(self)(*(a + b for a, b in zip(self, other, strict=True)))

    def compute(self) -> Tensor:
        """The standard deviation; 0 for a single value, NaN for none."""
        variance = (self.square - self.value**2 / self.count) / (self.count - 1).clamp(min=1)
        return variance.clamp(min=0).sqrt()


class EffectiveShare(NamedTuple):
    """The effective sample size of weights w relative to their number, (Σw)² / (n·Σw²), from logarithms of the sums,
    which do not overflow however large a weight is."""

    log_sum: Tensor
    log_square_sum: Tensor
    count: Tensor  # type: ignore[assignment]  # not tuple.count

    @classmethod
    def of(cls, log_weights: Tensor, mask: Tensor) -> "EffectiveShare":
        """Accumulate the weights of any shape whose ``mask`` is True, given as log w."""
        values = log_weights.detach().double().masked_fill(~mask, float("-inf")).flatten()
        return cls(values.logsumexp(0), (2 * values).logsumexp(0), mask.sum())

    def merge(self, other: "EffectiveShare") -> "EffectiveShare":
        return EffectiveShare(
            torch.logaddexp(self.log_sum, other.log_sum),
            torch.logaddexp(self.log_square_sum, other.log_square_sum),
            self.count + other.count,
        )

    def compute(self) -> Tensor:
        """In (0, 1]; 1 if all weights are equal, NaN if there are none."""
        return (2 * self.log_sum - self.log_square_sum).exp() / self.count


class Correlation(NamedTuple):
    """The correlation of two centered variables, from sums of products, which are added when merging."""

    xy: Tensor
    xx: Tensor
    yy: Tensor

    @property
    def count(self) -> Tensor:  # type: ignore[override]
        """0 if either variable is constant, so that there is no correlation."""
        return self.xx * self.yy

    def merge(self, other: "Correlation") -> "Correlation":
        return Correlation(*(a + b for a, b in zip(self, other, strict=True)))

    def compute(self) -> Tensor:
        return self.xy / (self.xx * self.yy).sqrt()


class NormRatio(NamedTuple):
    """‖x‖ / ‖y‖ of vectors that are divided among ranks, from their squared norms, which are added when merging."""

    x: Tensor
    y: Tensor

    @property
    def count(self) -> Tensor:  # type: ignore[override]
        return self.y

    def merge(self, other: "NormRatio") -> "NormRatio":
        return NormRatio(self.x + other.x, self.y + other.y)

    def compute(self) -> Tensor:
        return (self.x / self.y).sqrt()


class Total(NamedTuple):
    """A sum over micro-batches and ranks."""

    value: Tensor

    def merge(self, other: "Total") -> "Total":
        return Total(self.value + other.value)

    def compute(self) -> Tensor:
        return self.value


Metric = Mean | Min | Max | Percentile | Percentile99 | Spread | EffectiveShare | Correlation | NormRatio | Total


class Window:
    """Collects the metrics of an optimizer step; `reduce` merges them over ranks and clears the window.

    Values stay on their device until then, so that collecting never synchronizes with a GPU.

    Args:
        memory: returns the peak of memory in GiB since it was last called, for ``memory/{phase}`` and ``memory/gib``.
    """

    def __init__(self, memory: Callable[[], float] | None = None) -> None:
        self.metrics: dict[str, Metric] = {}
        self.memory = memory
        self.started = time.perf_counter()
        self.paused_at: float | None = None

    def pause(self) -> None:
        """Exclude the time and memory until `go_on` from the step."""
        self._observe_memory("update")
        self.paused_at = time.perf_counter()

    def go_on(self) -> None:
        """Continue after `pause`."""
        if self.paused_at is not None:
            self.started += time.perf_counter() - self.paused_at
            self.paused_at = None
            if self.memory is not None:
                self.memory()

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

    def log(self, metrics: Mapping[str, Sequence[float]]) -> None:
        """Add values that rewards logged to the means of their names. A metric of the trainer with the same name stays
        as it is, and the values are left out."""
        for name, values in metrics.items():
            self.mean(LOGGED + name, torch.tensor(values))

    def seconds(self, name: str, seconds: float) -> None:
        """Add to ``time/{name}``. The value of the slowest rank is reported."""
        earlier = self.metrics.get(f"time/{name}")
        total = seconds + (float(earlier.compute()) if earlier else 0.0)
        self.metrics[f"time/{name}"] = Max(torch.tensor(total, dtype=torch.float64))

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds spent inside to ``time/{name}``, and the peak of memory to ``memory/{name}``."""
        self._observe_memory("update")
        start = time.perf_counter()
        yield
        self.seconds(name, time.perf_counter() - start)
        self._observe_memory(name)

    def _observe_memory(self, phase: str) -> None:
        """Add the peak of memory since the last call to that of ``phase``, and to ``memory/gib``."""
        if self.memory is not None:
            peak = Max(torch.tensor(self.memory(), dtype=torch.float64))
            self.add({f"memory/{phase}": peak, "memory/gib": peak})

    def stop_clock(self) -> None:
        """Add ``step_time``, the seconds since the window was created, and ``time/update``, those of no other phase."""
        self._observe_memory("update")
        total = time.perf_counter() - self.started
        phases = sum(float(metric.compute()) for name, metric in self.metrics.items() if name.startswith("time/"))
        self.seconds("update", total - phases)
        self.add({"step_time": Max(torch.tensor(total, dtype=torch.float64))})

    def so_far(self, name: str) -> float | None:
        """The value of a metric over all ranks, which the window keeps; None if it was not added. Every rank must call
        it."""
        found = _over_ranks({name: self.metrics[name]} if name in self.metrics else {})
        return float(found[name].compute()) if found else None

    def reduce(self) -> dict[str, float]:
        """Return the values of `gather`."""
        return {name: float(metric.compute()) for name, metric in self.gather().items()}

    def gather(self) -> dict[str, Metric]:
        """Return all metrics that have values, merged over ranks, and clear the window. Every rank must call it."""
        merged, self.metrics = _over_ranks(self.metrics), {}
        found = {name: metric for name, metric in merged.items() if not _empty(metric)}
        logged = {name.removeprefix(LOGGED): found.pop(name) for name in list(found) if name.startswith(LOGGED)}
        return logged | found


def _over_ranks(metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    """Merge ``metrics`` with those of the other ranks."""
    local = {name: type(m)(*(part.detach().double().cpu() for part in m)) for name, m in metrics.items()}
    ranks: list[Any] = [local]
    # With one rank, gloo would copy the message in a thread of its own, and a message of 32 KiB in a second team of
    # OpenMP threads. Once these outnumber the cores, every parallel operation of the process waits longer.
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        ranks = [None] * distributed.get_world_size()
        distributed.all_gather_object(ranks, local)
    merged = Window()
    for rank in ranks:
        merged.add(rank)
    return merged.metrics


def _empty(metric: Metric) -> bool:
    if isinstance(metric, Total):
        return False
    if isinstance(metric, Min | Max):
        return float(metric.value) == (float("inf") if isinstance(metric, Min) else float("-inf"))
    return float(metric.count) == 0
