"""Which prompts come next: a pure function of the seed, a cursor and the pass rates seen so far."""

from abc import ABC, abstractmethod
from collections.abc import Set
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from lightning_grpo.errors import UserError
from lightning_grpo.ranges import check_ranges


@dataclass(frozen=True, kw_only=True)
class Sampler(ABC):
    """Base class of prompt samplers. A sampler has no state: what a draw depends on is passed in."""

    @abstractmethod
    def draw(
        self, count: int, *, size: int, seed: int, cursor: int, rates: Tensor, taken: Set[int]
    ) -> tuple[list[int], int]:
        """Up to ``count`` of the rows 0 … size − 1, each once and none of ``taken``, and the next cursor.

        ``rates`` [size] holds the running pass rate of each row, NaN where it has not been seen. Fewer than ``count``
        come back only when the rows outside ``taken`` are used up.
        """

    def update(self, rate: float, reward: float) -> float:
        """The running pass rate after a prompt's mean reward, ``rate`` being NaN at first. This one keeps none."""
        return rate


@lru_cache(maxsize=2)
def _order(size: int, seed: int, number: int) -> list[int]:
    return np.random.default_rng((seed, number)).permutation(size).tolist()


@dataclass(frozen=True, kw_only=True)
class PassSampler(Sampler):
    """Every prompt once a pass; the cursor counts rows over all passes, so that nothing is lost between rollouts.

    A row that meets itself within one rollout (at the seam of two passes) is passed over the second time.
    """

    shuffle: bool = True
    """A new order for every pass, from (seed, pass); false keeps the order of the source."""

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
    """Prompts that are solved about half of the time come more often: there the rewards of a group differ most.

    A row is drawn, without replacement, with weight floor + (1 − floor)·4p(1 − p), p being its running pass rate:
    p(1 − p) is the variance of a 0/1 reward, to which the size of the gradient is tied (Foster et al. 2025,
    arXiv:2502.12272). A row not seen yet weighs 1. The draw is an exponential race (Efraimidis & Spirakis 2006),
    seeded with (seed, cursor); the cursor counts draws.
    """

    floor: float = 0.05
    """Least weight, in (0, 1]: how often a prompt that is always or never solved is tried again. 1 is uniform."""
    smoothing: float = 0.5
    """Share of the newest observation in the running pass rate, in (0, 1]. 1 keeps the newest alone."""
    low: float = 0.0
    """Mean reward that counts as never solved; lower ones too."""
    high: float = 1.0
    """Mean reward that counts as always solved; higher ones too."""

    def __post_init__(self) -> None:
        ranges = {"floor": "(0, 1]", "smoothing": "(0, 1]", "low": "(-inf, inf)", "high": "(-inf, inf)"}
        check_ranges(self, ranges, prefix="sampler.")
        if not self.low < self.high:
            raise UserError(f"sampler.high is {self.high}; set it above sampler.low, which is {self.low}")

    def weights(self, rates: Tensor) -> Tensor:
        """[size] → [size], in [floor, 1]."""
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
