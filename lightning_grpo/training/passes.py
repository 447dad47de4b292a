"""Division of a micro-batch into forward and backward passes of a bounded number of tokens.

The gradient is that of the undivided micro-batch: the loss of all of its completions is computed for each pass, with
gradients for the completions of that pass alone. Those of later passes are represented by other log-probs, on which the
gradient of a sum over completions does not depend.

Shapes: n completions in a micro-batch, T completion length.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn

from lightning_grpo.metrics import Metric
from lightning_grpo.rollout import Rollout
from lightning_grpo.training.work import Lengths, even_parts, parts_within

LossOf = Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Metric]]]
"""Computes the loss of a micro-batch, and metrics of it, from log-probs and entropies [n, T]."""


def divide(rows: Rollout, limit: int, *, share_prompt: bool, packed: bool = False) -> list[list[list[int]]]:
    """Return sequences of passes, each as indices of ``rows``. The passes of a sequence of several have one prompt.

    Groups stay together if they fit into a pass. A completion that is too long by itself has a pass of its own.

    Args:
        rows: n completions of a micro-batch.
        limit: tokens per pass, padding included.
        share_prompt: whether a pass computes a prompt once for all completions of it.
        packed: whether a pass computes one row without padding.
    """
    lengths = Lengths.of(rows, share_prompt=share_prompt, packed=packed)
    groups: dict[int, list[int]] = {}
    for row, owner in enumerate(lengths.owners):
        groups.setdefault(owner, []).append(row)
    large = [group for group in groups.values() if lengths.tokens(group) > limit]
    small = [group for group in groups.values() if lengths.tokens(group) <= limit]

    def tokens_of_groups(several: Sequence[Sequence[int]]) -> int:
        return lengths.tokens([row for group in several for row in group])

    # sorted by length, which reduces padding
    by_length = (sorted(group, key=lambda row: (lengths.completions[row], row)) for group in large)
    sequences = [_evenly_within(group, limit, lengths.tokens) for group in by_length]
    if small:
        for several in _evenly_within(small, limit, tokens_of_groups):
            sequences.append([[row for group in several for row in group]])
    return sequences


def _evenly_within(items: Sequence, limit: int, cost: Callable[[Sequence], int]) -> list[list]:
    """Even parts of ``items``, as few as the limit allows."""
    return even_parts(items, len(parts_within(items, limit, cost)), cost)


def train(
    module: Any, rows: Rollout, loss_of: LossOf, coefficient: Tensor | None
) -> tuple[Tensor, dict[str, Metric], Tensor]:
    """Run all passes of the next micro-batch, and the backward of all but the last.

    Args:
        module: a `GRPOModule`.
        rows: the n completions.
        loss_of: computes the loss.
        coefficient: [n, T], the gradient of the loss with respect to the log-probs if it is known beforehand.

    Returns:
        The loss, whose gradient is that of the last pass; metrics; the log-probs [n, T].
    """

    sequences = module.scorer.divide(module.policy, rows, module.trainer)
    count = sum(map(len, sequences))

    def passes(**options: Any) -> Iterator[tuple[list[int], tuple[Tensor, ...]]]:
        place = module.progress.experience.number, module.progress.place_in_pass
        return module.scorer.passes(module.policy, rows, sequences, module.trainer, *place, **options)

    values = _others(module, rows, passes) if count > 1 else None
    options = {"entropy_grad": module.objective.needs_entropy_grad, "coefficient": coefficient}
    for k, (part, results) in enumerate(passes(**options)):
        values = results if values is None else _replaced(values, part, results)
        loss, metrics = loss_of(*values)
        if k < count - 1:
            _backward(module, loss)
    return loss, metrics, values[0]


def _others(module: Any, rows: Rollout, passes: Callable) -> tuple[Tensor, ...]:
    """Log-probs and entropies [n, T] that represent completions of later passes in the loss.

    If the loss is not a sum over completions, they are those of the policy, at the price of another forward pass.
    """
    logprobs = rows.rollout_logprobs.nan_to_num()
    values: tuple[Tensor, ...] = logprobs, torch.zeros_like(logprobs)
    if module.overrides_loss or module.objective.couples_completions:
        with torch.no_grad():
            for part, results in passes():
                values = _replaced(values, part, results)
    return values


def _replaced(values: Sequence[Tensor], part: list[int], results: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """``values`` [n, T] without gradients, and in the rows ``part`` the ``results`` of a pass with theirs."""
    index = torch.tensor(part, dtype=torch.long, device=values[0].device)
    width = values[0].shape[1]
    return tuple(
        whole.detach().index_copy(0, index, nn.functional.pad(new[: len(part)], (0, width - new.shape[1])))
        for whole, new in zip(values, results, strict=True)
    )


def _backward(module: Any, loss: Tensor) -> None:
    """Add the gradient of a pass, scaled and accumulated as Lightning does it with that of the last one."""
    strategy, plugin = module.trainer.strategy, module.trainer.precision_plugin
    loss = loss / module.trainer.accumulate_grad_batches
    if (scaler := getattr(plugin, "scaler", None)) is not None:
        loss = scaler.scale(loss)
    unsynced = strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()
    # a backward runs outside of the autocast of the forward
    with torch.autocast(module.device.type, enabled=False), unsynced:
        module.backward(loss)
