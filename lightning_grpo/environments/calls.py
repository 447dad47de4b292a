"""Calls of plain and ``async`` functions that run concurrently."""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from threading import TIMEOUT_MAX, Thread
from typing import Any, Self


class TimeLimitError(Exception):
    """A call took longer than its time limit."""


class Calls:
    """Runs each call of a plain function in its own thread, and all calls of ``async`` functions in one event loop.

    For use in one thread. As a context manager, it stops the event loop at the end.

    Args:
        time_limit: seconds after which a call counts as ended, with a `TimeLimitError`; None for no limit. Its thread
            can't be stopped.
    """

    def __init__(self, time_limit: float | None = None) -> None:
        self.time_limit = TIMEOUT_MAX if time_limit is None else time_limit
        self._running: dict[Future, tuple[Any, float]] = {}  # key and deadline, the earliest deadline first
        self._ended: SimpleQueue[Future] = SimpleQueue()
        self._loop = asyncio.new_event_loop()
        self._stopped = asyncio.Event()
        Thread(target=self._run_loop, name="environments", daemon=True).start()

    @property
    def running(self) -> int:
        """The number of calls that were submitted and that `ended` has not yielded."""
        return len(self._running)

    def submit(self, key: Any, function: Callable[..., Any], *args: Any) -> None:
        """Begin a call."""
        future: Future = Future()
        if inspect.iscoroutinefunction(function):
            future = self._await(function(*args))
        else:
            # A daemon thread, unlike one of a pool, does not keep a stopped process from ending.
            Thread(target=self._call, args=(future, function, args), name="environment", daemon=True).start()
        self._running[future] = key, time.monotonic() + self.time_limit
        future.add_done_callback(self._ended.put)

    def ended(self, *, wait: bool) -> Iterator[tuple[Any, Future]]:
        """Yield key and result of each call that has ended since the last time.

        Args:
            wait: wait for one if none has.
        """
        while self._running:
            first, (_, deadline) = next(iter(self._running.items()))
            left = deadline - time.monotonic()
            try:
                future = result = self._ended.get(block=wait and left > 0, timeout=left)
            except Empty:
                if time.monotonic() < deadline:
                    return
                future, result = first, Future()
                result.set_exception(TimeLimitError())
            wait = False
            if future in self._running:  # or else it ended after its limit
                yield self._running.pop(future)[0], result

    def _run_loop(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:  # which cancels running calls at the end
            runner.run(self._stopped.wait())

    def _call(self, future: Future, function: Callable[..., Any], args: tuple) -> None:
        try:
            result = function(*args)
            future.set_result(self._await(result).result() if inspect.isawaitable(result) else result)
        except BaseException as error:
            future.set_exception(error)

    def _await(self, awaitable: Awaitable[Any]) -> Future:
        return asyncio.run_coroutine_threadsafe(_result(awaitable), self._loop)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)


async def _result(awaitable: Awaitable[Any]) -> Any:
    try:
        return await awaitable
    except SystemExit as error:  # which would end the event loop
        raise RuntimeError(f"sys.exit({error.code!r}) was called") from error
