"""The rows of an optimizer step as a table.

Shapes: N completions of a rollout on this rank, n of them in the step, P prompt length, T completion length.
"""

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pyarrow as pa
from lightning import Trainer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_grpo.record.schema import COLUMNS, EXTRA, LOGPROBS, REWARD
from lightning_grpo.rewards import decode_completions
from lightning_grpo.rollout.callback import eos_token_ids
from lightning_grpo.training.experience import Experience


@dataclass(frozen=True, kw_only=True)
class SampleTables:
    """Converts trained rows to tables with the columns of `schema`."""

    tokenizer: PreTrainedTokenizerBase
    """Used by another thread than the run, so a copy of the run's own."""
    end_ids: Collection[int]
    """Tokens that end a completion."""
    reward_names: Sequence[str]
    num_generations: int
    max_completion_length: int
    rank: int
    shard: tuple[int, int]
    """Number of data-parallel ranks, and the index of this one among them."""
    logprobs: bool
    """Whether to include `LOGPROBS`."""

    @classmethod
    def of(cls, trainer: Trainer, *, logprobs: bool) -> Self:
        """For the rows of this rank of the trainer's module."""
        module: Any = trainer.lightning_module  # `GRPOModule`, which imports packages above this one
        shard = {"num_replicas": 1, "rank": 0} | (trainer.distributed_sampler_kwargs if trainer.world_size > 1 else {})
        return cls(
            tokenizer=copy.deepcopy(module.tokenizer),
            end_ids=eos_token_ids(module.policy, module.tokenizer),
            reward_names=module.reward_names,
            num_generations=module.num_generations,
            max_completion_length=module.max_completion_length,
            rank=trainer.global_rank,
            shard=(shard["num_replicas"], shard["rank"]),
            logprobs=logprobs,
        )

    def table(self, experience: Experience, rows: slice, step: int) -> pa.Table:
        """The ``rows`` of ``experience`` on which optimizer step ``step`` was taken."""
        place = np.arange(len(experience))[rows]
        shards, shard = self.shard
        mask, prompt_mask = _numpy(experience.completion_mask[rows]), _numpy(experience.prompt_mask[rows])
        ids = _numpy(experience.completion_ids[rows])
        prompts = [ids[kept] for ids, kept in zip(_numpy(experience.prompt_ids[rows]), prompt_mask, strict=True)]
        context = np.flip(np.logical_or.accumulate(np.flip(mask, 1), 1), 1)
        is_dialogue = experience.conversations is not None
        truncated, versions = _numpy(experience.truncated[rows]), _numpy(experience.versions[rows])
        written = [ids[kept].tolist() for ids, kept in zip(ids, context, strict=True)]
        parts = [self._part_lengths(*row) for row in zip(written, mask, strict=True)] if is_dialogue else None
        n, is_empty = len(place), ~mask.any(1)
        reasons = np.where(is_dialogue | (mask.sum(1) >= self.max_completion_length), "length", "cutoff")
        columns: dict[str, Any] = {
            "step": np.full(n, step),
            "rollout": np.full(n, experience.number),
            "rank": np.full(n, self.rank),
            "group": place // self.num_generations * shards + shard,
            "index": place % self.num_generations,
            "prompt": self._decode(prompts),
            "completion": self._decode([*map(np.array, written)])
            if is_dialogue
            else decode_completions(self.tokenizer, written, self.end_ids),
            "prompt_ids": _lists(_numpy(experience.prompt_ids[rows]), prompt_mask, pa.int32()),
            "completion_ids": _lists(ids, context, pa.int32()),
            "sampled": _lists(mask, context, pa.bool_()) if is_dialogue else None,
            "part_lengths": parts,
            "reward": _floats(experience.totals[rows]),
            "advantage": _floats(_per_completion(experience.advantages[rows], experience.completion_mask[rows])),
            "truncated": truncated,
            "finish_reason": np.where(truncated, reasons, "stop"),
            "version_min": pa.array(np.where(mask, versions, np.iinfo(np.int32).max).min(1), mask=is_empty),
            "version_max": pa.array(np.where(mask, versions, 0).max(1), mask=is_empty),
            "seed": None if experience.seeds is None else experience.seeds[rows],
            "source": None
            if experience.sources is None
            else [_text(x) if x else None for x in experience.sources[rows]],
        }
        arrays = [_column(columns[field.name], field.type, n) for field in COLUMNS]
        table = pa.table(arrays, schema=COLUMNS)
        for name, values in zip(self.reward_names, experience.rewards[rows].T, strict=True):
            table = table.append_column(REWARD + name, _column(_floats(values), pa.float32(), n))
        if self.logprobs:
            trainer = experience.logprobs if experience.old_logprobs is None else experience.old_logprobs
            for field, values in zip(LOGPROBS, (experience.rollout_logprobs, trainer), strict=True):
                lists = None if values is None else _lists(_numpy(values[rows].float()), context, pa.float32(), mask)
                table = table.append_column(field, _column(lists, field.type, n))
        for name, values in _extras((experience.extras or [])[rows]).items():
            table = table.append_column(EXTRA + name, values)
        return table

    def _decode(self, prompts: Sequence[np.ndarray]) -> list[str]:
        """The texts of the prompts, most of which occur several times."""
        texts: dict[bytes, str] = {}
        for ids in prompts:
            if (key := ids.tobytes()) not in texts:
                texts[key] = self._text(ids.tolist())
        return [texts[ids.tobytes()] for ids in prompts]

    def _part_lengths(self, ids: list[int], sampled: np.ndarray) -> list[int]:
        """Numbers of characters of the parts of a completion, those that the policy sampled and the others in turn."""
        ends = [*np.flatnonzero(np.diff(sampled[: len(ids)])) + 1, len(ids)]
        # from the beginning, since tokenizers may drop the first space of a text
        return np.diff([0, *(len(self._text(ids[:end])) for end in ends)]).tolist()

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))


