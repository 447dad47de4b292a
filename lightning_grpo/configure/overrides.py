"""Options that a user fixes with ``--set`` before the rest is planned."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from lightning_grpo.errors import UserError


@dataclass(frozen=True)
class Option:
    """The type and the allowed values of an option."""

    kind: type
    minimum: float = 0
    exclusive: bool = False
    """Whether ``minimum`` itself is excluded."""
    names: tuple[str, ...] = ()
    """Allowed values of a text; any if empty."""

    @property
    def expected(self) -> str:
        """The allowed values in words."""
        if self.kind is bool:
            return "true or false"
        if self.kind is str:
            return f"one of {', '.join(self.names)}" if self.names else "a name"
        number = "a whole number" if self.kind is int else "a number"
        return f"{number} above {self.minimum:g}" if self.exclusive else f"{number}, {self.minimum:g} or more"

    def allows(self, value: Any) -> bool:
        if self.kind in (bool, str):
            return isinstance(value, self.kind) and (not self.names or value in self.names)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return False
        whole = self.kind is float or value == int(value)
        return whole and (value > self.minimum if self.exclusive else value >= self.minimum)


OVERRIDABLE: dict[str, Option] = {
    "num_generations": Option(int, 2),
    "prompts_per_rollout": Option(int, 1),
    "micro_batch_size": Option(int, 1),
    "accumulate_grad_batches": Option(int, 1),
    "num_iterations": Option(int, 1),
    "max_prompt_length": Option(int, 1),
    "max_completion_length": Option(int, 1),
    "beta": Option(float),
    "learning_rate": Option(float, exclusive=True),
    "epsilon": Option(float),
    "epsilon_high": Option(float),
    "loss_type": Option(str),
    "scale_rewards": Option(str, names=("none", "group", "batch")),
    "temperature": Option(float, exclusive=True),
    "precision": Option(str, names=("32-true", "bf16-mixed", "16-mixed", "bf16-true")),
    "dtype": Option(str, names=("float32", "bfloat16", "float16")),
    "gradient_checkpointing": Option(bool),
    "optimizer": Option(str, names=("adamw", "adamw_8bit", "sgd")),
    "lora_rank": Option(int),
    "strategy": Option(str, names=("auto", "ddp", "fsdp")),
    "engine": Option(str, names=("hf", "vllm")),
    "engine_sleep": Option(bool),
    "engine_cache": Option(float, exclusive=True),
    "warmup_steps": Option(int),
    "lr_schedule": Option(str, names=("constant", "linear", "cosine")),
    "weight_decay": Option(float),
    "gradient_clip_val": Option(float),
    "max_steps": Option(int, 1),
    "seed": Option(int),
}


def check_overrides(overrides: Mapping[str, Any], lora: bool) -> dict[str, Any]:
    """Return the overrides with values of the right types, and the options that follow from them.

    Raises:
        UserError: an unknown option, a value that is not allowed, or two options that contradict each other.
    """
    checked = {}
    for name, value in overrides.items():
        if name not in OVERRIDABLE:
            raise UserError(f"--set {name}: unknown option; set one of {', '.join(OVERRIDABLE)}")
        option = OVERRIDABLE[name]
        if not option.allows(value):
            raise UserError(f"--set {name}={value}: set {option.expected}")
        checked[name] = option.kind(value)
    _check_objective(checked)
    if lora and checked.get("lora_rank") == 0:
        raise UserError("--lora and --set lora_rank=0 contradict each other; remove one")
    if checked.get("optimizer") == "adamw_8bit" and find_spec("bitsandbytes") is None:
        raise UserError("--set optimizer=adamw_8bit needs the package bitsandbytes: pip install bitsandbytes")
    precision, dtype = checked.get("precision"), checked.get("dtype")
    implied = {"32-true": "float32", "bf16-true": "bfloat16"}.get(precision)
    if implied and dtype not in (None, implied):
        raise UserError(f"--set precision={precision} and dtype={dtype} contradict each other: set dtype={implied}")
    return checked | ({"dtype": implied} if implied else {})


def _check_objective(overrides: Mapping[str, Any]) -> None:
    """Let the objective check its own options."""
    from lightning_grpo.objective import ObjectiveConfig

    chosen = {name: overrides[name] for name in ("loss_type", "beta", "epsilon", "epsilon_high") if name in overrides}
    try:
        ObjectiveConfig(**chosen)
    except ValueError as error:
        raise UserError(
            f"--set {' --set '.join(f'{name}={value}' for name, value in chosen.items())}: {error}"
        ) from error
