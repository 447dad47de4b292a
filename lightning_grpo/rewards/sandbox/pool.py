"""A pool of worker processes, each killed and replaced when a job exceeds its time."""

import atexit
import json
import logging
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from queue import Empty, LifoQueue, SimpleQueue
from threading import Event
from typing import Any

from lightning_grpo.errors import RunError
from lightning_grpo.rewards.sandbox.channel import Channel
from lightning_grpo.rewards.sandbox.program import enforced_restrictions
from lightning_grpo.rewards.sandbox.worker import DROP, RUN

log = logging.getLogger(__name__)

CHUNK = 32
"""Jobs that are sent to a worker at once, at most."""
PATIENCE = 0.05
"""Seconds that a job may take before the jobs behind it in its chunk are passed to other workers."""
START = 60.0
"""Seconds within which a worker must start, take what it is sent, and end when it is killed."""
FOLDER = "{folder}"
"""Stands for a worker's folder in the command of `isolation`."""
_MAX_ANSWER = 1 << 20


@dataclass(frozen=True)
class Failure:
    """A job without a value.

    Attributes:
        reason: what happened.
        limit: whether it exceeded its time or memory, or ended its worker. Otherwise the function raised.
    """

    reason: str
    limit: bool = False


@lru_cache(maxsize=1)
def isolation() -> tuple[str, ...]:
    """The command that starts a process in its own namespaces (network, processes, users, mounts): bubblewrap's, else
    that of util-linux, else none. What this system can't enforce is logged."""
    bubblewrap = (
        *("bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--ro-bind", "/", "/"),
        *("--dev", "/dev", "--proc", "/proc", "--bind", FOLDER, FOLDER, "--"),
    )
    namespaces = (
        *("unshare", "--user", "--map-root-user", "--net", "--ipc", "--uts", "--mount", "--pid"),
        *("--fork", "--kill-child", "--mount-proc", "--"),
    )
    command = next(filter(_starts, (bubblewrap, namespaces)), ())
    enforced = enforced_restrictions()
    missing = [] if command else ["they see the processes of this user and can send them signals (no namespaces)"]
    if not command and not enforced["seccomp"]:
        missing.append("they have the network (neither namespaces nor seccomp)")
    if command != bubblewrap and not enforced["landlock"]:
        missing.append("they can write files of this user (neither bubblewrap nor Landlock)")
    if not enforced["seccomp"]:
        missing.append("programs that they run can start and signal other processes (no seccomp)")
    if not enforced["landlock"]:
        missing.append("programs that they run can read files of this user (no Landlock)")
    if missing:
        log.warning("The isolation of reward workers is limited on this system: %s.", "; ".join(missing))
    return command


def _starts(command: tuple[str, ...]) -> bool:
    if not shutil.which(command[0]):
        return False
    tried = [*_in_folder(command, tempfile.gettempdir()), "true"]
    return subprocess.run(tried, capture_output=True, stdin=subprocess.DEVNULL, timeout=START).returncode == 0


def _in_folder(command: tuple[str, ...], folder: str) -> list[str]:
    return [shutil.which(part) or part for part in command[:1]] + [folder if p == FOLDER else p for p in command[1:]]


class _Worker:
    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="reward-worker-")
        paths = [path or os.getcwd() for path in sys.path]
        self.tokens, self._of_worker = socket.socketpair()
        command = isolation()
        start = (
            f"import sys; sys.path.append({str(Path(__file__).parents[3])!r}); "
            "from lightning_grpo.rewards.sandbox.supervisor import main; "
            f"main({paths!r}, {self._of_worker.fileno()}, isolated={bool(command)})"
        )
        environment = {
            "PATH": os.defpath,
            "LANG": "C.UTF-8",
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "TMPDIR": self.folder,
        }
        link, standard = socket.socketpair()
        with standard:
            self.process = subprocess.Popen(
                [*_in_folder(command, self.folder), sys.executable, "-I", "-S", "-X", "utf8", "-c", start],
                stdin=standard.fileno(),
                stdout=standard.fileno(),
                stderr=subprocess.DEVNULL,
                cwd=self.folder,
                env=environment,
                pass_fds=[self._of_worker.fileno()],
                start_new_session=True,
            )
        self.channel = Channel(link, _MAX_ANSWER)
        self.starting = 1
        """Messages that the worker has still to send before it is ready for jobs."""
        self._loaded: set[bytes] = set()

    def load(self, function: bytes) -> None:
        """Have the worker import what a function needs, without waiting for it."""
        if function not in self._loaded:
            self._loaded.add(function)
            self.starting += 1
            self.channel.send(pickle.dumps((function, None)), START)

    def wait_until_ready(self) -> None:
        while self.starting:
            try:
                self.channel.receive(START)
            except (EOFError, OSError, ValueError):
                raise RunError(
                    "a reward worker process did not start; set sandbox: false in the reward, or run "
                    f"{sys.executable} -c 'import lightning_grpo.rewards.sandbox.worker' to see why"
                ) from None
            self.starting -= 1

    def send(self, function: bytes, jobs: Sequence[tuple[Any, ...]]) -> None:
        self.tokens.send(RUN * len(jobs))
        self.channel.send(pickle.dumps((function, jobs)), START)

    def take_back(self, count: int) -> int:
        """Take back up to ``count`` jobs, the last of those that were sent, and return how many had not begun."""
        try:
            taken = len(self._of_worker.recv(count, socket.MSG_DONTWAIT)) if count else 0
        except BlockingIOError:
            taken = 0
        if not taken:
            return 0
        self.tokens.send(DROP)
        return taken

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # the system can't end it; the run need not wait for that
            self.process.wait(START)
        for connection in (self.channel, self.tokens, self._of_worker):
            connection.close()
        _remove(self.folder)


