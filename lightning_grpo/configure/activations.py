"""Activations that a forward pass saves for its backward, measured by running the model's layers on fake tensors.

Fake tensors have shapes and dtypes but no storage, so that a 70B model at 32k tokens takes no memory. One and two
layers are run at the planned size; every further layer saves as much as the second one.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import ceil
from typing import cast

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.integrations import moe

from lightning_grpo.configure.shape import ModelShape, with_layers
from lightning_grpo.configure.workload import Workload
from lightning_grpo.devices import Hardware
from lightning_grpo.policy.attention import NAME as ATTENTION
from lightning_grpo.policy.attention import attention_for
from lightning_grpo.policy.load import DTYPES
from lightning_grpo.policy.lora import LoRA, with_adapters
from lightning_grpo.policy.packing import Layout, PackedRow


@dataclass(frozen=True)
class Activations:
    """Bytes that the trunk saves in one forward pass."""

    layer: float
    """Bytes per layer, including low-precision copies of its weights."""
    ends: float
    """Bytes for embedding, final norm, masks and rotary tables."""


@contextlib.contextmanager
def saved_bytes(weights: set[int]) -> Iterator[dict[int, int]]:
    """Collect {storage: bytes} of what autograd saves in this context, except for the storages in ``weights``."""
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


@dataclass(frozen=True)
class _Settings:
    """Options of a run that determine its activations besides the sizes."""

    attention: str
    dtype: str
    autocast: str | None
    lora_rank: int
    lora_targets: str | tuple[str, ...]


def _saved(shape: ModelShape, layers: int, rows: int, prompts: int, P: int, T: int, settings: _Settings) -> int:
    autocast: contextlib.AbstractContextManager = contextlib.nullcontext()
    if settings.autocast:
        autocast = torch.autocast("cpu", dtype=DTYPES[settings.autocast])
    with torch.device("meta"):
        model = _build(with_layers(shape.config, layers), DTYPES[settings.dtype], settings.attention).train()
        if settings.lora_rank:
            targets = settings.lora_targets
            names = targets if isinstance(targets, str) else list(targets)
            with_adapters(model, LoRA(rank=settings.lora_rank, target_modules=names))
    with FakeTensorMode(), _fake_experts():
        _move_to_cpu(model)
        weights = {p.untyped_storage()._cdata for p in model.parameters()}
        with saved_bytes(weights) as saved, autocast:
            _forward(cast(PreTrainedModel, model.base_model), rows, prompts, P, T)
        return sum(saved.values())


def _build(config: PreTrainedConfig, dtype: torch.dtype, attention: str | None) -> PreTrainedModel:
    """Build the model, with its own attention if the named one is not supported."""
    attention = attention if attention_for(config, ATTENTION) else None
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)


@contextlib.contextmanager
def _fake_experts() -> Iterator[None]:
    """Use transformers' grouped product for experts, which saves as much as torch's and runs on fake tensors."""
    real = moe._can_use_grouped_mm
    moe._can_use_grouped_mm = lambda input, weight, offs: False
    try:
        yield
    finally:
        moe._can_use_grouped_mm = real


def _forward(trunk: PreTrainedModel, rows: int, prompts: int, P: int, T: int) -> None:
    """Run the trunk as the trainer does: on prompts with completions, or on each prompt once for all its rows."""
    if trunk.config._attn_implementation == ATTENTION:
        completions = [len(range(prompt, rows, prompts)) * [T] for prompt in range(prompts)]
        ids = torch.zeros(1, prompts * P + rows * T, dtype=torch.long)
        trunk(**PackedRow(ids, Layout([P] * prompts, completions), ids).inputs())
        return
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
    """Replace meta by fake tensors, since autocast does not support meta, and `Module.to` not fake tensors."""
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
    """The layers of a model don't run on fake tensors, so that its memory and time cannot be predicted."""


@cache
def _activations(shape: ModelShape, *sizes) -> Activations:
    try:
        one, two = (_saved(shape, layers, *sizes) for layers in (1, 2))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise Untraceable(
            f"{shape.name}: memory and time can't be predicted, because its layers don't run on tensors without data "
            f"({type(error).__name__}: {reason})"
        ) from error
    return Activations(layer=two - one, ends=max(0, 2 * one - two))


def packs(w: Workload, hardware: Hardware) -> bool:
    """Return whether the trainer computes micro-batches of ``w`` as one row; see `policy.packing`."""
    return hardware.is_cpu and attention_for(w.shape.config, ATTENTION) == ATTENTION


def activations(w: Workload, *, packed: bool) -> Activations:
    """Return what one forward pass of ``w`` saves, as one row or padded."""
    rows = w.rows_per_pass
    prompts = ceil(rows / w.num_generations) if (w.share_prompt if packed else w.shares_prompt) else rows
    settings = _Settings(
        ATTENTION if packed else "sdpa", w.dtype, w.compute_dtype if w.is_mixed else None, w.lora_rank, w.lora_targets
    )
    return _activations(w.shape, rows, prompts, w.prompt_length, w.completion_length, settings)
