"""The device of this machine, and devices by name."""

import platform
import re
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import psutil
import torch

from lightning_grpo.devices import GB, GPUS, GiB, Hardware, by_memory, known_gpu
from lightning_grpo.errors import UserError
from lightning_grpo.processor import parallel_speedup, product_rate


def cgroup_limit() -> float:
    """Return the bytes that this container may use, or infinity."""
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
    """Return this CPU, with measured rates of matrix products and copies (about 0.2 s)."""
    x, y = torch.ones(2**24), torch.empty(2**24)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        y.copy_(x)
        best = min(best, time.perf_counter() - start)
    threads = torch.get_num_threads()
    model = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return Hardware(
        name=f"CPU ({model}, {threads} thread{'s' if threads > 1 else ''})",
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
    """Return the first CUDA device, with rates by its name or by its memory; without one, the CPU."""
    if not torch.cuda.is_available():
        return this_cpu()
    properties = torch.cuda.get_device_properties(0)
    base = known_gpu(properties.name) or by_memory(properties.total_memory / GB)
    # memory and compute capability (bfloat16 from 8 on) come from the driver
    return replace(base, name=properties.name, memory=float(properties.total_memory), bf16=properties.major >= 8)


def shared(hardware: Hardware, ranks: int) -> Hardware:
    """Return the share of a CPU that each of ``ranks`` processes has; each rank has a GPU of its own."""
    if not hardware.is_cpu or ranks == 1:
        return hardware
    rates = {name: getattr(hardware, name) / ranks for name in ("memory", "flops", "flops_fp32", "bandwidth")}
    return replace(hardware, **rates)


def find_gpu(gpu: str | float | None) -> Hardware:
    """Return a device by name (``"h100"``), by gigabytes of memory (``24`` or ``"24GB"``), or, for None, ``"auto"``
    or ``"cpu"``, that of this machine.

    Raises:
        UserError: an unknown name; the message lists the known ones.
    """
    if gpu is None or gpu == "auto":
        return this_machine()
    text = str(gpu).strip().lower()
    if text == "cpu":
        return this_cpu()
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:gi?b?)?", text):
        gb = float(match[1])
        if not 4 <= gb <= 1000:
            raise UserError(f"--gpu {gpu}: no accelerator has {gb:g} GB of memory; set a number from 4 to 1000")
        return by_memory(gb)
    if text in GPUS:
        return GPUS[text]
    if known := known_gpu(text):
        return known
    raise UserError(
        f"--gpu {gpu}: unknown device; set one of {', '.join(GPUS)}, cpu, auto (the device of this machine), or the "
        "memory in gigabytes (for example 24)"
    )
