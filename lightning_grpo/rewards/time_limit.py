"""Rewards that don't end: the limit on the time of a call, and what it was doing when that was over.

How a call is interrupted depends on where it runs:

- **The main thread** (rewards judged after sampling): by SIGVTALRM, since rewards themselves use SIGALRM. It ends
  loops, waiting, and `re`, which lets no other thread run but looks for signals.
- **Other threads** (those judged early, and async ones) get no signals. The call has a daemon thread, which is left
  behind: interrupted where it loops, forgotten where it waits.
- **What neither reaches**, such as `re` in another thread: faulthandler, which needs no interpreter, writes all stacks
  to stderr and ends the process, `GRACE` seconds later.
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
"""Frames and the lines they are at, innermost last."""

WARN_AFTER = 0.1
"""Share of the limit after which a call is named as slow."""
GRACE = 10.0
"""Seconds beyond the limit after which the process is ended."""


class Overdue(BaseException):
    """Ends a call from inside. No Exception, which rewards catch to score 0."""


def within(
    limit: float | None, name: str, arguments: Mapping[str, Any], call: Callable[[], T], *, loop: bool = False
) -> T:
    """What ``call()`` returns, or raises, in ``limit`` seconds; None waits for ever.

    Args:
        limit: seconds.
        name: of the reward.
        arguments: of the reward, for messages: ``prompts`` and ``completions``.
        call: stays in the main thread if that is where it is asked for.
        loop: it runs an event loop that minds the limits itself: in a thread of its own, with a second more.

    Raises:
        TimeoutError: it is over.
    """
    if limit is None:
        return _left_behind(limit, name, arguments, call) if loop else call()
    call = _titled(f"the reward {name}, limited by its time_limit to {limit:g} s", call)
    with _last_resort(limit + GRACE):
        if not loop and threading.current_thread() is threading.main_thread():
            return _interrupted(limit, name, arguments, call)
        return _left_behind(limit, name, arguments, call, slack=1.0 if loop else 0.0)


def overdue(limit: float, name: str, arguments: Mapping[str, Any], stack: Stack) -> TimeoutError:
    """The error that names the reward, what it was judging, where it hangs, and what to do."""
    held = in_hand(stack, arguments) or f"{len(arguments['completions'])} completions"
    error = TimeoutError(
        f"the reward {name} was still at work after {limit:g} s, with {held} in hand: bound what it does (no nested "
        "repetition in a regular expression, a timeout on whatever it waits for), or raise its time_limit (null: none)"
    )
    error.add_note("it was at\n" + "".join(traceback.StackSummary.extract(iter(stack)).format()).rstrip())
    return error


def in_hand(stack: Stack, arguments: Mapping[str, Any]) -> str | None:
    """The completion that a variable of the stack holds, with its row and prompt; None where none does."""
    rows: dict[int, tuple[int, str]] = {}
    for row, completion in enumerate(arguments["completions"]):
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        # texts of one character are shared by all who have them
        rows |= {id(held): (row, text) for held in (completion, text) if len(text) > 1}
    for frame, _ in reversed(stack):
        for value in frame.f_locals.values():
            if id(value) in rows:
                row, text = rows[id(value)]
                return f"row {row}, the completion {text[:80]!r} of the prompt {str(arguments['prompts'][row])[:80]!r}"
    return None


def _interrupted(limit: float, name: str, arguments: Mapping[str, Any], call: Callable[[], T]) -> T:
    if signal.getsignal(signal.SIGVTALRM) is not signal.SIG_DFL or any(signal.getitimer(signal.ITIMER_VIRTUAL)):
        # the signal is another's: the last resort is left
        return call()
    done, deadline = threading.Event(), time.monotonic() + limit

    def ring(signum: int, frame: FrameType | None) -> None:
        # while one ring is writing its error, the next must not interrupt it
        rings = any(at.f_code is ring.__code__ for at, _ in traceback.walk_stack(frame))
        if not rings and not done.is_set() and time.monotonic() >= deadline:
            raise Overdue(overdue(limit, name, arguments, _inside(frame)))

    def watch() -> None:
        in_time = _in_time(done, limit, name)
        # a bare except may have caught it: again and again
        while not in_time and not done.is_set():
            signal.pthread_kill(threading.main_thread().ident, signal.SIGVTALRM)
            done.wait(1.0)

    watcher = threading.Thread(target=watch, name="reward-time-limit", daemon=True)
    try:
        signal.signal(signal.SIGVTALRM, ring)
        # where the call lets no other thread run, the processor's clock rings, at which the watcher gets its turn
        signal.setitimer(signal.ITIMER_VIRTUAL, limit * WARN_AFTER, limit * WARN_AFTER)
        watcher.start()
        try:
            return call()
        finally:
            done.set()
    except Overdue as hang:
        raise hang.args[0] from None
    finally:
        done.set()
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        watcher.join()
        # to ignore a signal drops one that is on its way, which would now end the process
        signal.signal(signal.SIGVTALRM, signal.SIG_IGN)
        signal.signal(signal.SIGVTALRM, signal.SIG_DFL)


def _left_behind(
    limit: float | None, name: str, arguments: Mapping[str, Any], call: Callable[[], T], slack: float = 0.0
) -> T:
    answer: Future[T] = Future()
    done = threading.Event()

    def judge() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)
        finally:
            done.set()

    thread = threading.Thread(target=judge, name="reward", daemon=True)
    thread.start()
    if not _in_time(done, limit, name) and not done.wait(slack):
        stack = _inside(sys._current_frames().get(thread.ident))
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(Overdue))
        raise overdue(limit, name, arguments, stack)
    return answer.result()


def _in_time(done: threading.Event, limit: float | None, name: str) -> bool:
    if limit is None:
        return done.wait()
    if not done.wait(soon := limit * WARN_AFTER):
        log.warning(
            "the reward %s has been at work for %g s; at its time_limit of %g s the run ends", name, soon, limit
        )
    return done.wait(limit * (1 - WARN_AFTER))


def _inside(frame: FrameType | None) -> Stack:
    # down to the call, which is of this file
    frames = traceback.walk_stack(frame) if frame is not None else ()
    return list(takewhile(lambda at: at[0].f_code.co_filename != __file__, frames))[::-1]


def _titled(title: str, call: Callable[[], T]) -> Callable[[], T]:
    def titled() -> T:
        return call()

    # all that faulthandler shows of a process that it ends is the names of functions
    code = titled.__code__.replace(co_name=title, co_qualname=title)
    return FunctionType(code, globals(), closure=titled.__closure__)


_deadlines: dict[object, float] = {}
_deadlines_lock = threading.Lock()


@contextmanager
def _last_resort(seconds: float) -> Iterator[None]:
    # faulthandler has one clock for all threads: it is set to the first deadline
    key = object()

    def wind() -> None:
        if _deadlines:
            seconds = max(min(_deadlines.values()) - time.monotonic(), 1e-3)
            faulthandler.dump_traceback_later(seconds, exit=True, file=2)
        else:
            faulthandler.cancel_dump_traceback_later()

    with _deadlines_lock:
        _deadlines[key] = time.monotonic() + seconds
        wind()
    try:
        yield
    finally:
        with _deadlines_lock:
            del _deadlines[key]
            wind()
