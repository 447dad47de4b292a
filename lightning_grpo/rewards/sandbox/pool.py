"""A pool of worker processes, each killed and replaced when a job exceeds its time."""

import atexit
import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.connection import Connection
from queue import LifoQueue
from typing import Any

from lightning_grpo.errors import RunError

log = logging.getLogger(__name__)

CHUNK = 32
"""Jobs that are sent to a worker at once, at most."""
START = 60.0
"""Seconds within which a worker must start."""
_MAX_ANSWER = 1 << 20


@dataclass(frozen=True)
class Failure:
    """A job without a value: it exceeded its time, raised, or ended its worker."""

    reason: str
    timed_out: bool = False


@lru_cache(maxsize=1)
def isolation() -> tuple[str, ...]:
    """The command that starts a process in its own namespaces (network, processes, users, mounts): bubblewrap's, else
    that of util-linux, else none, which is logged."""
    bubblewrap = (
        *("bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--ro-bind", "/", "/"),
        *("--dev", "/dev", "--proc", "/proc", "--tmpfs", "/var/tmp", "--setenv", "TMPDIR", "/var/tmp", "--"),
    )
    namespaces = (
        *("unshare", "--user", "--map-root-user", "--net", "--ipc", "--uts", "--mount", "--pid"),
        *("--fork", "--kill-child", "--mount-proc", "--"),
    )
    for command in (bubblewrap, namespaces):
        if shutil.which(command[0]):
            tried = subprocess.run([*command, "true"], capture_output=True, stdin=subprocess.DEVNULL, timeout=START)
            if tried.returncode == 0:
                if command is namespaces:
                    log.warning(
                        "Reward workers can write files of this user: bubblewrap (bwrap) is not installed or not "
                        "permitted. They have no network and don't see other processes."
                    )
                return command
    log.warning(
        "Reward workers are not isolated: neither bubblewrap nor unshare may create namespaces on this system. "
        "Network, files and signals are restricted for the programs of CodeTests only, time and memory for all."
    )
    return ()


class _Worker:
    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="reward-worker-")
        start = (
            f"import sys; sys.path[:] = {[path or os.getcwd() for path in sys.path]!r}; "
            "from lightning_grpo.rewards.sandbox.worker import main; main()"
        )
        environment = {
            "PATH": os.defpath,
            "LANG": "C.UTF-8",
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "TMPDIR": self.folder,
        }
        self.process = subprocess.Popen(
            [*isolation(), sys.executable, "-I", "-c", start],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=self.folder,
            env=environment,
            start_new_session=True,
        )
        self.jobs = Connection(os.dup(self.process.stdin.fileno()), readable=False)
        self.answers = Connection(os.dup(self.process.stdout.fileno()), writable=False)
        self.process.stdin.close()
        self.process.stdout.close()
        self.started = False

    def start(self) -> None:
        if not self.started:
            try:
                if not self.answers.poll(START):
                    raise EOFError
                self.answers.recv_bytes(_MAX_ANSWER)
            except (EOFError, OSError):
                raise RunError(
                    "a reward worker process did not start; set sandbox: false in the reward, or run "
                    f"{sys.executable} -c 'import lightning_grpo.rewards.sandbox.worker' to see why"
                ) from None
            self.started = True

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.jobs.close()
        self.answers.close()
        shutil.rmtree(self.folder, ignore_errors=True)


class Pool:
    """Worker processes, started when they are first needed. Safe to use from several threads.

    Args:
        size: number of workers; None: one per core that this process may use.
    """

    def __init__(self, size: int | None = None) -> None:
        self.size = size or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
        self._idle: LifoQueue[_Worker | None] = LifoQueue()
        for _ in range(self.size):
            self._idle.put(None)
        self._owner = os.getpid()
        self._threads = ThreadPoolExecutor(self.size, thread_name_prefix="reward-workers")
        self._workers: set[_Worker] = set()
        atexit.register(self.close)

    def map(self, function: Any, jobs: Sequence[tuple[Any, ...]], seconds: float) -> list[Any]:
        """What ``function(*job)`` returns for each job, in order; a `Failure` for one that returned nothing.

        Args:
            function: can be pickled, and returns what JSON can represent.
            jobs: positional arguments, which can be pickled.
            seconds: limit on the time of each job, after which its worker is killed and replaced.
        """
        isolation()  # warns once, before threads ask for it
        pickled = pickle.dumps(function)
        size = min(CHUNK, max(1, -(-len(jobs) // (2 * self.size))))
        chunks = [jobs[first : first + size] for first in range(0, len(jobs), size)]
        parts = self._threads.map(lambda chunk: self._run(pickled, chunk, seconds), chunks)
        return [value for part in parts for value in part]

    def _run(self, function: bytes, jobs: Sequence[tuple[Any, ...]], seconds: float) -> list[Any]:
        worker = self._idle.get()
        values: list[Any] = []
        try:
            while len(values) < len(jobs):
                if worker is None:
                    worker = _Worker()
                    self._workers.add(worker)
                try:
                    worker.start()
                    self._converse(worker, function, jobs[len(values) :], seconds, values)
                except BaseException as error:
                    self._discard(worker)
                    worker = None
                    if not isinstance(error, _WorkerLost):
                        raise
                    values.append(error.failure)
        finally:
            self._idle.put(worker)
        return values

    def _converse(self, worker: _Worker, function: bytes, jobs: Sequence[Any], seconds: float, values: list) -> None:
        try:
            worker.jobs.send_bytes(pickle.dumps((function, seconds, list(jobs))))
            for _ in jobs:
                if not worker.answers.poll(seconds):
                    raise _WorkerLost(Failure(f"it took more than {seconds:g} s", timed_out=True))
                answer = json.loads(worker.answers.recv_bytes(_MAX_ANSWER))
                values.append(Failure(answer["error"]) if "error" in answer else answer["value"])
        except (EOFError, OSError, ValueError, KeyError, TypeError) as error:
            raise _WorkerLost(Failure("it ended its worker process")) from error

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
