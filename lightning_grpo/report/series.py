"""Metrics of runs as arrays: one column per metric, thinned out for charts, averaged over the runs of an arm."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

POINTS = 1000
"""Most points per line of a chart. A longer run has one point per interval of steps."""


@dataclass(frozen=True)
class Curve:
    """A line of a chart with its band, at ``steps``."""

    steps: Array
    mean: Array
    low: Array
    high: Array


def column(lines: Sequence[Mapping[str, Any]], name: str) -> Array:
    """Return the values of a metric in ``lines``; NaN if it is missing or not a number."""
    values = (line.get(name) for line in lines)
    return np.array([value if isinstance(value, int | float) else np.nan for value in values], dtype=float)


def names(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of all metrics that have a value in ``lines``, in alphabetical order."""
    found = {name for line in lines for name, value in line.items() if isinstance(value, int | float)}
    return sorted(found - {"step", "time", "epoch"})


def curve(runs: Sequence[Sequence[Mapping[str, Any]]], name: str) -> Curve | None:
    """Return a metric's curve; None if no run has a value.

    The mean is that of all runs which have a value, of all steps in the interval. The band is the range over runs of
    their means in the interval or, for one run, over the steps of the interval.

    Args:
        runs: the lines of each run.
        name: the metric.
    """
    found = [(column(lines, "step"), column(lines, name)) for lines in runs]
    kept = [(steps[np.isfinite(values)], values[np.isfinite(values)]) for steps, values in found]
    kept = [(steps, values) for steps, values in kept if steps.size]
    if not kept:
        return None
    every = np.unique(np.concatenate([steps for steps, _ in kept]))
    edges = every if every.size <= POINTS else np.linspace(every[0], every[-1] + 1, POINTS + 1)[:-1]
    table = np.full((len(kept), edges.size), np.nan)
    low, high = np.full(edges.size, np.inf), np.full(edges.size, -np.inf)
    for row, (steps, values) in zip(table, kept, strict=True):
        place = np.searchsorted(edges, steps, side="right") - 1
        count = np.bincount(place, minlength=edges.size)
        row[count > 0] = np.bincount(place, values, minlength=edges.size)[count > 0] / count[count > 0]
        extremes = values if len(kept) == 1 else row[place]
        np.minimum.at(low, place, extremes)
        np.maximum.at(high, place, extremes)
    some = np.isfinite(table).any(0)
    return Curve(edges[some], np.nanmean(table[:, some], axis=0), low[some], high[some])


def smooth(values: Array, width: int) -> Array:
    """Return the centred moving average over ``width`` values, at both ends over those of them that exist."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(values.size)
    first, end = np.maximum(index - width // 2, 0), np.minimum(index + width // 2 + 1, values.size)
    return (sums[end] - sums[first]) / (end - first)
