"""The first process of a worker: it forks the worker, and one process for each program that the worker has it run.

A fork takes a millisecond, a new interpreter twenty. Programs are forked from this process rather than from the worker,
since a fork shares the memory of its parent: this process never reads a job, so that a program can't find the expected
values or another program there. It imports only the standard library.
"""

import builtins
import gc
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
from collections.abc import Sequence
from types import ModuleType

from lightning_grpo.rewards.sandbox.confine import confine_program, die_with_parent, hide_memory

REQUEST = struct.Struct("dQ")
"""Limits of a program: seconds of processor time, bytes of memory. Four descriptors come with it: of its stdin, its
stdout, a file with what it has to do, and its folder."""
PROCESSES = 128
"""Processes and threads of a worker and its programs, if it has a user namespace of its own."""
PRELOADED = (
    *("bisect", "collections", "copy", "dataclasses", "datetime", "decimal", "fractions", "functools", "heapq", "io"),
    *("itertools", "math", "operator", "random", "re", "statistics", "string", "threading", "time", "typing"),
)
"""Modules that programs often import."""


def main(paths: Sequence[str], tokens: int, *, isolated: bool) -> None:
    """Fork the worker, and run its programs until it ends or the run does.

    Args:
        paths: the search path of the worker.
        tokens: descriptor of the worker's tokens.
        isolated: whether this process is in namespaces of its own.
    """
    own_path = sys.path[:-1]
    hide_memory()
    if isolated:
        resource.setrlimit(resource.RLIMIT_NPROC, (PROCESSES, PROCESSES))
    requests, of_worker = socket.socketpair()
    if os.fork() == 0:
        die_with_parent()
        requests.close()
        sys.path[:] = paths
        from lightning_grpo.rewards.sandbox.worker import main as work

        return work(of_worker, tokens)
    of_worker.close()
    os.close(tokens)
    os.dup2(2, 1)
    for name in PRELOADED:
        __import__(name)
    gc.collect()
    gc.freeze()
    if program := _serve(requests):
        _run(*program, own_path)
    else:
        os._exit(0)


def _serve(requests: socket.socket) -> tuple[list[int], float, int] | None:
    """Fork programs; return twice: in a program's process its descriptors and limits, in this one None at the end."""
    while _wait(requests):
        message, descriptors, *_ = socket.recv_fds(requests, REQUEST.size, 4)
        if len(message) < REQUEST.size:
            break
        if (process := os.fork()) == 0:
            die_with_parent()
            return descriptors, *REQUEST.unpack(message)
        for descriptor in descriptors:
            os.close(descriptor)
        alive = _wait(requests) and requests.recv(1)  # the worker has the output, or the program's time is over
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        if not alive:
            break
        requests.send(b".")
    return None


def _wait(requests: socket.socket) -> bool:
    """Wait for a message of the worker; return False if the run ended, which closes the socket of jobs."""
    poll = select.poll()
    poll.register(requests, select.POLLIN)
    poll.register(0, 0)
    return all(descriptor != 0 for descriptor, _ in poll.poll())


def _run(descriptors: Sequence[int], seconds: float, memory: int, own_path: Sequence[str]) -> None:
    """Restrict this process, run a program, and write the values of the requested expressions as lines of JSON."""
    stdin, stdout, request_file, folder = descriptors
    os.fchdir(folder)
    with open(request_file, closefd=False) as file:
        request = json.load(file)
    answers = 3
    for source, target in ((stdin, 0), (stdout, 1)):
        os.dup2(source, target)
    if "expressions" in request:
        # what the program prints is not an answer
        kept = os.dup(1)
        os.dup2(2, 1)
        os.dup2(kept, answers)
    os.closerange(answers + ("expressions" in request), 1 << 16)
    os.environ.clear()
    limits = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_CPU: int(seconds) + 1,
        resource.RLIMIT_FSIZE: 1 << 20,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    for name, value in limits.items():
        resource.setrlimit(name, (value, value))
    confine_program()
    sys.path[:] = own_path
    sys.argv[:] = ["program"]
    sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("lightning_grpo")]
    for module in [name for name in sys.modules if name.startswith("lightning_grpo")]:
        del sys.modules[module]
    builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]  # as the module site does
    sys.modules["__main__"] = program = ModuleType("__main__")
    code, expressions = request["code"], request.get("expressions", ())
    del request, file
    exec(compile(code, "<completion>", "exec"), program.__dict__)
    for expression in expressions:
        try:
            line = {"value": repr(eval(expression, program.__dict__))}
        except BaseException as error:
            line = {"error": type(error).__name__}
        os.write(answers, json.dumps(line).encode() + b"\n")
    if expressions:
        os._exit(0)
