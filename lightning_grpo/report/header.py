"""The head of the page: what was trained, how far, how long, on what, and which files were damaged."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import PurePath

from lightning_grpo.record.reader import Run
from lightning_grpo.report.arms import run_names
from lightning_grpo.report.markup import duration, escape, number, table


def render(runs: Sequence[Run]) -> str:
    """Return a heading, a table with a row per run, and what the reader warned of."""
    names = run_names(runs)
    rows = [(name, *facts(run).values()) for name, run in zip(names, runs, strict=True)]
    warnings = [f"{name}: {warning}" for name, run in zip(names, runs, strict=True) for warning in run.warnings]
    noted = "".join(f'<p class="note warning">{escape(warning)}</p>' for warning in warnings)
    if len(runs) == 1:
        cards = "".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts(runs[0]).items()
        )
        content = f'<dl class="facts">{cards}</dl>'
    else:
        content = table(["run", *facts(runs[0])], rows)
    title = names[0] if len(runs) == 1 else f"{len(runs)} runs"
    return f'<header id="header"><p class="kicker">Training report</p><h1>{escape(title)}</h1>{content}{noted}</header>'


def facts(run: Run) -> dict[str, str]:
    """Return the facts about a run as text by name, with a dash for what is not known."""
    last = run.metrics[-1] if run.metrics else {}
    steps, total = last.get("step", 0), run.info.get("max_steps")
    resumed = run.info.get("resumed_from") or {}
    tokens = last.get("completion_tokens")
    started = run.info.get("started")
    return {
        "model": PurePath(str(run.info.get("model") or "–")).name,
        "data": data_name(run),
        "steps": f"{steps:,} of {total:,}" if isinstance(total, int) and total > 0 else f"{steps:,}",
        "completion tokens": "–" if tokens is None else number(float(tokens)),
        "time in steps": duration(sum(float(line.get("step_time") or 0.0) for line in run.metrics)),
        "started": datetime.fromisoformat(started).strftime("%Y-%m-%d %H:%M") if isinstance(started, str) else "–",
        "machine": str(run.info.get("machine") or "–"),
        "seed": str(run.info.get("seed", "–")),
        **({"resumed from": f"{resumed.get('folder')}, step {resumed.get('step')}"} if resumed else {}),
    }


def data_name(run: Run) -> str:
    """Return the source of the prompts that the configuration names."""
    data = run.config.get("data") or {}
    options = data.get("init_args", data)
    return str(options.get("source") or "–")
