"""The LoRA adapters in a checkpoint, and a check that they match those of this run."""

from collections.abc import Mapping, Set
from dataclasses import asdict
from typing import Any

from lightning_grpo.errors import UserError
from lightning_grpo.policy.load import LoRA


def describe(lora: LoRA | None, names: Set[str]) -> dict[str, Any] | None:
    """Return the description of adapters to store in a checkpoint; ``names`` are those of their weights.

    It is None for full weights.
    """
    return None if lora is None else asdict(lora) | {"names": sorted(names)}


def check(saved: Mapping[str, Any] | None, lora: LoRA | None, names: Set[str]) -> None:
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
    if lora.rank != saved["rank"]:
        raise UserError(
            f"lora.rank is {lora.rank}, but the checkpoint's adapters have rank {saved['rank']}; set lora.rank to it"
        )
    if lora.alpha != saved["alpha"]:
        raise UserError(
            f"lora.alpha is {lora.alpha:g}, but the checkpoint's adapters were trained with {saved['alpha']:g}: their "
            f"output would be scaled by {lora.alpha / saved['alpha']:g}; set lora.alpha to {saved['alpha']:g}"
        )
    for name in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern"):
        # the names of the weights don't show these; checkpoints of earlier versions have the defaults
        was, now = saved.get(name, getattr(LoRA(), name)), getattr(lora, name)
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
