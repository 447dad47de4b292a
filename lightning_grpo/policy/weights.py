"""The policy's weights for an engine: one whole tensor at a time, under Hugging Face names."""

from collections.abc import Iterator

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from lightning_grpo.errors import UserError


def policy_weights(policy: PreTrainedModel | PeftModel) -> Iterator[tuple[str, Tensor]]:
    """Stream the policy's parameters, in the order of its layers, without a second copy of the model.

    LoRA adapters are merged tensor by tensor into what is yielded, never into the policy. Sharded parameters are
    gathered one by one: every rank must consume the stream in step. A parameter that two modules share (a tied
    output head) comes once, under the name of the first.

    Args:
        policy: a causal language model of transformers, or a LoRA model around one.

    Yields:
        The name that the parameter has in the model's checkpoint, and the parameter, detached, on its own device
        and in its own dtype. It may share the policy's storage: copy before writing to it.

    Raises:
        UserError: the adapter does not simply add to the weight (DoRA, LoRA with a bias, or another method than
            LoRA).
    """
    if isinstance(policy, PeftModel):
        if policy.active_peft_config.is_prompt_learning or policy.active_peft_config.peft_type != "LORA":
            raise UserError(
                f"the adapter is {policy.active_peft_config.peft_type}; only LoRA can be given to an engine"
            )
        policy = policy.get_base_model()
    given: set[int] = set()
    with torch.no_grad():
        for prefix, module in policy.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) in given:
                    continue
                given.add(id(parameter))
                full_name = _checkpoint_name(f"{prefix}.{name}" if prefix else name)
                if full_name is not None:
                    yield full_name, _merged(policy, prefix, name, parameter)


def adapter_weights(policy: PreTrainedModel | PeftModel) -> Iterator[tuple[str, Tensor]]:
    """Stream the policy's LoRA adapter alone, for an engine that holds the base model itself.

    Yields:
        ``base_model.model.LAYER.lora_A.weight``, a copy of A [r, in], and ``….lora_B.weight``, alpha / r · B [out, r]
        in float32: with the scaling inside, an engine that scales once more holds other bits than were sent. Shards
        are gathered as in `policy_weights`.

    Raises:
        UserError: the policy is not a base model with a single plain LoRA adapter on linear layers.
    """
    if not isinstance(policy, PeftModel):
        raise UserError("the policy has no adapter; give the engine its weights instead")
    others = [name for name, p in policy.named_parameters() if p.requires_grad and "lora_" not in name]
    if others or len(policy.active_adapters) != 1:
        raise UserError(
            f"an engine takes one adapter and nothing beside it, but active adapters are {policy.active_adapters} and "
            f"{len(others)} other parameters train ({', '.join(others[:4])}); send merged weights instead"
        )
    (adapter,) = policy.active_adapters
    for name, layer in policy.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        _require_plain(layer, name, adapter)
        if layer.merged or adapter not in layer.lora_A:
            raise UserError(f"{name} is merged, or no linear layer; send merged weights instead")
        A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        yield f"base_model.model.{name}.lora_A.weight", whole(A.detach()).clone()
        yield f"base_model.model.{name}.lora_B.weight", whole(B.detach()).float() * layer.scaling[adapter]


def write_counters(policy: nn.Module) -> tuple[tuple[int, int], ...]:
    """Each parameter's address and the count of in-place writes to it, which torch keeps; microseconds per parameter.

    They differ after an optimizer step, ``load_state_dict``, pruning, or a parameter that was replaced. A write through
    ``parameter.data``, which torch does not count, shows only in the bits.
    """
    tensors = (p.to_local() if isinstance(p, DTensor) else p for p in policy.parameters())
    return tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor; gathered if this rank has only a shard, which is collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _checkpoint_name(name: str) -> str | None:
    """The name without the wrappers that PEFT puts around modules; None for the adapter's own parameters."""
    parts = name.split(".")
    if any(part.startswith("lora_") for part in parts) or "original_module" in parts:
        return None
    if "modules_to_save" in parts:
        at = parts.index("modules_to_save")
        del parts[at : at + 2]
    return ".".join(part for part in parts if part != "base_layer")


def _merged(policy: nn.Module, prefix: str, name: str, parameter: Tensor) -> Tensor:
    parent_name, _, leaf = prefix.rpartition(".")
    parent = policy.get_submodule(parent_name) if parent_name else policy
    value = whole(parameter.detach())
    if leaf != "base_layer" or name != "weight" or not isinstance(parent, LoraLayer) or parent.merged:
        return value
    for adapter in parent.active_adapters:
        if adapter in parent.scaling:
            value = value + _lora_delta(parent, prefix, adapter).to(value)
    return value


def _lora_delta(layer: LoraLayer, name: str, adapter: str) -> Tensor:
    """scaling · B·A in float32 (LoRA, Hu et al. 2021, equation 3)."""
    _require_plain(layer, name, adapter)
    if adapter in layer.lora_embedding_A:
        A, B = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        return (whole(B.detach()).float() @ whole(A.detach()).float()).T * layer.scaling[adapter]
    A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    delta = whole(B.detach()).float() @ whole(A.detach()).float() * layer.scaling[adapter]
    return delta.T if layer.fan_in_fan_out else delta


def _require_plain(layer: LoraLayer, name: str, adapter: str) -> None:
    if adapter in layer.lora_variant or layer.lora_bias.get(adapter):
        raise UserError(f"adapter {adapter!r} on {name} is not plain LoRA (DoRA, or a bias)")
