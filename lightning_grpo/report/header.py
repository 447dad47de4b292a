"""The head of the page: what was trained, how far, how long, on what, and which files were damaged."""

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np

from lightning_grpo.record.reader import Run
from lightning_grpo.report.arms import run_names
from lightning_grpo.report.markup import duration, escape, number, table
from lightning_grpo.report.series import column


def render(runs: Sequence[Run]) -> str:
    """Return a heading, the facts about each run, and what the reader warned of."""
    names = run_names(runs)
    known = [facts(run) for run in runs]
    if len(runs) == 1:
        cells = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in known[0].items())
        content = f'<dl class="facts">{cells}</dl>'
    else:
        head = list(dict.fromkeys(fact for each in known for fact in each))
        content = table(
            ["run", *head],
            [[name, *(each.get(fact, "–") for fact in head)] for name, each in zip(names, known, strict=True)],
        )
    warnings = [f"{name}: {warning}" for name, run in zip(names, runs, strict=True) for warning in run.warnings]
    noted = "".join(f'<p class="note warning">{escape(warning)}</p>' for warning in warnings)
    title = names[0] if len(runs) == 1 else f"{len(runs)} runs"
    return f'<header id="header"><p class="kicker">Training report</p><h1>{escape(title)}</h1>{content}{noted}</header>'


def facts(run: Run) -> dict[str, str]:
    """Return the facts about a run as text by name. What is not known is left out."""
    steps, total = run.metrics[-1]["step"] if run.metrics else 0, run.info.get("max_steps")
    tokens, seconds = column(run.metrics, "completion_tokens"), column(run.metrics, "step_time")
    resumed = run.info.get("resumed_from")
    found = {
        "model": PurePath(str(run.info.get("model") or "")).name,
        "data": data_name(run),
        "steps": f"{steps:,} of {total:,}" if isinstance(total, int) and total > 0 else f"{steps:,}",
        "reward": change(run.metrics, "reward"),
        "held-out pass@1": change(run.held_out, "val/pass@1"),
        "completion tokens": f"{np.nanmax(tokens):,.0f}" if np.isfinite(tokens).any() else "",
        "time in steps": duration(float(np.nansum(seconds))) if np.isfinite(seconds).any() else "",
        "started": str(run.info.get("started") or "").replace("T", " ")[:16],
        "machine": machine(run),
        "seed": str(run.info.get("seed", run.config.get("seed_everything", ""))),
    }
    if isinstance(resumed, dict):
        found["resumed from"] = f"{resumed.get('folder')}, step {resumed.get('step')}"
    return {name: value for name, value in found.items() if value}


def machine(run: Run) -> str:
    """Return the machine in words."""
    found = run.info.get("machine") or ""
    if not isinstance(found, dict):
        return str(found)
    if found.get("device") == "cpu":
        found = found | {"device": "CPU"}
    units = {"device": "", "cores": " cores", "memory_gib": " GiB", "ranks": " ranks"}
    return ", ".join(f"{found[name]}{unit}" for name, unit in units.items() if found.get(name) not in (None, 1))


def change(lines: Sequence[Mapping[str, Any]], name: str) -> str:
    """Return the first and the last value of a metric, as ``0.125 → 0.703``; of many, means over a twentieth of them.
    Empty if there is none."""
    values = column(lines, name)
    values = values[np.isfinite(values)]
    if not values.size:
        return ""
    width = max(1, values.size // 20)
    first, last = float(values[:width].mean()), float(values[-width:].mean())
    return number(last) if values.size == 1 else f"{number(first)} → {number(last)}"


def data_name(run: Run) -> str:
    """Return the source of the prompts that the configuration names."""
    data = run.config.get("data")
    options = data.get("init_args", data) if isinstance(data, dict) else {}
    return str(options.get("source") or "") if isinstance(options, dict) else ""
