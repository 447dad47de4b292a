"""Completions from the engine, and the rewards of completions.

Shapes: B prompts, G generations, N = B·G completions, R rewards.
"""

from collections.abc import Collection, Sequence

import torch
from lightning import Trainer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_grpo.data import Prompt, PromptBatch
from lightning_grpo.rewards import EarlyRewards, Reward, compute_rewards, decode_completions, template_opening
from lightning_grpo.rewards.logs import RewardLogs
from lightning_grpo.rollout import Completion, Rollout, SampleRequest, Sampling, SyncedEngine
from lightning_grpo.rollout.seeds import rollout_seeds


class Generation:
    """Samples completions of prompts, and scores them with the rewards.

    Args:
        rewards: R rewards. Those that are ``early`` score a group as soon as it is complete, while the engine samples
            the others.
        tokenizer: the policy's tokenizer.
        end_ids: tokens that end a completion.
        pad_id: token that fills up the rectangles of a `Rollout`.
        max_completion_length: the largest number of tokens in a completion.
        seed: seed of the run; each sample's seed follows from it, the rollout, the prompt and the sample's index.
        trainer: passed on to rewards that ask for its state.
    """

    def __init__(
        self,
        rewards: Sequence[Reward],
        *,
        tokenizer: PreTrainedTokenizerBase,
        end_ids: Collection[int],
        pad_id: int,
        max_completion_length: int,
        seed: int,
        trainer: Trainer | None,
    ) -> None:
        self.rewards = rewards
        self.tokenizer = tokenizer
        self.end_ids = end_ids
        self.pad_id = pad_id
        self.max_completion_length = max_completion_length
        self.seed = seed
        self.trainer = trainer

    def generate(
        self, engine: SyncedEngine, batch: PromptBatch, num_generations: int, sampling: Sampling, *, number: int
    ) -> Rollout:
        """Sample ``num_generations`` completions of each of B prompts: N rows, those of a prompt next to each other.

        Args:
            engine: samples, after it has received the policy's weights.
            batch: B prompts.
            num_generations: completions per prompt.
            sampling: options of sampling.
            number: number of the rollout, which enters the seeds.
        """
        request = SampleRequest(
            prompts=batch.prompts,
            seeds=[
                [rollout_seeds(self.seed, number, index, sample) for sample in range(num_generations)]
                for index in batch.prompt_indices
            ],
            max_tokens=self.max_completion_length,
            sampling=sampling,
        )
        early = [reward for reward in self.rewards if reward.early]

        def score_group(prompt: int, group: list[Completion]) -> tuple[Tensor, RewardLogs]:
            return self._score(early, [completion.token_ids for completion in group], [batch.rows[prompt]] * len(group))

        with EarlyRewards(score_group) as scores:
            completions = engine.generate(request, on_group=scores.submit if early else None)
            rollout = Rollout.collate(batch.prompts, completions, self.pad_id)
            rollout.seeds = [seed for seeds in request.seeds for seed in seeds]
            if early:
                values, logs = zip(*scores.gather(), strict=True)
                rollout.early_rewards = torch.cat(values)
                rollout.keep_logs([extras for group in logs for extras in group.extras], *(x.metrics for x in logs))
        return rollout

    def compute_rewards(self, rollout: Rollout, batch: PromptBatch) -> Tensor:
        """[N, R] float32: each reward of each completion, NaN if it does not apply."""
        prompts = [row for row in batch.rows for _ in range(len(rollout) // len(batch))]
        is_early = torch.tensor([reward.early and rollout.early_rewards is not None for reward in self.rewards])
        late = [reward for reward, done in zip(self.rewards, is_early, strict=True) if not done]
        values = torch.empty(len(rollout), len(self.rewards), dtype=torch.float32)
        values[:, ~is_early], logs = self._score(late, rollout.written_ids(), prompts)
        rollout.keep_logs(logs.extras, logs.metrics)
        if is_early.any():
            values[:, is_early] = rollout.early_rewards
        return values

    def score(self, rewards: Sequence[Reward], rollout: Rollout, batch: PromptBatch) -> Tensor:
        """[N, len(rewards)] float32: further ``rewards`` of the completions, such as those of evaluations."""
        prompts = [row for row in batch.rows for _ in range(len(rollout) // len(batch))]
        values, logs = self._score(rewards, rollout.written_ids(), prompts)
        rollout.keep_logs(logs.extras, logs.metrics)
        return values

    def final_answers(self, rollout: Rollout) -> list[str | None] | None:
        """The answer in each completion that the first reward finds; None if it does not look for answers."""
        return self.rewards[0].final_answers(self.decode(rollout.written_ids()))

    def decode(self, completion_ids: Sequence[Sequence[int]]) -> list[str]:
        """The text of each completion, without the tokens that end or pad it."""
        return decode_completions(self.tokenizer, completion_ids, self.end_ids)

    def _score(
        self, rewards: Sequence[Reward], completion_ids: list[list[int]], prompts: list[Prompt]
    ) -> tuple[Tensor, RewardLogs]:
        """[n, len(rewards)] for n completions and the prompt of each, and what the rewards log."""
        logs = RewardLogs(len(prompts))
        values = compute_rewards(
            rewards,
            [prompt.messages for prompt in prompts],
            self.decode(completion_ids),
            completion_ids,
            [prompt.columns for prompt in prompts],
            self.trainer,
            openings=[template_opening(self.tokenizer, prompt.ids) for prompt in prompts],
            applicable=[prompt.rewards for prompt in prompts],
            logs=logs,
        )
        return values, logs
