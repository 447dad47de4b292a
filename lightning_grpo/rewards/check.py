"""Rows that a reward could never judge, refused before training with the place where they stand."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_grpo.errors import UserError
from lightning_grpo.rewards.base import Reward


def check_rows(rewards: Sequence[Reward], columns: Sequence[Mapping[str, Any]], places: Sequence[str]) -> None:
    """Let every reward check all rows.

    Args:
        columns: of each row.
        places: where each row stands, for messages ("train.jsonl, line 7").

    Raises:
        UserError: a reward refuses a row; names its place.
    """
    for reward in rewards:
        try:
            reward.check(columns)
        except ValueError as error:
            place = next((p for row, p in zip(columns, places, strict=True) if _refuses(reward, row)), None)
            raise UserError(f"{place}: {error}" if place else str(error)) from error


def _refuses(reward: Reward, row: Mapping[str, Any]) -> bool:
    try:
        reward.check([row])
    except ValueError:
        return True
    return False
