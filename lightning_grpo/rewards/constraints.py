"""A reward for responses that follow instructions whose observance can be verified (IFEval, arXiv:2311.07911)."""

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_grpo.errors import UserError, optional
from lightning_grpo.rewards.response import ResponseReward

CHECKS: dict[str, Callable[..., bool]] = {}
"""The constraints by name. Each function takes the response, and the arguments in the row."""
_CHINESE = ("zh", "yue", "wuu", "lzh", "hak", "nan")
_SPLITTERS = {"paragraphs": r"\s*\*\*\*\s*", "blocks": r"\n\s*\n"}


def constraint(name: str) -> Callable[[Callable[..., bool]], Callable[..., bool]]:
    """Add a function to `CHECKS`."""
    return lambda check: CHECKS.setdefault(name, check)


def words(text: str) -> list[str]:
    """The words and numbers of a text."""
    return re.findall(r"\w+(?:['’-]\w+|[.,]\d+)*", text)


def sentences(text: str) -> list[str]:
    """The parts of a text up to full stops, question marks and exclamation marks, those of abbreviations included."""
    ends = r"[.!?]+(?=[\s\"'”’)]|$)|[。！？]+"
    return [part for part in re.split(ends, text) if re.search(r"\w", part)]


def occurrences(text: str, phrase: str) -> int:
    """How often a word or phrase occurs in a text. Case does not count."""
    return len(re.findall(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE))


def listed(values: list[str]) -> list[str]:
    """Return ``values``, or raise `TypeError` if they are one text, whose letters would be taken for them."""
    if isinstance(values, str):
        raise TypeError(f"{values!r} is not a list")
    return values


def compared(count: int, relation: str | None, number: int) -> bool:
    """Whether a count is ``less than``, ``at least`` (the default), ``at most`` or ``exactly`` a number."""
    relations = {
        "less than": count < number,
        "at least": count >= number,
        "at most": count <= number,
        "exactly": count == number,
    }
    if (relation or "at least") not in relations:
        raise UserError(f"the relation {relation!r} is unknown; set one of {', '.join(relations)}")
    return relations[relation or "at least"]


def parts(text: str, by: str) -> list[str]:
    """The ``paragraphs`` of a text, divided by ``***``, or its ``blocks``, divided by empty lines."""
    return [part for part in re.split(_SPLITTERS[by], text.strip()) if part.strip()]


# ── Words ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@constraint("keywords:existence")
def _existence(text: str, keywords: list[str]) -> bool:
    return all(occurrences(text, word) for word in listed(keywords))


@constraint("keywords:forbidden_words")
def _forbidden(text: str, forbidden_words: list[str]) -> bool:
    return not any(occurrences(text, word) for word in listed(forbidden_words))


@constraint("keywords:frequency")
def _frequency(text: str, keyword: str, frequency: int, relation: str | None = None) -> bool:
    return compared(occurrences(text, keyword), relation, frequency)


@constraint("keywords:letter_frequency")
def _letters(text: str, letter: str, let_frequency: int, let_relation: str | None = None) -> bool:
    return compared(text.casefold().count(letter.casefold()), let_relation, let_frequency)


@constraint("language:response_language")
def _language(text: str, language: str) -> bool:
    found = optional("py3langid", "language", "the constraint language:response_language").classify(text)[0]
    return found == language or (language.startswith("zh") and found in _CHINESE)


# ── Length ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@constraint("length_constraints:number_words")
def _number_words(text: str, num_words: int, relation: str | None = None) -> bool:
    return compared(len(words(text)), relation, num_words)


@constraint("length_constraints:number_sentences")
def _number_sentences(text: str, num_sentences: int, relation: str | None = None) -> bool:
    return compared(len(sentences(text)), relation, num_sentences)


@constraint("length_constraints:number_paragraphs")
def _number_paragraphs(text: str, num_paragraphs: int) -> bool:
    return len(parts(text, "paragraphs")) == num_paragraphs


@constraint("length_constraints:nth_paragraph_first_word")
def _first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    blocks = parts(text, "blocks")
    is_there = num_paragraphs >= nth_paragraph > 0 and len(blocks) == num_paragraphs
    first = words(blocks[nth_paragraph - 1])[:1] if is_there else []
    return [word.casefold() for word in first] == [first_word.casefold()]


# ── Content and format ────────────────────────────────────────────────────────────────────────────────────────────────


@constraint("detectable_content:number_placeholders")
def _placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[[^\[\]]+\]", text)) >= num_placeholders


@constraint("detectable_content:postscript")
def _postscript(text: str, postscript_marker: str) -> bool:
    return bool(re.search(rf"(?im)^[ \t*_]*{re.escape(postscript_marker)}[ \t*_:]*\S", text))


@constraint("detectable_format:number_bullet_lists")
def _bullets(text: str, num_bullets: int) -> bool:
    return len(re.findall(r"(?m)^[ \t]*(?:\*(?!\*)|-)[ \t]*[^\s*-]", text)) == num_bullets


@constraint("detectable_format:constrained_response")
def _constrained(text: str) -> bool:
    return any(f"My answer is {answer}." in text for answer in ("yes", "no", "maybe"))


