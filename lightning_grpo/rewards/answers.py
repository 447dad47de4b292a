"""Rewards that compare a completion with the correct answer."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_grpo.errors import UserError
from lightning_grpo.rewards.base import Completion, Reward, completion_text
from lightning_grpo.rewards.numbers import last_number, number_value
from lightning_grpo.rewards.text_reward import TextReward

SOLUTION = "####"
"""Marker before the final answer of a worked solution, as in GSM8K."""
_TAGS = re.compile(
    r"((?:[^\\.^$*+?{}\[\]|()]|\\[^\w\s])+)\((?:\?P<\w+>)?\.[*+]\??\)((?:[^\\.^$*+?{}\[\]|()]|\\[^\w\s])+)"
)


_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_NAMED = ("boxed", "last_number", "whole")


def extract(text: str, how: str) -> str | None:
    """Extract the answer from a text: the content of its last ``\\boxed{…}`` (``boxed``), its ``last_number``, the
    ``whole`` text, or the group in a regular expression's last match. None if there is no answer.
    """
    if how == "last_number":
        return last_number(text)
    if how == "whole":
        return text.strip()
    found = _last_match(text, how)
    return None if found is None else found[1].strip()


def takes_linear_time(how: str) -> bool:
    """Whether `extract` takes a time proportional to the length of any text, unlike some regular expressions."""
    return how in _NAMED or _TAGS.fullmatch(how) is not None


def _last_match(text: str, pattern: str) -> tuple[str, str] | None:
    """The last match of a pattern with one group, or of ``boxed``, and the text of the group."""
    if pattern == "boxed":
        return _last_box(text)
    if tags := _TAGS.fullmatch(pattern):
        # two literals are searched from the end: linear time even if the text repeats the first one
        first, last = (re.sub(r"\\(.)", r"\1", literal) for literal in tags.groups())
        end = text.rfind(last)
        start = text.rfind(first, 0, max(end, 0))
        return (text[start : end + len(last)], text[start + len(first) : end]) if start >= 0 else None
    matches = list(re.finditer(pattern, text, re.DOTALL))
    return (matches[-1][0], matches[-1][1] or "") if matches else None


def _last_box(text: str) -> tuple[str, str] | None:
    """The last ``\\boxed{…}`` with balanced braces, and its content."""
    last: tuple[str, str] | None = None
    opened: list[re.Match[str] | None] = []
    for token in _BOX.finditer(text):
        if token[0] == "}":
            box = opened.pop() if opened else None
            if box is not None:
                last = text[box.start() : token.end()], text[box.end() : token.start()]
        elif token[0].endswith("{") and token[0] != "\\{":
            opened.append(token if token[0] != "{" else None)
    return last


def check_extraction(option: str, how: str) -> None:
    """Raise `UserError` if `extract` can't use ``how``."""
    if how in _NAMED:
        return
    try:
        groups = re.compile(how).groups
    except re.error as error:
        raise UserError(f"{option} is {how!r}: {error}; set {', '.join(_NAMED)}, or a regular expression") from error
    if groups != 1:
        raise UserError(
            f"{option} is {how!r}, an expression with {groups} groups; set {', '.join(_NAMED)}, or an expression "
            "with one group (...) around the answer"
        )


def same_answer(given: str, expected: str) -> bool:
    """Whether two answers are equal: as numbers if each is one number (1,000 = 1000.0, 3/2 = 1.5), otherwise as text,
    ignoring case, repeated and surrounding spaces, and a final full stop.
    """
    values = number_value(given), number_value(expected)
    if None not in values:
        return values[0] == values[1]
    return _plain(given) == _plain(expected)


def _same_form(answer: str) -> str:
    """Text that is equal for answers that `same_answer` compares as equal."""
    value = number_value(answer)
    return _plain(answer) if value is None else str(value)


def _plain(text: str) -> str:
    """A text without what `same_answer` ignores."""
    return " ".join(text.split()).removesuffix(".").casefold()


@dataclass(kw_only=True, eq=False)
class ExactMatch(TextReward):
    """1 if the answer in the completion equals that of the row, else 0. No reward if the row's answer is null.

    Numbers are compared by value, and read as a whole: 3/2, ``\\frac{3}{2}`` and 1.5 are equal, and a completion
    that ends in 3/4 does not match the answer 1/4.
    """

    answer: str = "answer"
    """Column with the correct answer, as text or a number. If it holds worked solutions, the answer is what follows the
    last ``####``, or what ``extract`` finds between its tags."""
    extract: str = "last_number"
    """Where to find the answer in the completion: ``last_number``, ``boxed`` (the last ``\\boxed{…}``), ``whole`` (all
    of it), or a regular expression with one group, such as ``<answer>(.*?)</answer>`` (the last match counts). With
    last_number each row's answer must be one number. Worker processes score with expressions that may take long on some
    texts."""

    def __post_init__(self) -> None:
        check_extraction("ExactMatch.extract", self.extract)
        super().__post_init__()

    @property
    def in_workers(self) -> bool:
        return self.sandbox and not takes_linear_time(self.extract)

    def expected(self, answer: Any) -> str | None:
        """The correct answer as text, None if the row has none. Raises `UserError` if no completion could match it."""
        if answer is None:
            return None
        if isinstance(answer, bool) or not isinstance(answer, str | int | float):
            raise UserError(f"{answer!r} is neither text nor a number")
        text = str(answer).rpartition(SOLUTION)[2].strip()
        if self.extract == "whole":
            return text
        if self.extract == "last_number":
            if number_value(text) is None:
                raise UserError(
                    f"{text[-80:]!r} is not one number, and ExactMatch.extract is 'last_number', which compares "
                    "numbers; set it to whole or to an expression such as <answer>(.*?)</answer>, or drop such rows"
                )
            return text
        found = _last_match(text, self.extract)
        if found is None:
            return text
        match, group = found
        if match == group and group != text:
            raise UserError(
                f"ExactMatch.extract, {self.extract!r}, finds only {group!r} of the answer {text[-80:]!r}, so that "
                "no completion could match it; set an expression that takes the whole answer, or whole"
            )
        return group.strip()

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

    def score(self, text: str, row: Mapping[str, Any]) -> float | None:
        if self.answer not in row:
            raise UserError(f"ExactMatch.answer is {self.answer!r}; the data set has only {', '.join(row)}")
        expected = self.expected(row[self.answer])
        if expected is None:
            return None
        given = extract(text, self.extract)
        return float(given is not None and same_answer(given, expected))

    def final_answers(self, completions: Sequence[str]) -> list[str | None]:
        return self.evaluate(self._final_answer, [(completion,) for completion in completions], None)

    def _final_answer(self, completion: str) -> str | None:
        answer = extract(completion, self.extract)
        return None if answer is None else _same_form(answer)


@dataclass(kw_only=True, eq=False)
class PrefixMatch(Reward):
    """The fraction of the answer's characters that the completion has at the same positions. Case and spaces count.

    It gives a signal to models that have not learned anything yet.
    """

    answer: str = "answer"
    """Column with the correct answer, a nonempty text."""

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
