"""Attention as matrix products and softmaxes of blocks, with probabilities recomputed in the backward.

Only the inputs are kept for the backward, and no tensor has all H·T·L probabilities of a long row.

Shapes: N rows, H query heads, K key heads (H a multiple of K: Ainslie et al. 2023, arXiv:2305.13245), T queries, L
keys, D head size.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Probabilities per block of several rows, and of one row. In larger blocks memory is allocated anew each time, and in
# smaller ones matrix products are slow.
ROWS_BLOCK, BLOCK = 1 << 18, 1 << 20


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Return softmax(scale·query·keyᵀ)·value over the keys that ``mask`` allows, with the softmax in fp32 or higher.

    Args:
        query: [N, H, T, D].
        key: [N, K, L, D].
        value: [N, K, L, D].
        mask: [N, 1, T, L] bool, True if a query attends to a key; None for causal attention with T = L.
        scale: factor of the products.

    Returns:
        [N, H, T, D]; 0 for queries that attend to no key.
    """
    return _Attention.apply(query, key, value, mask, scale)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, mask, scale):
        ctx.save_for_backward(query, key, value, mask)
        ctx.scale = scale
        N, H, T, D = query.shape
        out = query.new_empty(N, T, H, D).transpose(1, 2)
        for rows, queries, keys in _blocks(query, key, mask):
            q, (k, v) = _fold(query[rows, :, queries], key), (_fold(x[rows, :, keys], key) for x in (key, value))
            sees = _sees(mask, rows, queries)
            part = torch.bmm(_probabilities(q, k, sees, scale), v)
            out[rows, :, queries] = _hidden_to_zero(part.view(out[rows, :, queries].shape), sees)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, value, mask = ctx.saved_tensors
        d_query = torch.empty_like(query)
        # The gradient of a key is a sum over blocks of queries.
        d_key, d_value = (torch.zeros_like(x, dtype=_wide(x)) for x in (key, value))
        for rows, queries, keys in _blocks(query, key, mask):
            q, (k, v) = _fold(query[rows, :, queries], key), (_fold(x[rows, :, keys], key) for x in (key, value))
            sees = _sees(mask, rows, queries)
            g = _fold(_hidden_to_zero(grad[rows, :, queries], sees), key)
            p = _probabilities(q, k, sees, ctx.scale)
            d_value[rows, :, keys] += torch.bmm(p.mT, g).view(d_value[rows, :, keys].shape)
            d_scores = torch._softmax_backward_data(torch.bmm(g, v.mT), p, -1, p.dtype)
            d_query[rows, :, queries] = torch.bmm(d_scores, k).mul_(ctx.scale).view(d_query[rows, :, queries].shape)
            d_key[rows, :, keys] += torch.bmm(d_scores.mT, q).mul_(ctx.scale).view(d_key[rows, :, keys].shape)
        return d_query, d_key.to(key.dtype), d_value.to(value.dtype), None, None


def _blocks(query: Tensor, key: Tensor, mask: Tensor | None) -> Iterator[tuple[slice, slice, slice]]:
    """Yield the rows, queries and keys of each block: several complete rows, or several queries of one row."""
    N, H, T, _ = query.shape
    L = key.shape[2]
    rows = max(1, ROWS_BLOCK // (H * T * L))
    parts = -(-H * T * L // BLOCK) if rows == 1 else 1
    queries = -(-T // parts)
    for row in range(0, N, rows):
        for first in range(0, T, queries):
            last = min(first + queries, T)
            yield slice(row, row + rows), slice(first, last), slice(0, last if mask is None else L)


def _fold(x: Tensor, key: Tensor) -> Tensor:
    """Reshape [n, H or K, t, D] to [n·K, (H/K)·t or t, D]: heads that share keys become further queries."""
    return x.reshape(len(x) * key.shape[1], -1, x.shape[3])


def _sees(mask: Tensor | None, rows: slice, queries: slice) -> Tensor:
    """The mask of a block, [n or 1, 1, t, l] bool."""
    if mask is not None:
        return mask[rows, :, queries]
    return torch.ones(queries.stop - queries.start, queries.stop, dtype=torch.bool).tril_(queries.start)[None, None]


def _hidden_to_zero(x: Tensor, sees: Tensor) -> Tensor:
    """Return ``x`` [n, H, t, D] with 0 for queries that attend to no key, whose probabilities are meaningless."""
    return x * sees.any(-1, keepdim=True)


def _probabilities(q: Tensor, k: Tensor, sees: Tensor, scale: float) -> Tensor:
    """The probabilities of a block, [n·K, (H/K)·t, l]."""
    products = torch.bmm(q, k.mT)
    n, _, t, width = sees.shape
    logits = products.to(_wide(q)).view(-1, products.shape[0] * products.shape[1] // (n * t), t, width)
    hide = torch.where(sees, 0.0, torch.finfo(torch.float32).min)
    return torch.softmax(logits.mul_(scale).add_(hide), -1).to(q.dtype).view_as(products)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
