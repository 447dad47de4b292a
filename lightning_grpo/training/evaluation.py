"""Held-out prompts: accuracy, rewards and lengths of their completions, and the records that ``predict`` returns.

Shapes: B prompts, k completions per prompt, N = B·k completions, R rewards.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_grpo.data import PromptBatch
from lightning_grpo.metrics import Window
from lightning_grpo.monitor.observe import observe_completions, observe_rewards
from lightning_grpo.rollout import Rollout

ROLLOUT_NUMBER = -1
"""The rollout number of held-out samples. It never changes, and so neither do their seeds: evaluations differ by the
policy alone."""


class Evaluation:
    """Collects the metrics of one pass over the held-out prompts.

    Args:
        num_generations: completions per held-out prompt (k in pass@k).
        pass_threshold: a completion is correct if its first reward is at least this value.
    """

    def __init__(self, *, num_generations: int, pass_threshold: float) -> None:
        self.num_generations = num_generations
        self.pass_threshold = pass_threshold
        self.reset()

    def reset(self) -> None:
        """Discard what was collected, for example by an evaluation that was interrupted."""
        self._metrics = Window()

    def observe(
        self, batch: PromptBatch, rollout: Rollout, rewards: Tensor, names: Sequence[str], weights: Tensor
    ) -> None:
        """Add the completions of one batch.

        Args:
            batch: B prompts.
            rollout: N completions.
            rewards: [N, R].
            names: of the R rewards.
            weights: [R].
        """
        k = self.num_generations
        # prompts that only fill up a rank's last batch are not counted
        real = torch.tensor(batch.real).repeat_interleave(k)
        observe_rewards(self._metrics, rewards[real], names, weights)
        self._metrics.log(rollout.reward_metrics)
        observe_completions(self._metrics, rollout.completion_mask[real].sum(1), rollout.truncated[real])
        correct = (rewards[real, 0] >= self.pass_threshold).view(-1, k)
        self._metrics.mean("pass@1", correct)
        if k > 1:
            self._metrics.mean(f"pass@{k}", correct.any(1))

    def compute(self) -> dict[str, float]:
        """The metrics over all ranks. Call it on every rank."""
        return self._metrics.reduce()

    def records(
        self,
        batch: PromptBatch,
        rollout: Rollout,
        rewards: Tensor,
        names: Sequence[str],
        completions: Sequence[str],
    ) -> list[dict[str, Any]]:
        """One record per completion: prompt, completion, rewards, and whether the completion was truncated."""
        rows = zip(completions, rewards.tolist(), rollout.truncated.tolist(), strict=True)
        return [
            {
                "prompt": batch.messages[n // self.num_generations],
                "completion": completion,
                "rewards": {name: None if x != x else x for name, x in zip(names, values, strict=True)},
                "truncated": truncated,
            }
            for n, (completion, values, truncated) in enumerate(rows)
            if batch.real[n // self.num_generations]
        ]
