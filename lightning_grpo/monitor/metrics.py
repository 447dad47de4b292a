"""True means over what an optimizer step saw: all its micro-batches, on all ranks."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import psutil
import torch
from torch import Tensor, distributed

from lightning_grpo.objective import Max, Metric, Min, Sum, total_rewards
from lightning_grpo.objective.advantages import std


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


class Window:
    """Collects metrics; `reduce` returns them over all ranks and empties it.

    Values stay on their device until then, so that collecting never waits for a GPU.
    """

    def __init__(self) -> None:
        self.metrics: dict[str, Metric | Spread | Total] = {}
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

    def add(self, metrics: Mapping[str, Metric | Spread | Total]) -> None:
        """Merge with what is there: sums and counts add up, minima and maxima are taken."""
        for name, metric in metrics.items():
            self.metrics[name] = self.metrics[name].merge(metric) if name in self.metrics else metric

    def mean(self, name: str, values: Tensor) -> None:
        """Add every element of ``values`` (any shape) to the mean ``name``; NaN means "does not apply"."""
        values = values.double()
        known = ~values.isnan()
        self.add({name: Sum(values.where(known, 0.0).sum(), known.sum())})

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


def _empty(metric: Metric | Spread | Total) -> bool:
    if isinstance(metric, Total):
        return False
    if isinstance(metric, Min | Max):
        return float(metric.value) == (float("inf") if isinstance(metric, Min) else float("-inf"))
    return float(metric.count) == 0


def memory_in_use(device: torch.device) -> float:
    """GiB: the most that this process has allocated on a GPU since the last call, or what it holds in main memory."""
    if device.type != "cuda":
        return psutil.Process().memory_info().rss / 2**30
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def observe_completions(window: Window, lengths: Tensor, truncated: Tensor) -> None:
    """TRL's ``completions/…`` of completions with ``lengths`` [n] tokens, ``truncated`` [n] where cut off."""
    lengths = lengths.double()
    window.mean("completions/mean_length", lengths)
    window.mean("completions/clipped_ratio", truncated)
    window.add({"completions/min_length": Min(lengths.min()), "completions/max_length": Max(lengths.max())})
    if len(ended := lengths[~truncated]):
        window.mean("completions/mean_terminated_length", ended)
        window.add({"completions/min_terminated_length": Min(ended.min())})
        window.add({"completions/max_terminated_length": Max(ended.max())})


def observe_rewards(window: Window, rewards: Tensor, names: Sequence[str], weights: Tensor) -> None:
    """TRL's ``reward``, ``reward_std`` and ``rewards/…`` of ``rewards`` [n, R], R ``names`` and ``weights`` [R]."""
    totals = total_rewards(rewards, weights)
    window.mean("reward", totals)
    window.add({"reward_std": Spread.of(totals)})
    for name, column in zip(names, rewards.T, strict=True):
        window.mean(f"rewards/{name}/mean", column)
        window.add({f"rewards/{name}/std": Spread.of(column)})


def observe_groups(window: Window, totals: Tensor, num_generations: int) -> None:
    """``group_reward_std``, the mean spread within a group of ``totals`` [B·G], and TRL's ``frac_reward_zero_std``."""
    spread = std(totals.double().view(-1, num_generations), 1)
    window.mean("group_reward_std", spread)
    window.mean("frac_reward_zero_std", spread < 1e-8)
