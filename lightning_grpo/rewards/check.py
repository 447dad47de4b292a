"""Checks before training that every reward can score every row of the data set."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_grpo.errors import UserError
from lightning_grpo.rewards.base import Reward


def check_rows(rewards: Sequence[Reward], columns: Sequence[Mapping[str, Any]], places: Sequence[str]) -> None:
    """Call `Reward.check` of every reward.

    Args:
        columns: the columns of each row.
        places: the location of each row for messages, such as "train.jsonl, line 7".

    Raises:
        UserError: a reward rejects a row. The message states its location.
    """
    for reward in rewards:
        try:
            reward.check(columns)
        except ValueError as error:
            place = next((p for row, p in zip(columns, places, strict=True) if _rejects(reward, row)), None)
            raise UserError(f"{place}: {error}" if place else str(error)) from error


def _rejects(reward: Reward, row: Mapping[str, Any]) -> bool:
    try:
        reward.check([row])
    except ValueError:
        return True
    return False
