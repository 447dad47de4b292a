"""What a forward pass keeps for its backward, measured without memory: the model's own layers on fake tensors.

Fake tensors have shapes and types but no storage, so a 70B model at 32k tokens costs as little as a small one. One and
two layers are run at the planned size; every further layer keeps what the second one did.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import ceil

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._subclasses import FakeTensorMode
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig
from transformers.integrations import moe

from lightning_grpo.configure.shape import ModelShape, with_layers
from lightning_grpo.configure.workload import Workload
from lightning_grpo.policy.attention import NAME as ATTENTION
from lightning_grpo.policy.attention import attention_for


@dataclass(frozen=True)
class Activations:
    """Bytes that the trunk's forward of one micro-batch keeps."""

    layer: float
    """Of each layer, its low-precision weight copies included."""
    ends: float
    """Of embedding, final norm, masks and rotary tables."""


@contextlib.contextmanager
def saved_bytes(weights: set[int]) -> Iterator[dict[int, int]]:
    """Collects {storage: bytes} of all that autograd keeps inside, the storages in ``weights`` left out."""
    saved: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in weights:
            saved[key] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def _kept(shape: ModelShape, layers: int, rows: int, prompts: int, P: int, T: int, settings: tuple) -> int:
    attention, precision, dtype, rank, targets = settings
    low = torch.float16 if precision.startswith("16") else torch.bfloat16
    autocast = torch.autocast("cpu", dtype=low) if precision.endswith("mixed") else contextlib.nullcontext()
    with torch.device("meta"):
        config = with_layers(shape.config, layers)
        kind = getattr(torch, dtype)
        model = _build(config, kind, attention).train()
        if rank:
            chosen = targets if isinstance(targets, str) else list(targets)
            get_peft_model(model, LoraConfig(r=rank, target_modules=chosen, task_type="CAUSAL_LM"))
    with FakeTensorMode(), _fake_experts():
        _move_to_cpu(model)
        weights = {p.untyped_storage()._cdata for p in model.parameters()}
        with saved_bytes(weights) as saved, autocast:
            _forward(model.base_model, rows, prompts, P, T)
        return sum(saved.values())


def _build(config: PreTrainedConfig, dtype: torch.dtype, attention: str | None) -> nn.Module:
    """With the model's own attention if it takes none by name."""
    attention = attention if attention_for(config, ATTENTION) else None
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)


@contextlib.contextmanager
def _fake_experts() -> Iterator[None]:
    """Experts by transformers' own grouped product, which keeps what torch's does and has a form without data."""
    real = moe._can_use_grouped_mm
    moe._can_use_grouped_mm = lambda input, weight, offs: False
    try:
        yield
    finally:
        moe._can_use_grouped_mm = real


def _forward(trunk: nn.Module, rows: int, prompts: int, P: int, T: int) -> None:
    """As the trainer runs it: rows of prompt and completion, or each prompt once into a cache shared by its rows."""
    ids = torch.zeros(rows, P + T, dtype=torch.long)
    if prompts == rows:
        trunk(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        return
    cache = DynamicCache(config=trunk.config)
    shared = ids[:prompts, :P]
    trunk(input_ids=shared, attention_mask=torch.ones_like(shared), past_key_values=cache, use_cache=True)
    cache.batch_select_indices(torch.zeros(rows, dtype=torch.long))
    trunk(input_ids=ids[:, P:], attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True)


def _move_to_cpu(model: nn.Module) -> None:
    """From meta to fake tensors (autocast doesn't know meta). `Module.to` swaps storages, which fake ones can't."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(
                    torch.empty(p.shape, dtype=p.dtype), requires_grad=p.requires_grad
                )
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


class Untraceable(ValueError):
    """A model's layers can't run without data, so that nothing can be predicted of it."""


@cache
def _activations(shape: ModelShape, *sizes) -> Activations:
    try:
        one, two = (_kept(shape, layers, *sizes) for layers in (1, 2))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise Untraceable(
            f"{shape.name}: memory and time can't be predicted, since its layers don't run on tensors without data "
            f"({type(error).__name__}: {reason})"
        ) from error
    return Activations(layer=two - one, ends=max(0, 2 * one - two))


def activations(w: Workload, attention: str = "sdpa") -> Activations:
    """What the forward of one micro-batch of ``w`` keeps, with transformers' attention of this name."""
    rows = w.micro_batch_size
    prompts = ceil(rows / w.num_generations) if w.shares_prompt else rows
    settings = (attention, w.precision, w.dtype, w.lora_rank, w.lora_targets)
    return _activations(w.shape, rows, prompts, w.prompt_length, w.completion_length, settings)
