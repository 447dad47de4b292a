"""The section with the metrics over the steps: those that tell most about a run first, all others on request."""

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_grpo.record.reader import Run
from lightning_grpo.report.arms import Arm, arms
from lightning_grpo.report.charts import chart, grid, lines
from lightning_grpo.report.markup import details, section
from lightning_grpo.report.series import curve, names

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
            "completions/p10_length": "10 %",
            "completions/p90_length": "90 %",
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
        {f"{MISMATCH}mean": "mean", f"{MISMATCH}p99": "99 %"},
        "Difference between the log-probs of engine and trainer for sampled tokens.",
    ),
    Featured("Effective sample size", "share of the tokens", {"sampling/ess": "effective sample size"}),
    Featured("Clipped tokens", "share", {"clip_ratio/region_mean": "clipped"}),
    Featured("Staleness", "optimizer steps", {"staleness": "mean", "staleness_max": "maximum"}),
    Featured("Learning rate", "", {"learning_rate": "learning rate"}),
)
ELSEWHERE = ("time/", "memory/", "step_time")
"""Prefixes of metrics that another section shows."""


def render(runs: Sequence[Run]) -> str:
    """Return the section."""
    found = arms(runs)
    known = sorted({name for run in runs for name in (*names(run.metrics), *names(run.held_out))})
    charts = [_chart(found, each) for each in FEATURED]
    shown = {name for each in FEATURED for name in each.metrics}
    parts: dict[str, list[str]] = {}
    for name in known:
        if name not in shown and not name.startswith(ELSEWHERE):
            parts.setdefault(name.partition("/")[0] if "/" in name else "others", []).append(name)
    others = [
        details(
            f"{part} ({len(metrics)})",
            grid([_chart(found, Featured(name, "", {name: name})) for name in metrics]),
            name=f"metrics-{part}",
        )
        for part, metrics in parts.items()
    ]
    return section("metrics", "Metrics", _legend(found), grid(charts), *others)


def _chart(found: Sequence[Arm], featured: Featured) -> str:
    """Return a chart: one color per arm and one dash per metric or, for one arm, one color per metric."""
    traces = []
    present = [
        (arm, name, label)
        for name, label in featured.metrics.items()
        for arm in found
        if any(name in line for run in arm.runs for line in _lines(run, name))
    ]
    metrics = list(dict.fromkeys(name for _, name, _ in present))
    for arm, name, label in present:
        drawn = curve([_lines(run, name) for run in arm.runs], name)
        if drawn is None:
            continue
        number = metrics.index(name) if len(found) == 1 else list(found).index(arm)
        legend = label if len(found) == 1 else arm.name if len(metrics) == 1 else f"{arm.name}, {label}"
        dash = 0 if len(found) == 1 else metrics.index(name)
        is_held_out = name.startswith("val/")
        # bands of several metrics of one run would cover each other
        traces += lines(drawn, legend, number, dash=dash, noisy=not is_held_out, band=len(metrics) == 1)
    return chart(featured.title, traces, unit=featured.unit, note=featured.note) if traces else ""


def _lines(run: Run, name: str) -> Sequence[dict]:
    return run.held_out if name.startswith(("val/", "test/")) else run.metrics


def _legend(found: Sequence[Arm]) -> str:
    bands = any(len(arm.runs) > 1 for arm in found)
    text = "Lines are moving averages; the values themselves are drawn behind them."
    if bands:
        text = "Lines are means over the runs of a configuration, which differ in their seed; bands reach from the "
        text += "lowest to the highest run."
    return f'<p class="lead muted">{text} Drag to zoom, double-click to zoom out.</p>'
