"""The engine that samples if the user names none."""

import logging

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only

from lightning_grpo.processor import fast_dtype
from lightning_grpo.rollout.callback import HFRollout, RolloutCallback, compute_dtype
from lightning_grpo.rollout.vllm.callback import VLLMRollout
from lightning_grpo.rollout.vllm.engine import vllm_version

log = logging.getLogger(__name__)


def default_rollout(trainer: L.Trainer, pl_module: L.LightningModule) -> RolloutCallback:
    """The faster engine on this machine; the choice and its reason are logged.

    On GPUs that is vLLM. On a CPU it is vLLM if the policy computes in bfloat16 and the processor is measured to be
    faster in it; otherwise matrix products take most of the time in both engines, and the policy's own modules need no
    second copy of the weights and start immediately. A policy that is sharded over ranks cannot sample with its own
    modules. The measurement is a ratio far from its threshold, so that all ranks choose the same engine, and a resumed
    run chooses the one that it had.
    """
    dtype = compute_dtype(trainer, pl_module)
    reason = "it is the faster engine on GPUs"
    if isinstance(trainer.strategy, ModelParallelStrategy):
        reason = "a sharded policy cannot sample with its own modules"
    elif not torch.cuda.is_available():
        if dtype != torch.bfloat16 or fast_dtype() != torch.bfloat16:
            _log("HFRollout", f"in {_name(dtype)} the policy's own modules sample as fast as vLLM on this processor")
            return HFRollout()
        reason = "it is the faster engine in bfloat16 on this processor"
    if vllm_version() is None:
        rank_zero_only(log.warning)(
            "vLLM is not installed. The policy's own modules sample instead (HFRollout), which is slower."
        )
        return HFRollout()
    _log("VLLMRollout", reason)
    return VLLMRollout()


def _log(engine: str, reason: str) -> None:
    rank_zero_only(log.info)(f"engine  {engine}: {reason}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
