"""Attention within a row of several sequences, as matrix products and softmaxes of blocks.

Only the inputs are kept for the backward, which recomputes probabilities. No tensor has all H·L² of them.

Shapes: L tokens, H query heads, K key heads (H a multiple of K: Ainslie et al. 2023, arXiv:2305.13245), T queries, D
head size.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Block(NamedTuple):
    """Consecutive queries, and the keys that they attend to."""

    queries: slice
    shared: slice
    """Keys that all queries attend to; may be empty."""
    own: slice
    """Keys after those."""
    hidden: Tensor
    """[queries, own] or [queries, shared and own] bool, True if a query does not attend to one of these last keys."""


def attention(query: Tensor, key: Tensor, value: Tensor, blocks: Sequence[Block], scale: float) -> Tensor:
    """Return softmax(scale·query·keyᵀ)·value over the keys of each query's block, with the softmax in fp32 or higher.

    Args:
        query: [1, H, T, D].
        key: [1, K, L, D].
        value: [1, K, L, D'].
        blocks: each query is in one of them, and attends to at least one key.
        scale: factor of the products.

    Returns:
        [1, H, T, D'], a transposed [1, T, H, D'].
    """
    return _Attention.apply(query, key, value, blocks, scale)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, blocks, scale):
        ctx.save_for_backward(query, key, value)
        ctx.blocks, ctx.scale = blocks, scale
        _, H, T, _ = query.shape
        out = query.new_empty(1, T, H, value.shape[3]).transpose(1, 2)
        for block in blocks:
            q, k, v = _fold(query, block, key), _keys(key, block), _keys(value, block)
            found = torch.bmm(_probabilities(q, k, block, scale), v)
            out[0, :, block.queries] = found.view(H, -1, found.shape[2])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, value = ctx.saved_tensors
        d_query = torch.empty_like(query)
        # The gradient of a key is a sum over blocks.
        d_key, d_value = (torch.zeros_like(x, dtype=_wide(x)) for x in (key, value))
        for block in ctx.blocks:
            q, k, v = _fold(query, block, key), _keys(key, block), _keys(value, block)
            g = _fold(grad, block, key)
            p = _probabilities(q, k, block, ctx.scale)
            _add(d_value, block, torch.bmm(p.mT, g))
            d_scores = torch._softmax_backward_data(torch.bmm(g, v.mT), p, -1, p.dtype)
            found = torch.bmm(d_scores, k).mul_(ctx.scale)
            d_query[0, :, block.queries] = found.view(query.shape[1], -1, found.shape[2])
            _add(d_key, block, torch.bmm(d_scores.mT, q).mul_(ctx.scale))
        return d_query, d_key.to(key.dtype), d_value.to(value.dtype), None, None


def _fold(x: Tensor, block: Block, key: Tensor) -> Tensor:
    """The block's queries of ``x`` [1, H, T, D] as [K, (H/K)·t, D]: heads that share keys become further queries."""
    return x[0, :, block.queries].reshape(key.shape[1], -1, x.shape[3])


def _keys(x: Tensor, block: Block) -> Tensor:
    """The block's keys of ``x`` [1, K, L, D], [K, l, D]."""
    own = x[0, :, block.own]
    return torch.cat([x[0, :, block.shared], own], 1) if block.shared.stop > block.shared.start else own


def _add(total: Tensor, block: Block, x: Tensor) -> None:
    """Add ``x`` [K, l, D] to the block's keys of ``total`` [1, K, L, D]."""
    shared = block.shared.stop - block.shared.start
    total[0, :, block.own] += x[:, shared:]
    if shared:
        total[0, :, block.shared] += x[:, :shared]


def _probabilities(q: Tensor, k: Tensor, block: Block, scale: float) -> Tensor:
    """The probabilities of a block, [K, (H/K)·t, l]."""
    products = torch.bmm(q, k.mT)
    t, width = block.hidden.shape
    logits = products.to(_wide(q)).view(-1, t, products.shape[2]).mul_(scale)
    logits[..., -width:].masked_fill_(block.hidden, -torch.inf)
    return torch.softmax(logits, -1).to(q.dtype).view_as(products)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
