"""Turns of conversations on vLLM servers."""

from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue

from lightning_grpo.rollout.turns import Turns
from lightning_grpo.rollout.types import Completion, Turn


class ServerTurns(Turns):
    """Each turn is a request with the whole conversation; the server's prefix cache has all but the new tokens.

    Args:
        start: starts the request of a turn.
    """

    def __init__(self, start: Callable[[Turn], "Future[Completion]"]) -> None:
        self._start = start
        self._calls: dict[int, Future[Completion]] = {}
        self._ended: SimpleQueue[int] = SimpleQueue()

    @property
    def running(self) -> int:
        return len(self._calls)

    def submit(self, turn: Turn) -> None:
        call = self._calls[turn.key] = self._start(turn)
        call.add_done_callback(lambda _: self._ended.put(turn.key))

    def step(self, timeout: float = 0.05) -> list[tuple[int, Completion]]:
        """As `Turns.step`. Raises the errors of `ServerEngine.generate`."""
        keys = []
        try:
            if self._calls:
                keys.append(self._ended.get(timeout=timeout))
            while True:
                keys.append(self._ended.get_nowait())
        except Empty:
            return [(key, self._calls.pop(key).result()) for key in keys]

    def end(self, key: int) -> None:
        """Without effect: servers discard the blocks of their cache that were used least recently."""

    def cancel(self) -> None:
        """End all turns that are running."""
        for call in self._calls.values():
            call.cancel()
