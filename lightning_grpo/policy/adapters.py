"""The LoRA adapters in a checkpoint, a check that they match those of this run, and what they were before training."""

from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor, nn

from lightning_grpo.errors import UserError
from lightning_grpo.policy.lora import LoRA, default_of


def describe(lora: LoRA | None, names: Set[str], quantization: str | None = None) -> dict[str, Any] | None:
    """Return the description of adapters to store in a checkpoint; ``names`` are those of their weights, and
    ``quantization`` is that of the base model.

    It is None for full weights.
    """
    return None if lora is None else asdict(lora) | {"names": sorted(names), "quantization": quantization}


def check(saved: Mapping[str, Any] | None, lora: LoRA | None, names: Set[str], quantization: str | None = None) -> None:
    """Compare the description from `describe` in a checkpoint with the adapters of this run.

    Raises:
        UserError: weights of the checkpoint would be ignored, or scaled differently than in the run that saved them.
    """
    if saved is None and lora is None:
        return
    if saved is None:
        raise UserError(
            f"the checkpoint has full weights, but lora is set, with rank {lora.rank}: it can't be loaded into "
            "adapters; leave lora unset"
        )
    options = {name: saved[name] for name in ("rank", "alpha", "target_modules")}
    if lora is None:
        raise UserError(f"the checkpoint has only LoRA adapters, but lora is not set; set lora to {options}")
    if quantization != saved.get("quantization"):
        raise UserError(
            f"quantization is {quantization}, but the checkpoint's adapters were trained with "
            f"{saved.get('quantization')}; set it to that"
        )
    if lora.rank != saved["rank"]:
        raise UserError(
            f"lora.rank is {lora.rank}, but the checkpoint's adapters have rank {saved['rank']}; set lora.rank to it"
        )
    if lora.alpha != saved["alpha"]:
        raise UserError(
            f"lora.alpha is {lora.alpha:g}, but the checkpoint's adapters were trained with {saved['alpha']:g}: their "
            f"output would be scaled by {lora.alpha / saved['alpha']:g}; set lora.alpha to {saved['alpha']:g}"
        )
    if lora.adapter is None and saved.get("adapter") is not None:
        raise UserError(
            f"lora.adapter is unset, but the run began with the adapter {saved['adapter']}, which is its reference; "
            "set lora.adapter to it"
        )
    for option in fields(LoRA):
        name = option.name
        if name not in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "options"):
            continue
        # the names of the weights don't show these; checkpoints of earlier versions have the defaults
        was, now = saved.get(name, default_of(option)), getattr(lora, name)
        if was != now:
            raise UserError(
                f"lora.{name} is {now}, but the checkpoint's adapters were trained with {was}; set lora.{name} to it"
            )
    missing, extra = names - set(saved["names"]), set(saved["names"]) - names
    if missing or extra:
        raise UserError(
            f"lora.target_modules is {lora.target_modules!r} and was {saved['target_modules']!r}: the checkpoint lacks "
            f"{len(missing)} adapter weights of this run and has {len(extra)} others, for example "
            f"{min(missing or extra)}; set lora.target_modules to {saved['target_modules']!r}"
        )


def trained_values(policy: nn.Module) -> dict[str, Tensor]:
    """Return copies of the trained parameters by name; of a sharded policy, this rank's shards."""
    return {name: p.detach().clone() for name, p in policy.named_parameters() if p.requires_grad}


@contextmanager
@torch.no_grad()
def with_values(policy: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Give the trained parameters other ``values``, from `trained_values`, inside this context."""
    own = dict(policy.named_parameters())
    current = trained_values(policy)
    try:
        for name, value in values.items():
            own[name].copy_(value)
        yield
    finally:
        for name, value in current.items():
            own[name].copy_(value)
