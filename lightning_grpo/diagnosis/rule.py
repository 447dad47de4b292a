"""The base class of rules."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lightning_grpo.diagnosis.finding import Finding, Severity
from lightning_grpo.diagnosis.history import History, Row
from lightning_grpo.errors import UserError
from lightning_grpo.ranges import check_ranges

POINTS = 20
"""Values per metric that are stored as evidence."""


@dataclass(frozen=True, kw_only=True)
class Rule(ABC):
    """Recognizes one problem. A subclass is a dataclass whose fields are its thresholds; its docstring is the reason.

    A rule has no state: it decides from the history alone whether the problem exists at the latest step.
    """

    name: ClassVar[str]
    severity: ClassVar[Severity] = "warning"
    source: ClassVar[str] = ""
    """The paper or project that the rule or its thresholds are from."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Metrics without which the rule does not apply; ``"a|b"`` is satisfied by either."""
    ranges: ClassVar[Mapping[str, str]] = {}
    """Ranges of numeric thresholds; see `check_ranges`."""

    after: int = 10
    """Number of optimizer steps, after the warm-up of the learning rate, before the rule is checked."""

    def __post_init__(self) -> None:
        check_ranges(self, {"after": "[0, inf)", **self.ranges}, prefix=f"{type(self).__name__}.")
        if not getattr(self, "name", ""):
            raise UserError(f"{type(self).__name__} has no name; set the class attribute name")

    @abstractmethod
    def check(self, history: History) -> Finding | None:
        """Return the problem if it exists at the latest step of ``history``, and None otherwise."""

    def choose(self, rows: Sequence[Row]) -> Iterable[Row]:
        """Return the completions, of those of the step at which the problem was found, that show it best."""
        return ()

    def why_not(self, history: History) -> str | None:
        """Return why the rule does not apply to a run, or None if it does."""
        missing = [need for need in self.needs if not any(name in history for name in need.split("|"))]
        return f"the log has no {', '.join(need.replace('|', ' or ') for need in missing)}" if missing else None

    def is_due(self, history: History) -> bool:
        """Whether enough steps have passed."""
        need = self.needs[0].split("|") if self.needs else ["reward"]
        return max((history.count(name) for name in need), default=0) >= self.after

    def finding(
        self,
        history: History,
        message: str,
        *,
        evidence: Sequence[str] = (),
        since: int | None = None,
        change: Mapping[str, Any] | None = None,
        advice: str = "",
        severity: Severity | None = None,
        extent: float = 0.0,
    ) -> Finding:
        """Return a finding at the latest step.

        Args:
            history: the history that shows it.
            message: what is wrong, in one sentence with figures.
            evidence: metrics whose values show it.
            since: the first step of the evidence; by default that of the latest `POINTS` values.
            change: values to set, by the option's path. Values that are None are left out.
            advice: what to do, in one sentence.
            severity: by default that of the rule.
            extent: how large the problem is; see `Finding.extent`.
        """
        values = {name: history.last(name, POINTS) for name in evidence if name in history}
        if since is None:
            since = min((int(series.steps[0]) for series in values.values() if len(series)), default=history.step)
        return Finding(
            rule=self.name,
            severity=severity or self.severity,
            step=history.step,
            since=since,
            message=message,
            evidence={
                name: [(int(step), float(value)) for step, value in zip(series.steps, series.values, strict=True)]
                for name, series in values.items()
            },
            change={path: value for path, value in (change or {}).items() if value is not None},
            advice=advice,
            source=self.source,
            extent=extent,
        )
