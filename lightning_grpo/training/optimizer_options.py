"""What a resumed optimizer takes from its checkpoint, and what from the configuration.

Its state (moments, step counts) and the position in the schedule are the checkpoint's, and so are options that the
optimizer adapts by itself. An option that was changed in the configuration since then is the configuration's.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_grpo.errors import UserError

IMPLEMENTATION = {"foreach", "fused", "capturable", "differentiable"}
"""Options that decide how a step is computed, and where its state lies, but not what it computes."""


def options(optimizer: Optimizer) -> dict[str, Any]:
    """The optimizer's class and the options of each of its groups, as they were configured. Plain data only."""
    groups = []
    for group in optimizer.param_groups:
        plain = {k: v.item() if isinstance(v, Tensor) and v.dim() == 0 else v for k, v in group.items()}
        groups.append({k: v for k, v in plain.items() if k not in IMPLEMENTATION and _is_plain(v)})
    return {"class": type(optimizer).__qualname__, "groups": groups}


def take_changed(optimizer: Optimizer, saved: Mapping[str, Any], configured: Mapping[str, Any]) -> list[str]:
    """Give ``optimizer``, whose state was loaded, the options that were ``saved`` and are ``configured`` otherwise now.

    Returns:
        One description of each change.

    Raises:
        UserError: the state is that of another optimizer.
    """
    if saved["class"] != configured["class"]:
        raise UserError(
            f"the checkpoint holds the state of {saved['class']} and the optimizer is {configured['class']}; set "
            f"{saved['class']}"
        )
    changes: dict[str, None] = {}
    for group, was, now in zip(optimizer.param_groups, saved["groups"], configured["groups"], strict=True):
        for name, value in now.items():
            if name in was and _same(was[name], value):
                continue
            changes[f"{name} {was.get(name)} → {value}"] = None
            # LambdaLR computes the rate from the initial one
            name = "initial_lr" if name == "lr" and "initial_lr" in group else name
            if isinstance(group.get(name), Tensor):
                group[name].fill_(value)
            else:
                group[name] = value
    return list(changes)


def reschedule(scheduler: LambdaLR) -> None:
    """Set the learning rates that ``scheduler`` gives at its position, from the optimizer's initial ones."""
    groups = scheduler.optimizer.param_groups
    scheduler.base_lrs = [group["initial_lr"] for group in groups]
    rates = [base * f(scheduler.last_epoch) for base, f in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    scheduler._last_lr = rates


def _is_plain(value: Any) -> bool:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return all(_is_plain(item) for item in value) and not isinstance(value, bytes)
    return value is None or isinstance(value, bool | int | float | str)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Sequence) and not isinstance(one, str):
        return list(one) == list(other) if isinstance(other, Sequence) else False
    return one == other
