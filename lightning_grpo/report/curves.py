"""The section with the metrics over the steps: those that tell most about a run first, all others on request."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_grpo.record.reader import Run
from lightning_grpo.record.schema import HELD_OUT
from lightning_grpo.report.arms import Arm, arms
from lightning_grpo.report.charts import Trace, chart, grid, lines, marks
from lightning_grpo.report.markup import details, escape, section
from lightning_grpo.report.series import column, curve, names

MISMATCH = "sampling/sampling_logp_difference/"


@dataclass(frozen=True)
class Featured:
    """A chart of one or several metrics."""

    title: str
    unit: str
    metrics: dict[str, str]
    """Names in the legend by metric. A metric that a run does not have is left out."""
    note: str = ""


FEATURED = (
    Featured("Reward", "mean per completion", {"reward": "reward"}),
    Featured("Held-out pass@1", "share of correct samples", {"val/pass@1": "pass@1"}),
    Featured("Held-out reward", "mean per completion", {"val/reward": "reward"}),
    Featured("Entropy", "nats per token", {"entropy": "entropy"}),
    Featured("KL divergence", "nats per token", {"kl": "kl"}, "From the reference policy."),
    Featured("Gradient norm", "before clipping", {"grad_norm": "gradient norm"}),
    Featured("Update of the weights", "‖Δw‖/‖w‖ per step", {"update_ratio": "update ratio"}),
    Featured(
        "Completion length",
        "tokens",
        {
            "completions/mean_length": "mean",
            "completions/p10_length": "10th percentile",
            "completions/p90_length": "90th percentile",
        },
    ),
    Featured("Truncated completions", "share", {"completions/clipped_ratio": "truncated"}),
    Featured(
        "Groups",
        "share",
        {"groups/all_right": "all right", "groups/mixed": "mixed", "groups/all_wrong": "all wrong"},
        "Only groups with different rewards give a signal.",
    ),
    Featured("Groups without a signal", "share", {"frac_reward_zero_std": "all rewards equal"}),
    Featured(
        "Engine and trainer",
        "nats per token",
        {f"{MISMATCH}mean": "mean", f"{MISMATCH}p99": "99th percentile"},
        "Difference between the log-probs of engine and trainer for sampled tokens.",
    ),
    Featured(
        "Effective sample size",
        "share",
        {"sampling/ess": "of the tokens", "sampling/sequence_ess": "of the completions"},
    ),
    Featured("Clipped tokens", "share", {"clip_ratio/region_mean": "clipped"}),
    Featured("Staleness", "optimizer steps", {"staleness": "mean", "staleness_max": "maximum"}),
    Featured("Learning rate", "", {"learning_rate": "learning rate"}),
)
ELSEWHERE = ("time/", "memory/", "step_time", "tokens_per_second", "mfu")
"""Prefixes of metrics that another section shows."""
ALWAYS_DRAWN = 3
"""The first charts are drawn even if their metric is constant."""
MOST_MARKS = 20


def render(runs: Sequence[Run]) -> str:
    """Return the section."""
    found = arms(runs)
    known = {name for run in runs for name in (*names(run.metrics), *names(run.held_out))}
    charts, constant = [], []
    for i, featured in enumerate(FEATURED):
        values = {value for name in featured.metrics for value in _values(runs, name)}
        if len(values) == 1 and i >= ALWAYS_DRAWN:
            constant.append(f"{featured.title.lower()} {values.pop():.4g}")
        else:
            charts.append(_chart(found, featured))
    note = f'<p class="muted">Constant: {escape("; ".join(constant))}.</p>' if constant else ""
    return section("metrics", "Metrics", _legend(found), grid(charts), note, *_others(found, known))


def _others(found: Sequence[Arm], known: set[str]) -> list[str]:
    """Return the charts of metrics that are not featured, by the first part of their names, to be opened."""
    shown = {name for each in FEATURED for name in each.metrics}
    parts: dict[str, list[str]] = {}
    for name in sorted(known - shown, key=lambda name: ("/" not in name, name)):
        if not name.startswith(ELSEWHERE):
            parts.setdefault(name.partition("/")[0] if "/" in name else "others", []).append(name)
    return [
        details(
            f"{part} ({len(metrics)})",
            grid([_chart(found, Featured(name, "", {name: name})) for name in metrics]),
            name=f"metrics-{part}",
        )
        for part, metrics in parts.items()
    ]


def _values(runs: Sequence[Run], name: str) -> set[float]:
    columns = [column(_lines(run, name), name) for run in runs]
    return {float(value) for values in columns for value in np.unique(values[np.isfinite(values)])}


def _chart(found: Sequence[Arm], featured: Featured) -> str:
    """Return a chart: one color per arm and one dash per metric or, for one arm, one color per metric."""
    drawn = {
        (name, i): each
        for name in featured.metrics
        for i, arm in enumerate(found)
        if (each := curve([_lines(run, name) for run in arm.runs], name)) is not None
    }
    if not drawn:
        return ""
    metrics = list(dict.fromkeys(name for name, _ in drawn))
    traces: list[Trace] = []
    for (name, i), each in drawn.items():
        label, number = featured.metrics[name], metrics.index(name)
        series, dash = (number, 0) if len(found) == 1 else (i, number)
        if len(found) > 1:
            label = found[i].name if len(metrics) == 1 else f"{found[i].name}, {label}"
        # bands of several metrics of one run would cover each other
        noisy, band = not name.startswith(HELD_OUT), len(metrics) == 1
        traces += lines(each, label, series, dash=dash, noisy=noisy, band=band)
    runs = [run for arm in found for run in arm.runs]
    last = max(line["step"] for run in runs for line in (*run.metrics[-1:], *run.held_out[-1:]))
    layout: dict[str, Any] = {"xaxis": {"range": [0, last]}}
    if len(runs) == 1:
        layout["shapes"] = _marks(runs[0])
    return chart(featured.title, traces, unit=featured.unit, note=featured.note, **layout)


def _marks(run: Run) -> list[dict[str, Any]]:
    """Return marks at the steps of findings that are more than a note."""
    severe = [(each["step"], f"--{each.get('severity')}") for each in run.findings]
    return marks([(step, name) for step, name in severe if name in ("--critical", "--warning")][:MOST_MARKS])


def _lines(run: Run, name: str) -> Sequence[dict]:
    return run.held_out if name.startswith(HELD_OUT) else run.metrics


def _legend(found: Sequence[Arm]) -> str:
    text = "Lines are moving averages; the values themselves are drawn behind them."
    if len(found) == 1 and any(run.findings for run in found[0].runs):
        text += " Dotted lines mark findings."
    if any(len(arm.runs) > 1 for arm in found):
        text = "Lines are means over the runs of a configuration, which differ in their seed; bands reach from the "
        text += "lowest to the highest run."
    return f'<p class="lead muted">{text} <span class="mouse">Drag to zoom, double-click to zoom out.</span></p>'
