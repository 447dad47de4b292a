"""Sampling of conversations turn by turn."""

from abc import ABC, abstractmethod

from lightning_grpo.rollout.types import Completion, Turn


class Turns(ABC):
    """Turns of any number of conversations, sampled together. For use in one thread.

    A submitted turn joins the turns that are running, so that no turn waits for the slowest one. What an engine caches
    of a conversation is kept until `end`: the next turn of the same key computes its new tokens only. The same weights,
    tokens and seed give the same turn, up to rounding, whatever else is sampled.
    """

    computed_tokens: int | None = None
    """Tokens before the turns that were computed so far; cached ones do not count. None: the engine does not report
    it."""

    @property
    @abstractmethod
    def running(self) -> int:
        """The number of turns that were submitted and that `step` has not returned."""

    @abstractmethod
    def submit(self, turn: Turn) -> None:
        """Start to sample ``turn``. Its key must have no other turn running."""

    @abstractmethod
    def step(self, timeout: float = 0.05) -> list[tuple[int, Completion]]:
        """Sample until a turn ends, or for about ``timeout`` seconds; an engine in this process samples one token more.

        Returns:
            Key and completion of the turns that have ended since the last call; [] if none has.
        """

    @abstractmethod
    def end(self, key: int) -> None:
        """Free what is cached of a conversation. Without effect if nothing is."""
