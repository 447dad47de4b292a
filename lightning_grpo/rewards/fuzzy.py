"""A reward for answers that resemble the correct one."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning_grpo.errors import UserError, optional
from lightning_grpo.ranges import check_ranges
from lightning_grpo.rewards.answers import check_extraction, extract
from lightning_grpo.rewards.response import AnswerReward


def word_f1(given: str, expected: str) -> float:
    """F1 of two bags of words (SQuAD, arXiv:1606.05250): the harmonic mean of precision and recall."""
    left, right = (Counter(re.findall(r"\w+", text.casefold())) for text in (given, expected))
    shared = (left & right).total()
    return 2 * shared / (left.total() + right.total()) if shared else 0.0


def character_similarity(given: str, expected: str) -> float:
    """1 minus the edit distance of two texts (insertions, deletions, substitutions) over the longer one's length."""
    levenshtein = optional("rapidfuzz.distance.Levenshtein", "fuzzy", "FuzzyMatch")
    return levenshtein.normalized_similarity(*(" ".join(text.casefold().split()) for text in (given, expected)))


@dataclass(kw_only=True, eq=False)
class FuzzyMatch(AnswerReward):
    """The similarity of the answer in the response to that of the row, from 0 to 1. Case and spacing do not count.

    With ``characters`` it is 1 − edit distance / length, which needs ``lightning-grpo[fuzzy]``. With ``words`` it is
    the F1 of the words (SQuAD, arXiv:1606.05250), which ignores their order. An empty answer gets 0.
    """

    unit: Literal["characters", "words"] = "characters"
    """What is compared."""
    extract: str = "whole"
    """Where to find the answer in the response, as in ``MathMatch``."""
    minimum: float = 0.0
    """Similarities below it become 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_extraction("FuzzyMatch.extract", self.extract)
        check_ranges(self, {"minimum": "[0, 1]"}, prefix="FuzzyMatch.")
        if self.unit not in ("characters", "words"):
            raise UserError(f"FuzzyMatch.unit is {self.unit!r}; set characters or words")

    def check(self, columns: Sequence[Mapping[str, Any]]) -> None:
        if self.unit == "characters":
            character_similarity("", "")
        super().check(columns)

    def compare(self, text: str, expected: str) -> float:
        given = extract(text, self.extract)
        if not given:
            return 0.0
        value = (word_f1 if self.unit == "words" else character_similarity)(given, expected)
        return value if value >= self.minimum else 0.0
