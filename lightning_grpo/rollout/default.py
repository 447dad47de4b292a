"""The engine that samples if the user names none."""

import logging

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only

from lightning_grpo.rollout.callback import HFRollout, RolloutCallback, compute_dtype
from lightning_grpo.rollout.vllm.callback import VLLMRollout
from lightning_grpo.rollout.vllm.engine import vllm_version

log = logging.getLogger(__name__)


def default_rollout(trainer: L.Trainer, pl_module: L.LightningModule) -> RolloutCallback:
    """The faster engine on this machine; the choice is logged.

    That is vLLM if it is installed. On a CPU in float32 the policy's own modules sample as fast (most of the time is
    spent in the same matrix products), need no second copy of the weights and start immediately. A policy that is
    sharded over ranks cannot sample with its own modules.
    """
    sharded = isinstance(trainer.strategy, ModelParallelStrategy)
    in_float32_on_a_cpu = not torch.cuda.is_available() and compute_dtype(trainer, pl_module) == torch.float32
    if in_float32_on_a_cpu and not sharded:
        rank_zero_only(log.info)(
            "engine  HFRollout: in float32 on a CPU the policy's own modules sample as fast as vLLM"
        )
        return HFRollout()
    if vllm_version() is None:
        rank_zero_only(log.warning)(
            "vLLM is not installed. The policy's own modules sample instead (HFRollout), which is slower."
        )
        return HFRollout()
    return VLLMRollout()
