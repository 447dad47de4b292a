"""Held-out prompts: accuracy, rewards and lengths of their completions, and the records that ``predict`` returns.

Shapes: B prompts, k completions per prompt, N = B·k completions, R rewards.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from lightning_grpo.data import Prompt, PromptBatch
from lightning_grpo.metrics import Spread, Window
from lightning_grpo.monitor.intervals import interval
from lightning_grpo.monitor.observe import observe_completions, pass_at, powers_of_two
from lightning_grpo.rollout import Rollout

ROLLOUT_NUMBER = -1
"""The rollout number of held-out samples. It never changes, and so neither do their seeds: evaluations differ by the
policy alone."""


MAX_SOURCES = 20
"""If held-out prompts name more sources, such as one per row, there are no metrics by source."""


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

    def reset(self, prompts: Sequence[Prompt] = ()) -> None:
        """Begin a pass over ``prompts``, and discard what was collected by one that was interrupted."""
        self._metrics = Window()
        self._prompts = Window()
        """The spread of each figure between prompts."""
        sources = {prompt.source for prompt in prompts} - {""}
        self._sources = sorted(sources) if 1 < len(sources) <= MAX_SOURCES else []

    def observe(
        self,
        batch: PromptBatch,
        rollout: Rollout,
        rewards: Tensor,
        totals: Tensor,
        names: Sequence[str],
        answers: Sequence[str | None] | None = None,
    ) -> None:
        """Add the completions of one batch: all of them, and those of each source.

        Args:
            batch: B prompts.
            rollout: N completions.
            rewards: [N, R + E], rewards that are trained on, and those of evaluations only.
            totals: [N], weighted sums of the rewards that are trained on.
            names: of the R + E rewards.
            answers: N final answers for majority@k; see `Reward.final_answers`.
        """
        self._metrics.log(rollout.reward_metrics)
        right = rewards[:, 0] >= self.pass_threshold
        lengths = rollout.completion_mask.sum(1).double()
        votes = None if answers is None else majority(answers, right.tolist(), self.num_generations)
        for source in ("", *self._sources):
            # prompts that only fill up a rank's last batch are not counted
            prompts = [real and source in ("", row.source) for row, real in zip(batch.rows, batch.real, strict=True)]
            rows = torch.tensor(prompts).repeat_interleave(self.num_generations)
            if not rows.any():
                continue
            prefix = f"{source}/" if source else ""
            self._figure(f"{prefix}reward", totals[rows])
            for name, column in zip(names, rewards.T, strict=True):
                self._figure(f"{prefix}rewards/{name}/mean", column[rows])
                self._metrics.add({f"{prefix}rewards/{name}/std": Spread.of(column[rows])})
            for k in sorted({*powers_of_two(self.num_generations), self.num_generations}):
                self._figure(f"{prefix}pass@{k}", pass_at(self._by_prompt(right[rows]), k))
            if votes is not None and self.num_generations > 1:
                self._figure(f"{prefix}majority@{self.num_generations}", votes[torch.tensor(prompts)])
            self._figure(f"{prefix}completions/mean_length", lengths[rows])
            if not source:
                self._metrics.add({"reward_std": Spread.of(totals[rows])})
                observe_completions(self._metrics, lengths[rows], rollout.truncated[rows])

    def _by_prompt(self, values: Tensor) -> Tensor:
        return values.view(-1, self.num_generations)

    def _figure(self, name: str, values: Tensor) -> None:
        """Add a figure with an interval: ``values`` of completions, those of a prompt next to each other, or of
        prompts."""
        if name != "completions/mean_length":  # `observe_completions` adds it
            self._metrics.mean(name, values)
        of_prompts = values if _is_share(name) else self._by_prompt(values).nanmean(1)
        self._prompts.add({name: Spread.of(of_prompts)})

    def compute(self) -> dict[str, float]:
        """The metrics over all ranks, and for each figure ``NAME`` the limits of its 95 % interval, ``NAME/low`` and
        ``NAME/high``. Call it on every rank."""
        values = self._metrics.reduce()
        for name, spread in self._prompts.gather().items():
            draws = self.num_generations // int(name.rpartition("@")[2]) if _is_share(name) else None
            if (limits := interval(cast(Spread, spread), draws=draws)) is not None:
                values[f"{name}/low"], values[f"{name}/high"] = limits
        return values

    def records(
        self,
        batch: PromptBatch,
        rollout: Rollout,
        rewards: Tensor,
        names: Sequence[str],
        completions: Sequence[str],
    ) -> list[dict[str, Any]]:
        """One record per completion: prompt, completion, rewards, whether the completion was truncated, and with an
        environment the conversation, of which ``completion`` is the last message."""
        rows = zip(completions, rewards.tolist(), rollout.truncated.tolist(), strict=True)
        return [
            {
                "prompt": rollout.prompts[n] if rollout.prompts else batch.messages[n // self.num_generations],
                "completion": completion,
                "rewards": {name: None if x != x else x for name, x in zip(names, values, strict=True)},
                "truncated": truncated,
            }
            | ({"conversation": rollout.conversations[n]} if rollout.conversations else {})
            for n, (completion, values, truncated) in enumerate(rows)
            if batch.real[n // self.num_generations]
        ]


def _is_share(name: str) -> bool:
    return "@" in name.rpartition("/")[2]


def majority(answers: Sequence[str | None], right: Sequence[bool], k: int) -> Tensor:
    """[B]: whether the most frequent answer among the k completions of a prompt is right, or the mean over the most
    frequent ones if there are several; 0 if no completion has an answer.

    Args:
        answers: of B·k completions; None for one without an answer.
        right: for each completion whether its answer is right.
    """
    votes = []
    for start in range(0, len(answers), k):
        group = [pair for pair in zip(answers[start : start + k], right[start : start + k], strict=True) if pair[0]]
        counts = Counter(answer for answer, _ in group)
        most = max(counts.values(), default=0)
        leading = [is_right for answer, is_right in group if counts[answer] == most]
        votes.append(sum(leading) / max(1, len(leading)))
    return torch.tensor(votes, dtype=torch.float64)
