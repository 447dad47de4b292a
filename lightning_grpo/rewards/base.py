"""What a reward is: a class, or a plain function in a coat."""

import importlib
import inspect
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_grpo.errors import UserError

Scores = Sequence[float | None]
Completion = str | list[dict[str, Any]]

ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state")
"""What every reward may name beside the columns of the data set."""
OFFERED = ("openings",)
"""Further arguments, passed only to rewards that name them."""


def call_with(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """Call with those of the arguments that the function names, or with all of them if it takes ``**columns``.

    `OFFERED` arguments are passed only to functions that name them.
    """
    parameters = inspect.signature(function).parameters
    require_arguments(function, arguments)
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return function(**{k: value for k, value in arguments.items() if k in parameters or k not in OFFERED})
    return function(**{name: arguments[name] for name in parameters if name in arguments})


def require_arguments(function: Callable[..., Any], arguments: Iterable[str]) -> None:
    """Raise `UserError` if the function needs an argument that is not among these names."""
    arguments = list(arguments)
    for name, parameter in inspect.signature(function).parameters.items():
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise UserError(
                f"its argument {name!r} is positional only; rewards are called by keywords, so remove the /"
            )
        if named and name not in arguments and parameter.default is parameter.empty:
            hint = "; TRL's log_metric and log_extra are not supported" if name in ("log_metric", "log_extra") else ""
            raise UserError(f"it takes {name!r}, and there is only {', '.join(arguments)}{hint}")


def completion_text(completion: Completion) -> str:
    """The text of a completion, plain or conversational (the content of its last message)."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


@dataclass(kw_only=True, eq=False)
class Reward(ABC):
    """Base class of rewards: override `__call__` (plain or ``async``) and name the class in YAML.

    A subclass needs no registration; its own options are typed arguments of its ``__init__`` (or dataclass fields).
    """

    weight: float = 1.0
    """Factor of this reward in the sum of all."""
    name: str = ""
    """Name in the logs. Empty: the class's name in snake_case, or the function's."""
    early: bool = False
    """Judge each group as soon as it is sampled, in another thread, while others still are. For slow rewards: it is
    then called with one group at a time, not with the whole rollout."""
    time_limit: float | None = 1800.0
    """Seconds that one call may take; then the run ends with an error that says where it hangs, and on what. A tenth
    of it brings a warning. Null waits for ever."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" not in cls.__dict__:
            cls.name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()

    def __post_init__(self) -> None:
        self.name = self.name or type(self).name
        if not isinstance(self.weight, int | float) or not math.isfinite(self.weight):
            raise UserError(f"the weight of the reward {self.name!r} is {self.weight}; set a finite number")
        if self.time_limit is not None and not 0 < self.time_limit < math.inf:
            raise UserError(
                f"the time_limit of the reward {self.name!r} is {self.time_limit}; set seconds above 0, or null"
            )

    @abstractmethod
    def __call__(
        self,
        prompts: list[str | list[dict[str, Any]]],
        completions: list[Completion],
        completion_ids: list[list[int]],
        **columns: Any,
    ) -> Scores | Awaitable[Scores]:
        """One number per completion; None where the reward does not apply.

        Args:
            prompts: N prompts, text or chat messages; those of one group follow each other.
            completions: N texts; ``[{"role": "assistant", "content": text}]`` where the prompt is chat messages.
            completion_ids: N lists of token ids, without padding.
            columns: each further column of the data set, as a list of N values, and ``trainer_state``. A reward that
                names ``openings`` gets N texts: a tag that the chat template opened at the end of the prompt, such as
                ``<think>``, so that it is missing from the completion; empty if there is none.
        """

    def check(self, columns: Sequence[Mapping[str, Any]]) -> None:  # noqa: B027  most rewards judge any row
        """Raise ValueError for rows of the data set that could never be judged. Called once, before training."""


@dataclass(kw_only=True, eq=False)
class FunctionReward(Reward):
    """A plain function ``f(prompts, completions, completion_ids, **columns)``, or one that names what it needs."""

    function: str | Callable[..., Any]
    """The function, or its dotted path: ``package.module.function``."""

    def __post_init__(self) -> None:
        if isinstance(self.function, str):
            self.function = load_function(self.function)
        if not callable(self.function):
            raise UserError(f"reward function {self.function!r} can't be called; give a function or its dotted path")
        self.name = self.name or getattr(self.function, "__name__", type(self.function).__name__)
        super().__post_init__()

    def check(self, columns: Sequence[Mapping[str, Any]]) -> None:
        """Raise `UserError` if the function needs an argument that is no column of the data set."""
        try:
            require_arguments(self.function, [*ARGUMENTS, *OFFERED, *dict.fromkeys(k for row in columns for k in row)])
        except UserError as error:
            raise UserError(f"the reward function {self.name!r} can't be called: {error}") from None

    def __call__(self, /, **arguments: Any) -> Scores | Awaitable[Scores]:
        return call_with(self.function, arguments)


def load_function(path: str) -> Callable[..., Any]:
    """The object at a dotted path."""
    module, _, name = path.rpartition(".")
    if "/" in path:
        raise UserError(
            f"reward function {path!r} can't be imported: it looks like a model's name or a file. Reward models are "
            "not loaded by name: write a Reward that loads the model, and give its class path"
        )
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"reward function {path!r} can't be imported: {error}; give package.module.function") from error


def as_rewards(rewards: Sequence[Reward | Callable[..., Any] | str]) -> list[Reward]:
    """Rewards as they are, functions and dotted paths wrapped; ValueError where two have the same name."""
    wrapped = [reward if isinstance(reward, Reward) else FunctionReward(function=reward) for reward in rewards]
    names = [reward.name for reward in wrapped]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two rewards are named {twice[0]!r}; give one of them another `name`")
    return wrapped
