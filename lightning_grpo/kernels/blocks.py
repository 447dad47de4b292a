"""Blocks of the vocabulary and chunks of tokens: their sizes, and what the forward keeps of each for the backward."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_grpo.kernels.products import block_memory, logits_dtype

MiB = 1 << 20


class Budget(NamedTuple):
    """Memory limits of the log-probability kernel, in bytes."""

    block: int
    """Size of a block of logits: large enough for matrix products at full speed, small compared with a model."""
    kept: int
    """Size of the gradients that the forward of a trained head keeps, so that their logits are not recomputed."""
    chunk: int
    """Size of the gradients of one chunk of tokens, which are used before the next chunk begins."""


def budget(*, itemsize: int, memory: float | None = None) -> Budget:
    """The limits for hidden states with elements of ``itemsize`` bytes, on a GPU with ``memory`` bytes or a CPU (None).

    On a GPU every block costs a few kernel launches, and every chunk reads and writes the gradient of the whole weight,
    so both are as large as a small share of the memory permits.
    """
    if memory is None:
        return Budget(block=8 * MiB, kept=256 * MiB, chunk=256 * MiB // itemsize)
    share = int(min(max(memory / 64, 256 * MiB), 2048 * MiB))
    return Budget(block=128 * MiB, kept=2 * share, chunk=share)


def budget_for(hidden: Tensor) -> Budget:
    """The limits for ``hidden``; see `budget`."""
    return budget(itemsize=hidden.element_size(), memory=_gpu_memory(hidden.device) if hidden.is_cuda else None)


@functools.cache
def _gpu_memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory


class Part(NamedTuple):
    """Consecutive ids of the vocabulary, or consecutive rows, and their ∂logprob/∂logits = −scale·g if it is kept."""

    range: slice
    g: Tensor | None = None
    """[rows, ≥ ids]; further columns are padding."""
    scale: Tensor | None = None
    """[rows], fp32."""


def block_width(hidden: Tensor, weight: Tensor) -> int:
    """The number of vocabulary ids in a block of logits."""
    return width_within(budget_for(hidden).block, len(hidden) * logits_dtype(hidden).itemsize, len(weight))


def width_within(size: int, column: int, vocab: int) -> int:
    """The number of columns of ``column`` bytes that fit in ``size`` bytes: a multiple of 64, at least 512."""
    return min(max(size // max(column, 1) // 64 * 64, 512), vocab)


def cut(length: int, width: int) -> list[slice]:
    """Return ranges of ``width``; the last may be narrower."""
    return [slice(i, min(i + width, length)) for i in range(0, length, width)]


def chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    """Return chunks of the rows whose gradients [n, V] fit in the budget, at least one chunk and 64 rows in each.

    They are of equal size, because a small last chunk would make slow matrix products.
    """
    largest = max(budget_for(hidden).chunk // (len(weight) * hidden.element_size()), 64)
    number = max(-(-len(hidden) // largest), 1)
    return cut(len(hidden), -(-len(hidden) // number) or 1) or [slice(0, 0)]


def scratch_like(memory: Tensor, hidden: Tensor, width: int) -> Tensor:
    """Return memory in the precision of ``hidden`` for factors of matrix products: ``memory`` if it has that dtype."""
    return memory if memory.dtype == hidden.dtype else block_memory(hidden, width, hidden.dtype)


def gradient_buffer(hidden: Tensor, weight: Tensor, limit: int | None = None) -> Tensor:
    """Allocate memory for the g of all blocks of these rows, with padding, but at most ``limit`` bytes."""
    size = len(hidden) * (len(weight) + 64)
    return hidden.new_empty(size if limit is None else min(size, limit // hidden.element_size()))


def targets_by_block(targets: Tensor, cuts: list[slice]) -> list[tuple[Tensor, Tensor]]:
    """Return, for each block of the vocabulary, the rows whose target is in it and the columns of those targets."""
    order = targets.argsort()
    width = cuts[0].stop
    ends = torch.arange(1, len(cuts) + 1, device=targets.device) * width
    counts = torch.searchsorted(targets[order], ends).tolist()
    parts = [order[i:j] for i, j in zip([0, *counts], counts, strict=False)]
    return [(rows, targets[rows] - ids.start) for rows, ids in zip(parts, cuts, strict=True)]
