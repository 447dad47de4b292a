"""Rewards that score the response: what a completion contains after its thoughts."""

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_grpo.errors import UserError
from lightning_grpo.rewards.answers import SOLUTION
from lightning_grpo.rewards.base import Completion, completion_text
from lightning_grpo.rewards.text_reward import TextReward

_THINK = re.compile(r"</?think(?:ing)?>")


def response(text: str) -> str:
    """What follows the thoughts, ``<think>…</think>``. Empty if the thoughts are not closed, the whole text if there
    are none."""
    tags = list(_THINK.finditer(text))
    if not tags:
        return text
    return text[tags[-1].end() :] if tags[-1][0].startswith("</") else ""


@dataclass(kw_only=True, eq=False)
class ResponseReward(TextReward):
    """Base class of rewards whose `score` gets the response instead of the whole completion."""

    def __call__(
        self, *, completions: list[Completion], openings: list[str] | None = None, **columns: Any
    ) -> list[float | None]:
        openings = openings or [""] * len(completions)
        texts: list[Completion] = [
            response(opening + completion_text(c)) for opening, c in zip(openings, completions, strict=True)
        ]
        return super().__call__(completions=texts, **columns)


@dataclass(kw_only=True, eq=False)
class AnswerReward(ResponseReward):
    """Base class of rewards that compare the response with the correct answer of the row."""

    answer: str = "answer"
    """Column with the correct answer, as text or a number. If it holds worked solutions, the answer is what follows the
    last ``####``. Rows whose answer is null get no reward."""

    def expected(self, answer: str | int | float) -> str:
        """The correct answer in the form that `compare` needs. Raises `UserError` if no response could match it."""
        text = str(answer).rpartition(SOLUTION)[2].strip()
        if not text:
            raise UserError("it is empty")
        return text

    @abstractmethod
    def compare(self, text: str, expected: str) -> float:
        """The reward of a response."""

    def check(self, columns: Sequence[Mapping[str, Any]]) -> None:
        """Raise `UserError` for a row without the column, or with an answer that no response could match."""
        kind = type(self).__name__
        for row, values in enumerate(columns):
            if self.answer not in values:
                raise UserError(
                    f"{kind}.answer is {self.answer!r}, and row {row} has no such column; set it to one of "
                    f"{', '.join(values) or '(none)'}, or name the column with data.columns"
                )
            answer = values[self.answer]
            if answer is None:
                continue
            if isinstance(answer, bool) or not isinstance(answer, str | int | float):
                raise UserError(f"{kind}: the {self.answer!r} of row {row}: {answer!r} is neither text nor a number")
            try:
                self.expected(answer)
            except UserError as error:
                raise UserError(f"{kind}: the {self.answer!r} of row {row}: {error}") from error

    def score(self, text: str, row: Mapping[str, Any]) -> float | None:
        if self.answer not in row:
            raise UserError(f"{type(self).__name__}.answer is {self.answer!r}; the data set has only {', '.join(row)}")
        return None if row[self.answer] is None else self.compare(text, self.expected(row[self.answer]))
