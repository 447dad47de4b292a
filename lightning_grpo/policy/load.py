"""Loads what is trained: tokenizer, policy (whole or LoRA) and its frozen reference."""

import copy
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from lightning_grpo.errors import UserError
from lightning_grpo.policy.attention import NAME as ATTENTION
from lightning_grpo.policy.attention import attention_for
from lightning_grpo.policy.checks import require_causal, require_complete, require_finite
from lightning_grpo.policy.files import loading_options, read_json, unreadable
from lightning_grpo.ranges import check_ranges

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
    """Share of adapter inputs dropped while training. Above 0, log-probs are
    those of a thinned policy, and not of the one that samples."""
    target_modules: str | list[str] = "all-linear"
    """Which linear layers carry an adapter: names, a regular expression, or all of them."""

    def __post_init__(self) -> None:
        # without an adapter (rank 0), leave lora out
        check_ranges(self, {"rank": "[1, inf)", "alpha": "(0, inf)", "dropout": "[0, 1)"}, prefix="lora.")


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        UserError: the folder or hub name holds none that can be read.
    """
    options = loading_options(model)
    try:
        return AutoTokenizer.from_pretrained(model, **options)
    except Exception as error:
        raise unreadable("tokenizer", model, error) from error


def load_config(model: str, *, dropout: bool = False) -> PreTrainedConfig:
    """The model's configuration, without its weights; unless ``dropout``, every dropout is switched off.

    Dropout would make the log-probs of scoring and of the update differ, and the ratio with them.

    Raises:
        UserError: the folder or hub name holds none that can be read, or that of a model that is not causal.
    """
    options = loading_options(model)
    try:
        config = AutoConfig.from_pretrained(model, **options)
    except Exception as error:
        raise unreadable("config.json", model, error) from error
    require_causal(model, config)
    if not dropout:
        _switch_off_dropout(config)
    return config


def _switch_off_dropout(config: PreTrainedConfig) -> None:
    """In the configuration itself and in those it holds, as of a text and a vision tower."""
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            _switch_off_dropout(value)
        elif isinstance(value, float) and (name.endswith(("dropout", "dropout_prob", "pdrop")) or name == "layerdrop"):
            setattr(config, name, 0.0)


def load_generation_config(model: str, config: PreTrainedConfig) -> GenerationConfig:
    """What generation_config.json says, or, if there is none, what of it stands in config.json.

    Raises:
        UserError: the file can't be read.
    """
    read_json(model, "generation_config.json")
    try:
        return GenerationConfig.from_pretrained(model, **loading_options(model))
    except OSError:
        return GenerationConfig.from_model_config(config)


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
            `lightning_grpo.policy.attention` does faster, or transformers' choice for models that can't be given
            either.
        from_scratch: random weights by the folder's configuration instead of its checkpoint.
        seed: of the random weights and of a new adapter.

    Raises:
        UserError: an unknown dtype; a model that can't be found or read; weights that are not complete and finite.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; set one of {', '.join(DTYPES)}")
    config = load_config(model)
    generation_config = load_generation_config(model, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options = {"dtype": DTYPES[dtype], "attn_implementation": attention_for(config, attn_implementation)}
        with _errors_named(model, attn_implementation):
            if from_scratch:
                policy = AutoModelForCausalLM.from_config(config, **options)
            else:
                policy = _load_weights(model, config, **options)
        policy.generation_config = generation_config
        if lora is not None:
            policy = with_adapters(policy, lora)
    if gradient_checkpointing:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if lora is not None:
            policy.enable_input_require_grads()
    return policy.train()


@contextmanager
def _errors_named(model: str, attn_implementation: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, ImportError, KeyError, SafetensorError, UnpicklingError) as error:
        if "attn_implementation" in str(error) or "FlashAttention" in str(error):
            raise UserError(
                f"attn_implementation is {attn_implementation!r}: {error}; set sdpa, or leave it out"
            ) from error
        raise unreadable("weights", model, error) from error


def with_adapters(policy: PreTrainedModel, lora: LoRA) -> PeftModel:
    """Put new adapters into ``policy``.

    Raises:
        UserError: ``lora.target_modules`` names no layers.
    """
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(policy, config)
    except (ValueError, re.error) as error:
        linears = {name.rpartition(".")[2] for name, module in policy.named_modules() if isinstance(module, nn.Linear)}
        raise UserError(
            f"lora.target_modules is {lora.target_modules!r}: {error}; set all-linear, or names among "
            f"{', '.join(sorted(linears))}"
        ) from error


def _load_weights(model: str, config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """The checkpoint's weights, all of them and all finite."""
    options |= loading_options(model)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its report of what is missing; `require_complete` says it
    try:
        # weights of another shape are refused below, with both shapes
        policy, info = AutoModelForCausalLM.from_pretrained(
            model, config=config, ignore_mismatched_sizes=True, output_loading_info=True, **options
        )
    finally:
        transformers_logging.set_verbosity(verbosity)
    if getattr(policy, "is_quantized", False):
        raise UserError(
            f"model is {model!r}: its weights are quantized; set a checkpoint in float32, bfloat16 or float16"
        )
    require_complete(model, info)
    require_finite(model, policy)
    return policy


def frozen_copy(policy: PreTrainedModel) -> PreTrainedModel:
    """The reference of full training: a copy of the policy as it is now, in evaluation mode, without gradients."""
    return copy.deepcopy(policy).eval().requires_grad_(False)


@contextmanager
def full_precision_buffers(model: nn.Module) -> Iterator[None]:
    """Leave the float32 buffers of ``model`` as they are while its dtype is changed to one of 16 bits, as
    transformers does when it loads in that dtype: rounded rotary frequencies would be other positions."""
    kept = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if buffer.dtype == torch.float32
    ]
    yield
    for module, name, buffer in kept:
        now = getattr(module, name)
        if now.dtype.itemsize < buffer.dtype.itemsize:
            setattr(module, name, buffer.to(now.device))


def shard(policy: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Split the parameters over the ranks of ``mesh``, gathered layer by layer where they are used (FSDP2)."""
    base = policy.get_base_model() if isinstance(policy, PeftModel) else policy
    layers = [module for module in policy.modules() if type(module).__name__ in (base._no_split_modules or ())]
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(policy, mesh=mesh)
