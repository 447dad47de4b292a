"""The section with the time per step by phase, the throughput, and the memory."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_grpo.monitor import PHASES
from lightning_grpo.record.reader import Run
from lightning_grpo.report.arms import arms, run_names
from lightning_grpo.report.charts import Trace, chart, color, grid, lines
from lightning_grpo.report.markup import details, duration, section, table
from lightning_grpo.report.series import column, curve


def render(runs: Sequence[Run]) -> str:
    """Return the section."""
    if len(runs) == 1:
        return section("time", "Time and memory", grid([_stack(runs[0]), *_over_time(runs)], wide=True), _table(runs))
    return section(
        "time", "Time and memory", grid(_over_time(runs), wide=True), _bars(runs), details("Seconds", _table(runs))
    )


def mean_seconds(run: Run) -> dict[str, float]:
    """Return the mean seconds per step by phase, of the phases that take any time."""
    means = {}
    for phase in PHASES:
        values = column(run.metrics, f"time/{phase}")
        if np.isfinite(values).any():
            means[phase] = float(np.nanmean(values))
    return means


def _stack(run: Run) -> str:
    traces: list[Trace] = []
    for i, phase in enumerate(PHASES):
        drawn = curve([run.metrics], f"time/{phase}")
        if drawn is not None and drawn.mean.max() > 0:
            (trace,) = lines(drawn, phase, i, noisy=False, band=False)
            filled = {"stackgroup": "phases", "fillcolor": color(i, 0.55), "mode": "lines"}
            traces.append(trace | filled | {"line": {"width": 0.5, "color": color(i)}})
    if not traces:
        return ""
    first, *others = column(run.metrics, "step_time")
    top, note = 1.1 * max(others, default=np.nan), ""
    layout: dict[str, Any] = {}
    if first > top:
        note = f"The first step, which includes compilation and allocation, took {duration(first)}."
        layout["yaxis"] = {"range": [0, top]}
    return chart("Time per step", traces, unit="seconds, by phase", note=note, height=260, **layout)


def _bars(runs: Sequence[Run]) -> str:
    names, means = run_names(runs), [mean_seconds(run) for run in runs]
    traces: list[Trace] = [
        {
            "type": "bar",
            "orientation": "h",
            "name": phase,
            "y": names,
            "x": [each.get(phase, 0.0) for each in means],
            "marker": {"color": color(i)},
            "hovertemplate": "%{x:.2f} s",
        }
        for i, phase in enumerate(PHASES)
        if any(each.get(phase, 0.0) > 0 for each in means)
    ]
    if not traces:
        return ""
    layout: dict[str, Any] = {
        "barmode": "stack",
        "hovermode": "y unified",
        "xaxis": {"title": {"text": "seconds per step"}, "showgrid": True},
        "yaxis": {"autorange": "reversed", "showgrid": False, "nticks": len(runs)},
    }
    return chart("Time per step", traces, unit="mean, by phase", height=max(200, 70 + 34 * len(runs)), **layout)


def _over_time(runs: Sequence[Run]) -> list[str]:
    found = arms(runs)
    charts = []
    for title, unit, metrics in (
        ("Throughput", "completion tokens per second", {"tokens_per_second": "tokens per second"}),
        ("Model FLOPs utilization", "share of the peak", {"mfu": "utilization"}),
        ("Memory", "GiB, peak per step", {"memory/gib": "whole step", **{f"memory/{p}": p for p in PHASES}}),
    ):
        traces: list[Trace] = []
        for i, arm in enumerate(found):
            drawn = {name: curve([run.metrics for run in arm.runs], name) for name in metrics}
            present = {name: each for name, each in drawn.items() if each is not None}
            for j, (name, each) in enumerate(present.items()):
                label = metrics[name] if len(found) == 1 else arm.name
                if len(found) > 1 and len(present) > 1:
                    label = f"{arm.name}, {metrics[name]}"
                series, dash = (j, 0) if len(found) == 1 else (i, j)
                traces += lines(each, label, series, dash=dash, noisy=False, band=len(present) == 1)
        if traces:
            charts.append(chart(title, traces, unit=unit, height=260, yaxis={"rangemode": "tozero"}))
    return charts


def _table(runs: Sequence[Run]) -> str:
    rows = []
    for name, run in zip(run_names(runs), runs, strict=True):
        means = mean_seconds(run)
        total = sum(means.values())
        if total > 0:
            shares = [f"{means[p]:.2f} s ({means[p] / total:.0%})" if p in means else "–" for p in PHASES]
            rows.append(([name] if len(runs) > 1 else []) + [f"{total:.2f} s", *shares])
    head = (["run"] if len(runs) > 1 else []) + ["mean per step", *PHASES]
    return table(head, rows) if rows else ""
