"""``lightning-grpo diagnose``: what is wrong with a run, finished or not."""

import argparse
import json
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_grpo.diagnosis.finding import SEVERITIES
from lightning_grpo.diagnosis.inputs import Log, read_log
from lightning_grpo.diagnosis.ruleset import RuleSet
from lightning_grpo.diagnosis.text import describe
from lightning_grpo.errors import UserError

Record = dict[str, Any]


def parser() -> argparse.ArgumentParser:
    """The options."""
    out = argparse.ArgumentParser(
        prog="lightning-grpo diagnose",
        description="Check the metrics of a run by rules (docs/diagnosis.md), and print what is wrong, the evidence, "
        "and what to set. The exit code is 1 if a finding is critical, and 0 otherwise.",
        epilog="Example: lightning-grpo diagnose runs/quickstart",
    )
    add = out.add_argument
    add(
        "paths",
        metavar="PATH",
        nargs="+",
        type=Path,
        help="the folder of a run; an output folder, a checkpoint or a trainer_state.json of TRL; or metrics as CSV or "
        "JSON lines under TRL's or verl's names",
    )
    add("--ignore", metavar="RULE", nargs="+", action="extend", default=[], help="rules that are not applied")
    add("--json", action="store_true", help="print one JSON object per path")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code."""
    arguments = parser().parse_args(argv)
    logs = [read_log(path) for path in arguments.paths]
    try:
        results = [diagnose(log, RuleSet(ignore=arguments.ignore)) for log in logs]
    except UserError as error:
        raise UserError(str(error).replace("diagnosis.ignore", "--ignore")) from error
    try:
        for result in results:
            print(json.dumps(result, ensure_ascii=False) if arguments.json else "\n".join(text(result)))
        sys.stdout.flush()
    except BrokenPipeError:  # a pager or `head` was closed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return int(any(f["severity"] == "critical" for result in results for f in result["findings"]))


def diagnose(log: Log, rules: RuleSet) -> Record:
    """The findings of a run, the most severe first, and the rules that could not be applied.

    Findings that the run recorded and that the metrics alone don't show, such as those of rules of the user's own, are
    included.
    """
    found, history = log.replay(rules)
    findings = [json.loads(finding.line()) | {"change": log.in_own_terms(finding.change)} for finding in found]
    known = {finding["rule"] for finding in findings} | {rule.name for rule in rules.rules} - {"nonfinite"}
    recorded = log.run.findings if log.run else []
    findings += [line for line in recorded if "message" in line and line.get("rule") not in known]
    findings.sort(key=lambda line: (-SEVERITIES.index(line["severity"]), line["step"]))
    inapplicable = rules.inapplicable(history)
    for finding in findings:
        inapplicable.pop(finding["rule"], None)
    return {
        "path": str(log.path),
        "steps": len(history.steps),
        "last_step": history.step,
        "findings": findings,
        "inapplicable": inapplicable,
        "warnings": log.warnings,
    }


def text(result: Record) -> list[str]:
    """The result in lines for the terminal."""
    findings = result["findings"]
    counts = [(severity, sum(line["severity"] == severity for line in findings)) for severity in reversed(SEVERITIES)]
    listed = ", ".join(f"{count} {severity}" for severity, count in counts if count) or "no findings"
    out = [f"{result['path']}: {result['steps']} steps up to step {result['last_step']}, {listed}"]
    for line in findings:
        out += ["", *describe(line)]
    rules: dict[str, list[str]] = defaultdict(list)
    for name, reason in result["inapplicable"].items():
        rules[reason].append(name)
    if rules:
        out += ["", "not applied:", *(f"  {', '.join(names)}: {reason}" for reason, names in rules.items())]
    return out + [f"warning: {warning}" for warning in result["warnings"]]
