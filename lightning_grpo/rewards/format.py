"""Rewards for the format and the length of a completion."""

import re
from dataclasses import dataclass
from typing import Any

from lightning_grpo.errors import UserError
from lightning_grpo.ranges import check_ranges
from lightning_grpo.rewards.base import Completion, Reward, completion_text


@dataclass(kw_only=True, eq=False)
class RegexFormat(Reward):
    """1 if the whole completion matches a regular expression, else 0.

    If the chat template ends the prompt with a tag such as ``<think>``, the tag counts as part of the completion.
    """

    pattern: str = r"\s*<think>(?:(?!</?think>).)*</think>\s*(?!</?think>)\S(?:(?!</?think>).)*"
    """Regular expression; the dot matches line breaks too. By default one <think>…</think> with text after it.
    Avoid nested repetition such as (a+)+, which takes exponential time on some texts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            self._compiled = re.compile(self.pattern, re.DOTALL)
        except re.error as error:
            raise UserError(f"RegexFormat.pattern is {self.pattern!r}: {error}") from error

    def __call__(
        self, *, completions: list[Completion], openings: list[str] | None = None, **columns: Any
    ) -> list[float]:
        openings = openings or [""] * len(completions)
        texts = [opening + completion_text(c) for opening, c in zip(openings, completions, strict=True)]
        return [float(self._compiled.fullmatch(text) is not None) for text in texts]


@dataclass(kw_only=True, eq=False)
class LengthPenalty(Reward):
    """Soft overlong punishment (DAPO, arXiv:2503.14476, eq. 13): 0 up to max_completion_length − soft_punish_cache
    tokens, then falling linearly to −1 at max_completion_length, and −1 beyond.
    """

    max_completion_length: int
    """Length in tokens from which the penalty is −1; usually that of the module."""
    soft_punish_cache: int
    """Number of tokens before it over which the penalty grows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = ("max_completion_length", "soft_punish_cache")
        check_ranges(self, dict.fromkeys(names, "[1, inf)"), prefix="LengthPenalty.")
        if not 0 < self.soft_punish_cache <= self.max_completion_length:
            raise UserError(
                f"LengthPenalty.soft_punish_cache is {self.soft_punish_cache}; set a value from 1 to "
                f"max_completion_length = {self.max_completion_length}"
            )

    def __call__(self, *, completion_ids: list[list[int]], **columns: Any) -> list[float]:
        free = self.max_completion_length - self.soft_punish_cache
        return [min(0.0, max(-1.0, (free - len(ids)) / self.soft_punish_cache)) for ids in completion_ids]


@dataclass(kw_only=True, eq=False)
class RepetitionPenalty(Reward):
    """−1 to 0: minus the share of n-grams of words that repeat an earlier one, 1 − distinct / all
    (as in Open-R1, after arXiv:2502.03373). 0 for completions of fewer than n words. Case does not count.
    """

    n: int = 3
    """Words per n-gram."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.n, int):
            raise UserError(f"RepetitionPenalty.n is {self.n!r}; set an integer")
        check_ranges(self, {"n": "[1, inf)"}, prefix="RepetitionPenalty.")

    def __call__(self, *, completions: list[Completion], **columns: Any) -> list[float]:
        return [self._penalty(completion_text(completion).lower().split()) for completion in completions]

    def _penalty(self, words: list[str]) -> float:
        ngrams = list(zip(*(words[start:] for start in range(self.n)), strict=False))
        return len(set(ngrams)) / len(ngrams) - 1.0 if ngrams else 0.0
