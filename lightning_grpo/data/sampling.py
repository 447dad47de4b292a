"""Samplers choose the next prompts, as a pure function of the seed, a cursor and the pass rates observed so far."""

from abc import ABC, abstractmethod
from collections.abc import Set
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_grpo.errors import UserError
from lightning_grpo.ranges import check_ranges


@dataclass(frozen=True, kw_only=True)
class Sampler(ABC):
    """Base class of prompt samplers. A sampler has no state: a draw depends on its arguments only."""

    @abstractmethod
    def draw(
        self, count: int, *, size: int, seed: int, cursor: int, rates: Tensor, taken: Set[int]
    ) -> tuple[list[int], int]:
        """Return ``count`` distinct rows in 0 … size − 1 that are not in ``taken``, and the next cursor.

        ``rates`` [size] has the running pass rate of each row, NaN if the row has not been observed. There are fewer
        than ``count`` rows only if there are not as many outside ``taken``.
        """

    @property
    def observes(self) -> bool:
        """Whether the sampler keeps pass rates."""
        return type(self).update is not Sampler.update

    def update(self, rate: float, reward: float) -> float:
        """Return the running pass rate of a prompt after another mean reward. The base class keeps no pass rates.

        ``rate`` is NaN before the first observation.
        """
        return rate


@lru_cache(maxsize=16)
def _order(size: int, seed: int, number: int) -> list[int]:
    return np.random.default_rng((seed, number)).permutation(size).tolist()


@dataclass(frozen=True, kw_only=True)
class PassSampler(Sampler):
    """Serves every prompt once per pass. The cursor counts rows over all passes.

    A row that would occur twice in a rollout, which can happen between two passes, is skipped the second time.
    """

    shuffle: bool = True
    """Draw a new order for every pass from (seed, pass). False keeps the order of the source."""

    def draw(
        self, count: int, *, size: int, seed: int, cursor: int, rates: Tensor, taken: Set[int]
    ) -> tuple[list[int], int]:
        drawn: dict[int, None] = {}
        for _ in range(min(count, size - len(taken))):
            while True:
                number, place = divmod(cursor, size)
                row = _order(size, seed, number)[place] if self.shuffle else place
                cursor += 1
                if row not in taken and row not in drawn:
                    drawn[row] = None
                    break
        return list(drawn), cursor


@dataclass(frozen=True, kw_only=True)
class DifficultySampler(Sampler):
    """Prefers prompts that are solved about half of the time, for which the rewards within a group differ most.

    Rows are drawn without replacement with weight floor + (1 − floor)·4p(1 − p), where p is the running pass rate: the
    size of the gradient depends on p(1 − p), the variance of a 0/1 reward (Foster et al. 2025, arXiv:2502.12272). A row
    that has not been observed has weight 1. The draw is an exponential race (Efraimidis & Spirakis 2006) seeded with
    (seed, cursor); the cursor counts draws.
    """

    floor: float = 0.05
    """Smallest weight, in (0, 1], given to prompts that are always or never solved. 1 is uniform sampling."""
    smoothing: float = 0.5
    """Weight of the newest observation in the running pass rate, in (0, 1]. 1 uses only the newest."""
    low: float = 0.0
    """Mean reward at or below which a prompt counts as never solved."""
    high: float = 1.0
    """Mean reward at or above which a prompt counts as always solved."""

    def __post_init__(self) -> None:
        ranges = {"floor": "(0, 1]", "smoothing": "(0, 1]", "low": "(-inf, inf)", "high": "(-inf, inf)"}
        check_ranges(self, ranges, prefix="sampler.")
        if not self.low < self.high:
            raise UserError(f"sampler.high is {self.high}; set it above sampler.low, which is {self.low}")

    def weights(self, rates: Tensor) -> Tensor:
        """Return the weight of each row, in [floor, 1], from pass rates [size]."""
        variance = torch.where(rates.isnan(), 1.0, 4 * rates * (1 - rates))
        return self.floor + (1 - self.floor) * variance

    def draw(
        self, count: int, *, size: int, seed: int, cursor: int, rates: Tensor, taken: Set[int]
    ) -> tuple[list[int], int]:
        finish = np.random.default_rng((seed, cursor)).exponential(size=size) / self.weights(rates).double().numpy()
        finish[list(taken)] = np.inf
        rows = np.argsort(finish, kind="stable")[: min(count, size - len(taken))]
        return rows.tolist(), cursor + 1

    def update(self, rate: float, reward: float) -> float:
        solved = min(max((reward - self.low) / (self.high - self.low), 0.0), 1.0)
        return solved if rate != rate else rate + self.smoothing * (solved - rate)


@dataclass(frozen=True, kw_only=True)
class MixtureSampler(Sampler):
    """Serves the prompts of several sources in the ratio of their weights, each source in passes of its own.

    The next prompt comes from the source that has been served least in proportion to its weight. Rows are ordered by
    source. The cursor has, for each source, the prompts that were served and the cursor of its `PassSampler`.
    """

    sizes: tuple[int, ...]
    """Number of rows of each source."""
    weights: tuple[float, ...]
    """Weight of each source, above 0."""
    shuffle: bool = True
    """As in `PassSampler`."""

    def draw(
        self, count: int, *, size: int, seed: int, cursor: Any, rates: Tensor, taken: Set[int]
    ) -> tuple[list[int], Any]:
        served, cursors = map(list, cursor or ([0] * len(self.sizes),) * 2)
        starts = [sum(self.sizes[:k]) for k in range(len(self.sizes))]
        own = [
            {row - start for row in taken if start <= row < start + n}
            for start, n in zip(starts, self.sizes, strict=True)
        ]
        drawn: list[int] = []
        for _ in range(min(count, size - len(taken))):
            open_sources = [k for k, n in enumerate(self.sizes) if len(own[k]) < n]
            k = min(open_sources, key=lambda k: ((served[k] + 1) / self.weights[k], k))
            passes = PassSampler(shuffle=self.shuffle)
            (row,), cursors[k] = passes.draw(
                1, size=self.sizes[k], seed=seed + k, cursor=cursors[k], rates=rates, taken=own[k]
            )
            own[k].add(row)
            served[k] += 1
            drawn.append(starts[k] + row)
        return drawn, (served, cursors)
