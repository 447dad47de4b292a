"""The dtypes that a run on a CPU computes and samples in, compared to what is fast on this processor."""

import torch
from lightning import LightningModule, Trainer

from lightning_grpo.devices import Hardware
from lightning_grpo.processor import GAIN, fast_dtype, slowdown
from lightning_grpo.rollout import HFRollout, RolloutCallback, VLLMRollout
from lightning_grpo.rollout.callback import compute_dtype


def speed_line(trainer: Trainer, pl_module: LightningModule, hardware: Hardware) -> str:
    """Return the line of the start-up summary about the processor's speed."""
    computes = compute_dtype(trainer, pl_module)
    rollout = _rollout(trainer)
    samples = _engine_dtype(rollout, computes)
    engine = f", samples in {_name(samples)} with {type(rollout).__name__}" if samples else ""
    return (
        f"speed   {hardware.flops_fp32 / 1e9:.0f} GFLOP/s in float32, {hardware.flops / 1e9:.0f} in bfloat16; computes "
        f"in {_name(computes)}{engine}"
    )


def slow_choices(trainer: Trainer, pl_module: LightningModule) -> list[str]:
    """Return a warning for each option that selects a dtype in which this processor is slow."""
    computes = compute_dtype(trainer, pl_module)
    low = "16" in str(trainer.precision)
    option = f"trainer.precision is {trainer.precision}" if low else f"model.dtype is {pl_module.dtype_name}"
    remedy = "trainer.precision auto or 32-true" if low else "model.dtype float32"
    warnings = [_warning(option, computes, remedy)]
    samples = _engine_dtype(_rollout(trainer), computes)
    if samples not in (None, computes):
        warnings.append(_warning(f"rollout.dtype is {_name(samples)}", samples, "rollout.dtype auto"))
    return [text for text in warnings if text]


def _warning(option: str, dtype: torch.dtype, remedy: str) -> str:
    if dtype == torch.float32 or slowdown(dtype) < GAIN:
        return ""
    return (
        f"{option}, but matrix products take {slowdown(dtype):.1f} times as long in {_name(dtype)} as in "
        f"{_name(fast_dtype())} on this processor; set {remedy}"
    )


def _rollout(trainer: Trainer) -> RolloutCallback | None:
    return next((callback for callback in trainer.callbacks if isinstance(callback, RolloutCallback)), None)


def _engine_dtype(rollout: RolloutCallback | None, computes: torch.dtype) -> torch.dtype | None:
    """Return the dtype of the engine's products, or None if it is unknown or not on this processor."""
    if isinstance(rollout, VLLMRollout):
        return None if torch.cuda.is_available() else getattr(torch, rollout.engine_args["dtype"])
    return computes if isinstance(rollout, HFRollout) else None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
