"""Isolation of vLLM in the trainer's process: its changes to process-wide state last only while it runs.

vLLM replaces functions of torch, reseeds every generator, sets environment variables, thread counts and the precision
of float32 products, and logs to the terminal. Inside `isolate_vllm()` its state is in effect, outside the trainer's.
"""

import gc
import logging
import os
import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch

log = logging.getLogger(__name__)

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

_vllm_functions: dict[tuple[object, str], object] = {}
_vllm_environment: dict[str, str] = {}
_vllm_precision: list[tuple[str | None, str, str]] = []


class Isolation:
    """One turn of vLLM in the trainer's process, which can be suspended."""

    def __init__(self) -> None:
        self._enter()

    def _enter(self) -> None:
        self._functions = {(owner, name): getattr(owner, name) for owner, name in _REPLACED if hasattr(owner, name)}
        self._environment = dict(os.environ)
        self._threads, self._set_num_threads = torch.get_num_threads(), torch.set_num_threads
        self._precision = _matmul_precision()
        self._random_states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self._cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
        for (owner, name), function in _vllm_functions.items():
            setattr(owner, name, function)
        os.environ.update(_vllm_environment)
        _set_matmul_precision(_vllm_precision[-1] if _vllm_precision else self._precision)

    def leave(self) -> None:
        """Restore the trainer's functions, variables, threads, precision and generators, and keep vLLM's."""
        for (owner, name), function in self._functions.items():
            if getattr(owner, name) is not function:
                _vllm_functions[owner, name] = getattr(owner, name)
                setattr(owner, name, function)
        now, before = dict(os.environ), self._environment
        _vllm_environment.update({k: v for k, v in now.items() if before.get(k) != v})
        for variable in now.keys() - before.keys():
            del os.environ[variable]
        os.environ.update({k: v for k, v in before.items() if now.get(k) != v})
        if torch.get_num_threads() != self._threads:
            self._set_num_threads(self._threads)
        if (precision := _matmul_precision()) != self._precision:
            _vllm_precision[:] = [precision]
            _set_matmul_precision(self._precision)
        random.setstate(self._random_states[0])
        np.random.set_state(self._random_states[1])
        torch.set_rng_state(self._random_states[2])
        if self._cuda_states is not None:
            torch.cuda.set_rng_state_all(self._cuda_states)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Restore the trainer's state inside this context, for a callback of the trainer."""
        self.leave()
        try:
            yield
        finally:
            self._enter()


@contextmanager
def isolate_vllm() -> Iterator[Isolation]:
    """Run vLLM's code inside this context. Afterwards the trainer's functions, variables, threads, precision and
    generators are restored, and vLLM's are kept for its next turn. Entering and leaving takes about a millisecond, so
    that a loop belongs inside one context."""
    isolation = Isolation()
    try:
        yield isolation
    finally:
        isolation.leave()


def _matmul_precision() -> tuple[str | None, str, str]:
    """The precision of float32 products: for all backends (None if they were set separately), on CUDA, in oneDNN."""
    try:
        common = torch.get_float32_matmul_precision()
    except RuntimeError:
        common = None
    return common, torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]


def _set_matmul_precision(precision: tuple[str | None, str, str]) -> None:
    if precision == _matmul_precision():
        return
    common, cuda, onednn = precision
    if common is not None:
        torch.set_float32_matmul_precision(common)
    torch.backends.cuda.matmul.fp32_precision = cuda
    torch.backends.mkldnn.matmul.fp32_precision = onednn  # type: ignore[attr-defined]


@contextmanager
def redirect_output(log_file: Path) -> Iterator[None]:
    """Write printed output and vLLM's log to `log_file`; afterwards vLLM's logger keeps writing there."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    # First for handlers of an earlier engine, then for those that the first import of vLLM adds.
    _route_logger(log_file)
    with log_file.open("a", buffering=1) as stream, redirect_stdout(stream), redirect_stderr(stream):
        try:
            yield
        finally:
            _route_logger(log_file)


def _route_logger(log_file: Path) -> None:
    """Make vLLM's logger write only to `log_file`."""
    logger = logging.getLogger("vllm")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        if isinstance(handler, logging.FileHandler):
            handler.close()
    handler = logging.FileHandler(log_file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)


# ── Process groups ────────────────────────────────────────────────────────────────────────────────────────────────


def on_this_device(trainer_has_group: bool) -> dict[str, Any]:
    """Settings that place the engine on this rank's GPU, in the trainer's process group. By itself an in-process vLLM
    takes the first GPU on every rank."""
    rank = torch.distributed.get_rank() if trainer_has_group else 0
    os.environ["RANK"] = str(rank)
    os.environ["LOCAL_RANK"] = str(torch.cuda.current_device() if torch.cuda.is_available() else rank)
    if not trainer_has_group:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            os.environ |= {"WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    return {"distributed_executor_backend": "external_launcher"}


def shutdown(llm: Any, trainer_has_group: bool) -> None:
    """Stop the engine, but keep the trainer's default process group, which vLLM would destroy with its own groups."""
    from vllm.v1.engine import core

    original = core.cleanup_dist_env_and_memory
    core.cleanup_dist_env_and_memory = lambda *args, **kwargs: release_process_group(trainer_has_group)
    client = llm.llm_engine.engine_core
    client._finalizer.detach()
    try:
        with isolate_vllm():
            _wake_for_shutdown(llm)
            client.engine_core.shutdown()
    finally:
        core.cleanup_dist_env_and_memory = original


def _wake_for_shutdown(llm: Any) -> None:
    """Map a sleeping engine's memory again. vLLM's allocator unmaps all memory when it is closed. Unmapping twice is a
    CUDA error that makes every later allocation in the process fail."""
    if llm.llm_engine.is_sleeping():
        try:
            llm.wake_up()
        except Exception as error:
            log.warning("The sleeping vLLM engine could not be woken up before it was closed: %s", error)


def release_process_group(trainer_has_group: bool) -> None:
    """Destroy the engine's process groups, and the default group only if the engine created it."""
    from vllm.distributed import parallel_state

    destroy = torch.distributed.destroy_process_group

    def destroy_own(group: Any = None) -> None:
        if group is not None or not trainer_has_group:
            destroy(group)

    torch.distributed.destroy_process_group = destroy_own
    try:
        parallel_state.cleanup_dist_env_and_memory()
    finally:
        torch.distributed.destroy_process_group = destroy
    gc.collect()
