"""The vocabulary cut into blocks: how wide they are, and what the forward keeps of each for the backward."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_grpo.kernels.products import block_memory, logits_dtype


class Budget(NamedTuple):
    """Bytes that the log-probability kernel uses at a time on a kind of device."""

    block: int
    """One block of logits: enough for the matrix products to run at full speed, small beside a model."""
    kept: int
    """Probabilities that a trainable head's forward keeps, so that their logits need not be made again."""
    chunk: int
    """Probabilities of one chunk of tokens, whose gradients are made before the next chunk begins."""


def budget(*, gpu: bool, itemsize: int) -> Budget:
    """For hidden states of ``itemsize`` bytes. On a GPU, where every block costs some twenty launches, blocks are large
    and few."""
    if gpu:
        return Budget(block=128 << 20, kept=640 << 20, chunk=640 << 20)
    return Budget(block=8 << 20, kept=256 << 20, chunk=(256 << 20) // itemsize)


def budget_for(hidden: Tensor) -> Budget:
    """`budget` for these hidden states."""
    return budget(gpu=hidden.is_cuda, itemsize=hidden.element_size())


class Block(NamedTuple):
    """Some neighbouring ids of the vocabulary, and ∂logprob/∂logits = −scale·g for them if the forward kept it."""

    ids: slice
    g: Tensor | None = None
    """[N, ≥ W]; columns past W are padding."""
    scale: Tensor | None = None
    """[N], fp32."""


def block_width(hidden: Tensor, weight: Tensor) -> int:
    """Vocabulary ids in a block of logits."""
    return width_within(budget_for(hidden).block, len(hidden) * logits_dtype(hidden).itemsize, len(weight))


def width_within(size: int, column: int, vocab: int) -> int:
    """Columns of ``column`` bytes each that a block of ``size`` bytes holds: a multiple of 64, at least 512."""
    return min(max(size // max(column, 1) // 64 * 64, 512), vocab)


def cut(weight: Tensor, width: int) -> list[slice]:
    """Ranges of ``width`` ids; the last may be narrower."""
    return [slice(i, min(i + width, len(weight))) for i in range(0, len(weight), width)]


def scratch_like(memory: Tensor, hidden: Tensor, width: int) -> Tensor:
    """For what is multiplied with the weights, in their precision: ``memory`` itself if that is in it."""
    return memory if memory.dtype == hidden.dtype else block_memory(hidden, width, hidden.dtype)


def room_for(hidden: Tensor, weight: Tensor, most: int | None = None) -> Tensor:
    """For the g of all blocks of these rows, padding included, or as much of it as ``most`` bytes hold."""
    size = len(hidden) * (len(weight) + 64)
    return hidden.new_empty(size if most is None else min(size, most // hidden.element_size()))


def targets_by_block(targets: Tensor, cuts: list[slice]) -> list[tuple[Tensor, Tensor]]:
    """For each block of the vocabulary, the rows whose target lies in it, and their columns.

    One synchronization with the device for all blocks together.
    """
    order = targets.argsort()
    width = cuts[0].stop
    ends = torch.arange(1, len(cuts) + 1, device=targets.device) * width
    counts = torch.searchsorted(targets[order], ends).tolist()
    parts = [order[i:j] for i, j in zip([0, *counts], counts, strict=False)]
    return [(rows, targets[rows] - ids.start) for rows, ids in zip(parts, cuts, strict=True)]
