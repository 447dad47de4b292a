"""Rewards that are functions of the user."""

import importlib
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_grpo.errors import UserError
from lightning_grpo.rewards.base import ARGUMENTS, LOGS, OFFERED, Reward, Scores, call_with, require_arguments
from lightning_grpo.rewards.logs import RewardLogs, plain
from lightning_grpo.rewards.workers import WorkerReward

STAYS = ("trainer_state", "environments")
"""Arguments that can't be sent to worker processes."""


@dataclass(kw_only=True, eq=False)
class FunctionReward(WorkerReward):
    """Wrap a function ``f(prompts, completions, completion_ids, **columns)``, or one with some of these arguments.

    With ``sandbox``, worker processes call it, with one completion at a time: without network, with limited memory, on
    all cores. A completion that exceeds ``seconds``, or for which the function raises, gets 0.
    """

    function: str | Callable[..., Any]
    """The function or its import path, ``package.module.function``."""
    sandbox: bool = False
    """Call the function in worker processes. It must be a plain function of an importable module that scores each
    completion by itself and needs neither ``trainer_state`` nor ``environments``. False: in this process, with all
    completions at once, where nothing limits a completion's time but time_limit."""

    def __post_init__(self) -> None:
        if isinstance(self.function, str):
            self.function = load_function(self.function)
        if not callable(self.function):
            raise UserError(f"reward function {self.function!r} can't be called; set a function or its import path")
        self.name = self.name or getattr(self.function, "__name__", type(self.function).__name__)
        super().__post_init__()
        if self.sandbox:
            self._require_plain_function()

    def _require_plain_function(self) -> None:
        given = inspect.signature(self.function).parameters
        if named := [name for name in STAYS if name in given]:
            problem = f"takes {named[0]}, which stays in the process of the run"
        elif any(map(inspect.iscoroutinefunction, (self.function, type(self.function).__call__))):
            problem = "is async, but there is nothing to wait for in a worker process, which has no network"
        else:
            return
        raise UserError(f"the reward function {self.name!r} {problem}; change it, or set sandbox: false")

    def modules(self) -> set[str | None]:
        return {getattr(self.function, "__module__", None)}

    def check(self, columns: Sequence[Mapping[str, Any]]) -> None:
        """Raise `UserError` if the function requires an argument that the data set has no column for."""
        try:
            require_arguments(
                self.function, [*ARGUMENTS, *LOGS, *OFFERED, *dict.fromkeys(k for row in columns for k in row)]
            )
        except UserError as error:
            raise UserError(f"the reward function {self.name!r} can't be called: {error}") from None

    def prepare(self) -> None:
        self.start_workers(self._score_one)

    def __call__(self, /, **arguments: Any) -> Scores | Awaitable[Scores]:
        if not self.sandbox:
            return call_with(self.function, arguments)
        names = [name for name in arguments if name not in (*STAYS, *LOGS)]
        rows = [({name: [arguments[name][i]] for name in names},) for i in range(len(arguments["completions"]))]
        answers = self.evaluate(self._score_one, rows, (self.failed, {}, {}))
        if arguments.get("log_metric"):
            self._repeat_logs([metrics for _, metrics, _ in answers], [extras for *_, extras in answers], arguments)
        return [value for value, *_ in answers]

    def _score_one(self, arguments: Mapping[str, Any]) -> tuple[Any, dict[str, list[float]], dict[str, Any]]:
        """The reward of one completion, and what the function logged. Called in a worker process."""
        logs = RewardLogs(1)
        (value,) = call_with(self.function, {**arguments, **logs.arguments([0])})
        return plain(value), logs.metrics, logs.extras[0]

    @staticmethod
    def _repeat_logs(metrics: Sequence[dict[str, list[float]]], extras: Sequence[dict[str, Any]], given: Any) -> None:
        """Log in this process what the calls in worker processes logged."""
        for name, values in (item for logged in metrics for item in logged.items()):
            for value in values:
                given["log_metric"](name, value)
        for column in dict.fromkeys(column for logged in extras for column in logged):
            given["log_extra"](column, [logged.get(column) for logged in extras])


def call_reward(reward: Reward, arguments: Mapping[str, Any]) -> Scores | Awaitable[Scores]:
    """Call a reward with those of the arguments that it, or its function, takes."""
    if isinstance(reward, FunctionReward):
        return reward(**arguments)
    # a column named self would collide with the method's first argument
    given = {name: values for name, values in arguments.items() if name != "self"}
    return call_with(reward, given, offered=(*OFFERED, *LOGS))


def names_argument(reward: Reward, name: str) -> bool:
    """Whether the signature of a reward names the argument."""
    function = reward.function if isinstance(reward, FunctionReward) else type(reward).__call__
    return name in inspect.signature(function).parameters


def load_function(path: str) -> Callable[..., Any]:
    """Import the object at a dotted path."""
    module, _, name = path.rpartition(".")
    if "/" in path:
        raise UserError(
            f"reward function {path!r} can't be imported: it looks like a model's name or a file. For a reward "
            "model, set class_path: RewardModel and init_args: {model: …}"
        )
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"reward function {path!r} can't be imported: {error}; set package.module.function") from error


def as_rewards(rewards: Sequence[Reward | Callable[..., Any] | str]) -> list[Reward]:
    """Wrap functions and import paths in `FunctionReward`; raise `UserError` if two rewards have the same name."""
    wrapped = [reward if isinstance(reward, Reward) else FunctionReward(function=reward) for reward in rewards]
    names = [reward.name for reward in wrapped]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two rewards are named {twice[0]!r}; set another `name` for one of them")
    return wrapped
