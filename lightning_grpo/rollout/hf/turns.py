"""Turns of conversations, sampled with the policy's own modules.

Shapes: R rows of a forward pass, T new tokens, V vocabulary.
"""

import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_grpo.rollout.hf.rows import Row, Sample, TokenSampler
from lightning_grpo.rollout.hf.slots import SlotCache
from lightning_grpo.rollout.turns import Turns
from lightning_grpo.rollout.types import Completion, Turn

if TYPE_CHECKING:
    from lightning_grpo.rollout.hf.engine import HFEngine


class HFTurns(Turns):
    """What the turns of both kinds of models have in common: submitted turns wait for a free row.

    Args:
        engine: the engine, in the context of its forward passes.
        sampler: samples tokens.
    """

    def __init__(self, engine: "HFEngine", sampler: TokenSampler) -> None:
        self.engine = engine
        self.sampler = sampler
        self.waiting: list[Turn] = []
        self.computed_tokens = 0
        self._running = 0

    @property
    def running(self) -> int:
        return self._running

    def submit(self, turn: Turn) -> None:
        self.waiting.append(turn)
        self._running += 1

    def step(self, timeout: float = 0.05) -> list[tuple[int, Completion]]:
        until = time.monotonic() + timeout
        ended: list[tuple[int, Completion]] = []
        while self.running and not ended:
            ended = [(key, row.completion(self.engine.version)) for key, row in self.advance()]
            self._running -= len(ended)
            if time.monotonic() >= until:
                break
        return ended

    @abstractmethod
    def advance(self) -> list[tuple[int, Row]]:
        """Begin waiting turns if there are free rows, and sample a token of each row; returns those that ended."""


# ── Models that keep all positions ────────────────────────────────────────────────────────────────────────────────


@dataclass(eq=False)
class _Slot:
    """A row of the cache: a conversation between its turns, or with one that is running."""

    key: int | None = None
    """None: the conversation has ended."""
    row: Row | None = None
    """The turn that is running."""
    cached: list[int] = field(default_factory=list)
    """The tokens whose keys and values are cached."""
    used: int = 0
    """The number of the turn that used it last."""

    @property
    def new(self) -> Sequence[int]:
        """The tokens before the turn that are not cached."""
        return self.row.prompt[len(self.cached) :]

    def begin(self, turn: Turn, number: int) -> None:
        """Run ``turn``, the one of this ``number``, and keep those cached tokens with which it begins."""
        self.key, self.used = turn.key, number
        self.row = Row(prompt=turn.token_ids, seed=turn.seed, max_tokens=turn.max_tokens)
        # The last token is computed again if all are cached: its logits are needed.
        pairs = zip(self.cached, turn.token_ids[:-1], strict=False)
        kept = next((i for i, (old, new) in enumerate(pairs) if old != new), len(turn.token_ids) - 1)
        del self.cached[kept:]


