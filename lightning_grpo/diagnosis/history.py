"""What rules read: the metrics of a run up to a step, its options, and the samples of a step."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_grpo.record.schema import HELD_OUT

Row = dict[str, Any]
"""A completion, by the names of the columns in the samples' files: step, rollout, group, index, completion_ids, …"""


@dataclass(frozen=True)
class Series:
    """Finite values of a metric."""

    steps: np.ndarray
    """[n] int, increasing."""
    values: np.ndarray
    """[n] float64."""

    def __len__(self) -> int:
        return len(self.values)

    @property
    def median(self) -> float:
        """The median; NaN of no values."""
        return float(np.median(self.values)) if len(self.values) else math.nan

    def between(self, first: int, last: float = math.inf) -> "Series":
        """The values of the steps from ``first`` to ``last``."""
        kept = (self.steps >= first) & (self.steps <= last)
        return Series(self.steps[kept], self.values[kept])


class Column:
    """The values of a metric so far, in arrays that grow."""

    def __init__(self) -> None:
        self.size = 0
        self._steps, self._values = np.empty(64, int), np.empty(64)

    def append(self, step: int, value: float) -> None:
        if self.size == len(self._steps):
            self._steps, self._values = (np.resize(x, 2 * self.size) for x in (self._steps, self._values))
        self._steps[self.size], self._values[self.size] = step, value
        self.size += 1

    def part(self, places: slice) -> Series:
        """Some of the values, without copying them."""
        places = slice(*places.indices(self.size))
        return Series(self._steps[places], self._values[places])

    def after(self, step: int) -> int:
        """Index of the first value after a step."""
        return int(np.searchsorted(self._steps[: self.size], step, side="right"))


EMPTY = Column()


def by_step(lines: Iterable[Mapping[str, float]]) -> Iterator[tuple[int, dict[str, float], dict[str, float]]]:
    """Merge lines of metrics, and yield each step with its metrics and those of held-out prompts."""
    steps: dict[int, dict[str, float]] = {}
    for line in lines:
        values = {name: float(x) for name, x in line.items() if name not in ("step", "time", "epoch")}
        steps.setdefault(int(line["step"]), {}).update(values)
    for step, values in sorted(steps.items()):
        held_out = {name: x for name, x in values.items() if name.startswith(HELD_OUT)}
        yield step, {name: x for name, x in values.items() if name not in held_out}, held_out


class History:
    """The metrics of a run up to its latest step. `Diagnosis` fills it during training, `diagnose` from files.

    Args:
        options: values of options by their path on the command line, such as ``model.num_generations``.
        info: facts about the run, as in run.json.
        samples: returns the samples of an optimizer step, or no rows if they are not known.
    """

    def __init__(
        self,
        *,
        options: Mapping[str, Any] | None = None,
        info: Mapping[str, Any] | None = None,
        samples: Callable[[int], Iterable[Row]] | None = None,
    ) -> None:
        self.options = dict(options or {})
        self.info = dict(info or {})
        self._samples = samples
        self.steps: list[int] = []
        """All optimizer steps with metrics."""
        self.latest: dict[str, float] = {}
        """All metrics of the latest step, those that are not finite included."""
        self._columns: dict[str, Column] = {}
        self._warms_up = True
        self._warmup_end = 0

    # ── Filling ───────────────────────────────────────────────────────────────────────────────────────────────────

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the metrics of an optimizer step, counted from 1. Steps must increase."""
        previous = self.latest.get("learning_rate")
        self.steps.append(step)
        self.latest = dict(metrics)
        self.add_held_out(step, metrics)
        rate = metrics.get("learning_rate")
        if self._warms_up and rate is not None and previous is not None:
            self._warms_up = rate > previous
            self._warmup_end = step if self._warms_up else self._warmup_end

    def add_held_out(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add held-out metrics, which are measured after a step and not in each one."""
        for name, value in metrics.items():
            if value is not None and math.isfinite(value):
                self._columns.setdefault(name, Column()).append(step, value)

    # ── Reading ───────────────────────────────────────────────────────────────────────────────────────────────────

    def __contains__(self, name: str) -> bool:
        return name in self._columns

    @property
    def step(self) -> int:
        """The latest optimizer step; 0 before the first one."""
        return self.steps[-1] if self.steps else 0

    @property
    def names(self) -> list[str]:
        """Names of all metrics with values."""
        return list(self._columns)

    @property
    def warmup_end(self) -> int:
        """The last step of the learning rate's warm-up; 0 without one."""
        return self._warmup_end

    def series(self, name: str) -> Series:
        """All values of a metric."""
        return self._column(name).part(slice(None))

    def last(self, name: str, count: int) -> Series:
        """The latest ``count`` values of a metric."""
        return self._column(name).part(slice(-count, None))

    def start(self, name: str, count: int = 10) -> Series:
        """The first ``count`` values of a metric after the warm-up of the learning rate."""
        first = self._column(name).after(self._warmup_end)
        return self._column(name).part(slice(first, first + count))

    def count(self, name: str) -> int:
        """Number of values of a metric after the warm-up."""
        return self._column(name).size - self._column(name).after(self._warmup_end)

    def option(self, path: str, default: Any = None) -> Any:
        """The value of an option, or ``default`` if it is not known or null."""
        value = self.options.get(path)
        return default if value is None else value

    def samples(self, step: int) -> list[Row]:
        """The samples of an optimizer step; empty if they are not known."""
        return [] if self._samples is None else list(self._samples(step))

    @property
    def reward_names(self) -> list[str]:
        """Names of the rewards, the first one first."""
        names = self.info.get("reward_names")
        ending = "/mean"
        return names or [
            n.removeprefix("rewards/").removesuffix(ending)
            for n in self.names
            if n.startswith("rewards/") and n.endswith(ending)
        ]

    def _column(self, name: str) -> Column:
        return self._columns.get(name, EMPTY)
