"""Blocks of the vocabulary: their width, and what the forward keeps of each for the backward."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_grpo.kernels.products import block_memory, logits_dtype


class Budget(NamedTuple):
    """Memory limits of the log-probability kernel, in bytes."""

    block: int
    """Size of a block of logits: large enough for matrix products at full speed, small compared with a model."""
    kept: int
    """Size of the gradients that the forward of a trained head keeps, so that their logits are not recomputed."""
    chunk: int
    """Size of the gradients of one chunk of tokens, which are used before the next chunk begins."""


def budget(*, gpu: bool, itemsize: int) -> Budget:
    """The limits for hidden states with elements of ``itemsize`` bytes.

    On a GPU, where every block needs about twenty kernel launches, blocks are larger and fewer.
    """
    if gpu:
        return Budget(block=128 << 20, kept=640 << 20, chunk=640 << 20)
    return Budget(block=8 << 20, kept=256 << 20, chunk=(256 << 20) // itemsize)


def budget_for(hidden: Tensor) -> Budget:
    """The limits for ``hidden``; see `budget`."""
    return budget(gpu=hidden.is_cuda, itemsize=hidden.element_size())


class Block(NamedTuple):
    """Consecutive ids of the vocabulary, and their ∂logprob/∂logits = −scale·g if the forward kept it."""

    ids: slice
    g: Tensor | None = None
    """[N, ≥ W]; columns past W are padding."""
    scale: Tensor | None = None
    """[N], fp32."""


def block_width(hidden: Tensor, weight: Tensor) -> int:
    """The number of vocabulary ids in a block of logits."""
    return width_within(budget_for(hidden).block, len(hidden) * logits_dtype(hidden).itemsize, len(weight))


def width_within(size: int, column: int, vocab: int) -> int:
    """The number of columns of ``column`` bytes that fit in ``size`` bytes: a multiple of 64, at least 512."""
    return min(max(size // max(column, 1) // 64 * 64, 512), vocab)


def cut(weight: Tensor, width: int) -> list[slice]:
    """Return ranges of ``width`` ids; the last may be narrower."""
    return [slice(i, min(i + width, len(weight))) for i in range(0, len(weight), width)]


def scratch_like(memory: Tensor, hidden: Tensor, width: int) -> Tensor:
    """Return memory in the precision of ``hidden`` for factors of matrix products: ``memory`` if it has that dtype."""
    return memory if memory.dtype == hidden.dtype else block_memory(hidden, width, hidden.dtype)


def gradient_buffer(hidden: Tensor, weight: Tensor, limit: int | None = None) -> Tensor:
    """Allocate memory for the g of all blocks of these rows, with padding, but at most ``limit`` bytes."""
    size = len(hidden) * (len(weight) + 64)
    return hidden.new_empty(size if limit is None else min(size, limit // hidden.element_size()))


def targets_by_block(targets: Tensor, cuts: list[slice]) -> list[tuple[Tensor, Tensor]]:
    """Return, for each block of the vocabulary, the rows whose target is in it and the columns of those targets.

    This needs one synchronization with the device for all blocks.
    """
    order = targets.argsort()
    width = cuts[0].stop
    ends = torch.arange(1, len(cuts) + 1, device=targets.device) * width
    counts = torch.searchsorted(targets[order], ends).tolist()
    parts = [order[i:j] for i, j in zip([0, *counts], counts, strict=False)]
    return [(rows, targets[rows] - ids.start) for rows, ids in zip(parts, cuts, strict=True)]
