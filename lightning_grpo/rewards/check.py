"""Checks before training that every reward can score every row of the data set, and that the environment can begin from
it."""

import hashlib
import inspect
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import FunctionType
from typing import Any, Protocol, runtime_checkable

from lightning_grpo.errors import UserError
from lightning_grpo.rewards.base import Reward

FIRST = 100
"""Number of rows to check again if an earlier run checked all of them, since some rewards also check the machine."""


class Row(Protocol):
    """What is checked of a prompt."""

    @property
    def columns(self) -> Mapping[str, Any]: ...
    @property
    def place(self) -> str: ...
    @property
    def rewards(self) -> Collection[str] | None: ...


class Checker(Protocol):
    """A reward, or an environment."""

    def check(self, rows: Sequence[Mapping[str, Any]], /) -> None: ...


@runtime_checkable
class Stored(Protocol):
    """Rows that are stored together with the keys of the rewards that accepted them."""

    def accepts(self, key: str) -> bool: ...
    def accept(self, key: str) -> None: ...


def check_rows(rewards: Sequence[Reward], rows: Sequence[Row], environment: Checker | None = None) -> None:
    """Call `Reward.check` of every reward with the rows that it applies to, and ``check`` of the environment with all.

    Of stored rows that the same rewards and environment accepted in an earlier run, only the first ones are checked.

    Raises:
        UserError: a row is rejected, or names a reward that does not exist. The message states its location
            ("train.jsonl, line 7").
    """
    key = _key([*rewards, environment]) if isinstance(rows, Stored) else None
    if not isinstance(rows, Stored) or key is None:
        _check(rewards, rows, environment)
    elif rows.accepts(key):
        _check(rewards, list(rows[:FIRST]), environment)
    else:
        _check(rewards, list(rows), environment)
        rows.accept(key)


def _check(rewards: Sequence[Reward], rows: Sequence[Row], environment: Checker | None) -> None:
    if environment is not None:
        _check_columns(environment, rows)
    names = [reward.name for reward in rewards]
    for row in rows:
        if unknown := [name for name in row.rewards or () if name not in names]:
            raise UserError(
                f"{row.place}: the rewards of its source include {unknown[0]!r}, but the rewards of the model are "
                f"{', '.join(names)}; set model.rewards and the rewards of the source to the same names"
            )
        for reward in rewards:
            if reward.name in (row.rewards or ()) and (missing := set(reward.requires).difference(row.rewards)):
                raise UserError(
                    f"{row.place}: the reward {reward.name!r} requires {min(missing)!r}, which the rewards of its "
                    "source do not include; add it to them"
                )
    for reward in rewards:
        _check_columns(reward, [row for row in rows if row.rewards is None or reward.name in row.rewards])


def _check_columns(checker: Checker, rows: Sequence[Row]) -> None:
    try:
        checker.check([row.columns for row in rows])
    except ValueError as error:
        place = next((row.place for row in rows if _rejects(checker, row.columns)), None)
        raise UserError(f"{place}: {error}" if place else str(error)) from error


def _rejects(checker: Checker, row: Mapping[str, Any]) -> bool:
    try:
        checker.check([row])
    except ValueError:
        return True
    return False


def _key(checkers: Sequence[Checker | None]) -> str | None:
    """A hash of the options of rewards or an environment and of the files that define them; None if they can't be
    described."""
    try:
        known = [checker for checker in checkers if checker is not None]
        parts = [[*map(_code, type(checker).__mro__[:-1]), vars(checker)] for checker in known]
        text = json.dumps(parts, default=_code)
    except (TypeError, ValueError, OSError):  # such as an option that is a module, or a class without a file
        return None
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _code(definition: Any) -> list[str]:
    """The name of a class or function, and the contents of the file that defines it."""
    if not isinstance(definition, type | FunctionType) or getattr(definition, "__closure__", None):
        raise TypeError(f"{definition!r} has a state that is not described by code")
    if definition.__module__ == "builtins" or definition.__module__ == "abc":
        return [definition.__qualname__]
    return [definition.__qualname__, Path(inspect.getfile(definition)).read_text(encoding="utf-8")]
