"""The head on a CPU: one block of the vocabulary at a time, so that its logits stay in the cache.

The blocks that are kept for the backward have a scale per row each. Rows with a gradient of exactly 0 are left out.
"""

import torch
from torch import Tensor

from lightning_grpo.kernels import rows
from lightning_grpo.kernels.blocks import (
    Part,
    block_width,
    budget_for,
    chunks,
    cut,
    gradient_buffer,
    scratch_like,
    targets_by_block,
)
from lightning_grpo.kernels.inputs import Inputs
from lightning_grpo.kernels.products import block_logits, block_memory, logits_dtype, product, view, write
from lightning_grpo.kernels.scaling import power_above
from lightning_grpo.kernels.softmax import Softmax, Statistics


def can_use(coefficient: Tensor, inputs: Inputs) -> bool:
    """Whether `with_coefficient` computes the gradients with less work than `softmax` and `gradients`."""
    return bool(coefficient.isfinite().all())


def parts(inputs: Inputs) -> list[Part]:
    """Return the blocks of the vocabulary, without gradients."""
    return [Part(ids) for ids in cut(len(inputs.weight), block_width(inputs.hidden, inputs.weight))]


def softmax(stats: Statistics, inputs: Inputs, *, keep: bool) -> tuple[Softmax, list[Part]]:
    """Return the softmax of the rows, and the blocks of the vocabulary, with gradients up to the budget if ``keep``.

    The empty ``stats`` are filled.
    """
    limit = budget_for(inputs.hidden).kept if keep else 0
    return _softmax(stats, inputs, gradient_buffer(inputs.hidden, inputs.weight, limit))


def _softmax(stats: Statistics, inputs: Inputs, buffer: Tensor) -> tuple[Softmax, list[Part]]:
    """Return the softmax of the rows, and the blocks with as many gradients as fit in ``buffer``."""
    hidden, weight, bias, targets, transform = inputs
    width = block_width(hidden, weight)
    memory = block_memory(hidden, width, logits_dtype(hidden))
    cuts, blocks = cut(len(weight), width), []
    for ids in cuts:
        _, a = block_logits(hidden, weight, bias, ids, memory)
        g = joins = None
        if a.numel() <= buffer.numel():
            g, buffer = view(buffer, a.shape), buffer[a.numel() :]
            joins = torch.ones(2, len(targets), dtype=torch.float32, device=hidden.device)
        rows.rows_for(a, g, transform).accumulate(a, ids, targets, transform, stats, g, joins)
        blocks.append(Part(ids) if joins is None else Part(ids, g, stats.m + joins[1].log()))
    softmax = stats.finish()
    if any(block.g is not None for block in blocks):
        at_target = transform.chain_(-softmax.rest[:, None], stats.y[:, None]).squeeze(1)
        for block, (here, column) in zip(blocks, targets_by_block(targets, cuts), strict=True):
            if block.g is None:
                continue
            block.scale.sub_(softmax.lse).exp_()
            # The target's column has a scale of its own, so the scale of its row becomes 1.
            block.g[here] = (block.g[here] * block.scale[here, None]).to(block.g.dtype)
            block.g[here, column] = at_target[here].to(block.g.dtype)
            block.scale[here] = 1
    return softmax, blocks


def frozen(inputs: Inputs) -> tuple[Softmax, Tensor, Tensor]:
    """Return the softmax of the rows, and ∂logprob/∂hidden as a product of slope [N, H] and size [N]."""
    hidden, weight, bias, targets, transform = inputs
    stats = Statistics.empty(len(hidden), hidden.device)
    expected = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    width = block_width(hidden, weight)
    memory = block_memory(hidden, width, logits_dtype(hidden))
    scratch = scratch_like(memory, hidden, width)
    for ids in cut(len(weight), width):
        w, a = block_logits(hidden, weight, bias, ids, memory)
        g = a if scratch is memory else view(scratch, a.shape)
        joins = torch.ones(2, len(targets), dtype=torch.float32, device=hidden.device)
        rows.rows_for(a, g, transform).accumulate(a, ids, targets, transform, stats, g, joins)
        old, new = joins
        expected.mul_(old[:, None]).addcmul_(product(g[:, : len(w)], w), new[:, None])
    softmax = stats.finish()
    at_target = transform.chain_(softmax.rest.clone()[:, None], stats.y[:, None])
    expected.mul_(-(stats.m - softmax.lse).exp()[:, None]).addcmul_(at_target, weight[targets])
    expected.mul_(transform.factor[:, None])
    # The slope of a token with probability near 1 would underflow in float16.
    size = power_above(expected.abs().amax(1))
    return softmax, (expected / size[:, None]).to(hidden.dtype), size


