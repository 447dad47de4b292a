"""Scores with reasoning-gym's own scorers, in worker processes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from lightning_grpo.errors import UserError, optional
from lightning_grpo.ranges import check_ranges
from lightning_grpo.rewards.answers import check_extraction, extract
from lightning_grpo.rewards.strict import strict_score
from lightning_grpo.rewards.text_reward import TextReward


@lru_cache(maxsize=16)
def _scorer(task: str, args: str) -> Any:
    reasoning_gym = optional("reasoning_gym", "reasoning-gym", "the reward ReasoningGym")

    return reasoning_gym.create_dataset(task, **json.loads(args), size=1, seed=0)


@dataclass(kw_only=True, eq=False)
class ReasoningGym(TextReward):
    """The score of the reasoning-gym task itself, for rows from ``data.source: reasoning_gym:TASK``.

    Scorers run in worker processes, since some evaluate the answer as Python code. They are called only with answers
    that contain no code, and those that give the full score to wrong answers are replaced
    (`lightning_grpo.rewards.strict`). An answer on which the scorer raises scores 0, and a warning counts such answers.
    """

    raises: ClassVar[bool] = True

    extract: str = "whole"
    """Where to find the answer in the completion: ``whole``, ``last_number``, ``boxed``, or a regular expression
    with one group, such as ``<answer>(.*?)</answer>`` (the last match counts)."""
    threshold: float | None = 1.0
    """The reward is 1 for scores of at least this value and 0 below it, since many tasks give 0.01 to 0.09 to any
    answer. null uses the score itself."""

    def __post_init__(self) -> None:
        check_extraction("ReasoningGym.extract", self.extract)
        check_ranges(self, {"threshold": "(-inf, inf)"}, prefix="ReasoningGym.")
        super().__post_init__()

    def warm_up(self) -> None:
        optional("reasoning_gym", "reasoning-gym", "the reward ReasoningGym")

    def check(self, columns: Sequence[Mapping[str, Any]]) -> None:
        for row, values in enumerate(columns):
            if not {"task", "task_args", "entry"} <= set(values):
                raise UserError(f"ReasoningGym: row {row} is not from data.source = reasoning_gym:TASK")

    def __call__(self, **arguments: Any) -> list[float | None]:
        missing = [name for name in ("task", "task_args", "entry") if name not in arguments]
        if missing:
            raise UserError(f"ReasoningGym: no column {missing[0]!r}; set data.source to reasoning_gym:TASK")
        return super().__call__(**arguments)

    def score(self, text: str, row: Mapping[str, Any]) -> float:
        task, entry = row["task"], row["entry"]
        answer = extract(text, self.extract)
        # the entry of a composite task belongs to another task
        source = entry["metadata"].get("source_dataset", task)
        scorer = _scorer(task, json.dumps(row["task_args"], sort_keys=True))
        score = 0.0 if answer is None else strict_score(source, answer, entry, scorer.score_answer)
        return score if self.threshold is None else float(score >= self.threshold)
