"""The reward that an environment gives."""

from dataclasses import dataclass
from typing import Any

from lightning_grpo.rewards.base import Reward


@dataclass(kw_only=True, eq=False)
class EnvironmentReward(Reward):
    """The sum of the rewards that the environment gave for the turns of the episode. Its range is the environment's."""

    def __call__(self, *, turn_rewards: list[list[float]], **_: Any) -> list[float]:  # type: ignore[override]
        return [sum(rewards) for rewards in turn_rewards]
