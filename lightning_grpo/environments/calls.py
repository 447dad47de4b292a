"""Calls of plain and ``async`` functions that run concurrently."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import closing
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, Self


class Calls:
    """Runs each call of a plain function in its own thread, and all calls of ``async`` functions in one event loop.

    For use in one thread. As a context manager, it stops the event loop at the end.
    """

    def __init__(self) -> None:
        self._ended: SimpleQueue[tuple[Any, Future]] = SimpleQueue()
        self._loop = asyncio.new_event_loop()
        Thread(target=self._run_loop, name="environments", daemon=True).start()
        self.running = 0
        """The number of calls that were submitted and that `ended` has not yielded."""

    def submit(self, key: Any, function: Callable[..., Any], *args: Any) -> None:
        """Begin a call."""
        self.running += 1
        future: Future = Future()
        if inspect.iscoroutinefunction(function):
            future = self._await(function(*args))
        else:
            # A daemon thread, unlike one of a pool, does not keep a stopped process from ending.
            Thread(target=self._call, args=(future, function, args), name="environment", daemon=True).start()
        future.add_done_callback(lambda done: self._ended.put((key, done)))

    def ended(self, *, wait: bool) -> Iterator[tuple[Any, Future]]:
        """Yield key and result of each call that has ended since the last time.

        Args:
            wait: wait for one if none has.
        """
        while self.running:
            try:
                key, future = self._ended.get(block=wait)
            except Empty:
                return
            self.running -= 1
            wait = False
            yield key, future

    def _run_loop(self) -> None:
        with closing(self._loop):
            self._loop.run_forever()

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
        self._loop.call_soon_threadsafe(self._loop.stop)


async def _result(awaitable: Awaitable[Any]) -> Any:
    try:
        return await awaitable
    except SystemExit as error:  # which would end the event loop
        raise RuntimeError(f"sys.exit({error.code!r}) was called") from error
