"""The order in which prompts are served, and the position in it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_grpo.data.sampling import Sampler
from lightning_grpo.errors import UserError


class Stream:
    """An endless run of rollouts over ``size`` rows, each served for a number of steps.

    Everything that a rollout changes (rows drawn further, pass rates observed) counts from the next rollout on, and
    only once a step of it has been trained: state taken before that draws the same rollout again.
    """

    def __init__(self, size: int, *, seed: int, sampler: Sampler) -> None:
        self.size = size
        self.seed = seed
        self.sampler = sampler
        self.rollout = -1
        self.step = 0
        self.repeats = 0
        self.rows: list[int] = []
        self.rates = torch.full((size,), torch.nan, dtype=torch.float32)
        self._cursor = self._cursor_at_start = 0
        self._observed: dict[int, float] = {}
        self._taken: set[int] = set()

    def advance(self, count: int, repeats: int) -> None:
        """Serve one more step: of the rollout at hand while it has been served less than ``repeats`` times, else of
        the next one, of ``count`` rows.
        """
        if not self.rows or self.step == self.repeats:
            self._begin(count)
            self.step, self.repeats = 0, repeats
        if self.step and repeats != self.repeats:
            raise UserError(
                f"the checkpoint was saved within a rollout of {self.repeats} micro-batches, this run has {repeats}; "
                "resume with the same batch sizes and number of ranks, or from a checkpoint between two rollouts"
            )
        self.repeats = repeats
        self.step += 1

    def _begin(self, count: int) -> None:
        self.rates = self._rates_observed()
        self._observed, self._taken = {}, set()
        self.rollout += 1
        self.rows = self.more(count)
        self._cursor_at_start = self._cursor

    def peek(self, count: int) -> list[int]:
        """The ``count`` rows that the next rollout begins with, if no more is drawn or observed in this one."""
        rates = self._rates_observed()
        draw = self.sampler.draw
        return draw(count, size=self.size, seed=self.seed, cursor=self._cursor, rates=rates, taken=set())[0]

    def _rates_observed(self) -> Tensor:
        rates = self.rates.clone()
        for row, reward in self._observed.items():
            rates[row] = self.sampler.update(rates[row].item(), reward)
        return rates

    def more(self, count: int, *, multiple: int = 1) -> list[int]:
        """``count`` further rows, rounded up to a ``multiple``, that this rollout doesn't hold yet; where there aren't
        as many, the largest multiple there is.
        """
        left = self.size - len(self._taken)
        rows, self._cursor = self.sampler.draw(
            min(-(-count // multiple), left // multiple) * multiple,
            size=self.size,
            seed=self.seed,
            cursor=self._cursor,
            rates=self.rates,
            taken=self._taken,
        )
        self._taken.update(rows)
        return rows

    def observe(self, rewards: Mapping[int, float]) -> None:
        """Take note of the mean reward of each row."""
        self._observed.update(rewards)

    def state_dict(self, unfinished: int = 0, *, draw_again: bool = True) -> dict[str, Any]:
        """The position, ``unfinished`` steps before the last one served. Tensors, lists and numbers only.

        Where that is the rollout's start, ``draw_again`` forgets what it drew further and observed.
        """
        step = self.step - unfinished
        keep = bool(step) or not draw_again
        return {
            "rollout": self.rollout,
            "step": step,
            "repeats": self.repeats,
            "rows": list(self.rows),
            "cursor": self._cursor if keep else self._cursor_at_start,
            "observed": dict(self._observed) if keep else {},
            "rates": self.rates.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rollout, self.step, self.repeats = state["rollout"], state["step"], state["repeats"]
        self.rows = list(state["rows"])
        self.rates = state["rates"].clone()
        self._cursor = self._cursor_at_start = state["cursor"]
        self._observed, self._taken = dict(state["observed"]), set(self.rows)
