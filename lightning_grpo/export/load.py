"""A module with a checkpoint's policy, for use without a Trainer."""

from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning import LightningModule

from lightning_grpo.errors import UserError
from lightning_grpo.export.checkpoint import read_checkpoint
from lightning_grpo.export.folder import load_adapter
from lightning_grpo.monitor.checkpoint_files import require_same_weights

M = TypeVar("M", bound=LightningModule)


def no_reward(completions: list[str], **columns: Any) -> list[None]:
    """A reward that applies to no completion."""
    return [None] * len(completions)


def load_module(kind: type[M], checkpoint: str | Path, device: torch.device | str | None = None, **options: Any) -> M:
    """Build a module whose policy is that of a checkpoint, in evaluation mode.

    Args:
        kind: the module's class.
        checkpoint: see `find_checkpoint`.
        device: where the policy is put; None leaves it on the CPU.
        options: of the module, in place of those that the checkpoint records. Rewards are needed only to score.

    Raises:
        UserError: the checkpoint or its base model can't be used, or ``lora`` is not the checkpoint's.
    """
    saved = read_checkpoint(checkpoint, model=options.get("model"))
    if options.get("lora", saved.lora) != saved.lora:
        raise UserError(f"lora is {options['lora']} and was {saved.lora} in {saved.path}; leave it out")
    module = kind(**{"rewards": [no_reward]} | saved.module_options() | options)
    module.configure_model()
    policy: Any = module.policy  # of `GRPOModule`, which imports this package
    if saved.lora is not None:
        load_adapter(policy, saved)
    else:
        require_same_weights(policy.state_dict(), saved.weights, remedy="; set model to its base model")
        policy.load_state_dict(saved.weights)
    if saved.chat_template is not None:
        tokenizer: Any = module.tokenizer
        tokenizer.chat_template = saved.chat_template
    return module.to(device or "cpu").eval()
