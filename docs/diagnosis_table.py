"""Generate docs/diagnosis.md: ``python docs/diagnosis_table.py > docs/diagnosis.md``."""

import sys
from dataclasses import fields

from objectives_table import first, table

from lightning_grpo.diagnosis.rule import Rule
from lightning_grpo.diagnosis.rules import RULES

TOP = """\
# Diagnosis

<!-- Generated from the code by `python docs/diagnosis_table.py`. -->

During `fit`, rules check the metrics after every optimizer step. What they find is printed in at most three lines (what
is wrong, the evidence, what to set) and appended to `findings.jsonl` beside the logs:

```
critical dead_groups, step 39: in 100% of the groups all rewards are equal, which wastes 61% of the run's time on …
  evidence: frac_reward_zero_std 0.5 → 1, reward 0.21 → 0, completions (rollout/group/index) 38/0/0 (steps 20–39)
  use prompts with pass rates between 0.15 and 0.85, or larger groups; set --model.num_generations 16 …
```

`set` is computed from the run's own values and can be pasted into the command line. The completions named are rows of
the samples' files. A problem is reported once, and again if it becomes more severe or four times as large, or if
it recurs after it had cleared for 20 steps.

Rules compare a run with its own start, and are silent until the learning rate's warm-up has ended and enough steps have
passed. A rule whose metrics are missing is skipped. An error in a rule turns it off with a warning; the run goes on.

`benchmarks/diagnosis.py` injects 26 faults into small runs, with two seeds each: all 52 were named within 20 optimizer
steps, and none of 51 healthy runs was reported as critical. 5 had a warning, that their steps took longer, on a busy
machine (2 cores of an AMD EPYC, 2026-11-28).

If a loss or gradient is NaN or infinite, `fit` skips the step and ends. The finding then names the first tensor that is
not finite (an input, a weight, the output of a layer, or a gradient) and the completion for which it is, and the batch
is saved as `nonfinite-stepN.pt` beside the logs: `torch.load` gives its `experience`, the `metrics` of the step before,
and `first`, the name of the tensor and the row.

## A finished run

```bash
lightning-grpo diagnose runs/quickstart
lightning-grpo diagnose trl_output/ verl_metrics.csv --json
```

`diagnose` applies the same rules to the folder of a run, to an output folder, a checkpoint or a `trainer_state.json` of
TRL, and to metrics in a CSV file or JSON lines with TRL's or verl's names, such as an export of Weights & Biases. It
starts without torch, lists the rules that could not be applied and why, and ends with exit code 1 if a finding is
critical, and 0 otherwise.

## Options

| option | effect |
| --- | --- |
| `diagnosis.enabled: false` | turns the diagnosis off |
| `diagnosis.ignore: [clipping]` | leaves out rules, by name |
| `diagnosis.halt_on: critical` | saves a checkpoint and stops with exit code 1 at a finding of this severity or above |
| `diagnosis.rules: […]` | adds rules; one with the name of a built-in rule replaces it |

A built-in rule with another threshold:

```yaml
diagnosis:
  rules:
    - class_path: lightning_grpo.diagnosis.rules.DeadGroups
      init_args: {share: 0.5}
```

A rule of your own is a dataclass whose fields are its thresholds. It has no state: it decides from the history alone
whether the problem exists at the latest step.

```python
# mine.py
from dataclasses import dataclass
from typing import ClassVar

from lightning_grpo.diagnosis import Finding, History, Rule


@dataclass(frozen=True, kw_only=True)
class ShortAnswers(Rule):
    \"\"\"Answers of a few tokens contain no reasoning.\"\"\"

    name: ClassVar[str] = "short_answers"
    needs: ClassVar[tuple[str, ...]] = ("completions/mean_length",)

    least: float = 50.0

    def check(self, history: History) -> Finding | None:
        length = history.last("completions/mean_length", 10).median
        if length >= self.least:
            return None
        return self.finding(
            history,
            f"completions have {length:.0f} tokens",
            evidence=["completions/mean_length"],
            advice="ask for reasoning in the prompt",
        )

    def choose(self, rows):
        return sorted(rows, key=lambda row: len(row["completion_ids"]))
```

```yaml
diagnosis:
  rules: [{class_path: mine.ShortAnswers, init_args: {least: 100}}]
```

## Rules

A severity may differ in single cases: dead groups of a solved task are only noted, and no gradient at all is critical.
"""

TITLES = {
    "sync": "Engine",
    "optimization": "Optimizer",
    "policy": "Policy",
    "rewards": "Rewards",
    "resources": "Time and memory",
}


def thresholds(rule: type[Rule]) -> str:
    """The options of a rule with their defaults."""
    values = {field.name: field.default for field in fields(rule)}
    return ", ".join(f"`{name}` {x:g}" for name, x in values.items() if isinstance(x, int | float))


def page() -> str:
    """The whole page, as Markdown."""
    parts = [TOP]
    for theme, title in TITLES.items():
        rules = [rule for rule in RULES if rule.__module__.endswith(f".{theme}")]
        body = [
            (f"`{rule.name}`<br>`{rule.__name__}`", rule.severity, first(rule), thresholds(rule), rule.source)
            for rule in rules
        ]
        parts += [f"### {title}\n", table(("rule", "severity", "reason", "thresholds", "sources"), body), ""]
    return "\n".join(parts)


if __name__ == "__main__":
    sys.stdout.write(page())
