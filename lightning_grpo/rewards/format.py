"""Rewards for the format and the length of a completion."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_grpo.errors import UserError
from lightning_grpo.ranges import check_ranges
from lightning_grpo.rewards.base import Completion, Reward, completion_text
from lightning_grpo.rewards.text_reward import TextReward

THINK = r"\s*<think>(?:(?!</?think>).)*</think>\s*(?!</?think>)\S(?:(?!</?think>).)*"
THINK_ANSWER = r"\s*<think>(?:(?!</?(?:think|answer)>).)*</think>\s*<answer>(?:(?!</?(?:think|answer)>).)*</answer>\s*"
PATTERNS = {"think": THINK, "think_answer": THINK_ANSWER}
"""Patterns by name."""


@dataclass(kw_only=True, eq=False)
class RegexFormat(TextReward):
    """1 if the whole completion matches a regular expression, else 0.

    If the chat template ends the prompt with a tag such as ``<think>``, the tag counts as part of the completion.
    """

    pattern: str = "think"
    """Regular expression (the dot matches line breaks too), or ``think``: one <think>…</think> with text after it, or
    ``think_answer``: <think>…</think> and then <answer>…</answer>, as in DeepSeek-R1 (arXiv:2501.12948). Worker
    processes match your own expressions, since some, such as (a+)+, take exponential time on some texts."""

    def __post_init__(self) -> None:
        try:
            re.compile(PATTERNS.get(self.pattern, self.pattern), re.DOTALL)
        except re.error as error:
            raise UserError(f"RegexFormat.pattern is {self.pattern!r}: {error}") from error
        super().__post_init__()

    @property
    def in_workers(self) -> bool:
        return self.sandbox and self.pattern not in PATTERNS

    def __call__(
        self, *, completions: list[Completion], openings: list[str] | None = None, **columns: Any
    ) -> list[float | None]:
        openings = openings or [""] * len(completions)
        texts = [opening + completion_text(c) for opening, c in zip(openings, completions, strict=True)]
        return self.evaluate(self.score, [(text, {}) for text in texts], self.failed)

    def score(self, text: str, row: Mapping[str, Any]) -> float:
        pattern = PATTERNS.get(self.pattern, self.pattern)
        return float(re.fullmatch(pattern, text, re.DOTALL) is not None)


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
