"""Loads what is trained: tokenizer, policy (whole or LoRA) and its frozen reference."""

import copy
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lightning_grpo.attention import NAME as ATTENTION
from lightning_grpo.errors import UserError

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Low-rank adapters instead of whole weights (Hu et al. 2021, arXiv:2106.09685)."""

    rank: int = 16
    """Rank r of each adapter. 1 to 32 is enough for reinforcement learning."""
    alpha: float = 32.0
    """The adapter's output is scaled by alpha / rank."""
    dropout: float = 0.0
    """Share of adapter inputs dropped while training. Above 0 the ratio is noisy even on-policy."""
    target_modules: str | list[str] = "all-linear"
    """Which linear layers carry an adapter: names, a regular expression, or all of them."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"lora.rank is {self.rank}; set 1 or more, or leave lora out to train whole weights")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout is {self.dropout}; set a share in [0, 1)")


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        ValueError: where the folder or hub name holds none.
    """
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise UserError(_not_found("tokenizer", model)) from error


def load_config(model: str):
    """The model's configuration, without its weights, every dropout switched off.

    Dropout would make the log-probs of scoring and of the update differ, and the ratio with them.

    Raises:
        ValueError: where the folder or hub name holds none.
    """
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise UserError(_not_found("config.json", model)) from error
    for name, value in vars(config).items():
        if isinstance(value, float) and (name.endswith(("dropout", "dropout_prob", "pdrop")) or name == "layerdrop"):
            setattr(config, name, 0.0)
    return config


def load_policy(
    model: str,
    *,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    lora: LoRA | None = None,
    gradient_checkpointing: bool = False,
    attn_implementation: str = ATTENTION,
    from_scratch: bool = False,
    seed: int = 0,
) -> PreTrainedModel | PeftModel:
    """Load a causal language model to be trained, in training mode.

    Args:
        model: folder of a Hugging Face checkpoint, or its hub name.
        dtype: of the parameters. float32 keeps master weights that small learning rates can move.
        lora: adapters to train instead of the whole weights.
        gradient_checkpointing: recompute activations in the backward pass.
        attn_implementation: transformers' name of the attention to use; by default its SDPA, but for what
            `lightning_grpo.attention` does faster.
        from_scratch: random weights by the folder's configuration instead of its checkpoint.
        seed: of the random weights and of a new adapter.

    Raises:
        ValueError: for an unknown dtype or a model that can't be found.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; set one of {', '.join(DTYPES)}")
    config = load_config(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if from_scratch:
            policy = AutoModelForCausalLM.from_config(
                config, dtype=DTYPES[dtype], attn_implementation=attn_implementation
            )
        else:
            try:
                policy = AutoModelForCausalLM.from_pretrained(
                    model, config=config, dtype=DTYPES[dtype], attn_implementation=attn_implementation
                )
            except OSError as error:
                raise UserError(_not_found("weights", model)) from error
        if lora is not None:
            policy = get_peft_model(
                policy,
                LoraConfig(
                    r=lora.rank,
                    lora_alpha=lora.alpha,
                    lora_dropout=lora.dropout,
                    target_modules=lora.target_modules,
                    task_type="CAUSAL_LM",
                ),
            )
    if gradient_checkpointing:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if lora is not None:
            policy.enable_input_require_grads()
    return policy.train()


def frozen_copy(policy: PreTrainedModel) -> PreTrainedModel:
    """The reference of full training: a copy of the policy as it is now, in evaluation mode, without gradients."""
    return copy.deepcopy(policy).eval().requires_grad_(False)


def shard(policy: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Split the parameters over the ranks of ``mesh``, gathered layer by layer where they are used (FSDP2)."""
    base = policy.get_base_model() if isinstance(policy, PeftModel) else policy
    layers = [module for module in policy.modules() if type(module).__name__ in (base._no_split_modules or ())]
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(policy, mesh=mesh)


def _not_found(what: str, model: str) -> str:
    folder = Path(model)
    if folder.is_dir():
        held = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        return f"model is {model!r}: that folder has no readable {what} (it holds {held}); set a checkpoint's folder"
    return (
        f"model is {model!r}: no such folder, and no {what} of that name could be loaded from the hub or its cache; "
        "set the folder of a Hugging Face checkpoint, or a hub name that this machine can reach"
    )
