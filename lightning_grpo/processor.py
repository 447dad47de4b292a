"""Measure how fast this processor multiplies each data type, and count the cores that may be used.

Only some processors have instructions for bfloat16 (x86: AVX-512 BF16 and AMX; ARM: BF16). On the others a product in
bfloat16 takes 5 to 100 times as long as in float32. The products that a linear layer needs in training are timed once
per process, on one thread, in about 50 milliseconds, so no list of processors is needed.
"""

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

ROWS, WIDTH = 256, 576
"""Sizes of the timed products: tokens of a micro-batch, and the hidden size of a model that trains on a CPU."""

BUDGET = 0.05
"""Seconds after which the timing stops repeating products."""

GAIN = 1.4
"""Minimum speedup of bfloat16 over float32 that justifies its rounding. Processors with instructions for it reach 2 or
more, others 1 or less."""


@cache
def product_rate(dtype: torch.dtype) -> float:
    """Measure the FLOP/s of one thread in the products of a linear layer (forward, gradients of input and weight).

    The best of several tries, in CPU time of the thread, so that other work on the machine has no effect.
    """
    x, weight, y = (torch.ones(n, WIDTH, dtype=dtype) for n in (ROWS, WIDTH, ROWS))
    best = float("inf")
    with _one_thread():
        torch.mm(x[:8], weight[:8].T)  # excludes the initialization of libraries
        first = time.thread_time()
        for _ in range(8):
            start = time.thread_time()
            torch.mm(x, weight.T)
            torch.mm(y, weight)
            torch.mm(y.T, x)
            end = time.thread_time()
            best = min(best, end - start)
            if end - first > BUDGET:
                break
    return 3 * 2 * ROWS * WIDTH * WIDTH / best


def fast_dtype() -> torch.dtype:
    """The data type to compute in on this processor: bfloat16 if its speedup is at least `GAIN`, else float32."""
    gain = product_rate(torch.bfloat16) / product_rate(torch.float32)
    return torch.bfloat16 if gain >= GAIN else torch.float32


def slowdown(dtype: torch.dtype) -> float:
    """Time of products in ``dtype`` relative to `fast_dtype` on this processor."""
    return product_rate(fast_dtype()) / product_rate(dtype)


@cache
def parallel_speedup() -> float:
    """Speedup of products with all threads of torch over one thread, between 1 and the number of threads."""
    threads = torch.get_num_threads()
    if threads == 1:
        return 1.0
    # about a millisecond on any number of threads: short enough to find the others idle, long enough to share
    size = 64 * math.ceil(8 * threads ** (1 / 3))
    x = torch.ones(size, size, dtype=fast_dtype())
    alone = 2 * size**3 / product_rate(fast_dtype())
    together, deadline = float("inf"), time.perf_counter() + 2 * BUDGET
    while together > 1.1 * alone / threads and time.perf_counter() < deadline:
        start = time.perf_counter()
        torch.mm(x, x)
        together = min(together, time.perf_counter() - start)
    return min(max(alone / together, 1.0), float(threads))


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def cores() -> int:
    """Number of CPU cores that this process may use, by its affinity and the CPU quota of its container."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, int(_cpu_quota())))


def _cpu_quota() -> float:
    """CPU quota of the container in cores, or a very large number without a limit."""
    root = Path("/sys/fs/cgroup")
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join((root / name).read_text() for name in files).split()
        except (OSError, ValueError):
            continue
        if quota.isdigit() and int(period) > 0:
            return int(quota) / int(period)
    return 2.0**31


def keep_threads_to_cores() -> None:
    """Limit torch's threads to the usable cores, unless OMP_NUM_THREADS is set.

    torch counts the cores of the machine even if a container may use only some of them. Products are slow if threads
    have to share a core.
    """
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > cores():
        torch.set_num_threads(cores())
