"""The worker: a process that evaluates one job after another for a `Pool`.

It reads pickled jobs from its parent, which it trusts, and answers in JSON, since its parent doesn't trust it.
"""

import json
import math
import os
import pickle
import resource
import socket
from contextlib import suppress
from functools import lru_cache
from multiprocessing.connection import Connection
from typing import Any

from lightning_grpo.rewards.sandbox import program
from lightning_grpo.rewards.sandbox.confine import confine_worker

MEMORY = 2 << 30
"""Bytes of address space of a worker."""
NOTE = 500
"""Characters of an error that are passed on."""
RUN, DROP = b"r", b"d"
"""Tokens: run the next job of the chunk; forget the rest of the chunk."""


@lru_cache(maxsize=64)
def _load(pickled: bytes) -> Any:
    """The function. If it is a method of an object that has ``warm_up``, this is called first."""
    function = pickle.loads(pickled)
    if warm_up := getattr(getattr(function, "__self__", None), "warm_up", None):
        warm_up()
    return function


def _answer(function: bytes, arguments: tuple[Any, ...]) -> bytes:
    try:
        value = _load(function)(*arguments)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"the result is {value}")
        return json.dumps({"value": value}, allow_nan=False).encode()
    except MemoryError:
        return json.dumps({"error": "MemoryError: the worker's memory limit was reached", "limit": True}).encode()
    except BaseException as error:
        return json.dumps({"error": f"{type(error).__name__}: {_text(error)}"}).encode()


def _text(error: BaseException) -> str:
    try:
        return "".join(char if char.isprintable() else " " for char in str(error)[:NOTE])
    except BaseException:
        return "its message can't be shown"


def main(supervisor: socket.socket, tokens: int) -> None:
    """Answer jobs on the socket that is standard input and output, until it is closed.

    Args:
        supervisor: starts processes for programs.
        tokens: socket with one token for each job, so that the parent can take back jobs that have not begun.
    """
    parent = Connection(os.dup(0))
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1):
        os.dup2(null, standard)
    limits = ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_FSIZE, 16 << 20), (resource.RLIMIT_CORE, 0))
    for limit, value in limits:
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))
    program.supervisor = supervisor
    parent.send_bytes(json.dumps(confine_worker()).encode())
    try:
        while True:
            function, chunk = pickle.loads(parent.recv_bytes())
            if chunk is None:
                with suppress(BaseException):  # the jobs that follow report it
                    _load(function)
                parent.send_bytes(b"{}")
                continue
            for arguments in chunk:
                if os.read(tokens, 1) == DROP:
                    break
                parent.send_bytes(_answer(function, arguments))
    except (EOFError, ConnectionError):
        pass
