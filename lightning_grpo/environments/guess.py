"""`GuessNumber`: a game of several turns, in which the policy finds a number by asking."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_grpo.environments.protocol import Environment, Step
from lightning_grpo.errors import UserError

_NUMBER = re.compile(r"-?\d{1,18}")


@dataclass(kw_only=True, eq=False)
class GuessNumber(Environment):
    """Answers every guess with "higher" or "lower", until the policy has found the number of the row.

    The guess is the last number of a turn. Rows have the columns ``low``, ``high`` and ``answer``, as those of the
    source ``hidden_numbers``.
    """

    max_turns: int = 6
    guess_reward: float = 0.0
    """Reward of a guess that agrees with all answers so far, which helps a small model to begin with. The right guess
    has the reward 1, plus this one for itself and for each turn that is left, so that long games are not better."""
    _low: int = field(default=0, init=False, repr=False)
    _high: int = field(default=0, init=False, repr=False)
    _answer: int = field(default=0, init=False, repr=False)
    _turns: int = field(default=0, init=False, repr=False)

    def check(self, rows: Sequence[Mapping[str, Any]], /) -> None:
        """Raise `UserError` if a row lacks the columns, or its answer is not in the range."""
        for row in rows:
            low, high, answer = _numbers(row)
            if not low <= answer <= high:
                raise UserError(f"the answer {answer} is not between low = {low} and high = {high}; correct the row")

    def reset(self, row: Mapping[str, Any]) -> None:
        self._low, self._high, self._answer = _numbers(row)

    def step(self, completion: str) -> Step:
        self._turns += 1
        numbers = _NUMBER.findall(completion)
        if not numbers:
            return Step(observation="Answer with a number.")
        guess = int(numbers[-1])
        if guess == self._answer:
            left = self.max_turns - self._turns
            return Step(reward=1.0 + self.guess_reward * (1 + left), done=True)
        reward = self.guess_reward if self._low <= guess <= self._high else 0.0
        if guess < self._answer:
            self._low = max(self._low, guess + 1)
            return Step(observation=f"It is higher than {guess}.", reward=reward)
        self._high = min(self._high, guess - 1)
        return Step(observation=f"It is lower than {guess}.", reward=reward)


def _numbers(row: Mapping[str, Any]) -> tuple[int, int, int]:
    """The lowest and the highest number that are possible, and the one to find."""
    try:
        return int(row["low"]), int(row["high"]), int(row["answer"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"GuessNumber needs whole numbers in the columns low, high and answer ({error!r}); set data.source to "
            "hidden_numbers, or add the columns"
        ) from error
