"""The machine at hand, and devices by name."""

import os
import platform
import re
import time
from functools import cache
from pathlib import Path

import psutil
import torch

from lightning_grpo.configure.devices import GB, GPUS, GiB, Hardware
from lightning_grpo.errors import UserError
from lightning_grpo.processor import parallel_speedup, product_rate


def cgroup_limit() -> float:
    """Bytes this container may use; infinite without a limit."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            return float(text)
    return float("inf")


@cache
def this_cpu() -> Hardware:
    """The host's CPU: its rates in matrix products, and in copying, as measured here (about 0.2 s)."""
    x, y = torch.ones(2**24), torch.empty(2**24)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        y.copy_(x)
        best = min(best, time.perf_counter() - start)
    threads = torch.get_num_threads()
    kind = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return Hardware(
        name=f"CPU ({kind}, {threads} thread{'s' if threads > 1 else ''})",
        memory=min(float(psutil.virtual_memory().total), cgroup_limit()),
        flops=parallel_speedup() * product_rate(torch.bfloat16),
        flops_fp32=parallel_speedup() * product_rate(torch.float32),
        bandwidth=2 * x.nbytes / best,
        link=x.nbytes / best,
        device="cpu",
        context=0.6 * GiB,
        source="measured here",
    )


def this_machine() -> Hardware:
    """The first CUDA device, known by name or by its properties; else the CPU."""
    if not torch.cuda.is_available():
        return this_cpu()
    properties = torch.cuda.get_device_properties(0)
    known = _match(properties.name)
    base = GPUS[known] if known else by_memory(properties.total_memory / GB)
    return Hardware(**{**base.__dict__, "name": properties.name, "memory": float(properties.total_memory)})


def _match(name: str) -> str | None:
    plain = re.sub(r"[^a-z0-9]", "", name.lower().replace("nvidia", "").replace("geforce", ""))
    names = sorted(GPUS, key=len, reverse=True)
    return next((key for key in names if re.sub("[^a-z0-9]", "", key) in plain), None)


def by_memory(gb: float) -> Hardware:
    """The slowest known card with about this much memory (within 25 %), given exactly ``gb`` gigabytes."""
    near = [gpu for gpu in GPUS.values() if abs(gpu.memory / GB - gb) <= 0.25 * gb] or list(GPUS.values())
    card = min(near, key=lambda gpu: gpu.bandwidth)
    return Hardware(**{**card.__dict__, "name": f"{gb:g} GB GPU (rates of {card.name})", "memory": gb * GB})


def find_gpu(gpu: str | float | None) -> Hardware:
    """A device by name (``"h100"``), by gigabytes of memory (``24`` or ``"24GB"``), or, for None, ``"auto"`` or
    ``"cpu"``, what is in this machine.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    if gpu is None or gpu == "auto":
        return this_machine()
    text = str(gpu).strip().lower()
    if text == "cpu":
        return this_cpu()
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:gi?b?)?", text):
        gb = float(match[1])
        if not 4 <= gb <= 1000:
            raise UserError(f"--gpu {gpu}: {gb:g} GB of memory is no accelerator's; set between 4 and 1000")
        return by_memory(gb)
    if text in GPUS:
        return GPUS[text]
    if known := _match(text):
        return GPUS[known]
    raise UserError(
        f"--gpu {gpu}: unknown. Set one of {', '.join(GPUS)}, cpu, auto (what is in this machine), "
        "or the memory in gigabytes (for example 24)"
    )


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
