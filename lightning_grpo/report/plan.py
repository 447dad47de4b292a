"""The section that compares what was predicted at the start with what was measured."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lightning_grpo.record.reader import Run
from lightning_grpo.report.arms import run_names
from lightning_grpo.report.charts import chart, color
from lightning_grpo.report.markup import duration, escape, number, section, table
from lightning_grpo.report.series import column

Pair = tuple[float, float]
MEMORY = ("rollout", "score", "update")


def render(runs: Sequence[Run]) -> str:
    """Return the section; empty if no run has a prediction."""
    known = [(name, run) for name, run in zip(run_names(runs), runs, strict=True) if prediction(run)]
    if len(runs) > 1:
        return section("prediction", "Prediction and measurement", _overview(known) if known else "")
    parts = [f'<div class="pair">{_bars(run)}<div>{_sentence(run)}{_table(run)}</div></div>' for _, run in known]
    return section("prediction", "Prediction and measurement", *parts)


def prediction(run: Run) -> Mapping[str, Any]:
    """Return what the run's start predicted; empty if there is nothing or if it is damaged."""
    found = run.info.get("prediction")
    seconds = found.get("step_seconds") if isinstance(found, dict) else None
    is_whole = isinstance(seconds, dict) and all(isinstance(value, int | float) for value in seconds.values())
    return found if is_whole else {}


def seconds_by_phase(run: Run) -> dict[str, Pair]:
    """Return predicted and measured seconds per step by phase, without the first rollout."""
    pairs = {}
    for phase, seconds in prediction(run)["step_seconds"].items():
        measured = _mean(column(_later(run), f"time/{phase}"))
        if seconds >= 0.001 or measured >= 0.001:
            pairs[phase] = (float(seconds), measured)
    return pairs


def memory_by_phase(run: Run) -> dict[str, Pair]:
    """Return predicted and measured peaks in GiB by phase, of the phases that were measured."""
    expected = prediction(run).get("memory_gib")
    expected = expected if isinstance(expected, dict) else {}
    measured = {phase: _largest(column(run.metrics, f"memory/{phase}")) for phase in MEMORY}
    pairs = {phase: (float(expected[phase]), measured[phase]) for phase in MEMORY if phase in expected}
    pairs = {phase: pair for phase, pair in pairs.items() if np.isfinite(pair[1])}
    peak = prediction(run).get("peak_gib")
    if not pairs and peak is not None:
        pairs = {"peak": (float(peak), _largest(column(run.metrics, "memory/gib")))}
    return pairs


def step_seconds(run: Run) -> Pair:
    """Return predicted and measured seconds per step."""
    pairs = seconds_by_phase(run).values()
    return sum(predicted for predicted, _ in pairs), _mean(column(_later(run), "step_time"))


def _later(run: Run) -> list[dict[str, Any]]:
    """Return the metrics after the first rollout, which includes compilation and allocation."""
    return [line for line in run.metrics if line["step"] > prediction(run).get("updates_per_rollout", 1)] or run.metrics


def _bars(run: Run) -> str:
    pairs = seconds_by_phase(run)
    traces = [
        {
            "type": "bar",
            "name": label,
            "x": list(pairs),
            "y": [pair[i] for pair in pairs.values()],
            "marker": {"color": color(7 if i == 0 else 0)},
            "hovertemplate": "%{y:.2f} s",
        }
        for i, label in enumerate(("predicted", "measured"))
    ]
    return chart("Seconds per step", traces, unit="by phase", height=250, xaxis={"title": {"text": ""}})


def _sentence(run: Run) -> str:
    expected = prediction(run)
    steps = run.metrics[-1]["step"] if run.metrics else 0
    measured = float(np.nansum(column(run.metrics, "step_time")))
    text = f"The prediction used efficiencies that were {expected.get('efficiency', 'assumed')}"
    if isinstance(expected.get("spread"), int | float):
        text += f" and was expected to be within a factor of {expected['spread']:g}"
    text += "."
    total, planned = expected.get("total_seconds"), expected.get("max_steps")
    if isinstance(total, int | float) and isinstance(planned, int) and planned > 0 and steps:
        share = total * min(1.0, len(run.metrics) / planned)
        text += (
            f" {len(run.metrics):,} of {planned:,} steps took {duration(measured)}; {duration(share)} were predicted."
        )
    return f'<p class="lead">{escape(text)}</p>'


def _table(run: Run) -> str:
    expected = prediction(run)
    rows = [_row(f"{phase}, seconds per step", pair) for phase, pair in seconds_by_phase(run).items()]
    rows.append(_row("whole step, seconds", step_seconds(run)))
    rows += [_row(f"memory of {phase}, GiB", pair) for phase, pair in memory_by_phase(run).items()]
    length = expected.get("mean_completion_length")
    if isinstance(length, int | float):
        rows.append(_row("tokens per completion", (length, _mean(column(run.metrics, "completions/mean_length")))))
    return table(["", "predicted", "measured", "factor"], rows)


def _overview(known: Sequence[tuple[str, Run]]) -> str:
    """Return a table with a row per run."""
    rows = []
    for name, run in known:
        peaks = memory_by_phase(run).values()
        peak = max((pair[0] for pair in peaks), default=np.nan), max((pair[1] for pair in peaks), default=np.nan)
        rows.append(_row(name, step_seconds(run)) + _row("", peak)[1:])
    head = ["run", "seconds per step: predicted", "measured", "factor", "peak memory (GiB): predicted", "measured"]
    return table([*head, "factor"], rows)


def _row(name: str, pair: Pair) -> list[str]:
    predicted, measured = pair
    factor = f"×{measured / predicted:.2f}" if predicted > 0 and np.isfinite(measured) else "–"
    return [name, number(predicted), number(measured), factor]


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def _largest(values: np.ndarray) -> float:
    return float(np.nanmax(values)) if np.isfinite(values).any() else float("nan")
