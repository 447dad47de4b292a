"""Sampling from the policy itself with Hugging Face modules, without a second copy of the weights.

Shapes: R unfinished rows in a batch, L cached positions, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from lightning_grpo.errors import UserError
from lightning_grpo.policy import Policy
from lightning_grpo.rollout.engine import Engine
from lightning_grpo.rollout.hf.decoding import buffered_cache, decoding_mode
from lightning_grpo.rollout.hf.sampling import draw, sampled_logprobs
from lightning_grpo.rollout.hf.stop import StopStrings
from lightning_grpo.rollout.seeds import uniform
from lightning_grpo.rollout.types import Completion, FinishReason, OnGroup, SampleRequest


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode inside this context, and restore the mode of each module afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@dataclass
class _Row:
    """One unfinished completion."""

    prompt_index: int
    sample_index: int
    seed: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None


class HFEngine(Engine):
    """An `Engine` that samples from the policy itself, so that its weights are always current.

    Each prompt is computed once, and its cache is copied for its generations. Prompts of similar length are sampled
    together, and rows leave the batch when they finish. Token t of a sample depends only on (weights, prompt, seed, t),
    up to rounding, which differs with the shape of the batch.

    Args:
        policy: a causal language model of transformers, or a PEFT model around one. Not sharded.
        eos_token_ids: tokens that end a completion.
        pad_id: token that pads shorter prompts; masked in attention.
        tokenizer: required for stop strings.
        max_num_seqs: maximum number of rows sampled at once, which limits the memory of the key-value cache.
        context: returns the context manager for the policy's forward passes (the trainer's precision).
    """

    def __init__(
        self,
        policy: Policy,
        *,
        eos_token_ids: Sequence[int],
        pad_id: int,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_num_seqs: int = 128,
        context: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        if max_num_seqs < 1:
            raise UserError(
                f"max_num_seqs is {max_num_seqs}; set the number of completions sampled at the same time, 1 or more"
            )
        if any(isinstance(p, DTensor) for p in policy.parameters()):
            raise UserError(
                "HFRollout can't sample from a sharded policy, whose forward pass needs all ranks at the same time; "
                "use VLLMRollout, or a strategy that does not shard the policy (ddp)"
            )
        self.policy = policy
        self.eos_token_ids = frozenset(eos_token_ids)
        self.pad_id = pad_id
        self.tokenizer = tokenizer
        self.max_num_seqs = max_num_seqs
        self.context = context
        self.version = 0

    def generate(self, request: SampleRequest, on_group: OnGroup | None = None) -> list[list[Completion]]:
        stop = request.sampling.stop
        if stop and self.tokenizer is None:
            raise UserError(f"sampling.stop is {stop}: stop strings need HFEngine(tokenizer=…)")
        groups: list[list[Completion | None]] = [[None] * len(group) for group in request.seeds]
        with self._inference():
            batches = list(self._batches(request))
            for batch in batches:
                # Only in the last batch have all completions begun.
                spare = request.spare if batch is batches[-1] else 0
                for row in self._decode(request, batch, spare=spare):
                    group = groups[row.prompt_index]
                    group[row.sample_index] = Completion(
                        token_ids=row.token_ids,
                        logprobs=row.logprobs,
                        finish_reason=row.finish_reason,
                        versions=[self.version] * len(row.token_ids),
                    )
                    if on_group is not None and all(group):
                        on_group(row.prompt_index, group)
        return groups

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int, *, in_flight: bool = False) -> None:
        """Record the version. The engine samples with the policy's own weights, so the iterable is not consumed."""
        self.version = version

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        # Causal attention does not see padding on the right.
        ids = torch.full((len(sequences), max(map(len, sequences))), self.pad_id)
        for line, sequence in zip(ids, sequences, strict=True):
            line[: len(sequence)] = torch.tensor(list(sequence))
        ids = ids.to(self._device)
        with self._inference():
            logits = self.policy(input_ids=ids, use_cache=False).logits[:, :-1].float()
            scored = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1).cpu()
        return [row[: len(sequence) - 1] for row, sequence in zip(scored, sequences, strict=True)]

    @property
    def _device(self) -> torch.device:
        return next(self.policy.parameters()).device

    @contextmanager
    def _inference(self) -> Iterator[None]:
        with torch.no_grad(), eval_mode(self.policy), self.context(), decoding_mode(self.policy):
            yield

    def _batches(self, request: SampleRequest) -> Iterator[list[_Row]]:
        order = sorted(range(len(request.prompts)), key=lambda i: -len(request.prompts[i]))
        rows = [_Row(i, g, seed) for i in order for g, seed in enumerate(request.seeds[i])]
        for start in range(0, len(rows), self.max_num_seqs):
            yield rows[start : start + self.max_num_seqs]

    def _decode(self, request: SampleRequest, rows: list[_Row], *, spare: int) -> Iterator[_Row]:
        """Sample the rows and yield each one when it finishes. The last ``spare`` of them are cut off."""
        prompts, sampling, max_tokens = request.prompts, request.sampling, request.max_tokens
        indices = sorted({row.prompt_index for row in rows})
        P = max(len(prompts[i]) for i in indices)
        ids = torch.full((len(indices), P), self.pad_id)
        mask = torch.zeros(len(indices), P, dtype=torch.long)
        for line, i in enumerate(indices):
            ids[line, P - len(prompts[i]) :] = torch.tensor(list(prompts[i]))
            mask[line, P - len(prompts[i]) :] = 1
        ids, mask = ids.to(self._device), mask.to(self._device)

        cache = buffered_cache(self.policy.config, P + max_tokens)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = self._forward(ids, mask, positions, cache)

        fan_out = torch.tensor([indices.index(row.prompt_index) for row in rows], device=self._device)
        cache.batch_select_indices(fan_out)
        logits, mask, position = logits[fan_out], mask[fan_out], positions[fan_out, -1]
        seen = None
        if sampling.repetition_penalty != 1:
            seen = torch.zeros_like(logits, dtype=torch.bool)
            # Padding marks the prompt's last token, which is marked anyway.
            seen.scatter_(1, torch.where(mask.bool(), ids[fan_out], ids[fan_out, -1:]), True)

        stop = StopStrings(self.tokenizer, sampling.stop)
        for step in range(max_tokens):
            logprobs = sampled_logprobs(logits, sampling, seen)
            uniforms = torch.tensor([uniform(row.seed, step) for row in rows], dtype=torch.float64)
            tokens = draw(logprobs, uniforms.to(logprobs.device), greedy=sampling.temperature == 0)
            chosen = logprobs.gather(-1, tokens[:, None]).squeeze(-1)
            for row, token, logprob in zip(rows, tokens.tolist(), chosen.tolist(), strict=True):
                row.token_ids.append(token)
                row.logprobs.append(logprob)
                row.finish_reason = self._finish_reason(row, prompts[row.prompt_index], stop, max_tokens)
            if sum(row.finish_reason is None for row in rows) <= spare:
                for row in rows:
                    row.finish_reason = row.finish_reason or "abort"
            yield from (row for row in rows if row.finish_reason)

            alive = [r for r, row in enumerate(rows) if not row.finish_reason]
            if not alive:
                return
            if len(alive) < len(rows):
                keep = torch.tensor(alive, device=self._device)
                rows = [rows[r] for r in alive]
                cache.batch_select_indices(keep)
                tokens, mask, position = tokens[keep], mask[keep], position[keep]
                seen = None if seen is None else seen[keep]
            if seen is not None:
                seen.scatter_(1, tokens[:, None], True)
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
            position = position + 1
            logits = self._forward(tokens[:, None], mask, position[:, None], cache)

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        """Return the logits [R, V] of the last position, and append to the cache."""
        output = self.policy(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]

    def _finish_reason(
        self, row: _Row, prompt: Sequence[int], stop: StopStrings, max_tokens: int
    ) -> FinishReason | None:
        if row.token_ids[-1] in self.eos_token_ids or stop.end(prompt, row.token_ids):
            return "stop"
        return "length" if len(row.token_ids) == max_tokens else None
