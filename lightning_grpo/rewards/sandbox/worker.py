"""The worker: a process that evaluates one job after another for a `Pool`.

It reads pickled jobs from its parent, which it trusts, and answers in JSON, since its parent doesn't trust it.
"""

import ctypes
import faulthandler
import json
import math
import os
import pickle
import resource
import sys
from functools import lru_cache
from multiprocessing.connection import Connection
from typing import Any

MEMORY = 2 << 30
"""Bytes of address space of a worker."""
NOTE = 500
"""Characters of an error that are passed on."""


@lru_cache(maxsize=64)
def _function(pickled: bytes) -> Any:
    return pickle.loads(pickled)


def _answer(function: bytes, arguments: tuple[Any, ...]) -> bytes:
    try:
        value = _function(function)(*arguments)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"the result is {value}")
        return json.dumps({"value": value}, allow_nan=False).encode()
    except MemoryError:
        return json.dumps({"error": "MemoryError: the worker's memory limit was reached"}).encode()
    except BaseException as error:
        return json.dumps({"error": f"{type(error).__name__}: {str(error)[:NOTE]}"}).encode()


def main() -> None:
    """Answer jobs from standard input on standard output until it is closed."""
    jobs = Connection(os.dup(0), writable=False)
    answers = Connection(os.dup(1), readable=False)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1):
        os.dup2(null, standard)
    limits = ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_FSIZE, 16 << 20), (resource.RLIMIT_CORE, 0))
    for limit, value in limits:
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))
    if sys.platform == "linux":
        # a program of the same user can't read the memory of this process
        ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)
    answers.send_bytes(b"{}")
    try:
        while True:
            function, seconds, jobs_arguments = pickle.loads(jobs.recv_bytes())
            for arguments in jobs_arguments:
                # in case that the parent died meanwhile
                faulthandler.dump_traceback_later(seconds + 30, exit=True, file=null)
                answers.send_bytes(_answer(function, arguments))
                faulthandler.cancel_dump_traceback_later()
    except (EOFError, BrokenPipeError):
        pass
