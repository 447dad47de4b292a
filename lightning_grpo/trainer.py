"""Lightning's `Trainer` with ``precision: auto``, which chooses the fastest precision of the device."""

from typing import Any, Literal

import torch
from lightning import Trainer
from lightning.fabric.connector import _PRECISION_INPUT
from lightning.pytorch.accelerators import Accelerator, CPUAccelerator, CUDAAccelerator, MPSAccelerator

from lightning_grpo.processor import fast_dtype

Precision = Literal["auto"] | _PRECISION_INPUT | None


class GRPOTrainer(Trainer):
    """Lightning's `Trainer`, which also accepts the precision auto."""

    def __init__(self, *args: Any, precision: Precision = None, **kwargs: Any) -> None:
        """Lightning's `Trainer`, whose precision may be auto.

        Args:
            precision: Precision of the arithmetic. auto chooses bf16-mixed on a GPU, or 16-mixed if it has no bfloat16;
                on a CPU bf16-mixed if it multiplies bfloat16 faster than float32, which is measured at start, else
                32-true. By default 32-true.
        """
        super().__init__(*args, precision=resolved(precision, kwargs.get("accelerator", "auto")), **kwargs)


def resolved(precision: Precision, accelerator: str | Accelerator) -> _PRECISION_INPUT | None:
    """Return ``precision``, or for ``auto`` the fastest one of the device of ``accelerator``."""
    if precision != "auto":
        return precision
    kind = _device(accelerator)
    if kind == "cpu":
        return "bf16-mixed" if fast_dtype() == torch.bfloat16 else "32-true"
    if kind == "cuda":
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
    return "32-true"


def _device(accelerator: str | Accelerator) -> str:
    """The kind of device that Lightning chooses for ``accelerator``."""
    if accelerator == "cpu" or isinstance(accelerator, CPUAccelerator):
        return "cpu"
    if CUDAAccelerator.is_available():
        return "cuda"
    if MPSAccelerator.is_available():
        return "mps"
    return "cpu" if accelerator == "auto" else "other"
