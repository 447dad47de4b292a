"""Options that a user fixes before the rest is planned."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from lightning_grpo.errors import UserError


@dataclass(frozen=True)
class Option:
    """The values that one may have: whole numbers or numbers from ``least`` on, true or false, or some names."""

    kind: type
    least: float = 0
    above: bool = False
    """Whether ``least`` itself is too little."""
    names: tuple[str, ...] = ()

    @property
    def wanted(self) -> str:
        if self.kind is bool:
            return "true or false"
        if self.kind is str:
            return f"one of {', '.join(self.names)}" if self.names else "a name"
        number = "a whole number" if self.kind is int else "a number"
        return f"{number} above {self.least:g}" if self.above else f"{number}, {self.least:g} or more"

    def holds(self, value: Any) -> bool:
        if self.kind in (bool, str):
            return isinstance(value, self.kind) and (not self.names or value in self.names)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return False
        whole = self.kind is float or value == int(value)
        return whole and (value > self.least if self.above else value >= self.least)


PINNABLE: dict[str, Option] = {
    "num_generations": Option(int, 2),
    "prompts_per_rollout": Option(int, 1),
    "micro_batch_size": Option(int, 1),
    "accumulate_grad_batches": Option(int, 1),
    "num_iterations": Option(int, 1),
    "max_prompt_length": Option(int, 1),
    "max_completion_length": Option(int, 1),
    "beta": Option(float),
    "learning_rate": Option(float, above=True),
    "epsilon": Option(float),
    "epsilon_high": Option(float),
    "loss_type": Option(str),
    "scale_rewards": Option(str, names=("none", "group", "batch")),
    "temperature": Option(float, above=True),
    "precision": Option(str, names=("32-true", "bf16-mixed", "16-mixed", "bf16-true")),
    "dtype": Option(str, names=("float32", "bfloat16", "float16")),
    "gradient_checkpointing": Option(bool),
    "optimizer": Option(str, names=("adamw", "adamw_8bit", "sgd")),
    "lora_rank": Option(int),
    "strategy": Option(str, names=("auto", "ddp", "fsdp")),
    "engine": Option(str, names=("hf", "vllm")),
    "engine_sleep": Option(bool),
    "engine_cache": Option(float, above=True),
    "warmup_steps": Option(int),
    "lr_schedule": Option(str, names=("constant", "linear", "cosine")),
    "weight_decay": Option(float),
    "gradient_clip_val": Option(float),
    "max_steps": Option(int, 1),
    "seed": Option(int),
}


def check_pins(pins: Mapping[str, Any], lora: bool) -> dict[str, Any]:
    """The pins with values of the right types, and what follows from them.

    Raises:
        ValueError: an unknown option, a value that it can't have, or two that contradict each other.
    """
    out = {}
    for name, value in pins.items():
        if name not in PINNABLE:
            raise UserError(f"--set {name}: unknown; set one of {', '.join(PINNABLE)}")
        option = PINNABLE[name]
        if not option.holds(value):
            raise UserError(f"--set {name}={value}: set {option.wanted}")
        out[name] = option.kind(value)
    _check_objective(out)
    if lora and out.get("lora_rank") == 0:
        raise UserError("--lora and --set lora_rank=0 contradict each other; leave one out")
    if out.get("optimizer") == "adamw_8bit" and find_spec("bitsandbytes") is None:
        raise UserError("--set optimizer=adamw_8bit needs the package bitsandbytes: pip install bitsandbytes")
    precision, dtype = out.get("precision"), out.get("dtype")
    forced = {"32-true": "float32", "bf16-true": "bfloat16"}.get(precision)
    if forced and dtype not in (None, forced):
        raise UserError(f"--set precision={precision} and dtype={dtype} contradict each other: set dtype={forced}")
    if forced:
        out["dtype"] = forced
    return out


def _check_objective(pins: Mapping[str, Any]) -> None:
    """By the loss itself, which knows its names and numbers."""
    from lightning_grpo.objective import ObjectiveConfig

    chosen = {name: pins[name] for name in ("loss_type", "beta", "epsilon", "epsilon_high") if name in pins}
    try:
        ObjectiveConfig(**chosen)
    except ValueError as error:
        raise UserError(
            f"--set {' --set '.join(f'{name}={value}' for name, value in chosen.items())}: {error}"
        ) from error
