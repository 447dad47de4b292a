"""Rewards that score one completion at a time by its text."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_grpo.rewards.base import Completion, completion_text
from lightning_grpo.rewards.workers import WorkerReward


@dataclass(kw_only=True, eq=False)
class TextReward(WorkerReward):
    """Base class of rewards that score each completion by its text and its row alone: override `score`.

    With ``sandbox``, worker processes score: without network, with limited memory, on all cores. A completion that
    exceeds ``seconds``, or whose scoring fails, gets ``failed``, and the others are not delayed.
    """

    def prepare(self) -> None:
        self.start_workers(self.score)

    @abstractmethod
    def score(self, text: str, row: Mapping[str, Any]) -> float | None:
        """The reward of one completion; None if it does not apply.

        Args:
            text: of the completion.
            row: further columns of the data set.
        """

    def __call__(self, *, completions: list[Completion], **columns: Any) -> list[float | None]:
        names = [name for name in columns if name not in ("prompts", "completion_ids", "trainer_state")]
        rows = [{name: columns[name][i] for name in names} for i in range(len(completions))]
        return self.evaluate(self.score, list(zip(map(completion_text, completions), rows, strict=True)), self.failed)
