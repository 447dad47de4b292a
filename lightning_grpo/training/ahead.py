"""Sampling one rollout ahead: the engine samples the next rollout while the policy trains on this one."""

import logging
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Self

from lightning_grpo.data import PromptBatch
from lightning_grpo.errors import RunError
from lightning_grpo.rollout.types import Rollout

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Ahead:
    """A rollout that is sampled before its turn."""

    number: int
    """Of the rollout, counted over the whole training."""
    prompt_indices: list[int]
    """Rows of the source that this rank's prompts are."""
    rollout: "Future[Rollout]"

    @property
    def is_sampled(self) -> bool:
        """Whether all of it is there."""
        return self.rollout.done()

    def take(self, batch: PromptBatch) -> Rollout:
        """The rollout, now that it is its turn; waits for it.

        Raises:
            RuntimeError: the data module now serves other prompts than it announced. What sampling raised goes through.
        """
        if (batch.rollout, batch.prompt_indices) != (self.number, self.prompt_indices):
            raise RunError(
                f"rollout {self.number} was sampled ahead for the prompts {self.prompt_indices[:4]} …, but the data "
                f"module serves rollout {batch.rollout} with {batch.prompt_indices[:4]} …: its next_prompts() and its "
                "train loader must agree; set rollout_ahead to 0 for data modules that can't know what comes next"
            )
        return self.rollout.result()

    def state_dict(self, *, wait: bool) -> dict[str, Any] | None:
        """The rollout for a checkpoint, once it is sampled: the weights that sample it won't be there any more.

        None where sampling failed, or is not done and can't be waited for: it is then sampled again after a restart.
        """
        if not (wait or self.is_sampled):
            return None
        try:
            rollout = self.rollout.result()
        except Exception as error:
            log.warning("the checkpoint lacks the rollout sampled ahead, which failed: %s", error)
            return None
        return {"number": self.number, "prompt_indices": self.prompt_indices, "rollout": vars(rollout)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Self:
        """What `state_dict` gave."""
        done: Future[Rollout] = Future()
        done.set_result(Rollout(**state["rollout"]))
        return cls(number=state["number"], prompt_indices=list(state["prompt_indices"]), rollout=done)
