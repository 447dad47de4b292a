"""Findings as text for the terminal."""

import json
import shlex
from collections.abc import Mapping
from typing import Any

METRICS = 3
"""Metrics that are shown with a finding."""


def describe(finding: Mapping[str, Any]) -> list[str]:
    """At most three lines about a line of findings.jsonl: what is wrong, the evidence, and what to set."""
    out = [f"{finding['severity']} {finding['rule']}, step {finding['step']}: {finding['message']}"]
    if evidence := _evidence(finding):
        out.append(f"  evidence: {evidence}")
    remedy = [finding.get("advice"), f"set {settings(finding['change'])}" if finding.get("change") else ""]
    if any(remedy):
        out.append(f"  {'; '.join(filter(None, remedy))}")
    return out


def settings(change: Mapping[str, Any]) -> str:
    """A config patch: options of the command line, or NAME=VALUE for the options of another trainer."""
    return " ".join(
        f"--{path} {shlex.quote(_value(value))}" if "." in path else f"{path}={_value(value)}"
        for path, value in change.items()
    )


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)


def _evidence(finding: Mapping[str, Any]) -> str:
    parts = []
    for name, pairs in list(finding.get("evidence", {}).items())[:METRICS]:
        values = [f"{value:.3g}" for _, value in pairs if value is not None]
        parts += [f"{name} {values[0]} → {values[-1]}"] if values else []
    if finding.get("samples"):
        places = ", ".join("{rollout}/{group}/{index}".format(**row) for row in finding["samples"])
        parts.append(f"completions (rollout/group/index) {places}")
    steps = finding.get("since", finding["step"]), finding["step"]
    return ", ".join(parts) + (f" (steps {steps[0]}–{steps[1]})" if parts else "")
