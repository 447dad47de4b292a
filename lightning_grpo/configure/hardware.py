"""What a device holds and how fast it is: a table of known GPUs, and the machine at hand.

Rates are dense, without sparsity: bfloat16 tensor-core FLOP/s (float16 where a card has no bfloat16), device-memory
bytes/s, bytes. Source: the vendors' data sheets.
"""

import os
import platform
import re
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil
import torch

from lightning_grpo.errors import UserError

GB = 1e9
GiB = 2**30


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One device (or the host's CPU) as the planner sees it."""

    name: str
    """Name shown to people."""
    memory: float
    """Bytes of device memory."""
    flops: float
    """Dense bf16 FLOP/s."""
    flops_fp32: float
    """Dense fp32 FLOP/s (TF32 left off, as in PyTorch's default)."""
    bandwidth: float
    """Device-memory bytes/s."""
    link: float = 25 * GB
    """Bytes/s between the ranks of one node, and from the trainer to the engine."""
    device: str = "cuda"
    """Torch device type."""
    context: float = 0.9 * GiB
    """Bytes that the driver's context, the libraries' workspaces and fragmentation take."""
    source: str = ""
    """Where the figures come from."""

    @property
    def is_cpu(self) -> bool:
        return self.device == "cpu"


def _gpu(name: str, tflops: float, fp32: float, gb: float, tb_s: float, link: float = 25, source: str = "") -> Hardware:
    return Hardware(
        name=name,
        # Some cards count in 2^30 bytes, others in 10^9; a percent is the driver's.
        memory=0.99 * gb * (GiB if name[:4] in ("A100", "H100", "H200") else GB),
        flops=tflops * 1e12,
        flops_fp32=fp32 * 1e12,
        bandwidth=tb_s * 1e12,
        link=link * GB,
        source=source or "vendor data sheet, dense",
    )


# name → (bf16 dense TFLOP/s, fp32 TFLOP/s, GB, TB/s, link GB/s)
GPUS: dict[str, Hardware] = {
    "a100-40": _gpu("A100 40 GB", 312, 19.5, 40, 1.555, 300),
    "a100": _gpu("A100 80 GB", 312, 19.5, 80, 2.039, 300),
    "h100": _gpu("H100 SXM 80 GB", 989, 67, 80, 3.35, 450),
    "h100-pcie": _gpu("H100 PCIe 80 GB", 756, 51, 80, 2.0, 300),
    "h200": _gpu("H200 141 GB", 989, 67, 141, 4.8, 450),
    "b200": _gpu("B200 192 GB", 2250, 80, 192, 8.0, 900),
    "l40s": _gpu("L40S 48 GB", 362, 91.6, 48, 0.864),
    "l20": _gpu("L20 48 GB", 119.5, 59.8, 48, 0.864),
    "a10": _gpu("A10 24 GB", 125, 31.2, 24, 0.600),
    "l4": _gpu("L4 24 GB", 121, 30.3, 24, 0.300),
    "rtx4090": _gpu("RTX 4090 24 GB", 165, 82.6, 24, 1.008),
    "rtx3090": _gpu("RTX 3090 24 GB", 71, 35.6, 24, 0.936),
    "t4": _gpu("T4 16 GB", 65, 8.1, 16, 0.320, 12, "vendor data sheet; float16: this card has no bfloat16"),
}


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
    """The host's CPU, its rates probed by two small matrix products and a copy (about 0.2 s)."""

    def rate(dtype: torch.dtype) -> float:
        a, b = torch.ones(1024, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        best = float("inf")
        for _ in range(4):
            start = time.perf_counter()
            torch.mm(a, b)
            best = min(best, time.perf_counter() - start)
        return 2 * 1024**3 / best

    x, y = torch.ones(2**24), torch.empty(2**24)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        y.copy_(x)
        best = min(best, time.perf_counter() - start)
    threads = torch.get_num_threads()
    return Hardware(
        name=f"CPU ({platform.machine()}, {threads} thread{'s' if threads > 1 else ''})",
        memory=min(float(psutil.virtual_memory().total), cgroup_limit()),
        flops=rate(torch.bfloat16),
        flops_fp32=rate(torch.float32),
        bandwidth=2 * x.nbytes / best,
        link=x.nbytes / best,
        device="cpu",
        context=0.6 * GiB,
        source="probed here",
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
