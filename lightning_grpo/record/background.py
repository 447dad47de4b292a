"""A thread that writes in the background, and never delays or breaks the run."""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, Full, Queue

log = logging.getLogger(__name__)

Job = Callable[[], None]
CAPACITY = 256
"""Jobs that may wait. A disk that is slower than so many optimizer steps loses some."""


class Background:
    """Runs jobs one after another in a daemon thread.

    If a job fails, for example because the disk is full, one warning is logged and all further jobs are skipped.

    Args:
        idle: called at least every ``seconds``, and by `flush`.
        seconds: see ``idle``.
        what: what the jobs write, for messages.
    """

    def __init__(self, idle: Job, *, seconds: float, what: str) -> None:
        self._idle = idle
        self._seconds = seconds
        self._what = what
        self._queue: Queue[Job | threading.Event] = Queue(CAPACITY)
        self._failed = self._overtaken = self._closed = False
        self._thread = threading.Thread(target=self._work, name=f"record {what}", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Run ``job`` soon. It is dropped, with one warning for all of them, if too many are waiting."""
        try:
            self._queue.put_nowait(job)
        except Full:
            if not self._overtaken:
                log.warning("%s can't be written as fast as training produces them; some are left out", self._what)
            self._overtaken = True

    def flush(self, seconds: float) -> None:
        """Wait until everything submitted so far is on the disk, at most ``seconds``."""
        done, deadline = threading.Event(), time.monotonic() + seconds
        with suppress(Full):
            self._queue.put(self._idle, timeout=seconds)
            self._queue.put(done, timeout=max(0.0, deadline - time.monotonic()))
        if not done.wait(max(0.0, deadline - time.monotonic())):
            log.warning("%s were not written within %g seconds; the run goes on", self._what, seconds)

    def close(self, seconds: float) -> None:
        """`flush`, and end the thread. It can be called twice."""
        if not self._closed:
            self.flush(seconds)
            self._closed = True
            self.submit(lambda: None)  # ends the wait for a job

    def _work(self) -> None:
        due = time.monotonic() + self._seconds
        while not self._closed or not self._queue.empty():
            try:
                item = self._queue.get(timeout=max(0.0, due - time.monotonic()))
            except Empty:
                item = self._idle
            if isinstance(item, threading.Event):
                item.set()
            else:
                self._run(item)
            if time.monotonic() >= due:
                self._run(self._idle)
                due = time.monotonic() + self._seconds

    def _run(self, job: Job) -> None:
        if self._failed:
            return
        try:
            job()
        except Exception as error:  # whatever it is, training goes on
            self._failed = True
            reason = error.strerror if isinstance(error, OSError) else repr(error)
            log.warning("%s are no longer written: %s. The run goes on", self._what, reason)
