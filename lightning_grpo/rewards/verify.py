"""Rewards that know the answer."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from lightning_grpo.errors import UserError
from lightning_grpo.rewards.base import Completion, Reward, completion_text

# a minus sign after a digit or letter subtracts: 7-3 holds 7 and 3
NUMBER = re.compile(
    r"(?:(?<!\w)-)?(?:(?<!\w)(?<![0-9]\.)(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<!\w)\.[0-9]+)"
)


def last_number(text: str) -> str | None:
    """The last number in a text, without thousands separators: "so 1,234.50 in all." → "1234.50"."""
    numbers = NUMBER.findall(text.replace("−", "-"))
    return numbers[-1].replace(",", "") if numbers else None


def extract(text: str, how: str) -> str | None:
    """The answer in a text: its ``last_number``, the ``whole`` of it, or the only group of a regular expression's last
    match. None where there is none.
    """
    if how == "last_number":
        return last_number(text)
    if how == "whole":
        return text.strip()
    matches = re.compile(how, re.DOTALL).findall(text)
    return matches[-1].strip() if matches else None


def check_extraction(option: str, how: str) -> None:
    """Raise ValueError for what `extract` can't use."""
    if how in ("last_number", "whole"):
        return
    try:
        groups = re.compile(how).groups
    except re.error as error:
        raise UserError(f"{option} is {how!r}: {error}; set last_number, whole, or a regular expression") from error
    if groups != 1:
        raise UserError(
            f"{option} is {how!r}, an expression with {groups} groups; set last_number, whole, or an expression with "
            "one group (...) around the answer"
        )


def same_answer(given: str, expected: str) -> bool:
    """Equal as numbers where both are numbers (1,000 = 1000.0), else as text without case, outer and double spaces,
    or a closing full stop.
    """
    given, expected = (" ".join(text.split()).removesuffix(".").casefold() for text in (given, expected))
    numbers = [text.replace(",", "") for text in (given, expected) if NUMBER.fullmatch(text)]
    return Decimal(numbers[0]) == Decimal(numbers[1]) if len(numbers) == 2 else given == expected


@dataclass(kw_only=True, eq=False)
class ExactMatch(Reward):
    """1 where the answer found in the completion is that of the row, else 0. A row whose answer is null: no reward."""

    answer: str = "answer"
    """Column with the right answer, text or a number. ``extract`` finds it there too, so that a worked solution will
    do ("… #### 72")."""
    extract: str = "last_number"
    """Where the answer stands in the completion: ``last_number``, ``whole`` (all of it), or a regular expression with
    one group, such as ``<answer>(.*?)</answer>`` (the last match counts)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_extraction("ExactMatch.extract", self.extract)

    def expected(self, answer: Any) -> str | None:
        """The right answer as text, None where the row has none; ValueError where it could never be given."""
        if answer is None:
            return None
        if isinstance(answer, bool) or not isinstance(answer, str | int | float):
            raise UserError(f"{answer!r} is neither text nor a number")
        found = extract(str(answer), self.extract)
        if found is None and self.extract == "last_number":
            raise UserError(f"{answer!r} holds no number; set ExactMatch.extract to whole or an expression")
        return str(answer) if found is None else found

    def check(self, columns: Sequence[Mapping[str, Any]]) -> None:
        for row, values in enumerate(columns):
            if self.answer not in values:
                raise UserError(
                    f"ExactMatch.answer is {self.answer!r}, and row {row} has no such column; set it to one of "
                    f"{', '.join(values) or '(none)'}, or name the column with data.columns"
                )
            try:
                self.expected(values[self.answer])
            except ValueError as error:
                raise UserError(f"ExactMatch: the {self.answer!r} of row {row}: {error}") from error

    def __call__(self, *, completions: list[Completion], **columns: Any) -> list[float | None]:
        if self.answer not in columns:
            raise UserError(f"ExactMatch.answer is {self.answer!r}; the data set has only {', '.join(columns)}")
        scores: list[float | None] = []
        for completion, answer in zip(completions, columns[self.answer], strict=True):
            expected, given = self.expected(answer), extract(completion_text(completion), self.extract)
            right = given is not None and expected is not None and same_answer(given, expected)
            scores.append(None if expected is None else float(right))
        return scores


@dataclass(kw_only=True, eq=False)
class PrefixMatch(Reward):
    """The share of the answer's characters that the completion has in the same places, from its first on: a signal
    for models that have learned nothing yet. Case and spaces count.
    """

    answer: str = "answer"
    """Column with the right answer, a text that isn't empty."""

    def check(self, columns: Sequence[Mapping[str, Any]]) -> None:
        for row, values in enumerate(columns):
            if not isinstance(values.get(self.answer), str) or not values[self.answer]:
                raise UserError(
                    f"PrefixMatch.answer is {self.answer!r}, which is {values.get(self.answer)!r} in row {row}; set it "
                    f"to a column of text, one of {', '.join(values) or '(none)'}"
                )

    def __call__(self, *, completions: list[Completion], **columns: Any) -> list[float]:
        self.check([{self.answer: answer} for answer in columns.get(self.answer, [None])])
        pairs = zip(completions, columns[self.answer], strict=True)
        return [sum(map(str.__eq__, completion_text(c), answer)) / len(answer) for c, answer in pairs]