class SlotTurns(HFTurns):
    """Each conversation keeps a row of a cache between its turns, so that a turn computes its new tokens only.

    Rows whose turn is running come first, and sample a token each in one forward pass. If there are more conversations
    than rows, those whose last turn is oldest lose their row, and are computed again as a whole.
    """

    def __init__(self, engine: "HFEngine", sampler: TokenSampler) -> None:
        super().__init__(engine, sampler)
        self._cache = SlotCache(engine.policy.config, engine.max_num_seqs)
        self._slots: list[_Slot] = []
        self._begun = 0

    def end(self, key: int) -> None:
        for slot in self._slots:
            if slot.key == key:
                slot.key, slot.used = None, 0

    def advance(self) -> list[tuple[int, Row]]:
        begun = self._begin()
        ended = []
        # Rows are padded to a common length, by less than their own.
        for _, slots in groupby(begun, key=lambda slot: len(slot.new).bit_length()):
            ended += self._prefill(list(slots))
        self._compact()
        return ended + self._decode()

    def _begin(self) -> list[_Slot]:
        """Assign rows to waiting turns, as far as there are free ones; returns them by their number of new tokens."""
        slots = {slot.key: slot for slot in self._slots}
        begun, waiting = [], []
        # Conversations with a row need no other.
        for turn in sorted(self.waiting, key=lambda turn: turn.key not in slots):
            slot = slots.get(turn.key) or self._free_slot()
            if slot is None:
                waiting.append(turn)
                continue
            if slot.key != turn.key:
                self._share(list(turn.token_ids[:-1]), slot)
            self._begun += 1
            slot.begin(turn, self._begun)
            begun.append(slot)
        self.waiting = waiting
        return sorted(begun, key=lambda slot: len(slot.new))

    def _free_slot(self) -> _Slot | None:
        idle = min((slot for slot in self._slots if slot.row is None), key=lambda slot: slot.used, default=None)
        if (idle is None or idle.key is not None) and len(self._slots) < self.engine.max_num_seqs:
            idle = _Slot()
            self._slots.append(idle)
        return idle

    def _share(self, beginning: list[int], slot: _Slot) -> None:
        """Copy the cache of ``beginning`` to ``slot`` from another row that has it, as the samples of a prompt do."""
        owner = next((other for other in self._slots if other.cached[: len(beginning)] == beginning), None)
        if beginning and owner is not None and owner is not slot:
            self._cache.copy([self._slots.index(owner)], [self._slots.index(slot)], len(beginning))
            slot.cached = beginning

    def _compact(self) -> None:
        """Move rows whose turn is running to the front."""
        R = sum(slot.row is not None for slot in self._slots)
        holes = [i for i in range(R) if self._slots[i].row is None]
        strays = [i for i in range(R, len(self._slots)) if self._slots[i].row is not None]
        if not holes:
            return
        length = max(len(self._slots[i].cached) for i in holes + strays)
        self._cache.copy(holes + strays, strays + holes, length)
        for hole, stray in zip(holes, strays, strict=True):
            self._slots[hole], self._slots[stray] = self._slots[stray], self._slots[hole]

    def _prefill(self, slots: list[_Slot]) -> list[tuple[int, Row]]:
        """Compute the new tokens of turns that begin, equal prompts once, and sample the first token of each."""
        firsts: dict[Any, _Slot] = {}
        owners = [firsts.setdefault(slot.key if slot.cached else tuple(slot.new), slot) for slot in slots]
        computed = list(firsts.values())
        rows = [self._slots.index(slot) for slot in computed]
        ids, new_mask = self.engine.left_padded([slot.new for slot in computed])
        mask, positions = self._cache.prefill(rows, [len(slot.cached) for slot in computed], new_mask.bool())
        logits = self.engine.forward(ids, mask, positions, self._cache)
        self.computed_tokens += int(new_mask.sum())
        copies = [(owner, slot) for owner, slot in zip(owners, slots, strict=True) if owner is not slot]
        if copies:
            source, target = ([self._slots.index(slot) for slot in part] for part in zip(*copies, strict=True))
            self._cache.copy(source, target, max(len(slot.new) for _, slot in copies))
        logits = logits[[computed.index(owner) for owner in owners]]
        for slot in slots:
            slot.cached = list(slot.row.prompt)
        return self._sample(slots, logits)

    def _decode(self) -> list[tuple[int, Row]]:
        """Compute the last token of all running turns, and sample the next one."""
        slots = [slot for slot in self._slots if slot.row is not None]
        if not slots:
            return []
        tokens = [slot.row.token_ids[-1] for slot in slots]
        mask, positions = self._cache.decode([len(slot.cached) for slot in slots], self.engine.device)
        logits = self.engine.forward(torch.tensor(tokens, device=mask.device)[:, None], mask, positions, self._cache)
        for slot, token in zip(slots, tokens, strict=True):
            slot.cached.append(token)
        return self._sample(slots, logits)

    def _sample(self, slots: list[_Slot], logits: Tensor) -> list[tuple[int, Row]]:
        seen = None
        if self.sampler.sampling.repetition_penalty != 1:
            seen = torch.zeros_like(logits, dtype=torch.bool)
            for line, slot in zip(seen, slots, strict=True):
                line[slot.cached] = True
        self.sampler([slot.row for slot in slots], logits, seen)
        ended = [(slot.key, slot.row) for slot in slots if slot.row.finish_reason]
        for slot in slots:
            if slot.row.finish_reason:
                slot.row = None
        return ended


# ── Other models ──────────────────────────────────────────────────────────────────────────────────────────────────


class BatchTurns(HFTurns):
    """Turns that begin together are a batch, which computes their whole conversations. For models with layers that do
    not keep all positions, such as sliding windows."""

    def __init__(self, engine: "HFEngine", sampler: TokenSampler) -> None:
        super().__init__(engine, sampler)
        self._batches: list[Iterator[list[tuple[int, Row]]]] = []

    def end(self, key: int) -> None:
        """Without effect: nothing is cached."""

    def advance(self) -> list[tuple[int, Row]]:
        free = self.engine.max_num_seqs - (self.running - len(self.waiting))
        begun, self.waiting = self.waiting[:free], self.waiting[free:]
        if begun:
            self._batches.append(self._sample(begun))
        results = [next(batch, None) for batch in self._batches]
        self._batches = [batch for batch, rows in zip(self._batches, results, strict=True) if rows is not None]
        return [pair for rows in results if rows for pair in rows]

    def _sample(self, turns: list[Turn]) -> Iterator[list[tuple[int, Row]]]:
        """Sample a batch of turns, and yield those that end with each token."""
        prompts = list({tuple(turn.token_ids): None for turn in turns})
        self.computed_tokens += sum(map(len, prompts))
        rows = [
            Sample(
                prompt=turn.token_ids,
                seed=turn.seed,
                max_tokens=turn.max_tokens,
                prompt_index=prompts.index(tuple(turn.token_ids)),
                sample_index=turn.key,
            )
            for turn in turns
        ]
        for ended in self.engine.sample(rows, self.sampler):
            yield [(row.sample_index, row) for row in ended]
