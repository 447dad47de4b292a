"""Measures efficiencies on this machine, and stores them for later plans."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import torch

from lightning_grpo.configure.cost import MEASURED, Efficiency, micro_batch_work, optimizer_bytes
from lightning_grpo.configure.measure import Measured, measure_decoding, measure_update
from lightning_grpo.configure.workload import Workload
from lightning_grpo.devices import Hardware
from lightning_grpo.errors import UserError


def default_file() -> Path:
    """Return ``$LIGHTNING_GRPO_CALIBRATION``, or lightning_grpo/calibration.json in the user's cache folder."""
    if given := os.environ.get("LIGHTNING_GRPO_CALIBRATION"):
        return Path(given)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "lightning_grpo" / "calibration.json"


def key(w: Workload, hardware: Hardware) -> str:
    """Return what a measurement is valid for: device, precision, full weights or adapters, engine."""
    return f"{hardware.name} | {w.precision} | {'lora' if w.lora_rank else 'full'} | {w.engine}"


def load(w: Workload, hardware: Hardware, file: Path | None = None) -> Efficiency | None:
    """Return the efficiencies measured for runs like ``w`` on this device, or None.

    Raises:
        UserError: the file exists but was not written by `save`.
    """
    entry = _read(file or default_file()).get(key(w, hardware))
    return None if entry is None else Efficiency(**entry)


def save(w: Workload, hardware: Hardware, efficiency: Efficiency, file: Path | None = None) -> Path:
    """Store ``efficiency`` for runs like ``w`` on this device."""
    file = file or default_file()
    entries = _read(file) | {key(w, hardware): asdict(efficiency)}
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(f".{os.getpid()}")
    draft.write_text(json.dumps(entries, indent=2))
    draft.replace(file)
    return file


def _read(file: Path) -> dict[str, dict]:
    if not file.is_file():
        return {}
    try:
        entries = json.loads(file.read_text())
        for entry in entries.values():
            Efficiency(**entry)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} is not a calibration file ({error}); delete it, or set --calibration to another"
        ) from error
    return entries


def from_update(w: Workload, hardware: Hardware, measured: Measured, before: Efficiency) -> Efficiency:
    """Return the efficiencies that explain a measured update, with those of ``before`` for decoding.

    The bandwidth follows from the optimizer step, unless it is too short to measure (adapters); the rate of matrix
    products follows from the rest of the micro-batch.
    """
    flops, moved = micro_batch_work(w, hardware)
    bandwidth = before.bandwidth
    if measured.optimizer_seconds > 0.05 * measured.micro_batch_seconds:
        bandwidth = optimizer_bytes(w) / (measured.optimizer_seconds * hardware.bandwidth)
    transfers = moved / (hardware.bandwidth * bandwidth)
    products = max(measured.micro_batch_seconds - transfers, 0.2 * measured.micro_batch_seconds)
    peak = hardware.flops_fp32 if w.compute_bytes == 4 else hardware.flops
    return replace(
        before,
        flops=flops / (products * peak),
        bandwidth=bandwidth,
        update_factor=1.0,
        spread=1.3,
        source=MEASURED,
    )


def measure(w: Workload, hardware: Hardware) -> tuple[Efficiency, Measured]:
    """Run two updates with the shapes of ``w`` and, if the policy itself samples, some decoding steps.

    Raises:
        UserError: this machine has no such device.
    """
    device = "cpu" if hardware.is_cpu else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--measure: this machine has no GPU, so {hardware.name} can't be measured; leave --gpu out")
    full = replace(w, mean_fill=1.0)
    measured = measure_update(full, device)
    before = Efficiency.assumed(hardware, w.engine)
    efficiency = from_update(full, hardware, measured, before)
    if w.engine == "hf":
        efficiency = replace(efficiency, token_overhead=measure_decoding(w, hardware, efficiency, device))
    return efficiency, measured
