"""`TRLEnvironment`: runs objects that were written for ``environment_factory`` of TRL's GRPOTrainer."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from lightning_grpo.data.rows import Message
from lightning_grpo.environments.tools import ToolEnvironment, resolve, run_tool, schema
from lightning_grpo.errors import UserError
from lightning_grpo.rewards import FunctionReward, Reward
from lightning_grpo.rewards.base import call_with

NOT_TOOLS = ("reset", "get_reward")
"""Public methods that are no tools."""


class Instances(list):
    """The objects that no episode uses. All copies of an environment share them."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Instances":
        return self


@dataclass(kw_only=True, eq=False)
class TRLEnvironment(ToolEnvironment):
    """Runs an object in the form that TRL documents for ``environment_factory``.

    The factory, a class or a function, is called without arguments, once for each sample that runs at the same time.
    ``reset(**row)`` begins an episode with all columns of the row; text that it returns is appended to the last message
    of the prompt. All other public methods are tools, except ``get_reward``. An episode ends with a completion that
    calls none. Reward functions with an argument ``environments`` are given the N objects; `get_reward` is one, and an
    empty list of rewards means it if the objects have a method of this name.
    """

    tools: list[str | Callable[..., Any]] = field(default_factory=list)
    """Further tools, as those of `ToolEnvironment`."""
    factory: str | Callable[[], Any]
    """The class or function, or its import path."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._create = resolve(self.factory, "factory")
        instance = self._create()
        if not callable(getattr(instance, "reset", None)):
            raise UserError(f"the objects of the factory {self.factory!r} have no method reset")
        self._schemas |= {method.__name__: schema(method) for method in _methods(instance)}
        self._has_reward = callable(getattr(instance, "get_reward", None))
        self._instances = Instances([instance])
        self._instance: Any = None

    @property
    def default_rewards(self) -> list[Reward]:
        return [FunctionReward(function=get_reward)] if self._has_reward else []

    @property
    def for_rewards(self) -> Any:
        return self._instance

    async def reset(self, row: Mapping[str, Any]) -> str | list[Message] | None:
        """Begin an episode of an object, which another episode may have used before."""
        try:
            self._instance = self._instances.pop()
        except IndexError:
            self._instance = self._create()
        self._functions |= {method.__name__: method for method in _methods(self._instance)}
        return await run_tool(partial(call_with, self._instance.reset, row), {})

    def close(self) -> None:
        if self._instance is not None:
            self._instances.append(self._instance)
            self._instance = None


async def get_reward(environments: Sequence[Any]) -> list[float]:
    """A reward function: what ``get_reward()`` of each object, plain or ``async``, returns after its episode."""
    return [await run_tool(environment.get_reward, {}) for environment in environments]


def _methods(instance: Any) -> list[Callable[..., Any]]:
    """The methods that are tools."""
    methods = inspect.getmembers(instance, predicate=inspect.ismethod)
    return [method for name, method in methods if not name.startswith("_") and name not in NOT_TOOLS]
