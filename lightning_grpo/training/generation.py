"""Completions from the engine, and the rewards of completions.

Shapes: B prompts, G generations, N = B·G completions, R rewards.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import compress
from typing import Any, cast

import torch
from lightning import Trainer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_grpo.data import Prompt, PromptBatch
from lightning_grpo.data.rows import Message
from lightning_grpo.data.template import ChatTemplate
from lightning_grpo.environments import Environment
from lightning_grpo.environments.episodes import Episode, Episodes, metrics
from lightning_grpo.environments.template import TurnTemplate
from lightning_grpo.rewards import (
    EarlyRewards,
    Reward,
    completion_text,
    compute_rewards,
    decode_completions,
    template_opening,
)
from lightning_grpo.rewards.function import names_argument
from lightning_grpo.rewards.logs import RewardLogs
from lightning_grpo.rollout import Completion, Rollout, SampleRequest, Sampling, SyncedEngine
from lightning_grpo.rollout.seeds import rollout_seeds


class Generation:
    """Samples completions of prompts, and scores them with the rewards.

    Args:
        rewards: R rewards. Those that are ``early`` score a group as soon as it is complete, while the engine samples
            the others.
        environment: what the policy acts in over several turns; None samples single completions.
        tokenizer: the policy's tokenizer.
        end_ids: tokens that end a completion.
        pad_id: token that fills up the rectangles of a `Rollout`.
        max_prompt_length: the largest number of tokens in a prompt.
        max_completion_length: the largest number of tokens in a completion.
        seed: seed of the run; each sample's seed follows from it, the rollout, the prompt and the sample's index.
        trainer: passed on to rewards that ask for its state.
    """

    def __init__(
        self,
        rewards: Sequence[Reward],
        environment: Environment | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase,
        end_ids: Collection[int],
        pad_id: int,
        max_prompt_length: int,
        max_completion_length: int,
        seed: int,
        trainer: Trainer | None,
    ) -> None:
        self.rewards = rewards
        self.environment = environment
        self.tokenizer = tokenizer
        self.end_ids = end_ids
        self.pad_id = pad_id
        self.max_prompt_length = max_prompt_length
        self.max_completion_length = max_completion_length
        self.seed = seed
        self.trainer = trainer
        # those that look at environments must be early, since a rollout does not keep the environments
        self.early = [reward for reward in rewards if reward.early or names_argument(reward, "environments")]

    # ── Sampling ──────────────────────────────────────────────────────────────────────────────────────────────────

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
        seeds = [
            [rollout_seeds(self.seed, number, index, sample) for sample in range(num_generations)]
            for index in batch.prompt_indices
        ]

        def score_group(index: int, group: list[Completion]) -> tuple[Tensor, RewardLogs]:
            return self._score_group(batch.rows[index], group)

        with ExitStack() as stack:
            sample = self._sampler(engine, batch, seeds, sampling, stack)
            # worker processes may score several groups at once, so that a slow completion delays its own group only
            threads = 16 if all(reward.in_workers for reward in self.early) else 1
            scores = stack.enter_context(EarlyRewards(score_group, threads))
            rollout = self._collate(batch, sample(on_group=scores.submit if self.early else None))
            rollout.seeds = [seed for group in seeds for seed in group]
            if self.early:
                values, logs = zip(*scores.gather(), strict=True)
                rollout.early_rewards = torch.cat(values)
                rollout.keep_logs([extras for group in logs for extras in group.extras], *(x.metrics for x in logs))
        return rollout

    def _sampler(
        self,
        engine: SyncedEngine,
        batch: PromptBatch,
        seeds: Sequence[Sequence[int]],
        sampling: Sampling,
        stack: ExitStack,
    ) -> Callable[..., Sequence[Sequence[Completion]]]:
        """What samples the groups. Environments are closed when ``stack`` is."""
        if self.environment is None:
            request = SampleRequest(
                prompts=batch.prompts, seeds=seeds, max_tokens=self.max_completion_length, sampling=sampling
            )
            return partial(engine.generate, request)
        episodes = Episodes(
            self.environment,
            tokenizer=self.tokenizer,
            end_ids=self.end_ids,
            template=turn_template(self.tokenizer, self.trainer),
            max_prompt_length=self.max_prompt_length,
            max_tokens=self.max_completion_length,
        )
        return partial(stack.enter_context(episodes).run, engine, batch.rows, seeds, sampling)

    def _collate(self, batch: PromptBatch, groups: Sequence[Sequence[Completion]]) -> Rollout:
        """The groups as one rollout."""
        if self.environment is None:
            return Rollout.collate(batch.prompts, groups, self.pad_id)
        episodes = cast(Sequence[Sequence[Episode]], groups)
        rollout = Rollout.collate([group[0].prompt.ids for group in episodes], groups, self.pad_id)
        rollout.prompts = [cast(list[Message], episode.prompt.messages) for group in episodes for episode in group]
        counted = [episode for group, is_real in zip(episodes, batch.real, strict=True) for episode in group if is_real]
        rollout.keep_logs([episode.extras for group in episodes for episode in group], metrics(counted))
        return rollout

    # ── Rewards ───────────────────────────────────────────────────────────────────────────────────────────────────

    def compute_rewards(self, rollout: Rollout, batch: PromptBatch) -> Tensor:
        """[N, R] float32: each reward of each completion, NaN if it does not apply."""
        early = self.early if rollout.early_rewards is not None else []
        is_early = torch.tensor([reward in early for reward in self.rewards])
        values = torch.empty(len(rollout), len(self.rewards), dtype=torch.float32)
        values[:, ~is_early] = self.score([reward for reward in self.rewards if reward not in early], rollout, batch)
        if early:
            values[:, is_early] = cast(Tensor, rollout.early_rewards)
        return values

    def score(self, rewards: Sequence[Reward], rollout: Rollout, batch: PromptBatch) -> Tensor:
        """[N, len(rewards)] float32: the ``rewards`` of the completions."""
        prompts = [row for row in batch.rows for _ in range(len(rollout) // len(batch))]
        if rollout.prompts is not None:
            rows = zip(prompts, rollout.prompts, strict=True)
            prompts = [replace(prompt, messages=messages) for prompt, messages in rows]
        turns = rollout.rewards_of_turns()
        offered = {} if turns is None else {"turn_rewards": turns}
        values, logs = self._score(rewards, rollout.written_ids(), prompts, rollout.conversations, offered)
        rollout.keep_logs(logs.extras, logs.metrics)
        return values

    def _score_group(self, prompt: Prompt, group: Sequence[Completion]) -> tuple[Tensor, RewardLogs]:
        """[G, number of early rewards] for a group, and what the rewards log."""
        ids = [[*compress(c.token_ids, c.mask)] if c.mask else c.token_ids for c in group]
        if self.environment is None:
            return self._score(self.early, ids, [prompt] * len(group))
        episodes = cast(Sequence[Episode], group)
        offered: dict[str, Sequence[Any]] = {
            "turn_rewards": [[reward for _, reward in episode.turn_rewards] for episode in episodes],
            "environments": [episode.environment.for_rewards for episode in episodes],
        }
        conversations = [episode.messages for episode in episodes]
        return self._score(self.early, ids, [episode.prompt for episode in episodes], conversations, offered)

    def _score(
        self,
        rewards: Sequence[Reward],
        completion_ids: list[list[int]],
        prompts: Sequence[Prompt],
        conversations: Sequence[list[Message]] | None = None,
        offered: Mapping[str, Sequence[Any]] | None = None,
    ) -> tuple[Tensor, RewardLogs]:
        """[n, len(rewards)] for n completions and the prompt of each, and what the rewards log."""
        logs = RewardLogs(len(prompts))
        values = compute_rewards(
            rewards,
            [prompt.messages for prompt in prompts],
            self._texts(completion_ids, conversations),
            completion_ids,
            [prompt.columns for prompt in prompts],
            self.trainer,
            openings=[template_opening(self.tokenizer, prompt.ids) for prompt in prompts],
            applicable=[prompt.rewards for prompt in prompts],
            logs=logs,
            conversations=conversations,
            offered=offered,
        )
        return values, logs

    # ── Texts ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def final_answers(self, rollout: Rollout) -> list[str | None] | None:
        """The answer in each completion that the first reward finds; None if it does not look for answers."""
        return self.rewards[0].final_answers(self.texts(rollout))

    def texts(self, rollout: Rollout) -> list[str]:
        """The text of each completion, without the tokens that end or pad it. If it has several turns, the text of the
        last one."""
        return self._texts(rollout.written_ids(), rollout.conversations)

    def _texts(self, ids: Sequence[Sequence[int]], conversations: Sequence[list[Message]] | None) -> list[str]:
        if conversations is not None:
            return [completion_text(conversation) for conversation in conversations]
        return decode_completions(self.tokenizer, ids, self.end_ids)


def turn_template(tokenizer: PreTrainedTokenizerBase, trainer: Trainer | None) -> TurnTemplate:
    """What renders the turns of conversations, with the chat template of the trainer's data module."""
    data = getattr(trainer, "datamodule", None)
    args = getattr(data, "chat_template_args", None)
    return TurnTemplate(tokenizer, ChatTemplate(tokenizer, getattr(data, "chat_template", None), args))
