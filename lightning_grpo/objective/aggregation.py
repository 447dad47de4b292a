"""Reduction of per-token losses to a scalar.

The trainer averages the losses of micro-batches and ranks. A mean over the whole optimizer step therefore divides by
the totals of the step per micro-batch: num_tokens = tokens in the step / (micro-batches · ranks), and num_sequences
likewise.
"""

from typing import Literal

from torch import Tensor

Aggregation = Literal["sequence_mean", "sequence_sum", "global_tokens", "local_tokens", "constant"]


def aggregate(
    loss: Tensor,
    mask: Tensor,
    aggregation: Aggregation,
    *,
    num_tokens: Tensor | float,
    num_sequences: Tensor | float,
    max_completion_length: int | None,
) -> Tensor:
    """Reduce ``loss`` [N, T] (0 at masked positions) to a scalar.

    - sequence_mean: mean over completions of their token means. Every completion has the same weight, short or long.
    - sequence_sum: mean over completions of their token sums. Long completions have more weight.
    - global_tokens: sum / num_tokens of the whole step. Every token has the same weight.
    - local_tokens: sum / tokens of this micro-batch. Depends by design on how the step is split.
    - constant: sum / (num_sequences · max_completion_length). No length bias at all (Dr. GRPO).
    """
    if aggregation == "sequence_mean":
        return (loss.sum(1) / mask.sum(1).clamp(min=1)).sum() / num_sequences
    if aggregation == "sequence_sum":
        return loss.sum() / num_sequences
    if aggregation == "constant":
        return loss.sum() / (num_sequences * max_completion_length)
    if aggregation == "local_tokens":
        num_tokens = mask.sum().clamp(min=1)
    return loss.sum() / num_tokens
