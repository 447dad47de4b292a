"""Engines that sample from the policy, and the sync of its weights to them."""

from lightning_grpo.policy.weights import adapter_weights, policy_weights
from lightning_grpo.rollout.callback import HFRollout, RolloutCallback, eos_token_ids
from lightning_grpo.rollout.default import default_rollout
from lightning_grpo.rollout.engine import Engine
from lightning_grpo.rollout.hf.engine import HFEngine
from lightning_grpo.rollout.seeds import rollout_seeds
from lightning_grpo.rollout.server.callback import VLLMProcessRollout, VLLMServerRollout
from lightning_grpo.rollout.server.engine import ServerEngine
from lightning_grpo.rollout.sync import SyncedEngine, SyncReport
from lightning_grpo.rollout.turns import Turns
from lightning_grpo.rollout.types import (
    COMPLETION_TOKENS,
    PROMPT_TOKENS,
    Completion,
    FinishReason,
    OnGroup,
    Rollout,
    SampleRequest,
    Sampling,
    Turn,
)
from lightning_grpo.rollout.verify import Mismatch, Tolerance, WeightSyncError, mismatch
from lightning_grpo.rollout.vllm.callback import VLLMRollout
from lightning_grpo.rollout.vllm.engine import VLLMEngine

__all__ = [
    "COMPLETION_TOKENS",
    "PROMPT_TOKENS",
    "Completion",
    "Engine",
    "FinishReason",
    "HFEngine",
    "HFRollout",
    "Mismatch",
    "OnGroup",
    "Rollout",
    "RolloutCallback",
    "SampleRequest",
    "Sampling",
    "ServerEngine",
    "SyncReport",
    "SyncedEngine",
    "Tolerance",
    "Turn",
    "Turns",
    "VLLMEngine",
    "VLLMProcessRollout",
    "VLLMRollout",
    "VLLMServerRollout",
    "WeightSyncError",
    "adapter_weights",
    "default_rollout",
    "eos_token_ids",
    "mismatch",
    "policy_weights",
    "rollout_seeds",
]
