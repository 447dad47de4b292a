"""Memory and rates of devices, and a table of known GPUs.

Rates are dense, without sparsity: bfloat16 tensor-core FLOP/s (float16 for cards without bfloat16), and bytes/s of the
device memory. Source: the vendors' data sheets.
"""

import re
from dataclasses import dataclass, replace

GB = 1e9
GiB = 2**30


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One device, or the host's CPU."""

    name: str
    """Name in messages."""
    memory: float
    """Bytes of device memory."""
    flops: float
    """Dense bf16 FLOP/s."""
    flops_fp32: float
    """Dense fp32 FLOP/s, without TF32 (PyTorch's default)."""
    bandwidth: float
    """Device-memory bytes/s."""
    link: float = 25 * GB
    """Bytes/s between the ranks of one node, and from the trainer to the engine."""
    device: str = "cuda"
    """Torch device type."""
    bf16: bool = True
    """Whether it supports matrix products in bfloat16."""
    context: float = 0.9 * GiB
    """Bytes for the driver's context, the libraries' workspaces and fragmentation."""
    source: str = ""
    """Source of the figures."""

    @property
    def is_cpu(self) -> bool:
        return self.device == "cpu"


def _gpu(
    name: str, tflops: float, fp32: float, gb: float, tb_s: float, link: float = 25, *, bf16: bool = True
) -> Hardware:
    return Hardware(
        name=name,
        # some vendors count in 2^30 bytes, others in 10^9; the driver takes a percent
        memory=0.99 * gb * (GiB if name[:4] in ("A100", "H100", "H200") else GB),
        flops=tflops * 1e12,
        flops_fp32=fp32 * 1e12,
        bandwidth=tb_s * 1e12,
        link=link * GB,
        bf16=bf16,
        source="vendor data sheet, dense" if bf16 else "vendor data sheet; float16, since this card has no bfloat16",
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
    "l40": _gpu("L40 48 GB", 181, 90.5, 48, 0.864),
    "l20": _gpu("L20 48 GB", 119.5, 59.8, 48, 0.864),
    "a10": _gpu("A10 24 GB", 125, 31.2, 24, 0.600),
    "l4": _gpu("L4 24 GB", 121, 30.3, 24, 0.300),
    "rtx4090": _gpu("RTX 4090 24 GB", 165, 82.6, 24, 1.008),
    "rtx3090": _gpu("RTX 3090 24 GB", 71, 35.6, 24, 0.936),
    "t4": _gpu("T4 16 GB", 65, 8.1, 16, 0.320, 12, bf16=False),
}


def known_gpu(name: str) -> Hardware | None:
    """Return the card of this name, as PyTorch or a person writes it (``NVIDIA A100-SXM4-40GB``, ``h100``).

    None for any other card, even if its name contains a known one (RTX A1000, H100 NVL), and for a part of a card
    (MIG).
    """
    words = re.findall(r"[a-z0-9]+", name.lower())
    plain = re.sub(r"(\d+) gb\b", r"\1gb", " ".join(words))
    size = re.findall(r"\b(\d+)gb\b", plain)
    words = [word for word in re.sub(r"\b\d+gb\b", "", plain).split() if word not in ("nvidia", "geforce", "tesla")]
    model = "".join(word for word in words if not re.fullmatch(r"sxm\d?|hbm\d?e?", word))
    if model == "a100pcie":
        model = "a100"
    keys = {re.sub("[^a-z0-9]", "", key): key for key in GPUS}
    if model not in keys or len(size) > 1:
        return None
    cards = [GPUS[key] for key in GPUS if key == keys[model] or key.startswith(f"{keys[model]}-4")]
    if not size:
        return GPUS[keys[model]]
    near = [card for card in cards if abs(card.memory / GB - float(size[0])) <= 0.1 * float(size[0])]
    return near[0] if near else None


def by_memory(gb: float) -> Hardware:
    """Return the slowest known card with about this much memory (within 25 %), with exactly ``gb`` gigabytes."""
    near = [gpu for gpu in GPUS.values() if abs(gpu.memory / GB - gb) <= 0.25 * gb] or list(GPUS.values())
    card = min(near, key=lambda gpu: gpu.bandwidth)
    return replace(card, name=f"{gb:g} GB GPU (rates of {card.name})", memory=gb * GB)
