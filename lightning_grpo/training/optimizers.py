"""The optimizer and its learning-rate schedule, new or resumed.

A resumed optimizer takes its state (moments, step counts) and the position in the schedule from the checkpoint, and so
the options that it adapts by itself. An option that has changed in the configuration since then is taken from there.
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from lightning import Trainer
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_grpo.errors import UserError
from lightning_grpo.training.schedules import Schedule, as_schedule, check_steps, describe, number_of_steps

log = logging.getLogger(__name__)

IMPLEMENTATION = {"foreach", "fused", "capturable", "differentiable"}
"""Options that determine how a step is computed and where its state is stored, but not its result."""


class Optimization:
    """The optimizer of a run and its learning-rate schedule, as configured.

    Args:
        factory: builds the optimizer from parameters or groups of them.
        lr_schedule: schedule after the warmup, or its name.
        warmup_steps: optimizer steps of the warmup; below 1, its share of all steps.
        decay_norms_and_biases: whether weight decay applies to norms and biases too.

    Raises:
        UserError: an option is out of its range.
    """

    def __init__(
        self,
        factory: OptimizerCallable,
        *,
        lr_schedule: str | Schedule = "constant",
        warmup_steps: float = 0,
        decay_norms_and_biases: bool = True,
    ) -> None:
        check_steps("warmup_steps", warmup_steps)
        self.factory = factory
        self.lr_schedule = as_schedule(lr_schedule)
        self.warmup_steps = warmup_steps
        self.decay_norms_and_biases = decay_norms_and_biases
        self.described: dict[str, Any] | None = None
        """The options that `configure` used, as plain data for checkpoints."""
        self._saved: Mapping[str, Any] | None = None
        self._scheduled_rates: list[float] | None = None

    def check(self) -> None:
        """Raise `UserError` if the optimizer does not accept its options."""
        self.build([nn.Parameter(torch.zeros(1))])

    def build(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """The optimizer of ``parameters``.

        Raises:
            UserError: an option is out of its range.
        """
        groups: Any = parameters
        if not self.decay_norms_and_biases:
            parameters = list(parameters)
            groups = [
                {"params": [p for p in parameters if p.ndim > 1]},
                # the weights of norms, and biases
                {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
            ]
        try:
            optimizer = self.factory(groups)
        except ValueError as error:
            raise UserError(f"model.optimizer: {error}; set a value in its range") from error
        for name, value in optimizer.defaults.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"model.optimizer.{name} is {value}; set a finite number")
        if not self.decay_norms_and_biases and "weight_decay" not in optimizer.defaults:
            raise UserError(
                f"decay_norms_and_biases is false, but {type(optimizer).__name__} has no weight decay; leave it unset"
            )
        return optimizer

    def configure(self, parameters: Iterable[nn.Parameter], trainer: Trainer) -> OptimizerLRSchedulerConfig:
        """What a module's ``configure_optimizers`` returns: the optimizer, and its schedule in optimizer steps."""
        optimizer = self.build(p for p in parameters if p.requires_grad)
        check_precision(optimizer, trainer)
        described = options(optimizer) | {"decay_norms_and_biases": self.decay_norms_and_biases}
        schedule, described["schedule"] = build_schedule(optimizer, self.lr_schedule, self.warmup_steps, trainer)
        self.described = described
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def load(self, saved: Mapping[str, Any]) -> None:
        """Keep the options that a checkpoint ``saved`` until `resume`.

        Raises:
            UserError: the optimizer has other groups of parameters than the checkpoint's.
        """
        was = saved.get("decay_norms_and_biases", True)  # checkpoints of 0.1 have no such option
        if was != self.decay_norms_and_biases:
            now = str(self.decay_norms_and_biases).lower()
            raise UserError(
                f"decay_norms_and_biases is {now}, but the checkpoint's optimizer was built with {str(was).lower()}, "
                "and its state is that of other groups of parameters; set it to that"
            )
        self._saved = saved

    def resume(self, trainer: Trainer) -> None:
        """If a checkpoint was loaded, bring the optimizer and its schedule up to date with the configuration."""
        saved, self._saved = self._saved, None
        if saved is not None and self.described is not None:
            resume(trainer, saved, self.described)

    def scale_rates(self, optimizer: Optimizer, factor: float) -> None:
        """Multiply the learning rates by ``factor`` for the next step. Call `restore_rates` after it."""
        self._scheduled_rates = [float(group["lr"]) for group in optimizer.param_groups]
        set_rates(optimizer, [rate * factor for rate in self._scheduled_rates])

    def restore_rates(self, optimizer: Optimizer) -> None:
        """Undo `scale_rates`, exactly."""
        if self._scheduled_rates is not None:
            set_rates(optimizer, self._scheduled_rates)
            self._scheduled_rates = None


