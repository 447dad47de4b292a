"""Time limits for rewards that are computed in this process.

Nothing can interrupt an arbitrary call in every thread, so a call that exceeds its limit ends the process: a watchdog
thread first logs the completion and the stack. If the call blocks all other threads, as `re` does, faulthandler, which
does not need the interpreter lock, ends the process a little later and prints the stacks of all threads.
"""

import faulthandler
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from types import FrameType
from typing import Any

log = logging.getLogger(__name__)
Stack = Sequence[tuple[FrameType, int]]
"""Frames and their current line numbers, innermost last."""

WARN_AFTER = 0.1
"""Fraction of the limit after which a warning is logged."""
GRACE = 10.0
"""Seconds after the limit at which faulthandler ends the process."""


@contextmanager
def time_limit(limit: float | None, name: str, arguments: Mapping[str, Any], *, slack: float = 0.0) -> Iterator[None]:
    """End the process if what runs in this context takes longer.

    Args:
        limit: seconds; None for no limit.
        name: name of the reward.
        arguments: arguments of the reward, of which messages quote ``prompts`` and ``completions``.
        slack: further seconds after the limit.
    """
    if limit is None:
        yield
        return
    done, thread, caller = threading.Event(), threading.get_ident(), sys._getframe(2)

    def watch() -> None:
        if not done.wait(limit * WARN_AFTER):
            log.warning(
                "The reward %s has been running for %g s; the run will stop at its time_limit of %g s.",
                *(name, limit * WARN_AFTER, limit),
            )
        if not done.wait(limit * (1 - WARN_AFTER) + slack):
            frames = traceback.walk_stack(sys._current_frames()[thread])
            stack = list(takewhile(lambda frame: frame[0] is not caller, frames))[::-1]
            error = timeout_error(limit, name, arguments, stack)
            log.error("%s\n%s", error, *error.__notes__)
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(1)

    with _kill_process_after(limit + slack + GRACE):
        threading.Thread(target=watch, name="reward-time-limit", daemon=True).start()
        try:
            yield
        finally:
            done.set()


def timeout_error(limit: float, name: str, arguments: Mapping[str, Any], stack: Stack) -> TimeoutError:
    """The error that states the reward, the completion it was scoring, the stack, and what to change."""
    scored = completion_in_frame(stack, arguments) or f"{len(arguments['completions'])} completions"
    error = TimeoutError(
        f"the reward {name} exceeded its time_limit of {limit:g} s while scoring {scored}; avoid nested repetition in "
        "regular expressions, set timeouts for blocking calls, or raise its time_limit (null disables it)"
    )
    error.add_note("stack of the reward:\n" + "".join(traceback.StackSummary.extract(iter(stack)).format()).rstrip())
    return error


def completion_in_frame(stack: Stack, arguments: Mapping[str, Any]) -> str | None:
    """The completion that a variable of the innermost possible frame refers to, with its row and prompt, or None."""
    rows: dict[int, tuple[int, str]] = {}
    for row, completion in enumerate(arguments["completions"]):
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        # Python has one object per text of one character, which many variables refer to
        rows |= {id(value): (row, text) for value in (completion, text) if len(text) > 1}
    for frame, _ in reversed(stack):
        for value in frame.f_locals.values():
            if id(value) in rows:
                row, text = rows[id(value)]
                return f"row {row}, the completion {text[:80]!r} of the prompt {str(arguments['prompts'][row])[:80]!r}"
    return None


_deadlines: dict[object, float] = {}
_deadlines_lock = threading.Lock()


@contextmanager
def _kill_process_after(seconds: float) -> Iterator[None]:
    # faulthandler has one timer per process: it is armed for the earliest deadline
    key = object()

    def arm() -> None:
        if _deadlines:
            remaining = max(min(_deadlines.values()) - time.monotonic(), 1e-3)
            faulthandler.dump_traceback_later(remaining, exit=True, file=2)
        else:
            faulthandler.cancel_dump_traceback_later()

    with _deadlines_lock:
        _deadlines[key] = time.monotonic() + seconds
        arm()
    try:
        yield
    finally:
        with _deadlines_lock:
            del _deadlines[key]
            arm()
