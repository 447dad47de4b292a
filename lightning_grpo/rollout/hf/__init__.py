"""Sampling with the policy's own Hugging Face modules."""

from lightning_grpo.rollout.hf.engine import HFEngine

__all__ = ["HFEngine"]
