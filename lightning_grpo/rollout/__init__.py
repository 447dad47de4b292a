"""Engines: what samples from the policy, and how its weights get there."""

from lightning_grpo.rollout.callback import HFRollout, RolloutCallback, VLLMRollout, default_rollout, eos_token_ids
from lightning_grpo.rollout.hf import HFEngine
from lightning_grpo.rollout.proof import Mismatch, Tolerance, WeightSyncError, mismatch
from lightning_grpo.rollout.seeds import rollout_seeds
from lightning_grpo.rollout.sync import SyncedEngine, SyncReport
from lightning_grpo.rollout.types import Completion, Engine, FinishReason, OnGroup, Rollout, Sampling
from lightning_grpo.rollout.vllm_engine import VLLMEngine
from lightning_grpo.rollout.weights import policy_weights

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
    "SyncReport",
    "SyncedEngine",
    "Tolerance",
    "VLLMEngine",
    "VLLMRollout",
    "WeightSyncError",
    "default_rollout",
    "eos_token_ids",
    "mismatch",
    "policy_weights",
    "rollout_seeds",
]
