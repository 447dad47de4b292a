"""Reads what `diagnose` is given: the folder of a run, TRL's trainer_state.json, or a table of metrics."""

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import compress
from pathlib import Path
from typing import Any

from lightning_grpo.diagnosis.finding import Finding
from lightning_grpo.diagnosis.history import History, Row, by_step
from lightning_grpo.diagnosis.ruleset import RuleSet
from lightning_grpo.errors import UserError
from lightning_grpo.record.reader import Run, read_run

STEP_NAMES = ("step", "Step", "_step", "global_step", "train/global_step", "training/global_step")
VERL_NAMES = {
    "critic/score/mean": "reward",
    "critic/rewards/mean": "reward",
    "actor/entropy": "entropy",
    "actor/entropy_loss": "entropy",
    "actor/grad_norm": "grad_norm",
    "actor/lr": "learning_rate",
    "actor/pg_clipfrac": "clip_ratio/region_mean",
    "actor/kl_loss": "kl",
    "actor/pg_loss": "loss",
    "response_length/mean": "completions/mean_length",
    "response_length/clip_ratio": "completions/clipped_ratio",
    "timing_s/step": "step_time",
    "timing_s/gen": "time/rollout",
    "perf/max_memory_allocated_gb": "memory/gib",
    "rollout_corr/kl": "sampling/k1",
    "rollout_corr/rollout_is_mean": "sampling/ratio/mean",
    "rollout_corr/rollout_is_std": "sampling/ratio/std",
    "rollout_corr/rollout_is_eff_sample_size": "sampling/ess",
    "rollout_corr/chi2_token": "sampling/chi2",
}
"""Names of verl's metrics."""
TRL_OPTIONS = {
    "model.optimizer.lr": "learning_rate",
    "model.num_generations": "num_generations",
    "model.max_completion_length": "max_completion_length",
    "model.objective.beta": "beta",
    "model.objective.epsilon_high": "epsilon_high",
    "model.objective.entropy_coef": "entropy_coef",
    "model.advantage.aggregation": "multi_objective_aggregation",
    "trainer.gradient_clip_val": "max_grad_norm",
    "trainer.accumulate_grad_batches": "gradient_accumulation_steps",
}
"""Names of options in TRL, in which changes are given for the logs of other trainers."""
COLUMNS = (
    *("step", "rollout", "group", "index", "reward", "advantage", "truncated"),
    *("sampled", "completion_ids", "engine_logprobs", "trainer_logprobs"),
)


@dataclass(kw_only=True)
class Log:
    """Metrics of a run and what is known about it."""

    path: Path
    lines: list[dict[str, float]]
    """Metrics with their ``step``, one or several lines per step."""
    run: Run | None = None
    """The run of this package; None for logs of other trainers."""
    warnings: list[str] = field(default_factory=list)
    """What was damaged and left out."""

    def replay(self, rules: RuleSet) -> tuple[list[Finding], History]:
        """Check ``rules`` after every step, as during training."""
        history, findings = self._history(), []
        for step, metrics, held_out in by_step(self.lines):
            if metrics:
                history.append(step, metrics)
                findings += rules.check(history)
            history.add_held_out(step, held_out)
        return findings, history

    def in_own_terms(self, change: Mapping[str, Any]) -> dict[str, Any]:
        """A config patch by the names of the trainer that wrote the log."""
        if self.run is not None:
            return dict(change)
        return {TRL_OPTIONS[path]: value for path, value in change.items() if path in TRL_OPTIONS}

    def _history(self) -> History:
        run = self.run
        if run is None:
            return History()

        @lru_cache
        def samples(step: int) -> list[Row]:
            return [sampled_tokens(row) for row in run.samples(COLUMNS, [step]).to_pylist()]

        info = dict(run.info)
        if run.metrics:
            info["completions_per_step"] = run.samples(["step"], [run.metrics[0]["step"]]).num_rows
        return History(options=flatten(run.config), info=info, samples=samples)


def sampled_tokens(row: Row) -> Row:
    """The row with only those tokens that the policy sampled."""
    if row["sampled"] is None:
        return row
    lists = {name: values for name in COLUMNS if isinstance(values := row[name], list)}
    return row | {name: [*compress(values, row["sampled"])] for name, values in lists.items()}


def flatten(config: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """The options of a config.yaml by their path on the command line, which names neither class_path nor init_args."""
    out: dict[str, Any] = {}
    for name, value in config.items():
        here = path if name == "init_args" else f"{path}.{name}" if path else str(name)
        if isinstance(value, Mapping):
            out[here] = value
            out |= flatten(value, here)
        elif name != "class_path":
            out[here] = value
    return out


def read_log(path: Path) -> Log:
    """Read a run's folder, a checkpoint of TRL or its trainer_state.json, or metrics as CSV or JSON lines.

    Raises:
        UserError: the path contains nothing of these.
    """
    if path.is_dir():
        if state := _trainer_state(path):
            return _read_json(state)
        run = read_run(path)
        return Log(path=run.folder, lines=[*run.metrics, *run.held_out], run=run, warnings=run.warnings)
    if not path.exists():
        raise UserError(f"{path} does not exist; name the folder of a run, trainer_state.json, or a CSV file")
    return _read_csv(path) if path.suffix == ".csv" else _read_json(path)


def _trainer_state(folder: Path) -> Path | None:
    """The newest trainer_state.json of TRL in a checkpoint's folder or in the folder that contains checkpoints."""
    found = [*folder.glob("trainer_state.json"), *folder.glob("checkpoint-*/trainer_state.json")]
    return max(found, key=lambda file: file.stat().st_mtime, default=None)


def _read_json(path: Path) -> Log:
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        content = json.loads(text)
    except ValueError:
        content = None
    warnings = []
    if isinstance(content, dict) and "log_history" in content:
        content = content["log_history"]
    elif not isinstance(content, list):
        content = []
        for number, line in enumerate(text.splitlines(), start=1):
            try:
                content.append(json.loads(line))
            except ValueError:
                warnings.append(f"line {number} was left out: it is damaged or half-written")
    return _log(path, [line for line in content if isinstance(line, dict)], warnings)


def _read_csv(path: Path) -> Log:
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        return _log(path, list(csv.DictReader(line.replace("\0", "") for line in file)), [])


def _log(path: Path, lines: list[dict[str, Any]], warnings: list[str]) -> Log:
    out = []
    for number, line in enumerate(lines, start=1):
        step = next((x for name in STEP_NAMES if (x := _number(line.get(name))) is not None and x == x), None)
        values = {own_name(str(name)): x for name, text in line.items() if (x := _number(text)) is not None}
        if "train_runtime" not in values:  # TRL's summary at the end
            out.append(values | {"step": number if step is None else step})
    if not any(len(line) > 1 for line in out):
        raise UserError(
            f"{path} has no metrics; name the folder of a run, TRL's trainer_state.json, or a CSV file or JSON lines "
            "with one row per step and columns such as step, reward, entropy, grad_norm"
        )
    return Log(path=path, lines=out, warnings=warnings)


def own_name(name: str) -> str:
    """The name of a metric in this package."""
    name = name.rsplit(" - ", 1)[-1]  # the exports of Weights & Biases begin with the run's name
    if name in VERL_NAMES:
        return VERL_NAMES[name]
    name = name.removeprefix("train/")
    for prefix in ("eval/", "eval_"):
        if name.startswith(prefix):
            return f"val/{name.removeprefix(prefix)}"
    return name


def _number(value: Any) -> float | None:
    """The value as a number; NaN for null, None for text and empty cells."""
    if value is None:
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
