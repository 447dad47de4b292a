"""Completions that are being sampled, a row of the batch each."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_grpo.rollout.hf.sampling import draw, sampled_logprobs
from lightning_grpo.rollout.hf.stop import StopStrings
from lightning_grpo.rollout.seeds import uniform
from lightning_grpo.rollout.types import Completion, FinishReason, Sampling


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
        logprobs = sampled_logprobs(logits, self.sampling, seen)
        uniforms = torch.tensor([uniform(row.seed, len(row.token_ids)) for row in rows], dtype=torch.float64)
        tokens = draw(logprobs, uniforms.to(logprobs.device), greedy=self.sampling.temperature == 0)
        chosen = logprobs.gather(-1, tokens[:, None]).squeeze(-1)
        for row, token, logprob in zip(rows, tokens.tolist(), chosen.tolist(), strict=True):
            row.token_ids.append(token)
            row.logprobs.append(logprob)
            row.finish_reason = self._finish_reason(row)
        return tokens

    def _finish_reason(self, row: Row) -> FinishReason | None:
        if row.token_ids[-1] in self.eos_token_ids or self.stop.end(row.prompt, row.token_ids):
            return "stop"
        return "length" if len(row.token_ids) == row.max_tokens else None
