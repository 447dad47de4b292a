"""What a device holds and how fast it is, and a table of known GPUs.

Rates are dense, without sparsity: bfloat16 tensor-core FLOP/s (float16 where a card has no bfloat16), device-memory
bytes/s, bytes. Source: the vendors' data sheets.
"""

from dataclasses import dataclass

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
