"""The policy: everything that depends on transformers and PEFT."""

from lightning_grpo.policy.load import (
    Policy,
    frozen_copy,
    full_precision_buffers,
    load_config,
    load_generation_config,
    load_policy,
    load_tokenizer,
    shard,
)
from lightning_grpo.policy.lora import LoRA
from lightning_grpo.policy.objects import source_of
from lightning_grpo.policy.pretrained import InMemory, Pretrained

__all__ = [
    "InMemory",
    "LoRA",
    "Policy",
    "Pretrained",
    "frozen_copy",
    "full_precision_buffers",
    "load_config",
    "load_generation_config",
    "load_policy",
    "load_tokenizer",
    "shard",
    "source_of",
]
