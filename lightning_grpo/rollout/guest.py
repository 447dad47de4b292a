"""vLLM as a guest in the trainer's process: what it changes there holds only while it works.

It replaces functions of torch, reseeds every generator, sets environment variables and thread counts, and logs to the
terminal. Inside `guest()` all that is its own; outside, the trainer finds everything as it left it.
"""

import logging
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import torch

# Replaced by vllm.v1.worker.cpu.shm and the CPU worker, for the process's lifetime.
_REPLACED = [
    (torch, "set_num_threads"),
    (torch, "Event"),
    (torch.cuda, "Event"),
    (torch.cuda, "Stream"),
    (torch.cuda, "set_stream"),
    (torch.cuda, "current_stream"),
    (torch.cuda, "stream"),
    (torch.accelerator, "synchronize"),
    (torch.accelerator, "empty_cache"),
    (torch.accelerator, "get_memory_info"),
    (torch.Tensor, "pin_memory"),
    (torch.Tensor, "record_stream"),
]

_guest_functions: dict[tuple[object, str], object] = {}
_guest_environment: dict[str, str] = {}


@contextmanager
def guest() -> Iterator[None]:
    """Give the process to vLLM for a while; afterwards the trainer's functions, variables, threads and generators
    are as before, and vLLM's are kept for its next turn."""
    functions = {(owner, name): getattr(owner, name) for owner, name in _REPLACED if hasattr(owner, name)}
    environment = dict(os.environ)
    threads, set_num_threads = torch.get_num_threads(), torch.set_num_threads
    random_states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    for (owner, name), function in _guest_functions.items():
        setattr(owner, name, function)
    os.environ.update(_guest_environment)
    try:
        yield
    finally:
        for (owner, name), function in functions.items():
            if getattr(owner, name) is not function:
                _guest_functions[owner, name] = getattr(owner, name)
                setattr(owner, name, function)
        _guest_environment.update({k: v for k, v in os.environ.items() if environment.get(k) != v})
        for variable in set(os.environ) - set(environment):
            del os.environ[variable]
        os.environ.update(environment)
        if torch.get_num_threads() != threads:
            set_num_threads(threads)
        random.setstate(random_states[0])
        np.random.set_state(random_states[1])
        torch.set_rng_state(random_states[2])
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)


@contextmanager
def noise_to(log_file: Path) -> Iterator[None]:
    """Send what is printed and what vLLM logs to `log_file`; afterwards its logger stays there."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    # Once for what an earlier engine left, once for what the first import sets up.
    route_logger(log_file)
    with log_file.open("a", buffering=1) as stream, redirect_stdout(stream), redirect_stderr(stream):
        try:
            yield
        finally:
            route_logger(log_file)


def route_logger(log_file: Path) -> None:
    """Make vLLM's logger write to `log_file` only."""
    logger = logging.getLogger("vllm")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        if isinstance(handler, logging.FileHandler):
            handler.close()
    handler = logging.FileHandler(log_file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
