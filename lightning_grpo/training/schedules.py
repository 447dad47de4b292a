"""Learning-rate schedules: the factor of the learning rate at each optimizer step."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from lightning_grpo.errors import UserError
from lightning_grpo.ranges import check_ranges

Name = Literal["constant", "linear", "cosine", "polynomial", "warmup_stable_decay"]


class Schedule(ABC):
    """A learning-rate schedule after the warmup."""

    needs_end = True
    """Whether the factor depends on the number of optimizer steps in the run."""

    @abstractmethod
    def __call__(self, step: int, steps: int) -> float:
        """Return the factor of the learning rate at ``step`` of the ``steps`` after the warmup, counted from 0."""


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """The full learning rate. The run can be extended later."""

    needs_end = False

    def __call__(self, step: int, steps: int) -> float:
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Decay(Schedule):
    """A decay to the share ``minimum`` of the learning rate."""

    minimum: float = 0.0
    """Learning rate at the end, as a share of the full one."""

    def __post_init__(self) -> None:
        check_ranges(self, {"minimum": "[0, 1]"}, prefix="lr_schedule.")

    def __call__(self, step: int, steps: int) -> float:
        return self.minimum + (1 - self.minimum) * self.remaining(min(step, steps), max(1, steps))

    @abstractmethod
    def remaining(self, step: int, steps: int) -> float:
        """The factor without a minimum, which decays from 1 to 0."""


@dataclass(frozen=True, kw_only=True)
class Linear(Decay):
    """A linear decay."""

    def remaining(self, step: int, steps: int) -> float:
        return (steps - step) / steps


@dataclass(frozen=True, kw_only=True)
class Cosine(Decay):
    """Half a period of a cosine (arXiv:1608.03983)."""

    def remaining(self, step: int, steps: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * (step / steps)))


@dataclass(frozen=True, kw_only=True)
class Polynomial(Decay):
    """(1 − step/steps)^power."""

    power: float = 1.0
    """Exponent. 1 is linear; larger ones decay earlier."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, {"power": "(0, inf)"}, prefix="lr_schedule.")

    def remaining(self, step: int, steps: int) -> float:
        return (1 - step / steps) ** self.power


@dataclass(frozen=True, kw_only=True)
class WarmupStableDecay(Decay):
    """The full learning rate, and a decay over the last steps (WSD, arXiv:2404.06395)."""

    decay: float = 0.1
    """Optimizer steps of the decay; below 1, its share of the steps after the warmup."""
    shape: Literal["linear", "cosine", "1-sqrt"] = "cosine"
    """Form of the decay. 1-sqrt is that of arXiv:2405.18392."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_steps("lr_schedule.decay", self.decay)

    def remaining(self, step: int, steps: int) -> float:
        decay = min(number_of_steps(self.decay, steps), steps)
        progress = max(0, step - (steps - decay)) / max(1, decay)
        if self.shape == "1-sqrt":
            return 1 - math.sqrt(progress)
        return 1 - progress if self.shape == "linear" else 0.5 * (1 + math.cos(math.pi * progress))


SCHEDULES: dict[str, type[Schedule]] = {
    "constant": Constant,
    "linear": Linear,
    "cosine": Cosine,
    "polynomial": Polynomial,
    "warmup_stable_decay": WarmupStableDecay,
}


def check_steps(name: str, value: float) -> None:
    """Raise `UserError` if ``value`` is neither a number of steps nor a share of them below 1."""
    check_ranges({name: value}, {name: "[0, inf)"})
    if value > 1 and value != int(value):
        raise UserError(f"{name} is {value}; set a whole number of optimizer steps, or a share below 1")


def number_of_steps(value: float, steps: int) -> int:
    """``value`` steps, or if it is below 1 this share of ``steps``, rounded up."""
    return int(value) if value >= 1 else math.ceil(steps * value)


def as_schedule(schedule: str | Schedule) -> Schedule:
    """The schedule of this name, or ``schedule`` itself.

    Raises:
        UserError: there is no schedule of this name.
    """
    if isinstance(schedule, Schedule):
        return schedule
    if schedule not in SCHEDULES:
        raise UserError(f"lr_schedule is {schedule!r}; set one of {', '.join(SCHEDULES)}, or a Schedule")
    return SCHEDULES[schedule]()


def describe(schedule: Schedule) -> str:
    """The name of ``schedule``, or what it is built from if its options are not the defaults."""
    return next((name for name, kind in SCHEDULES.items() if schedule == kind()), repr(schedule))