def check_precision(optimizer: Optimizer, trainer: Trainer) -> None:
    """Refuse a fused optimizer under 16-mixed, and warn about parameters that small steps are lost on."""
    if trainer.precision == "16-mixed" and optimizer.defaults.get("fused"):
        raise UserError(
            "optimizer.fused is true and trainer.precision is 16-mixed: the optimizer would unscale the gradients "
            "itself, after they were measured and clipped; set fused: false, or precision bf16-mixed"
        )
    lr = max(group["lr"] for group in optimizer.param_groups)
    dtypes = {p.dtype for group in optimizer.param_groups for p in group["params"]}
    if lr <= 1e-5 and dtypes != {torch.float32}:
        log.warning(
            "The trained parameters are %s and the learning rate is %g: most of each step is lost to rounding. Set "
            "dtype: float32 with trainer.precision bf16-mixed, which keeps master weights",
            " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)),
            lr,
        )


def build_schedule(
    optimizer: Optimizer, schedule: Schedule, warmup_steps: float, trainer: Trainer
) -> tuple[LambdaLR, dict[str, Any]]:
    """The learning-rate schedule, and what determines it.

    Raises:
        UserError: the schedule needs the number of optimizer steps, and training has no end.
    """
    steps: int | None = None
    if schedule.needs_end or 0 < warmup_steps < 1:
        total = trainer.estimated_stepping_batches
        if total == float("inf"):
            option = f"lr_schedule is {describe(schedule)}" if schedule.needs_end else f"warmup_steps is {warmup_steps}"
            raise UserError(
                f"{option}, which needs the number of optimizer steps, but trainer.max_steps is {trainer.max_steps} "
                f"and trainer.max_epochs is {trainer.max_epochs}, so training has no end; set one of them, or "
                "lr_schedule: constant and warmup_steps: 0"
            )
        steps = int(total)
    warmup = number_of_steps(warmup_steps, steps or 0)

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        return schedule(step - warmup, 0 if steps is None else max(0, steps - warmup))

    described = {"lr_schedule": describe(schedule), "warmup_steps": warmup_steps, "steps": steps}
    return LambdaLR(optimizer, factor), described


def resume(trainer: Trainer, saved: Mapping[str, Any], configured: Mapping[str, Any]) -> None:
    """Give the loaded optimizer and schedule the options that have changed since the checkpoint, and log them.

    Args:
        trainer: its optimizer and schedule have loaded the checkpoint's state.
        saved: what `options` returned in the run that saved the checkpoint, and its ``schedule``.
        configured: the same of this run.
    """
    changes = take_changed(trainer.optimizers[0], saved, configured)
    reschedule(cast(LambdaLR, trainer.lr_scheduler_configs[0].scheduler))  # as `build_schedule` returns
    schedule = configured["schedule"]
    changes += [f"{k} {was} → {now}" for k, was in saved["schedule"].items() if was != (now := schedule[k])]
    log.info(
        "Resuming after optimizer step %d with the checkpoint's weights, optimizer state and position in the schedule; "
        "%s",
        trainer.global_step,
        f"changed in the configuration: {', '.join(changes)}" if changes else "no option has changed",
    )


def step_schedule(trainer: Trainer) -> None:
    """Move the schedule by the optimizer step after which the checkpoint was saved, before Lightning had moved it."""
    for config in trainer.lr_scheduler_configs:
        if config.interval == "step" and not config.reduce_on_plateau:
            trainer.lightning_module.lr_scheduler_step(config.scheduler, None)


def options(optimizer: Optimizer) -> dict[str, Any]:
    """The optimizer's class and the options of each of its groups as configured, as plain data."""
    groups = []
    for group in optimizer.param_groups:
        plain = {k: v.item() if isinstance(v, Tensor) and v.dim() == 0 else v for k, v in group.items()}
        groups.append({k: v for k, v in plain.items() if k not in IMPLEMENTATION and _is_plain(v)})
    return {"class": type(optimizer).__qualname__, "groups": groups}


def take_changed(optimizer: Optimizer, saved: Mapping[str, Any], configured: Mapping[str, Any]) -> list[str]:
    """Give ``optimizer``, whose state was loaded, the options that were ``saved`` and are now ``configured`` otherwise.

    Returns:
        One description of each change.

    Raises:
        UserError: the state belongs to another optimizer.
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
    """Set the learning rates of ``scheduler`` at its position, from the optimizer's initial ones."""
    scheduler.base_lrs = [group["initial_lr"] for group in scheduler.optimizer.param_groups]
    rates = [base * f(scheduler.last_epoch) for base, f in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    set_rates(scheduler.optimizer, rates)
    scheduler._last_lr = rates


def set_rates(optimizer: Optimizer, rates: Sequence[float | Tensor]) -> None:
    """Set the learning rate of each group of ``optimizer``."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _is_plain(value: Any) -> bool:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return all(_is_plain(item) for item in value) and not isinstance(value, bytes)
    return value is None or isinstance(value, bool | int | float | str)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Sequence) and not isinstance(one, str):
        return list(one) == list(other) if isinstance(other, Sequence) else False
    return one == other
