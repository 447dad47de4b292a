"""Run an untrusted Python program in a process of its own. Only worker processes can: see `supervisor`."""

import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import IO

from lightning_grpo.errors import RunError
from lightning_grpo.rewards.sandbox import confine
from lightning_grpo.rewards.sandbox.supervisor import REQUEST

MAX_OUTPUT = 1 << 20
supervisor: socket.socket | None = None
"""Connection of this worker process to its supervisor; None in other processes."""


def run_program(
    code: str, *, expressions: Sequence[str] = (), stdin: str = "", seconds: float, memory_mb: int = 512
) -> bytes:
    """What a program writes to its stdout; empty if it exceeds its time or writes more than 1 MiB.

    Args:
        code: of the program.
        expressions: what to evaluate after the program. The output is then one line of JSON for each expression,
            ``{"value": repr}`` or ``{"error": name}``, instead of what the program writes.
        stdin: what the program can read from its stdin.
        seconds: after which its process is killed.
        memory_mb: limit on its address space.
    """
    if supervisor is None:
        raise RunError("programs of a model run only in the worker processes of rewards")
    if seconds <= 0:
        return b""
    request = {"code": code} | ({"expressions": list(expressions)} if expressions else {})
    deadline = time.monotonic() + seconds
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        _file(json.dumps(request)) as todo,
        _file(stdin) as given,
    ):
        output, written = os.pipe()
        inside = os.open(folder, os.O_RDONLY)
        limits = REQUEST.pack(seconds, memory_mb << 20)
        try:
            socket.send_fds(supervisor, [limits], [given.fileno(), written, todo.fileno(), inside])
            os.close(written)
            return _read(output, deadline)
        finally:
            os.close(output)
            os.close(inside)
            supervisor.send(b".")  # the supervisor kills the process, and answers when it is gone
            supervisor.recv(1)


def _file(text: str) -> IO[bytes]:
    file = tempfile.TemporaryFile()  # noqa: SIM115
    file.write(text.encode(errors="surrogatepass"))
    file.seek(0)
    return file


def _read(pipe: int, deadline: float) -> bytes:
    output = bytearray()
    while (left := deadline - time.monotonic()) > 0 and len(output) <= MAX_OUTPUT:
        if select.select([pipe], [], [], left)[0]:
            data = os.read(pipe, 1 << 16)
            if not data:
                return bytes(output)
            output += data
    return b""


@lru_cache(maxsize=1)
def enforced_restrictions() -> dict[str, bool]:
    """Whether this system enforces seccomp and Landlock."""
    command = [sys.executable, "-I", "-S", str(confine.__file__)]
    return json.loads(subprocess.run(command, capture_output=True, timeout=60, check=True).stdout)
