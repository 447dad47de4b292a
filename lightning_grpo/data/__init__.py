"""Prompts: their sources, their encoding, and the order in which they are served."""

from lightning_grpo.data.dataset import Source
from lightning_grpo.data.module import PromptDataModule
from lightning_grpo.data.prompts import Prompt, PromptBatch
from lightning_grpo.data.sampling import DifficultySampler, MixtureSampler, PassSampler, Sampler

__all__ = [
    "DifficultySampler",
    "MixtureSampler",
    "PassSampler",
    "Prompt",
    "PromptBatch",
    "PromptDataModule",
    "Sampler",
    "Source",
]
