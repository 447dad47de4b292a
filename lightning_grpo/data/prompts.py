"""Encoded prompts, one by one and as the batches that a rollout is made of."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lightning_grpo.data.rows import Message


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One row of the data set, encoded."""

    index: int
    """Row number in the source, from 0: stays the same whatever is dropped or held out."""
    place: str
    """Where the row stands, for messages: "train.jsonl, line 7"."""
    ids: list[int]
    """Token ids, as the engine gets them."""
    messages: str | list[Message]
    """The prompt as text or as chat messages: what reward functions see as ``prompts``."""
    columns: dict[str, Any]
    """All other columns, for the rewards."""


class PromptBatch:
    """This rank's prompts of one rollout (or of one validation batch). Not a dataclass, so that Lightning's
    conversions of batches don't walk through every token id.

    prompts: token ids of each prompt; messages: the same as text or chat messages; columns: the other columns of each
    row; prompt_indices: row numbers in the source, stable over runs; rollout: number of the rollout, from 0, counted
    over the whole training; step: which repetition of the batch this is, in [0, steps_per_rollout); real: False for a
    row that only fills up a validation shard, to be left out of every figure.
    """

    def __init__(self, rows: Sequence[Prompt], *, rollout: int = 0, step: int = 0, real: Sequence[bool] | None = None):
        self.rows = list(rows)
        self.rollout = rollout
        self.step = step
        self.real = [True] * len(self.rows) if real is None else list(real)

    @property
    def prompts(self) -> list[list[int]]:
        return [row.ids for row in self.rows]

    @property
    def messages(self) -> list[str | list[Message]]:
        return [row.messages for row in self.rows]

    @property
    def columns(self) -> list[dict[str, Any]]:
        return [row.columns for row in self.rows]

    @property
    def prompt_indices(self) -> list[int]:
        return [row.index for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def to(self, device: torch.device) -> "PromptBatch":
        """Itself: it holds no tensors (Lightning moves batches with this)."""
        return self


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """Equal for equal rows in the same order: token ids, and all columns that rewards see."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(np.array([prompt.index, len(prompt.ids), *prompt.ids], dtype=np.int64).tobytes())
        columns = [[name, prompt.columns[name]] for name in sorted(prompt.columns)]
        digest.update(json.dumps(columns, default=_plain, skipkeys=True).encode())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """What stands for a value that JSON has no form for: the same in every process."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    has_own_repr = type(value).__repr__ is not object.__repr__
    return [type(value).__qualname__, repr(value) if has_own_repr else ""]
