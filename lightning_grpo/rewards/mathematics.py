"""A reward for mathematical answers, compared with the library math-verify."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from typing import Any, ClassVar

from lightning_grpo.errors import optional
from lightning_grpo.ranges import check_ranges
from lightning_grpo.rewards.answers import check_extraction, extract
from lightning_grpo.rewards.latex_parser import store_predictions
from lightning_grpo.rewards.numbers import number_value
from lightning_grpo.rewards.response import AnswerReward, response

MAX_LENGTH, MAX_DEPTH = 400, 6
"""Answers with more characters, or brackets nested more deeply, are compared as text."""
_EXACT = 1e-12
"""Relative difference of equal numbers that are computed in floating point."""
_SYMBOLS = str.maketrans(
    {
        **{
            "−": "-",
            "–": "-",
            "∞": r"\infty ",
            "π": r"\pi ",
            "≤": r"\le ",
            "≥": r"\ge ",
            "≠": r"\ne ",
            "×": r"\times ",
        },
        **{"÷": "/", "·": r"\cdot ", "°": r"^\circ ", "∪": r"\cup ", "∅": r"\emptyset ", "±": r"\pm ", "√": r"\sqrt "},
    }
)
_PERCENT = re.compile(r"\\?%|\\?text\{\s*percent\s*\}|\s(?:percent|pct)\b")
_WRAPPER = re.compile(r"\\(?:text|textbf|mathrm|mathbf|boxed)\s*\{([^{}]*)\}")
_WORDS = re.compile(r"[^\W\d_]{3,}(?:[\s-]+[^\W\d_]+)*")
_UNIT_EXPONENT = re.compile(r"(?<=[A-Za-z)}])\s*\^\s*\{?\s*-?\d\s*\}?")


def equivalent(given: str, expected: str, tolerance: float = 0.0) -> bool:
    """Whether two answers, in plain text or LaTeX, are equal in value.

    Args:
        given: of the model. It can be hostile: call this in a worker process.
        expected: the correct answer.
        tolerance: relative difference of numbers that counts as equal.
    """
    given, expected = _normal(given), _normal(expected)
    if not given or not expected:
        return False
    if _text(given) == _text(expected):
        return True
    values = _number(given), _number(expected)
    if None not in values:
        return _same_number(given, values[0], expected, values[1], tolerance)
    return not (_only_text(given) or _only_text(expected)) and _same_expression(given, expected, tolerance)


def canonical(answer: str) -> str:
    """A text that is equal for most answers that are `equivalent`."""
    answer = _normal(answer)
    value = _number(answer)
    if value is not None:
        return str(value)
    expression = _parse(answer)[0] if answer and not _only_text(answer) else None
    return _text(answer) if expression is None else str(optional("sympy", "math", "MathMatch").simplify(expression))


def _normal(answer: str) -> str:
    answer = answer.translate(_SYMBOLS).replace(r"\varnothing", r"\emptyset").strip()
    return answer.removesuffix(".").strip().strip("$").strip()


def _text(answer: str) -> str:
    """The answer as text, without what does not count in the comparison of texts."""
    return " ".join(_WRAPPER.sub(r"\1", answer).split()).casefold()


def _only_text(answer: str) -> bool:
    """Whether an answer is compared as text alone: words, of which math-verify makes the product of their letters
    (cat = act), and what takes it long to read."""
    depths = accumulate((char in "([{") - (char in ")]}") for char in answer)
    return bool(_WORDS.fullmatch(_text(answer))) or len(answer) > MAX_LENGTH or max(depths, default=0) > MAX_DEPTH


def _number(answer: str) -> Fraction | None:
    return number_value(_PERCENT.sub("", answer))


def _same_number(given: str, value: Fraction, expected: str, correct: Fraction, tolerance: float) -> bool:
    """Whether two plain numbers are equal. If one is a percentage, 50% equals 0.5, and 50 if that is its amount."""
    percent = [bool(_PERCENT.search(text)) for text in (given, expected)]
    allowed = abs(correct) * Fraction(tolerance)
    if percent == [True, False]:
        return abs(value / 100 - correct) <= allowed or (abs(value) >= 1 and abs(value - correct) <= allowed)
    if percent == [False, True]:
        return abs(value - correct / 100) <= allowed / 100 or (abs(correct) >= 1 and abs(value - correct) <= allowed)
    return abs(value - correct) <= allowed


def _same_expression(given: str, expected: str, tolerance: float) -> bool:
    left, left_text = _parse(given)
    right, right_text = _parse(expected)
    if left is None or right is None or _loses_digits(given, left_text) or _loses_digits(expected, right_text):
        return False
    # without their units, they may be plain numbers
    values = _number(left_text), _number(right_text)
    if None not in values:
        return _same_number(given, values[0], expected, values[1], tolerance)
    if getattr(left, "is_number", False) and getattr(right, "is_number", False):
        # math-verify compares numbers with a fixed number of decimals, in which 1e-19 equals 2e-19
        return _same_constant(left, right, max(tolerance, _EXACT))
    math_verify = optional("math_verify", "math", "MathMatch")
    return bool(math_verify.verify(right, left, timeout_seconds=None))


def _same_constant(left: Any, right: Any, tolerance: float) -> bool:
    if left == right:
        return True
    try:
        difference, size = abs((left - right).evalf(30)), abs(right.evalf(30))
        return bool(difference.is_finite and size.is_finite and difference <= tolerance * size)
    except Exception:  # sympy raises errors of many kinds for numbers that are too large
        return False


def _loses_digits(answer: str, parsed: str) -> bool:
    """Whether a number of the answer was dropped with its units, as in ``3 \\text{ h } 5 \\text{ min}``."""
    count = lambda text: sum(map(str.isdigit, text))
    return count(parsed) < count(_UNIT_EXPONENT.sub("", answer))


@lru_cache(maxsize=4096)
def _parse(answer: str) -> tuple[Any, str]:
    """The answer as a sympy expression, None if it is none, and the text that math-verify made of it."""
    math_verify = optional("math_verify", "math", "MathMatch")
    store_predictions()
    # time is limited by the worker; the library would use signals, and warn that it does not
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    config = [math_verify.LatexExtractionConfig(boxed_match_priority=0)]
    found = math_verify.parse(rf"\boxed{{{answer}}}", extraction_config=config, parsing_timeout=None)
    return (found[0], found[1]) if len(found) == 2 else (None, "")


@dataclass(kw_only=True, eq=False)
class MathMatch(AnswerReward):
    """1 if the answer in the response equals that of the row in value, else 0. It needs ``lightning-grpo[math]``.

    Numbers are compared exactly; expressions, equations, sets, intervals and matrices with math-verify. Units are
    ignored. 50% equals 0.5 and 50. Answers in thoughts (``<think>…</think>``) do not count.
    """

    extract: str = "boxed"
    """Where to find the answer in the response: ``boxed`` (the last ``\\boxed{…}``), ``last_number``, ``whole``, or a
    regular expression with one group, such as ``<answer>(.*?)</answer>`` (the last match counts)."""
    tolerance: float = 0.0
    """Relative difference of numbers that counts as equal, such as 0.01 for measured values."""

    raises: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_extraction("MathMatch.extract", self.extract)
        check_ranges(self, {"tolerance": "[0, 1)"}, prefix="MathMatch.")

    def expected(self, answer: str | int | float) -> str:
        text = super().expected(answer)
        found = extract(text, "boxed")
        if found is None and self.extract not in ("boxed", "last_number", "whole"):
            found = extract(text, self.extract)
        return text if found is None else super().expected(found)

    def check(self, columns: Sequence[Any]) -> None:
        optional("math_verify", "math", "MathMatch")
        super().check(columns)

    def warm_up(self) -> None:
        equivalent("x", "y")

    def compare(self, text: str, expected: str) -> float:
        given = extract(text, self.extract)
        return float(given is not None and equivalent(given, expected, self.tolerance))

    def final_answers(self, completions: Sequence[str]) -> list[str | None]:
        return self.evaluate(self._final_answer, [(completion,) for completion in completions], None)

    def _final_answer(self, completion: str) -> str | None:
        answer = extract(response(completion), self.extract)
        return canonical(answer) or None if answer else None