def with_coefficient(
    inputs: Inputs, coefficient: Tensor, needs: tuple[bool, ...]
) -> tuple[Softmax, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """Return the softmax of the rows, and the gradients of hidden, weight and bias, computed in chunks of tokens.

    No logits are computed twice.
    """
    hidden, weight = inputs.hidden, inputs.weight
    softmaxes, grad_hidden = [], torch.empty_like(hidden) if needs[0] else None
    grad_weight = grad_bias = None
    ranges = chunks(hidden, weight)
    buffer = gradient_buffer(hidden[ranges[0]], weight)
    for i in ranges:
        chunk = inputs.rows(i)
        softmax, blocks = _softmax(Statistics.empty(len(chunk.targets), hidden.device), chunk, buffer)
        softmaxes.append(softmax)
        sums = (grad_weight, grad_bias)
        part, grad_weight, grad_bias = gradients(chunk, softmax, blocks, coefficient[i], None, needs, sums)
        if grad_hidden is not None:
            grad_hidden[i] = part
    return Softmax(*map(torch.cat, zip(*softmaxes, strict=True))), (grad_hidden, grad_weight, grad_bias)


def gradients(
    inputs: Inputs,
    softmax: Softmax,
    blocks: list[Part],
    c_logprob: Tensor,
    c_entropy: Tensor | None,
    needs: tuple[bool, ...],
    accumulators: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of hidden, weight and bias, given those of log-probs and entropy [N].

    The gradients of weight and bias are added to ``accumulators`` if these are given.
    """
    size = c_logprob.abs() if c_entropy is None else c_logprob.abs() + c_entropy.abs()
    active = size.nonzero().squeeze(1)
    all_active, width = len(active) == len(size), max(block.range.stop - block.range.start for block in blocks)
    h, weight, bias, targets, transform = inputs.rows(active)
    size, softmax = size[active], softmax.rows(active)
    # The size of the gradient is applied outside the block, where it could underflow in half precision.
    c_logprob = c_logprob[active] / size
    c_entropy = None if c_entropy is None else c_entropy[active] / size
    factor = (size * transform.factor)[:, None]
    scaled = (h * factor).to(h.dtype)
    grad_hidden = torch.zeros(h.shape, dtype=torch.float32, device=h.device) if needs[0] else None
    grad_weight, grad_bias = accumulators
    if needs[1] and grad_weight is None:
        grad_weight = torch.empty_like(weight)
    if needs[2] and grad_bias is None:
        grad_bias = torch.empty_like(bias)
    memory = block_memory(h, width, logits_dtype(h))
    scratch = scratch_like(memory, h, width)
    for block in blocks:
        ids = block.range
        if block.g is not None:
            w = weight[ids].to(h.dtype)
            g, scale = (block.g, block.scale) if all_active else (block.g[active], block.scale[active])
            to_rows = (-scale * c_logprob)[:, None]
        else:
            w, a = block_logits(h, weight, bias, ids, memory)
            g, to_rows = a if scratch is memory else view(scratch, a.shape), None
            arithmetic = rows.rows_for(a, g, transform)
            arithmetic.gradient(a, g, ids, targets, transform, softmax, c_logprob, c_entropy)
        g = g[:, : len(w)]
        if needs[0]:
            part = product(g, w)
            grad_hidden = grad_hidden.add_(part) if to_rows is None else grad_hidden.addcmul_(part, to_rows)
        if needs[1]:
            right = scaled if to_rows is None else (h * (factor * to_rows)).to(h.dtype)
            write(grad_weight[ids], g.T, right, add=accumulators[0] is not None)
        if needs[2]:
            right = factor if to_rows is None else factor * to_rows
            write(grad_bias[ids, None], g.T, right.to(g.dtype), add=accumulators[1] is not None)
    if needs[0]:
        grad_hidden = grad_hidden.mul_(factor).to(h.dtype)
        grad_hidden = grad_hidden if all_active else torch.zeros_like(inputs.hidden).index_copy_(0, active, grad_hidden)
    return grad_hidden, grad_weight, grad_bias
