"""Ranges of the numeric options of the trainer, which Lightning does not check or rejects with a traceback."""

import math
from collections.abc import Mapping
from typing import Any

from lightning_grpo.errors import UserError

AT_LEAST = {
    "max_steps": -1,
    "max_epochs": -1,
    "min_steps": 0,
    "min_epochs": 0,
    "accumulate_grad_batches": 1,
    "gradient_clip_val": 0,
    "log_every_n_steps": 0,
    "check_val_every_n_epoch": 1,
    "num_sanity_val_steps": -1,
    "num_nodes": 1,
    "limit_train_batches": 0,
    "limit_val_batches": 0,
    "limit_test_batches": 0,
    "limit_predict_batches": 0,
    "overfit_batches": 0,
}
MEANING = {"max_steps": " (-1: no limit)", "max_epochs": " (-1: no limit)", "num_sanity_val_steps": " (-1: all)"}
LARGEST_SEED = 2**32 - 1


def check_trainer_options(trainer: Mapping[str, Any]) -> None:
    """Raise `UserError` if an option is outside its range."""
    for name, least in AT_LEAST.items():
        value = trainer.get(name)
        if isinstance(value, int | float) and not least <= value < math.inf:
            raise UserError(f"trainer.{name} is {value}; set {least} or more{MEANING.get(name, '')}")
    if trainer.get("max_steps") == 0:
        raise UserError("trainer.max_steps is 0: nothing would be trained; set 1 or more, or -1 for no limit")


def check_seed(seed: bool | int | None) -> None:
    """Raise `UserError` if the random number generators do not accept the seed."""
    if not isinstance(seed, bool) and seed is not None and not 0 <= seed <= LARGEST_SEED:
        raise UserError(f"seed_everything is {seed}; set 0 to {LARGEST_SEED}")


def check_no_nan(config: Any, name: str = "") -> None:
    """Raise `UserError` if an option, at any level, is NaN."""
    if isinstance(config, float) and math.isnan(config):
        raise UserError(f"{name.replace('.init_args', '')} is nan; set a number")
    items = config.items() if isinstance(config, Mapping) else enumerate(config) if isinstance(config, list) else ()
    for key, value in items:
        check_no_nan(value, f"{name}.{key}" if name else str(key))
