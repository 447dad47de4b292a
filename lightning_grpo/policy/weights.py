"""Streams of the policy's weights for engines: one unsharded tensor at a time, with Hugging Face names."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.lora.variants import DoraLinearVariant
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_grpo.errors import UserError
from lightning_grpo.policy.load import Policy, base_model
from lightning_grpo.policy.quantized import dequantized


def policy_weights(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """Stream the policy's parameters in the order of its layers, without a second copy of the model.

    LoRA adapters are merged into the yielded tensors, one at a time, and never into the policy. Weights in 4 bits
    become the values that they stand for, in the dtype that they were quantized from. Sharded parameters are gathered
    one by one, so all ranks must iterate together. A parameter that two modules share (a tied output head) is
    yielded once, with the name in the first module.

    Args:
        policy: a causal language model of transformers, or a LoRA model around one.

    Yields:
        The parameter's name in the model's checkpoint, and the parameter, detached, with its device and dtype. It may
        share the policy's storage: copy it before writing to it.

    Raises:
        UserError: the adapter does more than change a weight (LoRA with a bias, or another method than LoRA).
    """
    if isinstance(policy, PeftModel):
        if policy.active_peft_config.is_prompt_learning or policy.active_peft_config.peft_type != "LORA":
            raise UserError(
                f"the adapter is {policy.active_peft_config.peft_type}; only LoRA adapters can be sent to an engine"
            )
        require_untied_adapters(policy)
        policy = base_model(policy)
    yielded: set[int] = set()
    with torch.no_grad():
        for prefix, module in policy.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) in yielded:
                    continue
                yielded.add(id(parameter))
                full_name = _checkpoint_name(f"{prefix}.{name}" if prefix else name)
                if full_name is not None:
                    yield full_name, _merged(policy, prefix, name, parameter)


def adapter_weights(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """Stream only the policy's LoRA adapter, for an engine that has its own copy of the base model.

    Yields:
        ``base_model.model.LAYER.lora_A.weight``, a copy of A [r, in], and ``….lora_B.weight``, alpha / r · B [out, r]
        in float32. The scaling is included, so that the engine stores exactly the bits that are sent. Shards are
        gathered as in `policy_weights`.

    Raises:
        UserError: the policy is not a base model with a single plain LoRA adapter on linear layers.
    """
    if not isinstance(policy, PeftModel):
        raise UserError("the policy has no adapter; send its weights instead")
    others = [name for name, p in policy.named_parameters() if p.requires_grad and "lora_" not in name]
    if others or len(policy.active_adapters) != 1:
        raise UserError(
            f"an engine accepts only one adapter, but the active adapters are {policy.active_adapters}, and "
            f"{len(others)} other parameters are trained ({', '.join(others[:4])}); send merged weights instead"
        )
    require_untied_adapters(policy)
    (adapter,) = policy.active_adapters
    for name, layer in policy.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        _require_plain(layer, name, adapter)
        if layer.merged or adapter not in layer.lora_A:
            raise UserError(f"{name} is merged or is not a linear layer; send merged weights instead")
        A, B = (cast(nn.Linear, part[adapter]).weight for part in (layer.lora_A, layer.lora_B))
        yield f"base_model.model.{name}.lora_A.weight", whole(A.detach()).clone()
        yield f"base_model.model.{name}.lora_B.weight", whole(B.detach()).float() * layer.scaling[adapter]


def require_untied_adapters(policy: Policy) -> None:
    """Raise `UserError` if PEFT adapts or copies the input embedding or the output head, and the model ties them.

    An engine has one tensor for both, but only one of them has the adapter.
    """
    if not isinstance(policy, PeftModel):
        return
    model = base_model(policy)
    if not model.config.get_text_config().tie_word_embeddings:
        return
    ends = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    for name, module in model.named_modules():
        if id(module) in ends and isinstance(module, LoraLayer | ModulesToSaveWrapper):
            raise UserError(
                f"lora adapts {name}, but the model ties the weights of its input embedding and output head "
                "(tie_word_embeddings), so an engine would apply the adapter to both; remove it from "
                "lora.target_modules and lora.modules_to_save, or set the rollout to HFRollout"
            )


def write_counters(policy: nn.Module) -> tuple[tuple[int, int], ...]:
    """The address of each parameter and torch's count of in-place writes to it. Takes microseconds per parameter.

    They change with an optimizer step, ``load_state_dict``, pruning, or the replacement of a parameter. Torch does not
    count writes through ``parameter.data``, so these are not detected.
    """
    tensors = (p.to_local() if isinstance(p, DTensor) else p for p in policy.parameters())
    return tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)


def whole(tensor: Tensor) -> Tensor:
    """The unsharded tensor. If this rank has only a shard, all ranks must call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _checkpoint_name(name: str) -> str | None:
    """The name without PEFT's wrapper modules; None for parameters of the adapter."""
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
    value = dequantized(parameter) if hasattr(parameter, "quant_state") else whole(parameter.detach())
    if leaf != "base_layer" or name != "weight" or not isinstance(parent, LoraLayer) or parent.merged:
        return value
    for adapter in parent.active_adapters:
        if adapter in parent.scaling:
            value = _with_adapter(value, parent, prefix, adapter)
    return value


def _with_adapter(weight: Tensor, layer: LoraLayer, name: str, adapter: str) -> Tensor:
    """The weight W with the adapter: W + scaling · B·A (LoRA, Hu et al. 2021, equation 3), in which each row has the
    norm in the magnitude vector if the adapter has one (DoRA, arXiv:2402.09353, equation 5)."""
    if type(layer.lora_variant.get(adapter)) is not DoraLinearVariant:  # not a subclass, such as for embeddings
        _require_plain(layer, name, adapter)
        return weight + _lora_delta(layer, adapter).to(weight)
    merged = weight.float() + _lora_delta(layer, adapter)
    rows = 0 if cast(Any, layer).fan_in_fan_out else 1
    magnitude = whole(cast(Tensor, layer.lora_magnitude_vector[adapter].weight).detach()).float()
    return (merged * (magnitude.unsqueeze(rows) / merged.norm(dim=rows, keepdim=True))).to(weight)


def _lora_delta(layer: LoraLayer, adapter: str) -> Tensor:
    """scaling · B·A in float32, in the layout of the layer's weight."""
    if adapter in layer.lora_embedding_A:
        A, B = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        return (whole(B.detach()).float() @ whole(A.detach()).float()).T * layer.scaling[adapter]
    A, B = (cast(nn.Linear, part[adapter]).weight for part in (layer.lora_A, layer.lora_B))
    delta = whole(B.detach()).float() @ whole(A.detach()).float() * layer.scaling[adapter]
    return delta.T if cast(Any, layer).fan_in_fan_out else delta


def _require_plain(layer: LoraLayer, name: str, adapter: str) -> None:
    if adapter in layer.lora_variant or layer.lora_bias.get(adapter) or isinstance(layer, ParamWrapper):
        raise UserError(
            f"adapter {adapter!r} on {name} is no plain LoRA of a layer's weight (DoRA of an embedding, a bias of its "
            "own, …), and an engine can't get it; set the rollout to HFRollout"
        )
