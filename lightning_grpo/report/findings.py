"""The section with the findings of the diagnosis: on the axis of steps, and as a list with evidence and remedy."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from lightning_grpo.record.reader import Run
from lightning_grpo.report.arms import run_names
from lightning_grpo.report.charts import chart, color, grid
from lightning_grpo.report.markup import details, escape, number, section

SEVERITIES = ("critical", "warning", "note")
"""From the most to the least severe; also names of colors."""
MOST_SAMPLES = 12
"""Most samples that a finding links to."""


def render(runs: Sequence[Run]) -> str:
    """Return the section; empty if no run was diagnosed."""
    diagnosed = [
        (i, name, run)
        for i, (name, run) in enumerate(zip(run_names(runs), runs, strict=True))
        if run.findings or _was_diagnosed(run)
    ]
    parts = []
    for i, name, run in diagnosed:
        title = f"<h3>{escape(name)}</h3>" if len(runs) > 1 else ""
        prefix = f"{i}-" if len(runs) > 1 else ""
        found = sorted(run.findings, key=lambda finding: (_severity(finding), finding["step"]))
        if found:
            cards = "".join(_card(finding, prefix) for finding in found)
            parts.append(f"{title}{_timeline(run)}{cards}")
        else:
            parts.append(f'{title}<p class="lead">The diagnosis has found nothing.</p>')
    return section("findings", "Findings", *parts)


def _was_diagnosed(run: Run) -> bool:
    options = run.config.get("diagnosis")
    return isinstance(options, dict) and bool(options.get("enabled", True))


def _severity(finding: Mapping[str, Any]) -> int:
    severity = finding.get("severity")
    return SEVERITIES.index(severity) if severity in SEVERITIES else len(SEVERITIES) - 1


def _timeline(run: Run) -> str:
    rules = list(dict.fromkeys(str(finding.get("rule")) for finding in run.findings))
    last = max([line["step"] for line in run.metrics[-1:]] + [finding["step"] for finding in run.findings])
    traces: list[dict[str, Any]] = []
    for finding in run.findings:
        severity = SEVERITIES[_severity(finding)]
        rule, step = str(finding.get("rule")), finding["step"]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "x": [_since(finding), step],
                "y": [rule, rule],
                "line": {"color": f"--{severity}", "width": 4},
                "marker": {"color": f"--{severity}", "size": [5, 11]},
                "showlegend": False,
                "text": escape(finding.get("message", "")),
                "hovertemplate": f"step {step}: {severity}<extra></extra>",
            }
        )
    layout: dict[str, Any] = {
        "hovermode": "closest",
        "xaxis": {"range": [0, last + 1]},
        "yaxis": {"type": "category", "categoryarray": rules[::-1], "nticks": len(rules)},
    }
    return chart(
        "Findings", traces, unit="by rule, from the first sign to the report", height=80 + 30 * len(rules), **layout
    )


def _card(finding: Mapping[str, Any], prefix: str) -> str:
    severity = SEVERITIES[_severity(finding)]
    step, since = finding["step"], _since(finding)
    when = f"step {step:,}" + (f", since step {since:,}" if since < step else "")
    text = "".join(
        f"<p>{label}{escape(_sentence(finding[name]))}</p>"
        for name, label in (("message", ""), ("advice", "<b>What to do:</b> "))
        if _is_text(finding.get(name))
    )
    change = finding.get("change")
    patch = ""
    if isinstance(change, dict) and change:
        patch = f"<pre>{escape(yaml.safe_dump(_nested(change), sort_keys=False).rstrip())}</pre>"
    source = f'<p class="muted">Source: {escape(finding["source"])}</p>' if _is_text(finding.get("source")) else ""
    evidence = details("Evidence", grid(_evidence(finding)), name=f"evidence-{prefix}{finding.get('rule')}-{step}")
    return (
        f'<article class="finding {severity}"><h4><span class="badge">{severity}</span> '
        f'{escape(finding.get("rule", ""))} <span class="muted">{when}</span></h4>'
        f"{text}{patch}{_links(finding, prefix)}{source}{evidence}</article>"
    )


def _evidence(finding: Mapping[str, Any]) -> list[str]:
    """Return a chart per metric of the evidence."""
    evidence = finding.get("evidence")
    charts = []
    for i, (name, pairs) in enumerate(evidence.items() if isinstance(evidence, dict) else ()):
        points = [pair for pair in pairs if _is_point(pair)] if isinstance(pairs, list) else []
        if len(points) == 1:
            charts.append(f"<p>{escape(name)}: {number(points[0][1])} at step {points[0][0]}</p>")
        elif points:
            trace = {
                "type": "scatter",
                "mode": "lines+markers",
                "x": [point[0] for point in points],
                "y": [point[1] for point in points],
                "line": {"color": color(i)},
                "marker": {"size": 4},
                "hovertemplate": "%{y:.4g}<extra></extra>",
            }
            charts.append(chart(str(name), [trace], height=150))
    return charts


def _is_point(pair: object) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(isinstance(value, int | float) for value in pair)


def _links(finding: Mapping[str, Any], prefix: str) -> str:
    samples = finding.get("samples")
    keys = ("step", "group", "index")
    known = [
        tuple(sample[key] for key in keys)
        for sample in (samples if isinstance(samples, list) else ())
        if isinstance(sample, dict) and all(isinstance(sample.get(key), int) for key in keys)
    ]
    links = [
        f'<a href="#sample-{prefix}{step}-{group}-{index}">step {step}, group {group}, completion {index}</a>'
        for step, group, index in known[:MOST_SAMPLES]
    ]
    more = f" and {len(known) - MOST_SAMPLES} more" if len(known) > MOST_SAMPLES else ""
    return f'<p class="links">Samples: {"; ".join(links)}{more}</p>' if links else ""


def _nested(change: Mapping[Any, Any]) -> dict[str, Any]:
    """Return options by dotted paths as nested options, as a configuration file has them."""
    out: dict[str, Any] = {}
    for path, value in change.items():
        *parents, last = str(path).split(".")
        place = out
        for name in parents:
            inner = place.setdefault(name, {})
            if not isinstance(inner, dict):
                return {str(path): value for path, value in change.items()}
            place = inner
        place[last] = value
    return out


def _since(finding: Mapping[str, Any]) -> int:
    since = finding.get("since")
    return since if isinstance(since, int) else finding["step"]


def _sentence(text: str) -> str:
    """Return a message with a capital letter and a full stop, unless it begins with a name such as ``sampling/kl``."""
    text = text[0].upper() + text[1:] if text.partition(" ")[0].isalpha() else text
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)
