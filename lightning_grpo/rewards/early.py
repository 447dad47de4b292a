"""Score groups while other groups are still being sampled."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Self, TypeVar

Group = TypeVar("Group")
Scores = TypeVar("Scores")


class EarlyRewards(Generic[Group, Scores]):
    """Scores groups one after another in a background thread, as they are submitted.

    Args:
        score: called with a group's index and the group.
    """

    def __init__(self, score: Callable[[int, Group], Scores]) -> None:
        self._score = score
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="early-rewards")
        self._futures: dict[int, Future[Scores]] = {}

    def submit(self, index: int, group: Group) -> None:
        """Add a group. An error that scoring an earlier one raised is raised here, which ends the sampling."""
        for earlier in self._futures.values():
            if earlier.done():
                earlier.result()
        self._futures[index] = self._thread.submit(self._score, index, group)

    def gather(self) -> list[Scores]:
        """Wait for all scores and return them in the order of the indices."""
        return [self._futures[index].result() for index in sorted(self._futures)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._thread.shutdown(cancel_futures=True)
