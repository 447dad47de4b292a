"""A reward for multiple-choice questions."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase

from lightning_grpo.errors import UserError
from lightning_grpo.ranges import check_ranges
from lightning_grpo.rewards.response import AnswerReward, response

_MARKUP = re.compile(r"[*$`_]|\\(?:text|textbf|mathrm|mathbf)\b")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_OPEN, _CLOSE = r"[(\[{\"'\s]{0,9}(?:(?i:option|choice)\s+)?[(\[{\"']?", r"[)\]}\"']{0,3}"


def chosen_letter(text: str, letters: str) -> str | None:
    """The one option that a response chooses; None if it chooses none or several.

    The last statement such as "the answer is B", ``\\boxed{B}`` or ``<answer>B</answer>`` counts. Without one, the
    response must have exactly one option at the start of a line ("B", "B. Paris") or in parentheses.
    """
    text = _BOX.sub(" answer: {", _MARKUP.sub("", text)).replace("<answer>", " answer: ")
    one = rf"{_OPEN}([{letters}])(?![\w'’]){_CLOSE}"
    listed = rf"{one}(?:[\s{{}}]*(?:(?:[,/&;|+]|\bor\b|\band\b)[\s{{}}]*){{1,2}}{one}|\s+{one})*"
    statement = (
        rf"(?i:\b(?:answer|choice|option)\b[^.\n:]{{0,40}}?(?:\bis\b|:|=)|\bI (?:choose|pick|select)\b):?({listed})"
    )
    forms = (rf"(?m)^[ \t]*[(\[]?([{letters}])(?:[)\].:]|[ \t]*$)", rf"\(([{letters}])\)")
    if found := list(re.finditer(statement, text)):
        chosen = re.findall(rf"\b[{letters}]\b", found[-1][1])
    else:
        chosen = [letter for form in forms for letter in re.findall(form, text)]
    return chosen[0] if len(set(chosen)) == 1 else None


@dataclass(kw_only=True, eq=False)
class MultipleChoice(AnswerReward):
    """1 if the response chooses the correct option, else 0, also if it chooses several. Thoughts do not count."""

    options: int = 4
    """Number of options, which are named A, B, C, …"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, {"options": "[2, 26]"}, prefix="MultipleChoice.")
        self._letters = ascii_uppercase[: self.options]

    def expected(self, answer: str | int | float) -> str:
        """The letter. The column has letters, such as ``B`` or ``(B)``, or numbers from 0."""
        if isinstance(answer, int) and 0 <= answer < self.options:
            return self._letters[answer]
        letter = super().expected(answer).strip("().").upper()
        if len(letter) != 1 or letter not in self._letters:
            raise UserError(
                f"{answer!r} is no option; set a letter from A to {self._letters[-1]}, or a number from 0 to "
                f"{self.options - 1}, or set MultipleChoice.options to the number of options"
            )
        return letter

    def compare(self, text: str, expected: str) -> float:
        return float(chosen_letter(text, self._letters) == expected)

    def final_answers(self, completions: Sequence[str]) -> list[str | None]:
        return [chosen_letter(response(completion), self._letters) for completion in completions]