def _numpy(x: Tensor) -> np.ndarray:
    return x.detach().cpu().numpy()


def _floats(x: Tensor) -> pa.Array:
    """[n], with null for NaN."""
    return pa.array(_numpy(x.float()), from_pandas=True)


def _per_completion(advantages: Tensor, mask: Tensor) -> Tensor:
    """[n]: the mean over the tokens of each completion if ``advantages`` are [n, T]."""
    if advantages.dim() == 1:
        return advantages
    mask = mask.to(advantages.device)
    return (advantages * mask).sum(1) / mask.sum(1)


def _lists(values: np.ndarray, mask: np.ndarray, kind: pa.DataType, known: np.ndarray | None = None) -> pa.Array:
    """[n] lists of the ``values`` [n, T] on which ``mask`` is True, with null for those on which ``known`` is False.

    A row is null if one of its known values is NaN.
    """
    known = mask if known is None else known
    offsets = np.concatenate([[0], mask.sum(1).cumsum()]).astype(np.int32)
    unknown = (np.isnan(values) & known).any(1)
    items = pa.array(values[mask], mask=~known[mask]).cast(kind)
    return pa.ListArray.from_arrays(offsets, items, mask=pa.array(unknown))


def _column(values: Any, kind: pa.DataType, n: int) -> pa.Array:
    if values is None:
        return pa.nulls(n, kind)
    return values.cast(kind) if isinstance(values, pa.Array) else pa.array(values).cast(kind)


def _extras(rows: Sequence[dict[str, Any]]) -> dict[str, pa.Array]:
    """Each name that any of the rows has: numbers if all of its values are, else texts."""
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {}
    for name in names:
        values = [row.get(name) for row in rows]
        if all(value is None or isinstance(value, int | float) for value in values):
            columns[_text(name)] = pa.array([None if value is None else float(value) for value in values], pa.float64())
        else:
            columns[_text(name)] = pa.array([None if value is None else _text(value) for value in values], pa.string())
    return columns


def _text(value: Any) -> str:
    """A text that can be written as UTF-8."""
    return str(value).encode("utf-8", "backslashreplace").decode()
