"""Checks before training that every reward can score every row of the data set."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from lightning_grpo.errors import UserError
from lightning_grpo.rewards.base import Reward


class Row(Protocol):
    """What is checked of a prompt."""

    @property
    def columns(self) -> Mapping[str, Any]: ...
    @property
    def place(self) -> str: ...
    @property
    def rewards(self) -> Collection[str] | None: ...


def check_rows(rewards: Sequence[Reward], rows: Sequence[Row]) -> None:
    """Call `Reward.check` of every reward with the rows that it applies to.

    Raises:
        UserError: a reward rejects a row, or a row names a reward that does not exist. The message states its location
            ("train.jsonl, line 7").
    """
    names = [reward.name for reward in rewards]
    for row in rows:
        if unknown := [name for name in row.rewards or () if name not in names]:
            raise UserError(
                f"{row.place}: the rewards of its source include {unknown[0]!r}, but the rewards of the model are "
                f"{', '.join(names)}; set model.rewards and the rewards of the source to the same names"
            )
    for reward in rewards:
        applicable = [row for row in rows if row.rewards is None or reward.name in row.rewards]
        try:
            reward.check([row.columns for row in applicable])
        except ValueError as error:
            place = next((row.place for row in applicable if _rejects(reward, row.columns)), None)
            raise UserError(f"{place}: {error}" if place else str(error)) from error


def _rejects(reward: Reward, row: Mapping[str, Any]) -> bool:
    try:
        reward.check([row])
    except ValueError:
        return True
    return False
