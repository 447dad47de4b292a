"""A rollout with its rewards and advantages, and its division into micro-batches.

Shapes: N = B·G completions on this rank, R rewards, P prompt length, T completion length.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate as cumulative
from typing import cast

import torch
from torch import Tensor

from lightning_grpo.errors import UserError
from lightning_grpo.objective import total_rewards
from lightning_grpo.rollout.types import COMPLETION_TOKENS, Rollout
from lightning_grpo.training.work import Lengths, even_parts


@dataclass(kw_only=True)
class Experience(Rollout):
    """A rollout with rewards, advantages and the log-probs that the objective needs.

    ==================  =========  ==================================================================
    number              int        number of the rollout, counted over the whole training
    rewards             [N, R]     float32, NaN where a reward does not apply
    contributions       [N, R]     float32, each reward as it counts in the sum: times its weight, 0 if a reward that it
                                   requires is too low, NaN where it does not apply
    advantages          [N]        float32; [N, T] if they differ between the tokens of a completion
    old_logprobs        [N, T]     log-probs of the sampling policy, recomputed by the trainer; None when on-policy
    ref_logprobs        [N, T]     log-probs of the reference policy; None if β is 0
    logprobs            [N, T]     log-probs of the policy when it was first trained on the token, NaN if it was not;
                                   None unless `GRPOModule.keeps_logprobs`
    ==================  =========  ==================================================================
    """

    number: int
    rewards: Tensor
    advantages: Tensor = field(metadata=COMPLETION_TOKENS)
    old_logprobs: Tensor | None = field(default=None, metadata=COMPLETION_TOKENS)
    ref_logprobs: Tensor | None = field(default=None, metadata=COMPLETION_TOKENS)
    logprobs: Tensor | None = field(default=None, metadata=COMPLETION_TOKENS)
    contributions: Tensor | None = None

    def __post_init__(self) -> None:
        if self.contributions is None:
            self.contributions = self.rewards

    @property
    def totals(self) -> Tensor:
        """[N]: the reward of each completion, which is the sum of `contributions`; NaN if no reward applies."""
        return total_rewards(self.contributions)


def cut_windows(
    experience: Rollout,
    *,
    windows: int,
    accumulate: int,
    micro_batch_size: int,
    skip_zero_advantage: bool,
    share_prompt: bool = True,
    packed: bool = False,
) -> list[list[int]]:
    """Return the micro-batches of one pass over the experience: ``windows · accumulate`` lists of rows.

    An optimizer step uses one window of ``accumulate`` micro-batches. A window consists of consecutive rows, so that a
    step has the same prompts on any number of ranks. Its rows are divided so that the most expensive micro-batch, which
    determines the peak of memory, has as few tokens as possible: short completions are more per micro-batch. Groups are
    sorted by length, which reduces padding, and stay together but for the ends of micro-batches. None of this changes
    the gradient.

    Args:
        experience: N = windows · accumulate · micro_batch_size rows; an `Experience` if any may be skipped.
        windows: optimizer steps in a pass.
        accumulate: micro-batches in an optimizer step.
        micro_batch_size: rows in a micro-batch on average; fewer if rows are skipped.
        skip_zero_advantage: skip rows without a gradient. A micro-batch keeps at least one row, because every rank must
            run a backward pass for each micro-batch.
        share_prompt: whether a prompt is computed once for the completions of it in a micro-batch.
        packed: whether a micro-batch is one row without padding.
    """
    size = accumulate * micro_batch_size
    if len(experience) != windows * size:
        raise UserError(
            f"{len(experience)} completions don't fill {windows} optimizer steps of {accumulate} micro-batches "
            f"of {micro_batch_size}"
        )
    lengths = Lengths.of(experience, share_prompt=share_prompt, packed=packed)
    totals = [prompt + completion for prompt, completion in zip(lengths.prompts, lengths.completions, strict=True)]
    matters = torch.ones(len(experience), dtype=torch.bool)
    if skip_zero_advantage:
        matters = (cast(Experience, experience).advantages != 0).view(len(experience), -1).any(1)
    batches: list[list[int]] = []
    for window in range(windows):
        rows = range(window * size, (window + 1) * size)
        groups: dict[int, list[int]] = {}
        for row in rows:
            if matters[row]:
                groups.setdefault(lengths.owners[row], []).append(row)
        by_length = sorted(groups.values(), key=lambda group: -max(totals[row] for row in group))
        queue = [row for group in by_length for row in group]
        batches += even_parts(queue, accumulate, lengths.tokens) if queue else []
        if (missing := accumulate - len(queue)) > 0:
            filler = min(set(rows).difference(queue), key=lambda row: (totals[row], row))
            batches += [[filler]] * missing
    return batches


def first_at_random(micro_batches: list[list[int]], accumulate: int, seeds: Sequence[int] | None) -> list[list[int]]:
    """Begin each optimizer step with a micro-batch that is drawn at random.

    The noise of the gradient is estimated from the first one (`noise_scale`), and the longest completions have the
    noisiest gradients. With probabilities in proportion to b(n − b), for b of the n rows, the mean estimate is that of
    all rows, whatever the noise and the size of each micro-batch.

    Args:
        micro_batches: rows of each, in the order of `cut_windows`.
        accumulate: micro-batches in an optimizer step.
        seeds: [N] of the completions, which determine the draw. None: keep the order.
    """
    if seeds is None or accumulate == 1:
        return micro_batches
    ordered: list[list[int]] = []
    for start in range(0, len(micro_batches), accumulate):
        step = micro_batches[start : start + accumulate]
        n = sum(map(len, step))
        ends = list(cumulative(len(rows) * (n - len(rows)) for rows in step))
        first = bisect_right(ends, seeds[min(map(min, step))] % ends[-1])
        ordered += [step[first], *step[:first], *step[first + 1 :]]
    return ordered


def redistribute(shares: Sequence[Experience], ranks: int, num_generations: int) -> list[Experience]:
    """Divide a rollout that ``len(shares)`` ranks hold among ``ranks`` others.

    Rank r of W has every W-th group of ``num_generations`` rows, starting with group r, as `PromptDataModule`
    distributes prompts.
    """
    whole = shares[0].join(*shares[1:])
    # [groups, G]: the rows of ``whole`` in the order of the data module's prompts
    groups = torch.arange(len(whole)).view(len(shares), -1, num_generations).transpose(0, 1).flatten(0, 1)
    return [whole.rows(groups[rank::ranks].flatten().tolist()) for rank in range(ranks)]


def without_fillers(experience: Experience) -> Experience:
    """Mask the tokens of rows without an advantage, which only fill a micro-batch that would be empty otherwise: they
    change neither the gradient nor the metrics."""
    matters = (experience.advantages != 0).view(len(experience), -1).any(1, keepdim=True)
    return replace(experience, completion_mask=experience.completion_mask & matters)
