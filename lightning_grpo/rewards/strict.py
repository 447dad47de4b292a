"""Stricter versions of the reasoning-gym 0.1.25 scorers that give the full score to wrong answers, or evaluate the
answer as Python code (with eval, or sympy's parser).

The former were found by passing each scorer its own correct answer with additions, with other numbers, and with values
that are not finite.
"""

import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction

from lightning_grpo.rewards.numbers import MAX_DIGITS, number_value

_NOT_FINITE = re.compile(r"(?<![a-z])(?:nan|inf|infinity)(?![a-hk-z])", re.IGNORECASE)
_HUGE = re.compile(rf"[0-9]{{{MAX_DIGITS}}}")


def _words(text: str) -> list[str]:
    return [word.strip(" '\"").casefold() for word in text.strip(" \n[]").split(",")]


def _values(text: str) -> list[Fraction | None]:
    return [number_value(word) for word in _words(text)]


def _same_values(answer: str, right: str) -> bool:
    return None not in (values := _values(answer)) and values == _values(right)


def _same_set(answer: str, right: str) -> bool:
    given, expected = _values(answer), _values(right)
    return None not in given and len(given) == len(expected) and set(given) == set(expected)


def _same_text(answer: str, right: str) -> bool:
    return answer.split() == right.split() or answer.casefold().split() == right.casefold().split()


def _same_words(answer: str, right: str) -> bool:
    return _words(answer) == _words(right)


def _same_cells(answer: str, right: str) -> bool:
    return "".join(answer.split()) == "".join(right.split())


def _same_tokens(answer: str, right: str) -> bool:
    return answer.split() == right.split()


EXACT: dict[str, Callable[[str, str], bool]] = {
    "binary_matrix": _same_tokens,
    "coin_flip": _same_values,
    "game_of_life": _same_cells,
    "game_of_life_halting": _same_text,
    "gsm_symbolic": _same_values,
    "letter_jumble": _same_text,
    "number_sorting": _same_values,
    "polynomial_equations": _same_set,
    "spell_backward": _same_text,
    "spiral_matrix": _same_tokens,
    "string_insertion": _same_tokens,
    "time_intervals": _same_text,
    "word_sorting": _same_words,
}
"""Tasks with one correct answer, which scores 1. All others score 0, and the scorer is not called."""

_ARITHMETIC = r"(?:[0-9+()\s-]|\*(?!\*)|/(?!/))+"
# single letters, but not those that mean something else in sympy; exponents that can't make huge numbers
_POLYNOMIAL = (
    r"(?<![A-Za-z0-9])[A-HJ-MPRT-Za-z](?![A-Za-z0-9(])|[0-9]|[-+()\s]|/(?!/)|\*(?!\*)"
    r"|\*\*\s*(?:[0-9]{1,2}|\(\s*-?[0-9]{1,2}(?:/[0-9]{1,2})?\s*\))(?![0-9])(?!\s*\*\*)"
)
_FUNCTIONS = r"(?<![A-Za-z0-9])(?:sqrt|exp|log|a?(?:sin|cos|tan)h?)(?=\()"
_CLAIM = r"\w+ is an? \w+"
FORM: dict[str, Callable[[str], object]] = {
    "advanced_geometry": re.compile(r"\s*\(?[-+0-9./\s]+(?:,[-+0-9./\s]+)?\)?\s*°?\s*").fullmatch,
    "countdown": re.compile(_ARITHMETIC).fullmatch,
    "fraction_simplification": lambda answer: number_value(answer) is not None,
    "intermediate_integration": re.compile(f"(?:{_POLYNOMIAL}|{_FUNCTIONS})+").fullmatch,
    "kakurasu": re.compile(r"[01\s]+").fullmatch,
    "knights_knaves": re.compile(rf"\s*{_CLAIM}(?:(?:, and |, | and ){_CLAIM})*\.?\s*").fullmatch,
    "n_queens": re.compile(r"[Q_\s]+").fullmatch,
    "polynomial_multiplication": re.compile(f"(?:{_POLYNOMIAL})+").fullmatch,
    "puzzle24": re.compile(_ARITHMETIC).fullmatch,
    "quantum_lock": re.compile(r"\s*[A-Z](?:\s*→\s*[A-Z])*\s*").fullmatch,
    "simple_integration": re.compile(f"(?:{_POLYNOMIAL})+").fullmatch,
    "sokoban": re.compile(r"[UDLRudlr\s]+").fullmatch,
    "survo": re.compile(r"[0-9\s]+").fullmatch,
    "tower_of_hanoi": re.compile(
        r"\s*(?:Move disk [0-9]+ from Peg [0-9]+ to Peg [0-9]+\.?\s*)+", re.IGNORECASE
    ).fullmatch,
}
"""Tasks whose scorer ignores additional text in the answer, or evaluates it as code: answers of any other form score
0."""


def strict_score(task: str, answer: str, entry: dict, score: Callable[[str, dict], float]) -> float:
    """The score of an answer; 0 if it is not finite, has another form, or only resembles the correct one.

    Args:
        task: the task's name in reasoning-gym.
        answer: the model's answer.
        entry: the row that reasoning-gym generated.
        score: reasoning-gym's scorer of the task.
    """
    right = entry.get("answer")
    if _HUGE.search(answer) or (_NOT_FINITE.search(answer) and not _NOT_FINITE.search(str(right))):
        return 0.0
    if same := EXACT.get(task):
        return float(same(answer, str(right)))
    if (form := FORM.get(task)) and not form(answer):
        return 0.0
    if task == "puzzle24" and Counter(re.findall("[0-9]+", answer)) != Counter(map(str, entry["metadata"]["numbers"])):
        return 0.0  # the scorer takes any four numbers
    return float(score(answer, entry))
