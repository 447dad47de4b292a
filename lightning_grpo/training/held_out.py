"""Completions of held-out prompts: sampled, rewarded with the module's hooks, and given to its `Evaluation`.

Shapes: B prompts, k completions per prompt, N = B·k completions, R rewards, E rewards of evaluations only.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from lightning import Trainer
from torch import Tensor

from lightning_grpo.data import PromptBatch
from lightning_grpo.objective import total_rewards
from lightning_grpo.rewards import Reward
from lightning_grpo.rollout import Rollout, Sampling
from lightning_grpo.stopping import abandonable
from lightning_grpo.training.evaluation import ROLLOUT_NUMBER, Evaluation
from lightning_grpo.training.generation import Generation


class HeldOutHooks(Protocol):
    """What these functions use of the module."""

    trainer: Trainer
    evaluation: Evaluation
    validation_sampling: Sampling
    eval_rewards: Sequence[Reward]

    @property
    def generation(self) -> Generation: ...
    @property
    def reward_names(self) -> list[str]: ...
    def generate(self, batch: PromptBatch, num_generations: int, sampling: Sampling, *, number: int) -> Rollout: ...
    def compute_rewards(self, rollout: Rollout, batch: PromptBatch) -> Tensor: ...
    def contributions(self, rewards: Tensor) -> Tensor: ...


def sample(module: HeldOutHooks, batch: PromptBatch) -> tuple[Rollout, Tensor]:
    """k completions of each of the batch's B prompts, and their rewards [N, R + E]."""
    k = module.evaluation.num_generations
    with abandonable(module.trainer):
        rollout = module.generate(batch, k, module.validation_sampling, number=ROLLOUT_NUMBER)
        rewards = module.compute_rewards(rollout, batch)
        if module.eval_rewards:
            rewards = torch.cat([rewards, module.generation.score(module.eval_rewards, rollout, batch)], 1)
        return rollout, rewards


def observe(module: HeldOutHooks, batch: PromptBatch) -> None:
    """Sample completions of the batch and collect their metrics."""
    rollout, rewards = sample(module, batch)
    answers = module.generation.final_answers(rollout)
    totals = total_rewards(module.contributions(rewards[:, : len(module.reward_names)]))
    module.evaluation.observe(batch, rollout, rewards, totals, _reward_names(module), answers)


def records(module: HeldOutHooks, batch: PromptBatch) -> list[dict[str, Any]]:
    """Sample completions of the batch, and return one record for each; see `Evaluation.records`."""
    rollout, rewards = sample(module, batch)
    texts = module.generation.texts(rollout)
    return module.evaluation.records(batch, rollout, rewards, _reward_names(module), texts)


def _reward_names(module: HeldOutHooks) -> list[str]:
    return [*module.reward_names, *(reward.name for reward in module.eval_rewards)]
