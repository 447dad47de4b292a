"""Encoded prompts, and batches of them."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from lightning_grpo.data.rows import Message


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """An encoded row of the data set."""

    index: int
    """Row number in the source, from 0. It does not depend on which rows are dropped or held out."""
    place: str
    """Location of the row, for messages: "train.jsonl, line 7"."""
    ids: list[int]
    """Token ids, as passed to the engine."""
    messages: str | list[Message]
    """The prompt as text or chat messages, as passed to reward functions under ``prompts``."""
    columns: dict[str, Any]
    """All other columns, for reward functions."""
    rewards: list[str] | None = None
    """Names of the rewards that apply to the prompt. None: all rewards."""

    @property
    def source(self) -> str:
        """The name of the data set that the row comes from: its column ``source``, or ``data_source`` as in verl's
        files. Empty if it has neither."""
        names = (self.columns.get(column) for column in ("source", "data_source"))
        return next((str(name) for name in names if name is not None), "")


class PromptBatch:
    """This rank's prompts of one rollout, or of one validation batch.

    It is not a dataclass, because Lightning's batch conversions would then visit every token id.

    Args:
        rows: the prompts.
        rollout_number: number of the rollout, from 0, counted over the whole training.
        real: False for rows that only pad a validation batch, which are excluded from all metrics. None: all True.
    """

    def __init__(self, rows: Sequence[Prompt], *, rollout_number: int = 0, real: Sequence[bool] | None = None) -> None:
        self.rows = list(rows)
        self.rollout_number = rollout_number
        self.real = [True] * len(self.rows) if real is None else list(real)

    @property
    def rollout(self) -> int:
        """The former name of ``rollout_number``, until 0.3."""
        return self.rollout_number

    @property
    def prompts(self) -> list[list[int]]:
        """Token ids of each prompt."""
        return [row.ids for row in self.rows]

    @property
    def messages(self) -> list[str | list[Message]]:
        """Each prompt as text or chat messages."""
        return [row.messages for row in self.rows]

    @property
    def columns(self) -> list[dict[str, Any]]:
        """The other columns of each row."""
        return [row.columns for row in self.rows]

    @property
    def prompt_indices(self) -> list[int]:
        """Row numbers in the source, the same in every run."""
        return [row.index for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def to(self, device: torch.device) -> "PromptBatch":
        """Return the batch itself, which has no tensors. Lightning calls this to move batches."""
        return self


class Encoded(NamedTuple):
    """What identifies a prompt."""

    row: int
    """`Prompt.index`"""
    ids: np.ndarray
    """int32"""
    columns: str
    """See `encoded_columns`."""


def encoded_columns(columns: dict[str, Any], **options: Any) -> str:
    """JSON of a list of pairs (name, value), sorted by name; ``options`` are those of `json.dumps`."""
    return json.dumps([[name, columns[name]] for name in sorted(columns)], **options)


def identify(prompt: Prompt) -> Encoded:
    """The prompt with columns as JSON, in which values that JSON can't represent are described."""
    columns = encoded_columns(prompt.columns, default=_plain, skipkeys=True)
    return Encoded(prompt.index, np.array(prompt.ids, dtype=np.int32), columns)


def fingerprint(prompts: Iterable[Encoded]) -> str:
    """Return a hash of prompts in their order: their token ids and all columns for reward functions."""
    digest = hashlib.sha256()
    for row, ids, columns in prompts:
        digest.update(np.array([row, len(ids)], dtype=np.int64).tobytes())
        digest.update(ids.astype(np.int64).tobytes())
        digest.update(columns.encode())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """Return a representation of a value that JSON can't encode; it is the same in every process."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    has_own_repr = type(value).__repr__ is not object.__repr__
    return [type(value).__qualname__, repr(value) if has_own_repr else ""]
