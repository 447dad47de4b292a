"""Engines: what samples from the policy, and how its weights get there."""

from lightning_grpo.rollout.callback import HFRollout, RolloutCallback, eos_token_ids
from lightning_grpo.rollout.default import default_rollout
from lightning_grpo.rollout.hf import HFEngine
from lightning_grpo.rollout.proof import Mismatch, Tolerance, WeightSyncError, mismatch
from lightning_grpo.rollout.seeds import rollout_seeds
from lightning_grpo.rollout.server_engine import ServerEngine
from lightning_grpo.rollout.server_rollout import VLLMProcessRollout, VLLMServerRollout
from lightning_grpo.rollout.sync import SyncedEngine, SyncReport
from lightning_grpo.rollout.types import Completion, Engine, FinishReason, OnGroup, Rollout, Sampling
from lightning_grpo.rollout.vllm_engine import VLLMEngine
from lightning_grpo.rollout.vllm_rollout import VLLMRollout
from lightning_grpo.rollout.weights import adapter_weights, policy_weights

__all__ = [
    "Completion",
    "Engine",
    "FinishReason",
    "HFEngine",
    "HFRollout",
    "Mismatch",
    "OnGroup",
    "Rollout",
    "RolloutCallback",
    "Sampling",
    "ServerEngine",
    "SyncReport",
    "SyncedEngine",
    "Tolerance",
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
