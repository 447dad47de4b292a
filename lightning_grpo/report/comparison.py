"""The section that compares configurations over seeds. It is left out for runs of one configuration."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_grpo.record.reader import Run
from lightning_grpo.report.arms import Arm, arms, differences, seed
from lightning_grpo.report.charts import chart, color
from lightning_grpo.report.markup import escape, number, section, table
from lightning_grpo.report.series import Array, column, smooth
from lightning_grpo.report.statistics import FEWEST_PAIRS, Interval, paired_interval

LEVEL = 0.95


@dataclass(frozen=True)
class Measure:
    """A figure of a run that arms are compared by."""

    name: str
    metric: str
    of: Callable[[Array], float]


def final(values: Array) -> float:
    """Return the mean over the last tenth of the steps."""
    return float(values[-max(1, values.size // 10) :].mean())


def best(values: Array) -> float:
    """Return the maximum of the moving average over a tenth of the steps."""
    return float(smooth(values, max(1, values.size // 10)).max())


MEASURES = (
    Measure("held-out pass@1, last", "val/pass@1", lambda values: float(values[-1])),
    Measure("held-out pass@1, best", "val/pass@1", lambda values: float(values.max())),
    Measure("held-out reward, last", "val/reward", lambda values: float(values[-1])),
    Measure("held-out reward, best", "val/reward", lambda values: float(values.max())),
    Measure("reward, last tenth of the steps", "reward", final),
    Measure("reward, best moving average", "reward", best),
)
"""In the order of preference: the sentence is about the first one that the runs have."""


@dataclass(frozen=True)
class Comparison:
    """An arm and the first one, by one measure, over the seeds that both have."""

    measure: Measure
    base: Array
    other: Array
    level: float

    @property
    def differences(self) -> Array:
        return self.other - self.base

    @property
    def interval(self) -> Interval | None:
        return paired_interval(self.differences, self.level)


def pairs(base: Arm, other: Arm) -> list[tuple[Run, Run]]:
    """Return the runs of two arms with equal seeds. Of several runs with one seed in an arm, the first counts."""
    first, second = _by_seed(base), _by_seed(other)
    return [(first[key], second[key]) for key in first if key in second]


def compare(base: Arm, other: Arm, level: float = LEVEL) -> list[Comparison]:
    """Return the comparisons by all measures that every paired run has. Two runs of a pair are compared up to the last
    step that both have reached."""
    found = []
    for measure in MEASURES:
        values = [_pair(measure, *runs) for runs in pairs(base, other)]
        if values and np.isfinite(values).all():
            table_of_pairs = np.array(values)
            found.append(Comparison(measure, table_of_pairs[:, 0], table_of_pairs[:, 1], level))
    return found


def conclusion(base: Arm, other: Arm, comparisons: Sequence[Comparison]) -> str:
    """Return a sentence about the difference between two arms, by the first measure."""
    count = len(pairs(base, other))
    if not comparisons:
        reason = "no seed occurs in both" if not count else "their runs have no common figure yet"
        return f"{other.name} and {base.name} can't be compared: {reason}."
    first = comparisons[0]
    name = f"{first.measure.name[0].upper()}{first.measure.name[1:]}"
    seeds = "1 seed" if count == 1 else f"{count} seeds"
    if first.interval is None:
        needed = f"at least {FEWEST_PAIRS}" if count < FEWEST_PAIRS else "more"
        mean = _signed(first.differences.mean())
        return (
            f"{name}: the difference between {other.name} and {base.name} is {mean} over {seeds}, from which nothing "
            f"can be concluded. Run {needed} seeds of both."
        )
    span = f"{_percent(first.level)} interval {_span(first.interval)}, {seeds}"
    if first.interval.excludes_zero:
        size, word = number(abs(first.interval.mean)), "higher" if first.interval.mean > 0 else "lower"
        return f"{name}: {other.name} is {size} {word} than {base.name} ({span})."
    return f"{name}: no difference between {other.name} and {base.name} was found ({span})."


def render(runs: Sequence[Run]) -> str:
    """Return the section; empty if there is only one arm."""
    found = arms(runs)
    if len(found) < 2:
        return ""
    # with several arms, each interval is wider, so that all together are right with the same probability
    level = 1 - (1 - LEVEL) / (len(found) - 1)
    parts = [_options(found)]
    base, *others = found
    for other in others:
        comparisons = compare(base, other, level)
        parts.append(f'<p class="lead conclusion">{escape(conclusion(base, other, comparisons))}</p>')
        if comparisons:
            parts.append(_table(base, other, comparisons))
    parts.append(_forest(base, others, level))
    note = (
        "Runs are paired by their seeds, and each pair is compared up to the last step that both have reached. "
        f"Intervals are studentized bootstrap intervals of the mean difference, at {_percent(level)}."
    )
    return section("comparison", "Comparison", *parts, f'<p class="muted">{escape(note)}</p>')


def _by_seed(arm: Arm) -> dict[int, Run]:
    found: dict[int, Run] = {}
    for run in arm.runs:
        number = seed(run)
        if number is not None:
            found.setdefault(number, run)
    return found


def _pair(measure: Measure, *runs: Run) -> list[float]:
    last = min(run.metrics[-1]["step"] if run.metrics else 0 for run in runs)
    return [_figure(measure, run, last) for run in runs]


def _figure(measure: Measure, run: Run, last: int) -> float:
    lines = [line for line in (*run.metrics, *run.held_out) if line["step"] <= last]
    values = column(lines, measure.metric)
    values = values[np.isfinite(values)]
    return measure.of(values) if values.size else float("nan")


def _options(found: Sequence[Arm]) -> str:
    rows: list[list[Any]] = [["runs", *(len(arm.runs) for arm in found)]]
    rows.append(["seeds", *(", ".join(str(seed(run)) for run in arm.runs) for arm in found)])
    rows += [[name, *values] for name, values in differences([arm.runs[0] for arm in found]).items()]
    return table(["option", *(arm.name for arm in found)], rows)


def _table(base: Arm, other: Arm, comparisons: Sequence[Comparison]) -> str:
    rows = []
    for each in comparisons:
        interval = each.interval
        span = "–" if interval is None else _span(interval)
        means = (number(each.base.mean()), number(each.other.mean()), _signed(each.differences.mean()))
        rows.append([each.measure.name, *means, span, each.differences.size])
    return table(["", base.name, other.name, "difference", f"{_percent(comparisons[0].level)} interval", "pairs"], rows)


def _forest(base: Arm, others: Sequence[Arm], level: float) -> str:
    """Return a chart of the paired differences by the first measure, with their intervals."""
    traces: list[dict[str, Any]] = []
    names = []
    for i, other in enumerate(others):
        comparisons = compare(base, other, level)
        if not comparisons:
            continue
        first = comparisons[0]
        names.append(first.measure.name)
        points = {"x": first.differences.tolist(), "y": [other.name] * first.differences.size}
        marker = {"color": color(i + 1, 0.5), "size": 8}
        traces.append({"type": "scatter", "mode": "markers", "showlegend": False, "marker": marker} | points)
        if (interval := first.interval) is not None:
            line = {"color": color(i + 1), "width": 3}
            ends = {"x": [interval.low, interval.mean, interval.high], "y": [other.name] * 3}
            traces.append({"type": "scatter", "mode": "lines+markers", "showlegend": False, "line": line} | ends)
    if not traces:
        return ""
    layout: dict[str, Any] = {
        "hovermode": "closest",
        "xaxis": {
            "title": {"text": f"difference from {base.name}"},
            "rangemode": "tozero",
            "zeroline": True,
            "zerolinecolor": "--muted",
        },
        "yaxis": {"type": "category", "nticks": len(names), "showgrid": False},
    }
    title = f"Difference in {names[0]}"
    return chart(title, traces, unit="per seed, and interval of the mean", height=110 + 40 * len(names), **layout)


def _span(interval: Interval) -> str:
    return f"{_signed(interval.low)} to {_signed(interval.high)}"


def _percent(level: float) -> str:
    return f"{100 * level:.3g} %"


def _signed(value: float) -> str:
    return ("+" if value >= 0 else "−") + number(abs(float(value)), 2)
