"""Engines that sample completions, and the proof that they sample from the policy's current weights."""

from lightning_grpo.rollout.types import Completion, Engine, Rollout, Sampling

__all__ = ["Completion", "Engine", "Rollout", "Sampling"]
