"""A rollout that is sampled in the background while the policy trains on the one before it."""

import logging
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Self

from lightning_grpo.data import PromptBatch
from lightning_grpo.errors import RunError
from lightning_grpo.rollout import Rollout

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class PendingRollout:
    """A rollout that is being sampled, or was sampled, before it is needed."""

    number: int
    """Number of the rollout, counted over the whole training."""
    prompt_indices: list[int]
    """Rows of the source that hold this rank's prompts."""
    future: "Future[Rollout]"

    def take(self, batch: PromptBatch) -> Rollout:
        """Wait for the rollout and return it. Errors of sampling are raised here.

        Raises:
            RunError: ``batch`` does not hold the prompts that were sampled.
        """
        if (batch.rollout_number, batch.prompt_indices) != (self.number, self.prompt_indices):
            raise RunError(
                f"rollout {self.number} was sampled ahead for the prompts {self.prompt_indices[:4]} …, but the data "
                f"module serves rollout {batch.rollout_number} with {batch.prompt_indices[:4]} …. Its next_prompts() "
                "must return what its train loader yields next; set rollout_ahead to 0 for a data module that cannot "
                "know it"
            )
        return self.future.result()

    def state_dict(self, *, wait: bool) -> dict[str, Any] | None:
        """The sampled rollout, since a resumed run no longer has the weights it was sampled with.

        None if sampling failed, or has not ended and ``wait`` is false. A resumed run then samples it again.
        """
        if not (wait or self.future.done()):
            return None
        try:
            rollout = self.future.result()
        except Exception as error:
            log.warning("The checkpoint does not contain the rollout sampled ahead, which failed: %s", error)
            return None
        return {"number": self.number, "prompt_indices": self.prompt_indices, "rollout": vars(rollout)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], rollout_class: type[Rollout] = Rollout) -> Self:
        """Restore what `state_dict` returned."""
        done: Future[Rollout] = Future()
        done.set_result(rollout_class(**state["rollout"]))
        return cls(number=state["number"], prompt_indices=list(state["prompt_indices"]), future=done)
