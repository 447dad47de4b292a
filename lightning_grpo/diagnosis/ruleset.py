"""Applies rules to a history, and reports each problem once."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning_grpo.diagnosis.finding import Finding
from lightning_grpo.diagnosis.history import History, Row
from lightning_grpo.diagnosis.rule import Rule
from lightning_grpo.diagnosis.rules import RULES
from lightning_grpo.errors import UserError

log = logging.getLogger(__name__)

CLEARED = 20
"""Checks without a problem after which it is reported again if it recurs."""
SAMPLES = 4
"""Completions that are stored with a finding."""


def keys(row: Row) -> dict[str, int]:
    """What identifies a completion."""
    return {name: int(row[name]) for name in ("step", "rollout", "group", "index")}


class RuleSet:
    """The rules of a run, and what they have reported.

    Args:
        rules: further rules. One with the name of a built-in rule replaces it.
        ignore: names of rules that are not applied.
    """

    def __init__(self, rules: Iterable[Rule] = (), ignore: Sequence[str] = ()) -> None:
        by_name = {rule.name: rule for rule in (*(kind() for kind in RULES), *rules)}
        if unknown := [name for name in ignore if name not in by_name]:
            raise UserError(f"diagnosis.ignore names {unknown[0]!r}; set names of rules: {', '.join(sorted(by_name))}")
        self.rules = [rule for name, rule in by_name.items() if name not in ignore]
        self.reported: dict[str, Finding] = {}
        """The last report of each rule whose problem has not cleared."""
        self._clear: dict[str, int] = {}
        self.broken: dict[str, str] = {}
        """Rules that raised an error, and the error."""

    def check(self, history: History) -> list[Finding]:
        """Return the problems at the latest step that are new, worse than reported, or recur after they had cleared."""
        found = []
        for rule in self.rules:
            if rule.name in self.broken:
                continue
            try:
                finding = self._check(rule, history)
            except Exception as error:  # a fault in a rule must not end the run
                self.broken[rule.name] = f"{type(error).__name__}: {error}"
                log.warning("the diagnosis rule %s failed and is off: %s", rule.name, self.broken[rule.name])
                continue
            if finding is not None:
                found.append(finding)
        return found

    def remember(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Count the findings of an earlier start of the run, lines of findings.jsonl, as reported."""
        for line in lines:
            if line.keys() >= {"rule", "severity", "step"}:
                self.reported[line["rule"]] = Finding(
                    rule=line["rule"], severity=line["severity"], step=line["step"], since=line["step"], message=""
                )

    def _check(self, rule: Rule, history: History) -> Finding | None:
        if rule.why_not(history) or not rule.is_due(history):
            return None
        finding, earlier = rule.check(history), self.reported.get(rule.name)
        if finding is None:
            self._clear[rule.name] = self._clear.get(rule.name, 0) + 1
            if self._clear[rule.name] >= CLEARED:
                self.reported.pop(rule.name, None)
            return None
        self._clear[rule.name] = 0
        if earlier is not None and not finding.worse_than(earlier):
            return None
        finding.samples = [keys(row) for row in list(rule.choose(history.samples(finding.step)))[:SAMPLES]]
        self.reported[rule.name] = finding
        return finding

    def inapplicable(self, history: History) -> dict[str, str]:
        """For each rule that could not be applied to the whole run: why."""
        reasons = {rule.name: rule.why_not(history) or self._why_early(rule, history) for rule in self.rules}
        return {name: reason for name, reason in (reasons | self.broken).items() if reason}

    @staticmethod
    def _why_early(rule: Rule, history: History) -> str | None:
        return None if rule.is_due(history) else f"it needs {rule.after} steps after the warm-up"
