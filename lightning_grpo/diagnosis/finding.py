"""What a rule found, and its line in findings.jsonl."""

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Severity = Literal["note", "warning", "critical"]
SEVERITIES: tuple[Severity, ...] = ("note", "warning", "critical")
"""From the least to the most severe."""


@dataclass(kw_only=True)
class Finding:
    """A problem of a run, with its evidence and a remedy."""

    rule: str
    severity: Severity
    step: int
    """Optimizer step at which the rule found it."""
    since: int
    """First step of the evidence."""
    message: str
    """What is wrong, in one sentence with figures."""
    evidence: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    """For each metric: pairs of step and value."""
    samples: list[dict[str, int]] = field(default_factory=list)
    """Completions that show the problem, by ``step``, ``rollout``, ``group`` and ``index``."""
    change: dict[str, Any] = field(default_factory=dict)
    """Values to set, by the option's path on the command line."""
    advice: str = ""
    """What to do, in one sentence."""
    source: str = ""
    """Paper or project that the rule is from."""
    extent: float = 0.0
    """How large the problem is, in a unit of the rule. A finding is reported again if this is four times as large."""

    def worse_than(self, earlier: "Finding") -> bool:
        """Whether this is a reason to report a problem again that was reported before."""
        if self.severity != earlier.severity:
            return SEVERITIES.index(self.severity) > SEVERITIES.index(earlier.severity)
        return self.extent > 4 * earlier.extent > 0

    def line(self) -> str:
        """The finding as one line of JSON. Values that are not finite are null."""
        fields = asdict(self)
        del fields["extent"]
        fields["evidence"] = {
            name: [[step, value if math.isfinite(value) else None] for step, value in pairs]
            for name, pairs in self.evidence.items()
        }
        return json.dumps(fields, ensure_ascii=False)


def at_least(severity: Severity, limit: Severity) -> bool:
    """Whether ``severity`` is ``limit`` or more severe."""
    return SEVERITIES.index(severity) >= SEVERITIES.index(limit)
