"""Rewards that count only for completions for which other rewards are high enough.

Shapes: N completions, R rewards.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_grpo.errors import UserError
from lightning_grpo.rewards.base import Reward


def check_gates(rewards: Sequence[Reward], eval_rewards: Sequence[Reward]) -> None:
    """Raise `UserError` if a reward requires itself, or one that is not trained on."""
    names = [reward.name for reward in rewards]
    for reward in rewards:
        for required in reward.requires:
            if required not in names or required == reward.name:
                others = ", ".join(name for name in names if name != reward.name)
                raise UserError(
                    f"the reward {reward.name!r} requires {required!r}; set the name of another reward"
                    + (f": {others}" if others else ", of which there is none")
                )
    for reward in eval_rewards:
        if reward.requires:
            raise UserError(
                f"the reward {reward.name!r} of eval_rewards requires others, but it is not summed with them; remove "
                "requires"
            )


def gated(rewards: Sequence[Reward], values: Tensor) -> Tensor:
    """[N, R]: the ``values`` [N, R], with 0 if a required reward is too low, and NaN if it does not apply (NaN)."""
    if not any(reward.requires for reward in rewards):
        return values
    names, columns = [reward.name for reward in rewards], list(values.unbind(1))
    for i, reward in enumerate(rewards):
        for required, minimum in reward.requires.items():
            other = values[:, names.index(required)]
            columns[i] = torch.where(other < minimum, 0.0 * columns[i], columns[i])
            columns[i] = columns[i].masked_fill(other.isnan(), torch.nan)
    return torch.stack(columns, 1)
