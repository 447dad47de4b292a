"""Scores with those of reasoning-gym's own scorers that are safe to call."""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lightning_grpo.errors import UserError, optional
from lightning_grpo.ranges import check_ranges
from lightning_grpo.rewards.answers import check_extraction, extract
from lightning_grpo.rewards.base import Completion, Reward, completion_text
from lightning_grpo.rewards.strict import strict_score

log = logging.getLogger(__name__)

CODE = "evaluates the model's answer as Python code inside this process (eval, or sympy's parser)"
REFUSED = {
    "binary_matrix": CODE,
    "countdown": CODE,
    "game_of_life_halting": "gives the full score to any nonempty text",
    "intermediate_integration": CODE,
    "n_queens": CODE,
    "polynomial_multiplication": CODE,
    "puzzle24": CODE,
    "simple_integration": CODE,
    "spiral_matrix": CODE,
    "string_insertion": CODE,
}
"""Tasks that must not or cannot be scored with reasoning-gym 0.1.25, with the reason."""


@lru_cache(maxsize=16)
def _scorer(task: str, args: str) -> Any:
    reasoning_gym = optional("reasoning_gym", "reasoning-gym", "the reward ReasoningGym")

    return reasoning_gym.create_dataset(task, **json.loads(args), size=1, seed=0)


def _refuse(task: str, entry: Mapping[str, Any]) -> None:
    # a composite task passes its entries to the scorers of other tasks
    for name in (task, entry["metadata"].get("source_dataset")):
        if name in REFUSED:
            raise UserError(
                f"the scorer of the reasoning-gym task {name!r} {REFUSED[name]}; choose a task other than "
                f"{', '.join(REFUSED)}, or score its answers with another reward, such as ExactMatch"
            )


@dataclass(kw_only=True, eq=False)
class ReasoningGym(Reward):
    """The score of the reasoning-gym task itself, for rows from ``data.source: reasoning_gym:TASK``.

    Tasks whose scorer evaluates code from the answer are rejected (`REFUSED`), since code of a model must not run in
    the trainer. Scorers that give the full score to wrong answers are replaced (`lightning_grpo.rewards.strict`). An
    answer on which the scorer raises scores 0, and a warning counts such answers. Scorers run in this process.
    """

    extract: str = "whole"
    """Where to find the answer in the completion: ``whole``, ``last_number``, or a regular expression with one group,
    such as ``<answer>(.*?)</answer>`` (the last match counts)."""
    threshold: float | None = 1.0
    """The reward is 1 for scores of at least this value and 0 below it, since many tasks give 0.01 to 0.09 to any
    answer. null uses the score itself."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_extraction("ReasoningGym.extract", self.extract)
        check_ranges(self, {"threshold": "(-inf, inf)"}, prefix="ReasoningGym.")

    def check(self, columns: Sequence[Mapping[str, Any]]) -> None:
        for row, values in enumerate(columns):
            if not {"task", "task_args", "entry"} <= set(values):
                raise UserError(f"ReasoningGym: row {row} is not from data.source = reasoning_gym:TASK")
            _refuse(values["task"], values["entry"])

    def __call__(self, *, completions: list[Completion], **columns: Any) -> list[float]:
        missing = [name for name in ("task", "task_args", "entry") if name not in columns]
        if missing:
            raise UserError(f"ReasoningGym: no column {missing[0]!r}; set data.source to reasoning_gym:TASK")
        scores: list[float] = []
        raised: Counter[str] = Counter()
        rows = zip(completions, columns["task"], columns["task_args"], columns["entry"], strict=True)
        for completion, task, args, entry in rows:
            _refuse(task, entry)
            scorer = _scorer(task, json.dumps(args, sort_keys=True))
            answer = extract(completion_text(completion), self.extract)
            try:
                # the entry of a composite task belongs to another task
                source = entry["metadata"].get("source_dataset", task)
                score = 0.0 if answer is None else strict_score(source, answer, entry, scorer.score_answer)
            except Exception as error:
                raised[f"{task} raised {type(error).__name__}"] += 1
                score = 0.0
            scores.append(score if self.threshold is None else float(score >= self.threshold))
        for what, count in raised.items():
            log.warning("The scorer of %s for %d of %d answers, which score 0.", what, count, len(scores))
        return scores