def _remove(folder: str) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except RecursionError:  # a program made folders within folders, for which only `rm` has no limit
        with suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(["rm", "-rf", folder], capture_output=True, timeout=START)


@dataclass(frozen=True)
class _Call:
    """One call of `Pool.map`."""

    function: bytes
    jobs: Sequence[tuple[Any, ...]]
    seconds: float
    results: SimpleQueue = field(default_factory=SimpleQueue)
    """Pairs of the index of a job and its value; or an exception as the value, which ends the call."""
    ended: Event = field(default_factory=Event)


class Pool:
    """Worker processes, started when they are first needed. Safe to use from several threads.

    Args:
        size: number of workers; None: one per core that this process may use, divided among the ranks of this machine,
            and at least two, so that one job that exceeds its time does not delay the others.
    """

    def __init__(self, size: int | None = None) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.size = size or max(2, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        self._idle: LifoQueue[_Worker | None] = LifoQueue()
        for _ in range(self.size):
            self._idle.put(None)
        self._owner = os.getpid()
        self._threads = ThreadPoolExecutor(self.size, thread_name_prefix="reward-workers")
        self._workers: set[_Worker] = set()
        atexit.register(self.close)

    def prepare(self, function: Any) -> None:
        """Start all workers, and have each import what the function needs, without waiting for it."""
        pickled, idle = pickle.dumps(function), []
        with suppress(Empty):
            while True:
                idle.append(self._idle.get_nowait())
        while idle:
            worker = idle.pop()
            try:
                worker = worker or self._new_worker()
                worker.load(pickled)
            except OSError:  # it ended; `map` starts another
                if worker:
                    self._discard(worker)
                worker = None
            finally:
                self._idle.put(worker)

    def map(self, function: Any, jobs: Sequence[tuple[Any, ...]], seconds: float) -> list[Any]:
        """What ``function(*job)`` returns for each job, in order; a `Failure` for one that returned nothing.

        Args:
            function: can be pickled, and returns what JSON can represent.
            jobs: positional arguments, which can be pickled.
            seconds: limit on the time of each job, after which its worker is killed and replaced.
        """
        isolation()  # warns once, before threads ask for it
        call = _Call(pickle.dumps(function), jobs, seconds)
        size = min(CHUNK, max(1, -(-len(jobs) // (2 * self.size))))
        for first in range(0, len(jobs), size):
            self._threads.submit(self._run, call, range(first, min(first + size, len(jobs))))
        values: list[Any] = [None] * len(jobs)
        try:
            for _ in jobs:
                index, value = call.results.get()
                if isinstance(value, BaseException):
                    raise value
                values[index] = value
        finally:
            call.ended.set()
        return values

    def _run(self, call: _Call, chunk: Sequence[int]) -> None:
        """Have a worker do the jobs of a chunk, and another one if it is lost."""
        worker, pending = self._idle.get(), deque(chunk)
        try:
            while pending and not call.ended.is_set():
                if worker and worker.process.poll() is not None:  # it ended while it was idle
                    self._discard(worker)
                    worker = None
                worker = worker or self._new_worker()
                try:
                    self._converse(worker, call, pending)
                except _WorkerLost as lost:
                    self._discard(worker)
                    worker = None
                    call.results.put((pending.popleft(), lost.failure))
        except BaseException as error:
            call.results.put((None, error))
            broken, worker = worker, None
            if broken:
                self._discard(broken)
        finally:
            self._idle.put(worker)

    def _converse(self, worker: _Worker, call: _Call, pending: deque[int]) -> None:
        """Send the pending jobs to a worker and read its answers. If a job takes long, the rest goes to others."""
        try:
            worker.load(call.function)
            worker.wait_until_ready()  # the time that imports take is not that of a job
            worker.send(call.function, [call.jobs[index] for index in pending])
            while pending:
                seconds = call.seconds
                if len(pending) > 1 and not worker.channel.poll(patience := min(PATIENCE, seconds)):
                    seconds -= patience
                    if taken := [pending.pop() for _ in range(worker.take_back(len(pending) - 1))]:
                        self._threads.submit(self._run, call, taken[::-1])
                answer = json.loads(worker.channel.receive(seconds))
                failed = "error" in answer and Failure(answer["error"], limit="limit" in answer)
                call.results.put((pending.popleft(), failed or answer["value"]))
        except TimeoutError as error:
            raise _WorkerLost(Failure(f"it took more than {call.seconds:g} s", limit=True)) from error
        except (EOFError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise _WorkerLost(Failure("it ended its worker process", limit=True)) from error

    def _new_worker(self) -> _Worker:
        worker = _Worker()
        self._workers.add(worker)
        return worker

    def _discard(self, worker: _Worker) -> None:
        self._workers.discard(worker)
        worker.kill()

    def close(self) -> None:
        """Kill all workers."""
        if os.getpid() == self._owner:
            for worker in list(self._workers):
                self._discard(worker)


class _WorkerLost(Exception):
    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.reason)
        self.failure = failure


_shared: dict[int, Pool] = {}


def shared_pool() -> Pool:
    """The pool of this process; a forked process gets its own."""
    if os.getpid() not in _shared:
        _shared[os.getpid()] = Pool()
    return _shared[os.getpid()]
