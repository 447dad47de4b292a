"""The base class of environments, and what one of their steps returns."""

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_grpo.data.rows import Message
from lightning_grpo.ranges import check_ranges
from lightning_grpo.rewards import EnvironmentReward, Reward


@dataclass(frozen=True, kw_only=True)
class Step:
    """How an environment answers a turn of the policy."""

    observation: str | Message | list[Message] | None = None
    """What the policy reads before its next turn: the text of a user message, a message, or several. It may be None
    only if the episode is over."""
    reward: float = 0.0
    """Reward of the turn."""
    done: bool = False
    """Whether the episode is over. ``observation`` is then ignored."""
    metrics: Mapping[str, float | Sequence[float]] = field(default_factory=dict)
    """Metrics by name. Numbers are summed over the turns of an episode, and their mean over the episodes is logged; of
    sequences, the mean over all values of all episodes is logged."""
    extras: Mapping[str, Any] = field(default_factory=dict)
    """Columns of the recorded sample, as those that rewards log with ``log_extra``. Later turns overwrite earlier
    ones."""


@dataclass(kw_only=True, eq=False)
class Environment(ABC):
    """Base class of environments: override `step`, and name the class in YAML under ``model.environment``.

    A subclass needs no registration. Its options are dataclass fields. The configured object is a prototype: every
    sample gets a deep copy of it, which may therefore keep the state of one episode.

    `reset`, `step` and `close` are plain functions or ``async`` ones. Plain ones run in threads and async ones in an
    event loop, so that a slow step delays no other sample. An exception ends the run.
    """

    max_turns: int = 8
    """The largest number of turns of the policy in an episode."""
    max_turn_tokens: int | None = None
    """The largest number of tokens of one turn. By default what is left of max_completion_length, which bounds all
    tokens after the prompt, observations included."""
    step_time_limit: float | None = 300.0
    """Maximum seconds per call of `step`, `reset` or `close`. When a call exceeds it, the run ends with an error that
    names the row. null disables the limit."""
    seed: int = field(default=0, init=False, repr=False)
    """Seed of the sample, set before `reset`. It is a function of the run's seed, the rollout, the row and the sample.
    If all random numbers of an environment follow from it, a resumed run samples the same episodes again."""

    def __post_init__(self) -> None:
        ranges = {"max_turns": "[1, inf)", "max_turn_tokens": "[1, inf)", "step_time_limit": "(0, inf)"}
        check_ranges(self, ranges, prefix=f"{type(self).__name__}.")

    def check(self, rows: Sequence[Mapping[str, Any]], /) -> None:  # noqa: B027  most can begin from any row
        """Raise ValueError for rows of the data set from which no episode can begin. Called once, before training.

        Args:
            rows: all columns of each row but ``prompt``.
        """

    def prepare(self, tokenizer: Any) -> None:  # noqa: B027  most environments need no tokenizer
        """Called with the policy's tokenizer before episodes begin. A copy of the tokenizer for every sample would be
        slow, so keep what is needed of it instead."""

    @property
    def tool_schemas(self) -> list[dict[str, Any]]:
        """JSON schemas of the tools that the chat template describes to the policy."""
        return []

    @property
    def default_rewards(self) -> list[Reward]:
        """The rewards of a module whose list of rewards is empty."""
        return [EnvironmentReward()]

    @property
    def for_rewards(self) -> Any:
        """What reward functions are given for this sample under ``environments``."""
        return self

    def reset(self, row: Mapping[str, Any]) -> str | list[Message] | Awaitable[str | list[Message] | None] | None:
        """Begin an episode, and return what to append to the prompt: messages, text for the end of its last message, or
        None.

        Args:
            row: all columns of the data set, including ``prompt``.

        It must be the same for all samples of a row, because their rewards are compared.
        """
        return None

    @abstractmethod
    def step(self, completion: str) -> Step | Awaitable[Step]:
        """Answer a turn of the policy.

        Args:
            completion: text of the turn, without the tokens that end it.
        """

    def close(self) -> Awaitable[None] | None:
        """Free what the episode holds. Called once, after its rewards were computed."""
        return None
