"""Stopping by Ctrl-C and the signals with which schedulers end a job.

The first signal stops the run at a safe point, a second one ends it immediately.

A signal may arrive at any point of the code, and on one rank before the others. It therefore only sets a flag while
weights, the optimizer or a file are being written. In work that changes nothing in a checkpoint, which `abandonable`
marks, it raises `Stopped` immediately. In `stop_if_asked` all ranks stop together.

This module has no slow imports, since every command imports it first.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning import Trainer

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
SAME_REQUEST = 1.0
"""Seconds within which a repeated signal counts as the first one: terminals and launchers both send it to each rank."""


class Stopped(BaseException):
    """A signal stopped the run.

    It is not an `Exception`, so that code that handles errors does not catch it.

    Attributes:
        signum: the signal.
        saved: the checkpoint from which the run can be resumed, once one was saved.
        failure: why no checkpoint could be saved.
        progress: how far training got, in words.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {name_of(signum)}")
        self.signum = signum
        self.saved: str | None = None
        self.failure: BaseException | None = None
        self.progress: str | None = None

    @property
    def exit_code(self) -> int:
        """128 plus the signal's number, as shells report it: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.signum


def name_of(signum: int) -> str:
    """The name of a signal in messages."""
    return "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name


class _State:
    """State of the signal handler, of which a process has one."""

    def __init__(self) -> None:
        self.asked = 0
        self.since = 0.0
        self.immediate = False
        self.handlers: dict[int, Any] = {}
        self.children: list[Any] = []
        self.ranks_independent = True
        self.group: Any = None


_state = _State()


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Handle `SIGNALS` in this block, and raise `Stopped` immediately until training begins (`defer`).

    Signals that the process was started to ignore (nohup, a shell's background job) stay ignored. Without effect
    outside the main thread.
    """
    global _state
    outer, _state = _state, _State()
    if threading.current_thread() is threading.main_thread():
        _state.handlers = {
            signum: handler for signum in SIGNALS if (handler := signal.getsignal(signum)) is not signal.SIG_IGN
        }
    _state.immediate = True
    install()
    try:
        yield
    finally:
        _state.immediate = False
        for signum, handler in _state.handlers.items():
            signal.signal(signum, handler)
        _state = outer


def install() -> None:
    """Install the handlers, again after Lightning has replaced the one for SIGTERM."""
    for signum in _state.handlers:
        signal.signal(signum, _receive)


def is_installed() -> bool:
    """Whether the handlers of this module are installed."""
    return bool(_state.handlers)


def defer() -> None:
    """Stop only at safe points from now on, since training has begun."""
    _state.immediate = False


def raise_immediately() -> None:
    """Stop anywhere from now on, since there is nothing to save."""
    _state.immediate = is_installed()


def forward_to(children: list[Any], *, ranks_independent: bool) -> None:
    """Forward signals to ``children``, the processes of other ranks that this one started.

    Args:
        children: `subprocess.Popen` objects.
        ranks_independent: whether each rank samples and scores without waiting for the others.
    """
    _state.children, _state.ranks_independent = children, ranks_independent


def _receive(signum: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    if _state.asked:
        if now - _state.since > SAME_REQUEST:
            _say(f"{name_of(signum)} again: ending immediately, without a checkpoint")
            end_children(patience=0)
            os._exit(128 + signum)
        return
    _state.asked, _state.since = signum, now
    for child in _state.children:
        with suppress(OSError):
            child.send_signal(signum)
    if _state.immediate:
        raise Stopped(signum)
    _say(f"{name_of(signum)}: saving a checkpoint at the next safe point; Ctrl-C again ends immediately, without one")


def _say(message: str) -> None:
    # print is not safe inside a signal handler
    if is_first_rank():
        os.write(2, f"{message}\n".encode())


def is_first_rank() -> bool:
    """Whether this process is the rank that prints, by the launcher's variables, which are set before Lightning's."""
    return all(os.environ.get(rank, "0") == "0" for rank in ("LOCAL_RANK", "RANK", "SLURM_PROCID"))


@contextmanager
def abandonable(trainer: "Trainer") -> Iterator[None]:
    """Let a signal interrupt the block immediately, since it changes nothing in a checkpoint, then `stop_if_asked`.

    All ranks call this together. With several ranks the block is interrupted only if each rank runs it independently
    (`forward_to`), since the other ranks would otherwise wait for one that left.
    """
    outer = _state.immediate
    try:
        if not _state.asked:
            _state.immediate = is_installed() and (trainer.world_size == 1 or _state.ranks_independent)
            try:
                yield
            finally:
                _state.immediate = outer
    except Stopped:
        _state.immediate = outer
    stop_if_asked(trainer)


def stop_if_asked(trainer: "Trainer") -> None:
    """Raise `Stopped` on all ranks if any of them received a signal. All ranks call this together."""
    asked = _state.asked
    if is_installed() and trainer.world_size > 1:
        asked = _any_rank(asked)
    if asked:
        _state.asked, _state.since = asked, _state.since or time.monotonic()
        raise Stopped(asked)


def _any_rank(asked: int) -> int:
    import torch
    from torch import distributed

    if _state.group is None:
        # a separate group on CPUs: it does not wait for GPUs, and ranks may be far apart while they sample
        _state.group = distributed.new_group(backend="gloo", timeout=timedelta(days=1))
    flag = torch.tensor(asked)
    distributed.all_reduce(flag, distributed.ReduceOp.MAX, group=_state.group)
    return int(flag)


def end_children(patience: float) -> None:
    """Kill all child processes and their children if they are still running after ``patience`` seconds."""
    import psutil

    children = psutil.Process().children(recursive=True)
    _, alive = psutil.wait_procs(children, timeout=patience) if patience else ([], children)
    for child in alive:
        with suppress(psutil.Error):
            child.kill()
