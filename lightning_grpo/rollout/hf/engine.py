"""Sampling from the policy itself with Hugging Face modules, without a second copy of the weights.

Shapes: R unfinished rows in a batch, L cached positions, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from lightning_grpo.errors import UserError
from lightning_grpo.policy import Policy
from lightning_grpo.rollout.engine import Engine
from lightning_grpo.rollout.hf.decoding import buffered_cache, decoding_mode
from lightning_grpo.rollout.hf.rows import Sample, TokenSampler, unfinished
from lightning_grpo.rollout.hf.slots import SlotCache
from lightning_grpo.rollout.hf.stop import StopStrings
from lightning_grpo.rollout.hf.turns import BatchTurns, SlotTurns
from lightning_grpo.rollout.turns import Turns
from lightning_grpo.rollout.types import Completion, OnGroup, SampleRequest, Sampling


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
        sampler = self._sampler(request.sampling)
        groups: list[list[Completion | None]] = [[None] * len(group) for group in request.seeds]
        with self._inference():
            batches = list(self._batches(request))
            for batch in batches:
                # Only in the last batch have all completions begun.
                spare = request.spare if batch is batches[-1] else 0
                for row in chain.from_iterable(self.sample(batch, sampler, spare=spare)):
                    group = groups[row.prompt_index]
                    group[row.sample_index] = row.completion(self.version)
                    if on_group is not None and all(group):
                        on_group(row.prompt_index, group)
        return groups

    @contextmanager
    def turns(self, sampling: Sampling) -> Iterator[Turns]:
        """As `Engine.turns`. The policy is in evaluation mode, without gradients, inside this context."""
        kind = SlotTurns if SlotCache.supports(self.policy.config) else BatchTurns
        with self._inference():
            yield kind(self, self._sampler(sampling))

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int, *, in_flight: bool = False) -> None:
        """Record the version. The engine samples with the policy's own weights, so the iterable is not consumed."""
        self.version = version

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        # Causal attention does not see padding on the right.
        ids = torch.full((len(sequences), max(map(len, sequences))), self.pad_id)
        for line, sequence in zip(ids, sequences, strict=True):
            line[: len(sequence)] = torch.tensor(list(sequence))
        ids = ids.to(self.device)
        with self._inference():
            logits = self.policy(input_ids=ids, use_cache=False).logits[:, :-1].float()
            scored = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1).cpu()
        return [row[: len(sequence) - 1] for row, sequence in zip(scored, sequences, strict=True)]

    @property
    def device(self) -> torch.device:
        return next(self.policy.parameters()).device

    @contextmanager
    def _inference(self) -> Iterator[None]:
        with torch.no_grad(), eval_mode(self.policy), self.context(), decoding_mode(self.policy):
            yield

    def _sampler(self, sampling: Sampling) -> TokenSampler:
        if sampling.stop and self.tokenizer is None:
            raise UserError(f"sampling.stop is {sampling.stop}: stop strings need HFEngine(tokenizer=…)")
        stop = StopStrings(self.tokenizer, sampling.stop)
        return TokenSampler(sampling=sampling, stop=stop, eos_token_ids=self.eos_token_ids)

    def _batches(self, request: SampleRequest) -> Iterator[list[Sample]]:
        order = sorted(range(len(request.prompts)), key=lambda i: -len(request.prompts[i]))
        rows = [
            Sample(prompt=request.prompts[i], seed=seed, max_tokens=request.max_tokens, prompt_index=i, sample_index=g)
            for i in order
            for g, seed in enumerate(request.seeds[i])
        ]
        for start in range(0, len(rows), self.max_num_seqs):
            yield rows[start : start + self.max_num_seqs]

    def sample(self, rows: list[Sample], sampler: TokenSampler, *, spare: int = 0) -> Iterator[list[Sample]]:
        """Sample a batch, and yield the rows that end with each token. The last ``spare`` of them are cut off."""
        prompts = {row.prompt_index: row.prompt for row in rows}
        indices = sorted(prompts)
        ids, mask = self.left_padded([prompts[i] for i in indices])
        P = ids.shape[1]

        cache = buffered_cache(self.policy.config, P + max(row.max_tokens for row in rows))
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = self.forward(ids, mask, positions, cache)

        fan_out = torch.tensor([indices.index(row.prompt_index) for row in rows], device=self.device)
        cache.batch_select_indices(fan_out)
        logits, mask, position = logits[fan_out], mask[fan_out], positions[fan_out, -1]
        seen = None
        if sampler.sampling.repetition_penalty != 1:
            seen = torch.zeros_like(logits, dtype=torch.bool)
            # Padding marks the prompt's last token, which is marked anyway.
            seen.scatter_(1, torch.where(mask.bool(), ids[fan_out], ids[fan_out, -1:]), True)

        while True:
            tokens = sampler(rows, logits, seen)
            if sum(row.finish_reason is None for row in rows) <= spare:
                for row in rows:
                    row.finish_reason = row.finish_reason or "abort"
            yield [row for row in rows if row.finish_reason]

            kept = unfinished(rows)
            if not kept:
                return
            if len(kept) < len(rows):
                keep = torch.tensor(kept, device=self.device)
                rows = [rows[r] for r in kept]
                cache.batch_select_indices(keep)
                tokens, mask, position = tokens[keep], mask[keep], position[keep]
                seen = None if seen is None else seen[keep]
            if seen is not None:
                seen.scatter_(1, tokens[:, None], True)
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
            position = position + 1
            logits = self.forward(tokens[:, None], mask, position[:, None], cache)

    def left_padded(self, sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Token ids [R, T] of ``sequences``, and their mask [R, T], int64."""
        width = max(map(len, sequences))
        ids = torch.full((len(sequences), width), self.pad_id)
        mask = torch.zeros(len(sequences), width, dtype=torch.long)
        for line, sequence in enumerate(sequences):
            ids[line, width - len(sequence) :] = torch.tensor(list(sequence))
            mask[line, width - len(sequence) :] = 1
        return ids.to(self.device), mask.to(self.device)

    def forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
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
