"""Findings as text for the terminal."""

import json
import shlex
from typing import Any

from lightning_grpo.diagnosis.finding import Finding


def lines(finding: Finding) -> list[str]:
    """At most three lines: what is wrong, the evidence, and what to set."""
    out = [f"{finding.severity} {finding.rule}, step {finding.step}: {finding.message}"]
    if evidence := _evidence(finding):
        out.append(f"  evidence: {evidence}")
    if finding.change or finding.advice:
        out.append("  " + "; ".join(filter(None, [finding.advice, _set(finding)])))
    return out


def command_line(change: dict[str, Any]) -> str:
    """A config patch as options of the command line."""
    return " ".join(f"--{path} {shlex.quote(_value(value))}" for path, value in change.items())


def _set(finding: Finding) -> str:
    return f"set {command_line(finding.change)}" if finding.change else ""


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)


def _evidence(finding: Finding) -> str:
    parts = []
    for name, pairs in list(finding.evidence.items())[:3]:
        values = [pairs[0][1], pairs[-1][1]]
        parts.append(f"{name} {' → '.join(f'{value:.3g}' for value in values)}")
    if finding.samples:
        places = [f"{row['rollout']}/{row['group']}/{row['index']}" for row in finding.samples]
        parts.append(f"completions (rollout/group/index) {', '.join(places)}")
    return ", ".join(parts) + (f" (steps {finding.since}–{finding.step})" if parts else "")
