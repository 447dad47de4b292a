"""The abstract base class of all engines."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import ClassVar

import torch
from torch import Tensor

from lightning_grpo.errors import UserError
from lightning_grpo.rollout.turns import Turns
from lightning_grpo.rollout.types import Completion, OnGroup, SampleRequest, Sampling
from lightning_grpo.rollout.verify import StoredTensor


class Engine(ABC):
    """Samples completions from the policy's current weights. Prompts and completions are token ids, never text."""

    runs_in_background: ClassVar[bool] = False
    """Whether `generate` can run in another thread while the policy trains."""
    updates_in_flight: ClassVar[bool] = False
    """Whether `update_weights` can run while `generate` does; running requests then continue with the new weights."""

    dtype: torch.dtype | None = None
    """The dtype that the engine computes in; weights are cast to it before they are sent. None sends them unchanged."""
    stored: Sequence[StoredTensor] | None = None
    """The tensors that the engine stores after `update_weights`, as far as it can report them. None: it stores none of
    its own."""
    weights_lost: bool = False
    """Whether a sleep discarded the weights, so that `update_weights` must come before the next use."""

    @abstractmethod
    def generate(self, request: SampleRequest, on_group: OnGroup | None = None) -> list[list[Completion]]:
        """Sample the requested completions of each prompt.

        Calls ``on_group`` in this thread with each group as soon as it is complete, so that rewards can start early.
        The same prompt, seed and weights give the same completion, whatever else is in the batch (as far as the
        engine's arithmetic is batch-invariant).
        """

    def turns(self, sampling: Sampling) -> AbstractContextManager[Turns]:
        """Sample conversations turn by turn inside this context. Turns that are running at its end are aborted.

        Raises:
            UserError: the engine samples single completions only.
        """
        raise UserError(
            f"{type(self).__name__} samples single completions and no conversations of several turns, which "
            "model.environment needs; use HFRollout, VLLMRollout, VLLMProcessRollout or VLLMServerRollout"
        )

    @abstractmethod
    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int, *, in_flight: bool = False) -> None:
        """Load the policy's weights, under Hugging Face names, and discard all that was computed with earlier ones.

        Args:
            weights: every tensor once.
            version: the policy's version.
            in_flight: let running requests continue with the new weights, instead of waiting for them. Only for
                engines with `updates_in_flight`.
        """

    @abstractmethod
    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """For each sequence of n tokens the n − 1 values log p(token[i] | token[:i]), at temperature 1."""

    def replica_logprobs(self, sequences: Sequence[Sequence[int]]) -> dict[str, list[Tensor]]:
        """`logprobs` of each copy of the model, by a name of its place; an engine with a single copy uses ""."""
        return {"": self.logprobs(sequences)}

    def sleep(self) -> None:  # noqa: B027
        """Release device memory until `wake`; without effect if the engine has none to release."""

    def wake(self) -> None:  # noqa: B027
        """Undo `sleep`."""

    def close(self) -> None:  # noqa: B027
        """Free everything. Safe to call twice."""
