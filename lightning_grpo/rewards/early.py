"""Score groups while other groups are still being sampled."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Self, TypeVar

Group = TypeVar("Group")
Scores = TypeVar("Scores")


class EarlyRewards(Generic[Group, Scores]):
    """Scores groups in background threads, as they are submitted.

    Args:
        score: called with a group's index and the group.
        threads: groups that may be scored at once; 1: one after another.
    """

    def __init__(self, score: Callable[[int, Group], Scores], threads: int = 1) -> None:
        self._score = score
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="early-rewards")
        self._futures: dict[int, Future[Scores]] = {}

    def submit(self, index: int, group: Group) -> None:
        """Add a group. An error that scoring an earlier one raised is raised here, which ends the sampling."""
        for earlier in self._futures.values():
            if earlier.done():
                earlier.result()
        self._futures[index] = self._threads.submit(self._score, index, group)

    def gather(self) -> list[Scores]:
        """Wait for all scores and return them in the order of the indices."""
        return [self._futures[index].result() for index in sorted(self._futures)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._threads.shutdown(cancel_futures=True)