@constraint("detectable_format:number_highlighted_sections")
def _highlights(text: str, num_highlights: int) -> bool:
    found = re.findall(r"\*\*([^*\n]+)\*\*|\*([^*\n]+)\*", text)
    return sum(any(part.strip() for part in groups) for groups in found) >= num_highlights


@constraint("detectable_format:multiple_sections")
def _sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"{re.escape(section_spliter.strip())}[ \t]?\d+", text)) >= num_sections


@constraint("detectable_format:json_format")
def _json(text: str) -> bool:
    block = re.fullmatch(r"\s*```(?:json)?\s*(.*?)\s*```\s*", text, re.DOTALL | re.IGNORECASE)
    try:
        json.loads(block[1] if block else text)
        return True
    except (ValueError, RecursionError):
        return False


@constraint("detectable_format:title")
def _title(text: str) -> bool:
    return any(title.strip() for title in re.findall(r"<<([^<>\n]+)>>", text))


# ── Case, start and end ───────────────────────────────────────────────────────────────────────────────────────────────


@constraint("combination:two_responses")
def _two_responses(text: str) -> bool:
    responses = [part.strip() for part in text.split("******")]
    return len(responses) == 2 and all(responses) and responses[0] != responses[1]


@constraint("combination:repeat_prompt")
def _repeat(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().casefold().startswith(prompt_to_repeat.strip().casefold())


@constraint("startend:end_checker")
def _end(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').casefold().endswith(end_phrase.strip().casefold())


@constraint("startend:quotation")
def _quotation(text: str) -> bool:
    return len(text.strip()) > 2 and text.strip()[0] == text.strip()[-1] == '"'


@constraint("change_case:capital_word_frequency")
def _capital_words(text: str, capital_frequency: int, capital_relation: str | None = None) -> bool:
    return compared(sum(map(str.isupper, words(text))), capital_relation, capital_frequency)


@constraint("change_case:english_capital")
def _capital(text: str) -> bool:
    return text.isupper()


@constraint("change_case:english_lowercase")
def _lowercase(text: str) -> bool:
    return text.islower()


@constraint("punctuation:no_comma")
def _no_comma(text: str) -> bool:
    return "," not in text


# ── The reward ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(kw_only=True, eq=False)
class Constraints(ResponseReward):
    """The share of a row's constraints that the response satisfies, from 0 to 1; 0 for an empty response.

    Rows name constraints as IFEval does (arXiv:2311.07911): a list of names (``length_constraints:number_words``), and
    a list of their arguments, such as ``{"num_words": 100, "relation": "at most"}``. `CHECKS` has all 25 of IFEval.
    Relations are ``less than`` and ``at least``, and besides those of IFEval ``at most`` and ``exactly``. Thoughts do
    not count.
    """

    constraints: str = "instruction_id_list"
    """Column with the list of names."""
    arguments: str = "kwargs"
    """Column with the list of mappings of arguments. Arguments that are null are ignored."""
    all_or_nothing: bool = False
    """1 only if all constraints are satisfied, else 0."""

    def check(self, columns: Sequence[Mapping[str, Any]]) -> None:
        """Raise `UserError` for a row with an unknown constraint, or with arguments that do not fit."""
        for row, values in enumerate(columns):
            for column in (self.constraints, self.arguments):
                if not isinstance(values.get(column), list) or len(values[column]) != len(values[self.constraints]):
                    raise UserError(
                        f"Constraints: the {column!r} of row {row} is {values.get(column)!r:.80}; set "
                        f"Constraints.constraints and .arguments to columns with lists of the same length, from "
                        f"{', '.join(values) or '(none)'}"
                    )
            if not values[self.constraints]:
                raise UserError(f"Constraints: row {row} has no constraints; drop it")
            for name, arguments in self._pairs(values):
                if name not in CHECKS:
                    raise UserError(f"Constraints: {name!r} in row {row} is unknown; set one of {', '.join(CHECKS)}")
                for key, value in arguments.items():
                    if value in ("", []) or (isinstance(value, list) and "" in value):
                        raise UserError(
                            f"Constraints: {key} of {name} in row {row} is {value!r}; set a text, or drop it"
                        )
                try:
                    CHECKS[name]("A response.", **arguments)
                except UserError as error:
                    raise UserError(f"Constraints: {name} in row {row}: {error}") from error
                except (TypeError, AttributeError) as error:
                    raise UserError(
                        f"Constraints: the arguments of {name} in row {row}, {arguments}, do not fit: {error}; set "
                        f"{', '.join(list(inspect.signature(CHECKS[name]).parameters)[1:]) or 'none'}"
                    ) from error

    def _pairs(self, row: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
        return [
            (name, {key: value for key, value in (arguments or {}).items() if value is not None})
            for name, arguments in zip(row[self.constraints], row[self.arguments], strict=True)
        ]

    def score(self, text: str, row: Mapping[str, Any]) -> float:
        if not text.strip():
            return 0.0
        satisfied = [CHECKS[name](text, **arguments) for name, arguments in self._pairs(row)]
        return float(all(satisfied)) if self.all_or_nothing else sum(satisfied) / len(satisfied)
