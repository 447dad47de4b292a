"""A reward that depends on correctness and length."""

import inspect
import math
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_grpo.errors import UserError
from lightning_grpo.ranges import check_ranges
from lightning_grpo.rewards.base import Reward, Scores
from lightning_grpo.rewards.function import call_reward


@dataclass(kw_only=True, eq=False)
class CosineLength(Reward):
    """Scales a reward by length along a cosine (arXiv:2502.03373, appendix C.1), so that short correct completions get
    more than long ones, and long wrong ones more than short ones.

    A completion is correct if ``reward`` gives it 1 or more. No reward where that gives none.
    """

    reward: Reward
    """The reward that decides which completions are correct."""
    max_completion_length: int
    """Length in tokens at which the values for long completions are reached; usually that of the module."""
    correct: tuple[float, float] = (1.0, 0.5)
    """Reward of a correct completion: the shortest, the longest."""
    wrong: tuple[float, float] = (-1.0, -0.5)
    """Reward of a wrong completion: the shortest, the longest."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, {"max_completion_length": "[1, inf)"}, prefix="CosineLength.")
        for name in ("correct", "wrong"):
            if len(values := getattr(self, name)) != 2 or not all(map(math.isfinite, values)):
                raise UserError(f"CosineLength.{name} is {values}; set two finite numbers, as [1.0, 0.5]")

    def check(self, columns: Sequence[Mapping[str, Any]]) -> None:
        self.reward.check(columns)

    def prepare(self) -> None:
        self.reward.prepare()

    @property
    def in_workers(self) -> bool:
        return self.reward.in_workers

    def __call__(
        self,
        *,
        completion_ids: list[list[int]],
        openings: list[str] | None = None,
        log_metric: Any = None,
        log_extra: Any = None,
        **arguments: Any,
    ) -> Scores | Awaitable[Scores]:
        logs = {"log_metric": log_metric, "log_extra": log_extra}
        given = {**arguments, **logs, "completion_ids": completion_ids, "openings": openings}
        scores = call_reward(self.reward, given)
        return self._later(scores, completion_ids) if inspect.isawaitable(scores) else self._all(scores, completion_ids)

    async def _later(self, scores: Awaitable[Scores], completion_ids: list[list[int]]) -> Scores:
        return self._all(await scores, completion_ids)

    def _all(self, scores: Scores, completion_ids: list[list[int]]) -> Scores:
        return [
            None if score is None else self._scale(self.correct if score >= 1 else self.wrong, len(ids))
            for score, ids in zip(scores, completion_ids, strict=True)
        ]

    def _scale(self, bounds: tuple[float, float], length: int) -> float:
        shortest, longest = bounds
        progress = min(length / self.max_completion_length, 1.0)
        return longest + 0.5 * (shortest - longest) * (1.0 + math.cos(math.pi * progress))

    def final_answers(self, completions: Sequence[str]) -> list[str | None] | None:
        return self.reward.final_answers(completions)
