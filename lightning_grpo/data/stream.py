"""The order in which prompts are served, and the current position."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_grpo.data.sampling import Sampler
from lightning_grpo.errors import UserError


class Stream:
    """An endless sequence of rollouts over ``size`` rows, each of which is served for a number of steps.

    Pass rates that are observed and rows that are drawn during a rollout take effect from the next rollout on, and only
    after a step of the rollout has been trained: a state saved before that draws the same rollout again.

    Attributes:
        rollout: number of the current rollout; −1 before the first.
        rows: rows of the current rollout.
        repeats: steps for which each rollout is served.
        step: steps for which the current rollout has been served.
        rates: [size], running pass rates before the current rollout; NaN if not observed. Empty if the
            sampler keeps none.
    """

    def __init__(self, size: int, *, seed: int, sampler: Sampler) -> None:
        self.size = size
        self.seed = seed
        self.sampler = sampler
        self.rollout = -1
        self.step = 0
        self.repeats = 0
        self.rows: list[int] = []
        self.rates = torch.full((size if sampler.observes else 0,), torch.nan, dtype=torch.float32)
        self._cursor = 0
        self._observed: dict[int, float] = {}
        self._taken: set[int] = set()
        self._before = self.state_dict()

    def advance(self, count: int, repeats: int) -> None:
        """Advance by one step: of the current rollout until it has been served ``repeats`` times, then of the next
        rollout, which has ``count`` rows.
        """
        if not self.rows or self.step == self.repeats:
            self._begin(count)
            self.step, self.repeats = 0, repeats
        if repeats != self.repeats:
            self._divide_into(repeats)
        self.step += 1

    def _begin(self, count: int) -> None:
        self._before = self.state_dict()
        self.rates = self._rates_observed()
        self._observed, self._taken = {}, set()
        self.rollout += 1
        self.rows = self.more(count)

    def _divide_into(self, repeats: int) -> None:
        """Keep the position within the rollout, which now takes ``repeats`` steps."""
        step, remainder = divmod(self.step * repeats, self.repeats)
        if remainder:
            raise UserError(
                f"the checkpoint was saved within a rollout of {self.repeats} micro-batches, but this run has "
                f"{repeats} per rollout; resume with the same batch sizes and number of ranks, or from a checkpoint "
                "between two rollouts"
            )
        self.step, self.repeats = step, repeats

    def peek(self, count: int) -> list[int]:
        """Return the first ``count`` rows of the next rollout, if `more` and `observe` are not called before."""
        rates = self._rates_observed()
        draw = self.sampler.draw
        return draw(count, size=self.size, seed=self.seed, cursor=self._cursor, rates=rates, taken=set())[0]

    def _rates_observed(self) -> Tensor:
        rates = self.rates.clone()
        for row, reward in self._observed.items():
            rates[row] = self.sampler.update(rates[row].item(), reward)
        return rates

    def more(self, count: int, *, multiple: int = 1) -> list[int]:
        """Draw ``count`` rows, rounded up to a ``multiple``, that are not in this rollout yet; if there are not as
        many, the largest multiple that is available.
        """
        available = self.size - len(self._taken)
        rows, self._cursor = self.sampler.draw(
            min(-(-count // multiple), available // multiple) * multiple,
            size=self.size,
            seed=self.seed,
            cursor=self._cursor,
            rates=self.rates,
            taken=self._taken,
        )
        self._taken.update(rows)
        return rows

    def observe(self, rewards: Mapping[int, float]) -> None:
        """Record the mean reward of each row, if the sampler keeps pass rates."""
        if self.sampler.observes:
            self._observed.update(rewards)

    def state_dict(self, unfinished: int = 0, *, draw_again: bool = True) -> dict[str, Any]:
        """Return the position ``unfinished`` steps before the current one, as tensors, lists and numbers.

        If that is the start of a rollout and ``draw_again`` is True, it is the position before the rollout was drawn.
        """
        step = self.step - unfinished
        if unfinished and step == 0 and draw_again and self._before["rollout"] < self.rollout:
            return self._before
        return {
            "rollout": self.rollout,
            "step": step,
            "repeats": self.repeats,
            "rows": list(self.rows),
            "cursor": self._cursor,
            "observed": dict(self._observed),
            "rates": self.rates.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rollout, self.step, self.repeats = state["rollout"], state["step"], state["repeats"]
        self.rows = list(state["rows"])
        self.rates = state["rates"].clone()
        self._cursor = state["cursor"]
        self._observed, self._taken = dict(state["observed"]), set(self.rows)
        self._before = dict(state)
