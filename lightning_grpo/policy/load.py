"""Loading of the tokenizer, the policy (full or LoRA) and its frozen reference."""

import copy
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any, Literal, cast

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
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
from lightning_grpo.policy.files import read_json, unreadable
from lightning_grpo.policy.lora import LoRA, with_adapters
from lightning_grpo.policy.pretrained import InMemory, Pretrained
from lightning_grpo.policy.quantized import compute_alike, nf4

log = logging.getLogger(__name__)

Policy = PreTrainedModel | PeftModel
"""What is trained: a model of transformers, or one of PEFT around it."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def compute_dtype_of(precision: str, parameters: torch.dtype) -> torch.dtype:
    """The dtype of matrix products under Lightning's ``precision``, for parameters of this dtype."""
    if precision.startswith("bf16"):
        return torch.bfloat16
    return torch.float16 if precision.startswith("16") else parameters


def load_tokenizer(model: str | Pretrained) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model.

    Raises:
        UserError: the folder or hub name has no readable tokenizer.
    """
    model = Pretrained.of(model)
    options = model.options()
    try:
        return AutoTokenizer.from_pretrained(model.name, **options)
    except Exception as error:
        raise unreadable("tokenizer", model.name, error) from error


def load_config(model: str | Pretrained, *, dropout: bool = False) -> PreTrainedConfig:
    """Load the configuration of a model. Unless ``dropout`` is True, all dropout is disabled.

    Dropout would cause differences between the log-probs of scoring and of the update, and a ratio other than 1.

    Raises:
        UserError: the folder or hub name has no readable configuration, or the model is not causal.
    """
    model = Pretrained.of(model)
    config = read_config(model)
    require_causal(model.name, config)
    for name, value in model.configured(config).items():
        setattr(config, name, value)
    if not dropout:
        _switch_off_dropout(config)
    return config


def read_config(model: Pretrained) -> PreTrainedConfig:
    """Return the configuration of any model as it was saved.

    Raises:
        UserError: the folder or hub name has no readable configuration.
    """
    options = model.options()
    try:
        return AutoConfig.from_pretrained(model.name, **options)
    except Exception as error:
        raise unreadable("config.json", model.name, error) from error


def _switch_off_dropout(config: PreTrainedConfig) -> None:
    """Disable dropout in the configuration and in nested ones, such as those of a text and a vision model."""
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            _switch_off_dropout(value)
        elif isinstance(value, float) and (name.endswith(("dropout", "dropout_prob", "pdrop")) or name == "layerdrop"):
            setattr(config, name, 0.0)


def load_generation_config(model: str | Pretrained, config: PreTrainedConfig) -> GenerationConfig:
    """Load generation_config.json, or the generation options in config.json if there is no such file.

    Raises:
        UserError: the file can't be read.
    """
    model = Pretrained.of(model)
    read_json(model.name, "generation_config.json")
    try:
        return GenerationConfig.from_pretrained(model.name, **model.options())
    except OSError:
        return GenerationConfig.from_model_config(config)


def load_policy(
    model: str | Pretrained,
    *,
    dtype: str = "float32",
    lora: LoRA | None = None,
    gradient_checkpointing: bool = False,
    attn_implementation: str = ATTENTION,
    head_in_float32: bool = False,
    from_scratch: bool = False,
    quantization: Literal["nf4"] | None = None,
    seed: int = 0,
) -> Policy:
    """Load a causal language model for training, in training mode.

    Args:
        model: the checkpoint, or its folder or hub name.
        dtype: dtype of the parameters. In float32, small learning rates are not lost to rounding.
        lora: adapters to train instead of all weights.
        gradient_checkpointing: recompute activations in the backward pass.
        attn_implementation: name of the attention in transformers. The default is SDPA, replaced by
            `lightning_grpo.policy.attention` if that is faster; models that support neither use the default of
            transformers.
        head_in_float32: compute the logits in float32 whatever the precision.
        from_scratch: use random weights with the folder's configuration instead of its checkpoint.
        quantization: store the weights of linear layers in 4 bits. They can't be trained; ``lora`` can.
        seed: seed of the random weights and of a new adapter.

    Raises:
        UserError: the dtype is unknown, the model can't be found or read, or its weights are incomplete or not finite.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; set one of {', '.join(DTYPES)}")
    model = Pretrained.of(model)
    if model.trust_remote_code:
        log.info("model %s: its own Python code is run (trust_remote_code)", model.name)
    config = load_config(model)
    generation_config = load_generation_config(model, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options: dict[str, Any] = {
            "dtype": DTYPES[dtype],
            "attn_implementation": attention_for(config, attn_implementation),
        }
        options |= {name: value for name, value in model.kwargs.items() if not hasattr(config, name)}
        if quantization is not None:
            if from_scratch or isinstance(model, InMemory):
                cause = "from_scratch is true" if from_scratch else "model is an object"
                raise UserError(f"quantization is {quantization}, but {cause}; set model to a checkpoint's folder")
            options["quantization_config"] = nf4()
        with errors_named(model.name, attn_implementation):
            if isinstance(model, InMemory):
                if from_scratch:
                    raise UserError("from_scratch is true, but model is an object that has weights; leave it unset")
                base = _taken(model, **options)
            else:
                build = build_model if from_scratch else load_weights
                base = build(config, model, **options)
        if quantization is not None:
            compute_alike(base)
        base.generation_config = generation_config
        if head_in_float32:
            compute_head_in_float32(model.name, base)
        policy = base if lora is None else with_adapters(base, lora)
    if gradient_checkpointing:
        enable_gradient_checkpointing(policy)
    return policy.train()


def _taken(model: InMemory, *, dtype: torch.dtype, attn_implementation: str | None) -> PreTrainedModel:
    """Return a model in memory as `load_weights` returns one: without dropout, and with this dtype and attention."""
    policy = model.take()
    _refuse_quantized("an object", policy)
    require_finite("an object", policy)
    _switch_off_dropout(policy.config)
    for module in policy.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and name.endswith("dropout"):
                setattr(module, name, 0.0)
    if attn_implementation is not None:
        policy.set_attn_implementation(attn_implementation)
    with full_precision_buffers(policy):
        cast(nn.Module, policy).to(dtype)  # whose type a decorator of transformers hides
    return policy


def build_model(config: PreTrainedConfig, model: Pretrained, **options: Any) -> PreTrainedModel:
    """Return the model that ``config`` of the checkpoint ``model`` describes, with random weights."""
    return AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code, **options)


