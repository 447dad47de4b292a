"""Time limits for reward functions.

How a call is interrupted depends on the thread that makes it:

- **In the main thread** (rewards computed after sampling), SIGVTALRM interrupts it, since rewards may use SIGALRM
  themselves. This ends loops, blocking calls, and `re`, which blocks all other threads but checks for signals.
- **In other threads** (early rewards), which receive no signals, and for async rewards, the call runs in a daemon
  thread. A loop in it is interrupted, a blocking call is abandoned.
- **If neither works**, as for `re` in another thread, faulthandler writes all stacks to stderr and ends the process
  `GRACE` seconds later. It does not need the interpreter lock.
"""

import ctypes
import faulthandler
import logging
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from itertools import takewhile
from types import FrameType, FunctionType
from typing import Any, TypeVar

log = logging.getLogger(__name__)
T = TypeVar("T")
Stack = Sequence[tuple[FrameType, int]]
"""Frames and their current line numbers, innermost last."""

WARN_AFTER = 0.1
"""Fraction of the limit after which a warning is logged."""
GRACE = 10.0
"""Seconds after the limit at which the process is ended."""


class RewardTimeout(BaseException):
    """Raised inside a call to end it. Not an `Exception`, since rewards catch those to return 0."""


def call_with_timeout(
    limit: float | None, name: str, arguments: Mapping[str, Any], call: Callable[[], T], *, loop: bool = False
) -> T:
    """Return ``call()``, and pass on what it raises.

    Args:
        limit: seconds that the call may take; None for no limit.
        name: name of the reward.
        arguments: arguments of the reward, of which messages quote ``prompts`` and ``completions``.
        call: runs in the current thread if that is the main thread, else in a new one.
        loop: whether the call runs an event loop that enforces the limits itself. It then runs in a new thread and has
            one second more.

    Raises:
        TimeoutError: the call took longer than ``limit``.
    """
    if limit is None:
        return _run_in_thread(limit, name, arguments, call) if loop else call()
    call = _with_frame_name(f"the reward {name}, limited by its time_limit to {limit:g} s", call)
    with _kill_process_after(limit + GRACE):
        if not loop and threading.current_thread() is threading.main_thread():
            return _run_in_main_thread(limit, name, arguments, call)
        return _run_in_thread(limit, name, arguments, call, slack=1.0 if loop else 0.0)


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


def _run_in_main_thread(limit: float, name: str, arguments: Mapping[str, Any], call: Callable[[], T]) -> T:
    if signal.getsignal(signal.SIGVTALRM) is not signal.SIG_DFL or any(signal.getitimer(signal.ITIMER_VIRTUAL)):
        # the program uses this signal itself, so only _kill_process_after limits the call
        return call()
    done, deadline = threading.Event(), time.monotonic() + limit

    def on_signal(signum: int, frame: FrameType | None) -> None:
        # a second signal must not interrupt the handler while it creates the error
        nested = any(at.f_code is on_signal.__code__ for at, _ in traceback.walk_stack(frame))
        if not nested and not done.is_set() and time.monotonic() >= deadline:
            raise RewardTimeout(timeout_error(limit, name, arguments, _stack_of_call(frame)))

    def watch() -> None:
        in_time = _wait_and_warn(done, limit, name)
        # repeated, since a bare except in the reward may catch the exception
        while not in_time and not done.is_set():
            signal.pthread_kill(threading.main_thread().ident, signal.SIGVTALRM)
            done.wait(1.0)

    watcher = threading.Thread(target=watch, name="reward-time-limit", daemon=True)
    try:
        signal.signal(signal.SIGVTALRM, on_signal)
        # a timer too: if the call never releases the interpreter lock, the handler lets the watcher run
        signal.setitimer(signal.ITIMER_VIRTUAL, limit * WARN_AFTER, limit * WARN_AFTER)
        watcher.start()
        try:
            return call()
        finally:
            done.set()
    except RewardTimeout as timeout:
        raise timeout.args[0] from None
    finally:
        done.set()
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        watcher.join()
        # SIG_IGN first discards a pending signal, which would end the process under SIG_DFL
        signal.signal(signal.SIGVTALRM, signal.SIG_IGN)
        signal.signal(signal.SIGVTALRM, signal.SIG_DFL)


def _run_in_thread(
    limit: float | None, name: str, arguments: Mapping[str, Any], call: Callable[[], T], slack: float = 0.0
) -> T:
    result: Future[T] = Future()
    done = threading.Event()

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)
        finally:
            done.set()

    thread = threading.Thread(target=run, name="reward", daemon=True)
    thread.start()
    if not _wait_and_warn(done, limit, name) and not done.wait(slack):
        stack = _stack_of_call(sys._current_frames().get(thread.ident))
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(RewardTimeout))
        raise timeout_error(limit, name, arguments, stack)
    return result.result()


def _wait_and_warn(done: threading.Event, limit: float | None, name: str) -> bool:
    """Wait for ``done`` and return whether it was set within the limit."""
    if limit is None:
        return done.wait()
    if not done.wait(warn_after := limit * WARN_AFTER):
        log.warning(
            "The reward %s has been running for %g s; the run will stop at its time_limit of %g s.",
            *(name, warn_after, limit),
        )
    return done.wait(limit * (1 - WARN_AFTER))


def _stack_of_call(frame: FrameType | None) -> Stack:
    # without the outer frames, which begin with one of this file
    frames = traceback.walk_stack(frame) if frame is not None else ()
    return list(takewhile(lambda at: at[0].f_code.co_filename != __file__, frames))[::-1]


def _with_frame_name(name: str, call: Callable[[], T]) -> Callable[[], T]:
    def named() -> T:
        return call()

    # when faulthandler ends a process, it prints only the names of functions
    code = named.__code__.replace(co_name=name, co_qualname=name)
    return FunctionType(code, globals(), closure=named.__closure__)


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
