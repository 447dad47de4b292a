"""Judging groups while others are still being sampled."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Self, TypeVar

Group = TypeVar("Group")
Judged = TypeVar("Judged")


class EarlyJudge(Generic[Group, Judged]):
    """Hears of groups as they finish and judges them, one after another, in a thread of its own.

    Args:
        judge: called with a group's index and the group.
    """

    def __init__(self, judge: Callable[[int, Group], Judged]) -> None:
        self._judge = judge
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="early-rewards")
        self._judged: dict[int, Future[Judged]] = {}

    def hear(self, index: int, group: Group) -> None:
        """Take one more group. What judging an earlier one raised is raised here, so that sampling ends."""
        for earlier in self._judged.values():
            if earlier.done():
                earlier.result()
        self._judged[index] = self._thread.submit(self._judge, index, group)

    def results(self) -> list[Judged]:
        """What was judged, in the order of the indices; waits for it."""
        return [self._judged[index].result() for index in sorted(self._judged)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._thread.shutdown(cancel_futures=True)
