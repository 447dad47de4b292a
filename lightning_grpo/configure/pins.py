"""Options that a user fixes before the rest is planned."""

from collections.abc import Mapping
from typing import Any

from lightning_grpo.errors import UserError

PINNABLE: dict[str, type] = {
    "num_generations": int,
    "prompts_per_rollout": int,
    "micro_batch_size": int,
    "accumulate_grad_batches": int,
    "num_iterations": int,
    "max_prompt_length": int,
    "max_completion_length": int,
    "beta": float,
    "learning_rate": float,
    "epsilon": float,
    "epsilon_high": float,
    "loss_type": str,
    "scale_rewards": str,
    "temperature": float,
    "precision": str,
    "dtype": str,
    "gradient_checkpointing": bool,
    "optimizer": str,
    "lora_rank": int,
    "strategy": str,
    "engine": str,
    "engine_sleep": bool,
    "engine_cache": float,
    "warmup_steps": int,
    "lr_schedule": str,
    "weight_decay": float,
    "gradient_clip_val": float,
    "max_steps": int,
    "seed": int,
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
        kind = PINNABLE[name]
        wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "a name"}[kind]
        if isinstance(value, bool) != (kind is bool) or (kind is str) != isinstance(value, str):
            raise UserError(f"--set {name}={value}: set {wanted}")
        if kind is int and value != int(value):
            raise UserError(f"--set {name}={value}: set {wanted}")
        if kind in (int, float) and value < 0:
            raise UserError(f"--set {name}={value}: set 0 or more")
        out[name] = kind(value)
    if lora and out.get("lora_rank") == 0:
        raise UserError("--lora and --set lora_rank=0 contradict each other; leave one out")
    allowed = {
        "precision": ("32-true", "bf16-mixed", "16-mixed", "bf16-true"),
        "dtype": ("float32", "bfloat16", "float16"),
        "optimizer": ("adamw", "adamw_8bit", "sgd"),
        "engine": ("hf", "vllm"),
        "strategy": ("auto", "ddp", "fsdp"),
        "lr_schedule": ("constant", "linear", "cosine"),
    }
    for name, values in allowed.items():
        if name in out and out[name] not in values:
            raise UserError(f"--set {name}={out[name]}: set one of {', '.join(values)}")
    precision, dtype = out.get("precision"), out.get("dtype")
    forced = {"32-true": "float32", "bf16-true": "bfloat16"}.get(precision)
    if forced and dtype not in (None, forced):
        raise UserError(f"--set precision={precision} and dtype={dtype} contradict each other: set dtype={forced}")
    if forced:
        out["dtype"] = forced
    return out
