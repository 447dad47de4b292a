"""The `Reward` base class, and how rewards are called."""

import inspect
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from lightning_grpo.errors import UserError
from lightning_grpo.lazy import lazy_names
from lightning_grpo.ranges import check_ranges

Scores = Sequence[float | None]
Completion = str | list[dict[str, Any]]

ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state")
"""Arguments of every reward besides the columns of the data set."""
LOGS = ("log_metric", "log_extra")
"""Functions that log a metric and a column of the samples, as in TRL. A function that takes ``**columns`` gets them,
and a `Reward` if its signature names them."""
OFFERED = ("openings", "turn_rewards", "environments")
"""Further arguments, passed only to rewards whose signature names them."""


def call_with(function: Callable[..., Any], arguments: Mapping[str, Any], *, offered: Collection[str] = OFFERED) -> Any:
    """Call the function with the arguments that its signature names, or with all of them if it takes ``**columns``.

    Arguments that are only ``offered`` are passed to functions whose signature names them.
    """
    parameters = inspect.signature(function).parameters
    require_arguments(function, arguments)
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return function(**{k: value for k, value in arguments.items() if k in parameters or k not in offered})
    return function(**{name: arguments[name] for name in parameters if name in arguments})


def require_arguments(function: Callable[..., Any], arguments: Iterable[str]) -> None:
    """Raise `UserError` if the function requires an argument that is not among these names."""
    arguments = list(arguments)
    for name, parameter in inspect.signature(function).parameters.items():
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise UserError(
                f"its argument {name!r} is positional-only, but rewards are called with keyword arguments; remove the /"
            )
        if named and name not in arguments and parameter.default is parameter.empty:
            raise UserError(f"it requires {name!r}, but the arguments are {', '.join(arguments)}")


def completion_text(completion: Completion) -> str:
    """The text of a completion, plain or conversational (the content of its last message)."""
    return completion if isinstance(completion, str) else completion[-1]["content"] or ""


@dataclass(kw_only=True, eq=False)
class Reward(ABC):
    """Base class of rewards: override `__call__` (plain or ``async``) and name the class in YAML.

    A subclass needs no registration. Its options are typed arguments of its ``__init__`` (or dataclass fields).
    """

    weight: float | dict[int, float] = 1.0
    """Weight of this reward in the sum; or weights by optimizer step, such as {0: 1.0, 100: 0.2}, between which the
    weight changes linearly. It is constant before the first of these steps and after the last."""
    requires: dict[str, float] = field(default_factory=dict)
    """Names of other rewards and their minimum, such as {regex_format: 1.0}: this reward counts as 0 for completions
    for which one of them is lower, and does not apply to those to which one of them does not apply."""
    name: str = ""
    """Name in logs. By default the name of the class in snake_case, or that of the function."""
    early: bool = False
    """Score each group in another thread as soon as it is sampled, while other groups are still being sampled. Use it
    for slow rewards. The reward is then called once per group instead of once per rollout."""
    time_limit: float | None = 1800.0
    """Maximum seconds per call. When a call exceeds it, the run ends with an error that states the completion and the
    stack; a warning is logged after a tenth of it. null disables the limit. Rewards that worker processes compute have
    a limit per completion instead."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" not in cls.__dict__:
            cls.name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()

    def __post_init__(self) -> None:
        self.name = self.name or type(self).name
        weights = self.weight if isinstance(self.weight, dict) else {0: self.weight}
        if not weights or not all(isinstance(w, int | float) and math.isfinite(w) for w in weights.values()):
            raise UserError(f"the weight of the reward {self.name!r} is {self.weight}; set a finite number")
        if not all(isinstance(step, int) and step >= 0 for step in weights):
            raise UserError(
                f"the weight of the reward {self.name!r} is {self.weight}; set weights by optimizer step, 0 or more"
            )
        check_ranges(self.requires, dict.fromkeys(self.requires, "(-inf, inf)"), prefix=f"{self.name}.requires.")
        if self.time_limit is not None and not 0 < self.time_limit < math.inf:
            raise UserError(
                f"the time_limit of the reward {self.name!r} is {self.time_limit}; set seconds above 0, or null"
            )

    @property
    def in_workers(self) -> bool:
        """Whether worker processes compute this reward, so that several threads may call it at once."""
        return False

    def prepare(self) -> None:  # noqa: B027  most rewards need no preparation
        """Start what takes time to start. Called once, before the first completions are sampled."""

    def weight_at(self, step: int) -> float:
        """The weight at an optimizer step."""
        if not isinstance(self.weight, dict):
            return float(self.weight)
        points = sorted(self.weight.items())
        for (first, start), (last, end) in pairwise(points):
            if step < last:
                return start + (end - start) * max(0, step - first) / (last - first)
        return float(points[-1][1])

    @abstractmethod
    def __call__(
        self,
        prompts: list[str | list[dict[str, Any]]],
        completions: list[Completion],
        completion_ids: list[list[int]],
        **columns: Any,
    ) -> Scores | Awaitable[Scores]:
        """Return one number per completion, or None if the reward does not apply to it.

        Args:
            prompts: N prompts, as text or chat messages. Those of one group are adjacent.
            completions: N texts, or ``[{"role": "assistant", "content": text}]`` if the prompt is chat messages.
            completion_ids: N lists of token ids, without padding.
            columns: each further column of the data set, as a list of N values, and ``trainer_state``. If the signature
                names ``openings``, also N texts: the tag, such as ``<think>``, that the chat template appended to the
                prompt, so that the completion lacks it, or an empty text. If it names ``log_metric`` or ``log_extra``,
                these functions; see `RewardLogs`. With an environment, ``completions`` are the messages of the
                conversation, and if the signature names them, ``turn_rewards`` has N lists with the environment's
                reward of each turn, and ``environments`` the N environments.
        """

    def final_answers(self, completions: Sequence[str]) -> list[str | None] | None:
        """The final answer in each completion, equal answers in the same form; None for a completion without one.

        Override it for ``majority@k`` in evaluations, which votes on the answers of a prompt. The default, None, is for
        rewards that do not look for answers.
        """
        return None

    def check(self, columns: Sequence[Mapping[str, Any]]) -> None:  # noqa: B027  most rewards can score any row
        """Raise ValueError for rows of the data set that can't be scored. Called once, before training."""


# configurations of earlier versions have it under this path
__getattr__, _ = lazy_names(__name__, {"FunctionReward": "lightning_grpo.rewards.function"})
