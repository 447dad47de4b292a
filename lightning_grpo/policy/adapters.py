"""LoRA adapters in a checkpoint, and whether they fit those of this run."""

from collections.abc import Mapping, Set
from dataclasses import asdict
from typing import Any

from lightning_grpo.errors import UserError
from lightning_grpo.policy.load import LoRA


def describe(lora: LoRA | None, names: Set[str]) -> dict[str, Any] | None:
    """What a checkpoint says of its adapters, whose weights have ``names``. None if it holds whole weights."""
    return None if lora is None else asdict(lora) | {"names": sorted(names)}


def check(saved: Mapping[str, Any] | None, lora: LoRA | None, names: Set[str]) -> None:
    """Compare what `describe` wrote into a checkpoint with the adapters of this run.

    Raises:
        UserError: the checkpoint's weights would be left out, or count more or less than in the run that saved them.
    """
    if saved is None and lora is None:
        return
    if saved is None:
        raise UserError(
            f"the checkpoint holds whole weights and lora is set, with rank {lora.rank}: its weights have no place in "
            "the adapters; leave lora out"
        )
    options = {name: saved[name] for name in ("rank", "alpha", "target_modules")}
    if lora is None:
        raise UserError(f"the checkpoint holds LoRA adapters alone and lora is not set; set lora to {options}")
    if lora.rank != saved["rank"]:
        raise UserError(f"lora.rank is {lora.rank} and the checkpoint's adapters have rank {saved['rank']}; set that")
    if lora.alpha != saved["alpha"]:
        raise UserError(
            f"lora.alpha is {lora.alpha:g} and the checkpoint's adapters were trained with {saved['alpha']:g}: their "
            f"output would count {lora.alpha / saved['alpha']:g} times as much; set {saved['alpha']:g}"
        )
    missing, more = names - set(saved["names"]), set(saved["names"]) - names
    if missing or more:
        raise UserError(
            f"lora.target_modules is {lora.target_modules!r} and was {saved['target_modules']!r}: the checkpoint lacks "
            f"{len(missing)} adapter weights of this run and has {len(more)} others, {min(missing or more)} among "
            f"them; set {saved['target_modules']!r}"
        )
