"""Completions that are being sampled, a row of the batch each."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import repeat, starmap

import torch
from torch import Tensor

from lightning_grpo.rollout.hf.sampling import draw, sampled_logprobs
from lightning_grpo.rollout.hf.stop import StopStrings
from lightning_grpo.rollout.seeds import uniform
from lightning_grpo.rollout.types import Completion, FinishReason, Sampling

CPU_ROWS = 4
"""Rows whose tokens are drawn together on a CPU, so that what is computed of their logits stays in its caches."""


@dataclass(kw_only=True, eq=False)
class Row:
    """One unfinished completion of ``prompt``."""

    prompt: Sequence[int]
    seed: int
    max_tokens: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def completion(self, version: int) -> Completion:
        """The completion, sampled with the weights of policy ``version``."""
        return Completion(
            token_ids=self.token_ids,
            logprobs=self.logprobs,
            finish_reason=self.finish_reason or "abort",
            versions=[version] * len(self.token_ids),
        )


@dataclass(kw_only=True, eq=False)
class Sample(Row):
    """A row of a batch whose rows are started together: completion ``sample_index`` of prompt ``prompt_index``."""

    prompt_index: int
    sample_index: int


def unfinished(rows: Sequence[Row]) -> list[int]:
    """The indices of unfinished rows, in an order in which most of them keep their place: the last ones replace those
    that have finished."""
    alive = [r for r, row in enumerate(rows) if not row.finish_reason]
    last = iter([r for r in alive if r >= len(alive)])
    return [next(last) if rows[r].finish_reason else r for r in range(len(alive))]


@dataclass(kw_only=True)
class TokenSampler:
    """Samples the next token of each row, and ends rows."""

    sampling: Sampling
    stop: StopStrings
    eos_token_ids: frozenset[int]

    def __call__(self, rows: Sequence[Row], logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """Append a token to each row, and return them, [R].

        Args:
            rows: R rows. Those that end get a ``finish_reason``.
            logits: [R, V].
            seen: [R, V] bool, the tokens so far, if there is a repetition penalty.
        """
        uniforms = torch.tensor([uniform(row.seed, len(row.token_ids)) for row in rows], dtype=torch.float64)
        size = CPU_ROWS if logits.device.type == "cpu" else len(rows)
        marks = repeat(None) if seen is None else seen.split(size)
        parts = zip(logits.split(size), uniforms.to(logits.device).split(size), marks, strict=False)
        tokens, chosen = (torch.cat(part) for part in zip(*starmap(self._sample, parts), strict=True))
        for row, token, logprob in zip(rows, tokens.tolist(), chosen.tolist(), strict=True):
            row.token_ids.append(token)
            row.logprobs.append(logprob)
            row.finish_reason = self._finish_reason(row)
        return tokens

    def _sample(self, logits: Tensor, uniforms: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor]:
        """Draw a token of each row; returns them and their log-probs, [R] each."""
        logprobs = sampled_logprobs(logits, self.sampling, seen)
        tokens = draw(logprobs, uniforms, greedy=self.sampling.temperature == 0)
        return tokens, logprobs.gather(-1, tokens[:, None]).squeeze(-1)

    def _finish_reason(self, row: Row) -> FinishReason | None:
        if row.token_ids[-1] in self.eos_token_ids or self.stop.end(row.prompt, row.token_ids):
            return "stop"
        return "length" if len(row.token_ids) == row.max_tokens else None
