"""Per-token log-probs of completions under the policy and under its reference.

Shapes: N completions on this rank, n of them in a micro-batch, P prompt length, T completion length.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, NamedTuple, cast

import torch
from lightning import Trainer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lightning_grpo.policy import LoRA, Policy, full_precision_buffers
from lightning_grpo.policy.adapters import trained_values, with_values
from lightning_grpo.policy.logprobs import completion_logprobs, shares_prompts
from lightning_grpo.policy.packable import packs
from lightning_grpo.policy.shared_prompts import PromptOfPass, prompts_of_passes
from lightning_grpo.rollout import Rollout
from lightning_grpo.rollout.seeds import rollout_seeds, turn_seed
from lightning_grpo.training.passes import divide


class RowsToScore(NamedTuple):
    """The rows of a rollout whose log-probs are computed."""

    rollout: Rollout
    micro_batches: Sequence[list[int]]
    """Those of the update."""
    number: int
    """Number of the rollout, which enters the seeds."""
    trainer: Trainer


class Scorer:
    """Computes log-probs at the temperature at which the completions were sampled.

    Args:
        temperature: divides the logits.
        share_prompt: compute each prompt once for all of its completions.
        seed: seed of the run, from which the random numbers of dropout follow.
        limit: the most tokens of one forward pass; None: those of a micro-batch.
    """

    def __init__(self, *, temperature: float, share_prompt: bool, seed: int, limit: int | None = None) -> None:
        self.temperature = temperature
        self.share_prompt = share_prompt
        self.seed = seed
        self.limit = limit
        self.reference: nn.Module | None = None
        """The frozen reference of full training. It is not part of the module tree, so that it is neither trained,
        saved nor sharded with the policy. With LoRA, the policy without its adapter takes its place."""
        self.initial: dict[str, Tensor] | None = None
        """The trained weights before training, if the reference is not the policy without its adapter."""

    def remember(self, policy: Policy, lora: LoRA | None) -> None:
        """Keep what is needed to compute the reference of a policy that has not been trained yet."""
        if lora is not None and not lora.begins_at_base:
            self.initial = trained_values(policy)

    def logprobs(
        self,
        model: nn.Module,
        rows: Rollout,
        *,
        entropy_grad: bool = False,
        coefficient: Tensor | None = None,
        grad_norm: bool = False,
        prompt: PromptOfPass | None = None,
    ) -> tuple[Tensor, ...]:
        """Log-probs and entropies [n, T] of the completions' tokens; with ``grad_norm`` a third value.

        Args:
            model: the policy or its reference.
            rows: n completions.
            entropy_grad: whether the entropy needs a gradient.
            coefficient: [n, T], the gradient of the loss with respect to the log-probs if it is known beforehand,
                which saves memory and time.
            grad_norm: also return the squared norm of ∂log-prob/∂logits, without gradients for any result.
            prompt: of all n completions, if several passes share it.
        """
        return completion_logprobs(
            model,
            prompt_ids=rows.prompt_ids,
            prompt_mask=rows.prompt_mask,
            completion_ids=rows.completion_ids,
            completion_mask=rows.completion_mask,
            temperature=self.temperature,
            share_prompt=self.share_prompt,
            entropy_grad=entropy_grad,
            coefficient=coefficient,
            grad_norm=grad_norm,
            prompt=prompt,
        )

    def divide(self, model: nn.Module, rows: Rollout, trainer: Trainer) -> list[list[list[int]]]:
        """Return the sequences of passes over ``rows``; see `training.passes.divide`.

        Sharded models need as many passes on all ranks. Passes of no rows make up for those that this rank lacks.
        """
        if self.limit is None:
            return [[list(range(len(rows)))]]
        shares = self.share_prompt and shares_prompts(model)
        sequences = divide(rows, self.limit, share_prompt=shares, packed=packs(model))
        if isinstance(model, FSDPModule):
            own = sum(map(len, sequences))
            most = trainer.strategy.reduce(torch.tensor(own, device=trainer.strategy.root_device), reduce_op="max")
            sequences += [[[]]] * (int(most) - own)
        return sequences

    def passes(
        self,
        model: nn.Module,
        rows: Rollout,
        sequences: Sequence[Sequence[list[int]]],
        trainer: Trainer,
        number: int,
        micro_batch: int,
        *,
        coefficient: Tensor | None = None,
        **options: bool,
    ) -> Iterator[tuple[list[int], tuple[Tensor, ...]]]:
        """Run the forward passes of a micro-batch.

        Args:
            model: the policy or its reference.
            rows: n completions.
            sequences: what `divide` returned for them.
            trainer: it runs the model.
            number: number of the rollout, which enters the seeds.
            micro_batch: index of the micro-batch in a pass over the rollout, which enters the seeds.
            coefficient: [n, T], see `logprobs`.
            options: further ones of `logprobs`.

        Yields:
            The indices of the pass's completions in ``rows``, and the results of `logprobs` for them. If there are no
            indices, the results belong to no completion.
        """
        parts: list[tuple[list[int], PromptOfPass | None]] = [
            pair for sequence in sequences for pair in zip(sequence, prompts_of_passes(len(sequence)), strict=True)
        ]
        for k, (part, prompt) in enumerate(parts):
            batch, known = rows, coefficient
            if len(parts) > 1:
                index = part or [len(rows) - 1]
                batch = rows.rows(index)
                known = None if known is None else known[index, : batch.completion_mask.shape[1]]
            with self.seeded(trainer, number, micro_batch, k):
                results = self.logprobs(model, batch, coefficient=known, prompt=prompt, **options)
            yield part, results

    @contextmanager
    def seeded(self, trainer: Trainer, number: int, micro_batch: int, part: int = 0) -> Iterator[None]:
        """Seed dropout by the number of the rollout, the rank, the micro-batch's index in a pass over the rollout, and
        the index of the ``part`` of it that is computed.

        Old log-probs are then computed with the same units dropped as in the update, and checkpoints need not save the
        state of a generator.
        """
        device = trainer.strategy.root_device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            seed = rollout_seeds(self.seed, number, trainer.global_rank, micro_batch)
            torch.manual_seed(turn_seed(seed, part))
            yield

    def score(
        self,
        model: nn.Module,
        rows: RowsToScore,
    ) -> Tensor:
        """Log-probs [N, T] of ``model`` for ``rows``, and 0 for those in no micro-batch.

        They are computed in the trainer's precision and on the micro-batches of the update: as long as the policy has
        not changed, they equal bit for bit what the update will compute, so that the first ratio is exactly 1.
        """
        logprobs, _ = self._score(model, rows)
        return logprobs

    def score_with_norms(
        self,
        model: nn.Module,
        rows: RowsToScore,
    ) -> tuple[Tensor, Tensor]:
        """What `score` returns, and `Rollout.grad_norms` [N, T]."""
        logprobs, _, norms = self._score(model, rows, grad_norm=True)
        return logprobs, norms.masked_fill(~rows.rollout.completion_mask, torch.nan)

    @torch.no_grad()
    def _score(
        self,
        model: nn.Module,
        rows: RowsToScore,
        *,
        grad_norm: bool = False,
    ) -> list[Tensor]:
        """The results of `logprobs`, [N, T] each, and 0 for rows that are in no micro-batch."""
        rollout, micro_batches, number, trainer = rows
        scores = [torch.zeros_like(rollout.rollout_logprobs) for _ in range(3 if grad_norm else 2)]
        with trainer.precision_plugin.forward_context():
            for k, index in enumerate(micro_batches):
                batch = rollout.rows(index, trainer.strategy.root_device)
                sequences = self.divide(model, batch, trainer)
                for part, results in self.passes(model, batch, sequences, trainer, number, k, grad_norm=grad_norm):
                    places = [index[row] for row in part]
                    for score, values in zip(scores, results, strict=True):
                        score[places, : values.shape[1]] = values[: len(part)].to(score)
        return scores

    def score_reference(
        self,
        policy: nn.Module,
        rows: RowsToScore,
    ) -> Tensor:
        """`score` by ``policy`` as it was before training."""
        if self.initial is not None:
            with with_values(policy, self.initial):
                return self.score(policy, rows)
        if self.reference is None:
            adapted = cast(Any, policy)  # a PeftModel, whose type this package does not import
            with adapted.disable_adapter():
                return self.score(policy, rows)
        # Lightning moves and converts only what is in the module tree
        with full_precision_buffers(self.reference):
            reference = rows.trainer.precision_plugin.convert_module(
                self.reference.to(rows.trainer.strategy.root_device)
            )
        return self.score(reference, rows)


@torch.no_grad()
def sequence_logprobs(policy: nn.Module, sequences: Sequence[Sequence[int]], trainer: Trainer) -> list[Tensor]:
    """For each sequence of n tokens the n − 1 values log p(token[i] | token[:i]) at temperature 1."""
    logprobs: list[Tensor] = []
    with trainer.precision_plugin.forward_context():
        for _, batch in groupby(sequences, key=len):
            ids = torch.tensor([list(sequence) for sequence in batch], device=trainer.strategy.root_device)
            mask = torch.ones_like(ids, dtype=torch.bool)
            values, _ = completion_logprobs(
                policy,
                prompt_ids=ids[:, :1],
                prompt_mask=mask[:, :1],
                completion_ids=ids[:, 1:],
                completion_mask=mask[:, 1:],
                share_prompt=False,
            )
            logprobs.extend(values)
    return logprobs