def enable_gradient_checkpointing(policy: PreTrainedModel | PeftModel) -> None:
    """Recompute the activations of ``policy`` in the backward pass."""
    policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if isinstance(policy, PeftModel):
        policy.enable_input_require_grads()


@contextmanager
def errors_named(model: str, attn_implementation: str) -> Iterator[None]:
    """Raise `UserError`, which names the model or the option, for what transformers raises when it loads weights."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, ImportError, KeyError, SafetensorError, UnpicklingError) as error:
        if "attn_implementation" in str(error) or "FlashAttention" in str(error):
            raise UserError(
                f"attn_implementation is {attn_implementation!r}: {error}; set it to sdpa, or leave it unset"
            ) from error
        raise unreadable("weights", model, error) from error
    except TypeError as error:
        if (unknown := re.search(r"unexpected keyword argument '(\w+)'", str(error))) is None:
            raise
        raise UserError(
            f"model.model.kwargs has {unknown[1]}, which neither the configuration of {model} nor from_pretrained has; "
            "remove it"
        ) from error


def load_weights(
    config: PreTrainedConfig, model: Pretrained, *, kind: Any = AutoModelForCausalLM, **options: Any
) -> PreTrainedModel:
    """Load the weights of a checkpoint with the auto class ``kind``, and check that they are complete and finite."""
    options |= model.options()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # `require_complete` reports missing tensors instead
    try:
        # `require_complete` rejects weights with another shape, and reports both shapes.
        # with ``output_loading_info`` a pair, which transformers does not declare
        loaded: Any = kind.from_pretrained(
            model.name, config=config, ignore_mismatched_sizes=True, output_loading_info=True, **options
        )
        policy, info = loaded
    finally:
        transformers_logging.set_verbosity(verbosity)
    if "quantization_config" not in options:
        _refuse_quantized(model.name, policy)
    require_complete(model.name, info)
    require_finite(model.name, policy)
    return policy


def _refuse_quantized(model: str, policy: PreTrainedModel) -> None:
    if getattr(policy, "is_quantized", False):
        raise UserError(f"model is {model!r}: its weights are quantized; set one in float32, bfloat16 or float16")


def frozen_copy(policy: nn.Module) -> nn.Module:
    """Return a copy of the policy as the reference, in evaluation mode and without gradients."""
    return copy.deepcopy(policy).eval().requires_grad_(False)


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32, whatever the precision of the Trainer."""

    def forward(self, x: Tensor) -> Tensor:
        """The output [..., out] of ``x`` [..., in], in float32."""
        with torch.autocast(x.device.type, enabled=False):
            return functional.linear(x.float(), self.weight.float(), None if self.bias is None else self.bias.float())


def compute_head_in_float32(model: str, policy: PreTrainedModel) -> None:
    """Make the output head of ``policy`` compute its logits in float32 (ScaleRL, arXiv:2510.13786).

    Raises:
        UserError: the head is not a linear layer.
    """
    head = policy.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise UserError(
            f"head_in_float32 is true, but the output head of {model} is a {type(head).__name__}, not a linear layer; "
            "leave it unset"
        )
    head.__class__ = Float32Linear


@contextmanager
def full_precision_buffers(model: nn.Module) -> Iterator[None]:
    """Keep the float32 buffers of ``model`` unchanged while its dtype is converted to 16 bits.

    transformers does the same when it loads a model in 16 bits: rounded rotary frequencies would change positions.
    """
    buffers = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if buffer.dtype == torch.float32
    ]
    yield
    for module, name, buffer in buffers:
        converted = getattr(module, name)
        if converted.dtype.itemsize < buffer.dtype.itemsize:
            setattr(module, name, buffer.to(converted.device))


def base_model(model: nn.Module) -> PreTrainedModel:
    """Return the model within PEFT's wrapper, or ``model`` itself if it has none."""
    unwrap = getattr(model, "get_base_model", None)
    return cast(PreTrainedModel, model) if unwrap is None else unwrap()


def shard(policy: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Shard the parameters over the ranks of ``mesh``; each layer is gathered when it is used (FSDP2)."""
    base = base_model(policy)
    layers = [module for module in policy.modules() if type(module).__name__ in (base._no_split_modules or ())]
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(policy, mesh=mesh)
    return policy
