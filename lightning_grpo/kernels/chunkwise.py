"""The head on a GPU: one chunk of tokens at a time, with one matrix of gradients.

A launch takes microseconds of the host's time, and a synchronization leaves the device idle. A chunk of n tokens
therefore has a single matrix g [n, V] in the precision of the hidden states, with one scale per row, and needs one
matrix product for each gradient. Its logits are computed in fp32, one block of the vocabulary at a time. Rows with a
gradient of 0 are computed like the others, since leaving them out would require their number on the host.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_grpo.kernels import rows
from lightning_grpo.kernels.blocks import Part, block_width, budget_for, chunks, cut
from lightning_grpo.kernels.inputs import Inputs
from lightning_grpo.kernels.products import block_logits, block_memory, logits_dtype, write
from lightning_grpo.kernels.scaling import LARGEST_SUM, power_above
from lightning_grpo.kernels.softmax import Softmax, Statistics


def can_use(coefficient: Tensor, inputs: Inputs) -> bool:
    """Whether `with_coefficient` computes the gradients with less work than `softmax` and `gradients`.

    It does not if the gradients of all chunks can be kept. Its result is compared with the gradient of the loss, for
    which the host waits once.
    """
    hidden = inputs.hidden
    return len(hidden) * len(inputs.weight) * hidden.element_size() > budget_for(hidden).kept


def parts(inputs: Inputs) -> list[Part]:
    """Return the chunks of rows, without gradients."""
    return [Part(i) for i in chunks(inputs.hidden, inputs.weight)]


def softmax(stats: Statistics, inputs: Inputs, *, keep: bool) -> tuple[Softmax, list[Part]]:
    """Return the softmax of the rows, and the chunks of rows, with gradients up to the budget if ``keep``.

    The empty ``stats`` are filled.
    """
    inputs = _cast(inputs)
    limit = budget_for(inputs.hidden).kept if keep else 0
    softmaxes, parts = [], []
    for i in chunks(inputs.hidden, inputs.weight):
        chunk, g = inputs.rows(i), None
        if limit >= _row_bytes(inputs) * len(chunk.hidden):
            limit -= _row_bytes(inputs) * len(chunk.hidden)
            g = _matrix(chunk)
        result, scale = _accumulate(stats.rows(i), chunk, g)
        softmaxes.append(result)
        parts.append(Part(i, g, scale))
    return Softmax(*map(torch.cat, zip(*softmaxes, strict=True))), parts


def frozen(inputs: Inputs) -> tuple[Softmax, Tensor, Tensor]:
    """Return the softmax of the rows, and ∂logprob/∂hidden as a product of slope [N, H] and size [N]."""
    inputs = _cast(inputs)
    hidden = inputs.hidden
    slope, size = torch.empty_like(hidden), torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    ranges, softmaxes = chunks(hidden, inputs.weight), []
    g = _matrix(inputs.rows(ranges[0]))
    for i in ranges:
        chunk = inputs.rows(i)
        result, scale = _accumulate(Statistics.empty(len(chunk.hidden), hidden.device), chunk, g[: len(chunk.hidden)])
        softmaxes.append(result)
        expected = _product(g[: len(chunk.hidden)], chunk.weight).mul_((-scale * chunk.transform.factor)[:, None])
        # The slope of a token with probability near 1 would underflow in float16.
        size[i] = power_above(expected.abs().amax(1))
        slope[i] = expected.div_(size[i, None])
    return Softmax(*map(torch.cat, zip(*softmaxes, strict=True))), slope, size


def with_coefficient(
    inputs: Inputs, coefficient: Tensor, needs: tuple[bool, ...]
) -> tuple[Softmax, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """Return the softmax of the rows, and the gradients of hidden, weight and bias. No logits are computed twice."""
    grads = _Gradients(inputs, needs)
    inputs = _cast(inputs)
    ranges, softmaxes = chunks(inputs.hidden, inputs.weight), []
    g = _matrix(inputs.rows(ranges[0]))
    for i in ranges:
        chunk = inputs.rows(i)
        n = len(chunk.hidden)
        result, scale = _accumulate(Statistics.empty(n, g.device), chunk, g[:n])
        softmaxes.append(result)
        grads.add(i, chunk, g[:n], -scale * coefficient[i] * chunk.transform.factor, coefficient[i] == 0)
    return Softmax(*map(torch.cat, zip(*softmaxes, strict=True))), grads.results()


def gradients(
    inputs: Inputs,
    softmax: Softmax,
    parts: list[Part],
    c_logprob: Tensor,
    c_entropy: Tensor | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of hidden, weight and bias, given those of log-probs and entropy [N]."""
    grads = _Gradients(inputs, needs)
    inputs = _cast(inputs)
    size = c_logprob.abs() if c_entropy is None else c_logprob.abs() + c_entropy.abs()
    idle = size == 0
    # The size of the gradient is applied outside the matrix, where it could underflow in half precision.
    c_logprob = c_logprob / size.masked_fill(idle, 1)
    c_entropy = None if c_entropy is None else c_entropy / size.masked_fill(idle, 1)
    factor = size * inputs.transform.factor
    scratch = None
    for i, g, scale in parts:
        chunk = inputs.rows(i)
        if g is not None:
            grads.add(i, chunk, g, -scale * c_logprob[i] * factor[i], idle[i])
            continue
        scratch = _matrix(chunk) if scratch is None else scratch
        g = scratch[: len(chunk.hidden)]
        c, ce = c_logprob[i], None if c_entropy is None else c_entropy[i]
        for ids, a in _logits(chunk):
            out = g[:, ids.start : ids.start + a.shape[1]]
            arithmetic = rows.rows_for(a, out, chunk.transform)
            arithmetic.gradient(a, out, ids, chunk.targets, chunk.transform, softmax.rows(i), c, ce)
        grads.add(i, chunk, g, factor[i], idle[i])
    return grads.results()


class _Gradients:
    """Sums of the gradients over chunks of rows."""

    def __init__(self, inputs: Inputs, needs: tuple[bool, ...]) -> None:
        # Each chunk writes its rows of the first, and the first chunk writes the other two.
        values = (inputs.hidden, inputs.weight, inputs.bias)
        self.hidden, self.weight, self.bias = (
            torch.empty_like(x) if need else None for x, need in zip(values, needs, strict=True)
        )

    def add(self, i: slice, chunk: Inputs, g: Tensor, scale: Tensor, idle: Tensor) -> None:
        """Add the gradients of the rows ``i``, where ∂loss/∂(head's output) = scale·g; ``idle`` rows count as 0."""
        g, add = g[:, : len(chunk.weight)], i.start > 0
        scale = scale.masked_fill(idle, 0)[:, None]
        if self.hidden is not None:
            self.hidden[i] = _product(g, chunk.weight).mul_(scale)
        if self.weight is not None:
            scaled = (chunk.hidden * scale).masked_fill_(idle[:, None], 0)
            write(self.weight, g.T, scaled.to(g.dtype), add=add)
        if self.bias is not None:
            write(self.bias[:, None], g.T, scale.to(g.dtype), add=add)

    def results(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.hidden, self.weight, self.bias


def _cast(inputs: Inputs) -> Inputs:
    """Return the inputs with the weight and bias in the precision of the matrix products."""
    dtype = inputs.hidden.dtype
    bias = None if inputs.bias is None else inputs.bias.to(dtype)
    return inputs._replace(weight=inputs.weight.to(dtype), bias=bias)


def _row_bytes(inputs: Inputs) -> int:
    return len(inputs.weight) * inputs.hidden.element_size()


def _matrix(inputs: Inputs) -> Tensor:
    """Allocate the matrix of gradients [N, V], with rows padded to a multiple of 64 columns."""
    return block_memory(inputs.hidden, -(-len(inputs.weight) // 64) * 64, inputs.hidden.dtype)


def _logits(inputs: Inputs) -> Iterator[tuple[slice, Tensor]]:
    """Yield the ids of each block of the vocabulary, and the head's output [N, ≥ W] for them."""
    width = block_width(inputs.hidden, inputs.weight)
    memory = block_memory(inputs.hidden, width, logits_dtype(inputs.hidden))
    for ids in cut(len(inputs.weight), width):
        yield ids, block_logits(inputs.hidden, inputs.weight, inputs.bias, ids, memory)[1]


def _accumulate(stats: Statistics, inputs: Inputs, g: Tensor | None) -> tuple[Softmax, Tensor | None]:
    """Return the softmax of a chunk's rows; fill ``g``, and return scale [n], so that ∂logprob/∂logits = −scale·g."""
    targets, transform = inputs.targets, inputs.transform
    n, width = len(targets), block_width(inputs.hidden, inputs.weight)
    blocks = -(-len(inputs.weight) // width)
    joins = None if g is None else torch.ones(blocks, 2, n, dtype=torch.float32, device=targets.device)
    for k, (ids, a) in enumerate(_logits(inputs)):
        out = None if g is None else g[:, ids.start : ids.start + a.shape[1]]
        arithmetic = rows.rows_for(a, out, transform)
        arithmetic.accumulate(a, ids, targets, transform, stats, out, None if joins is None else joins[k])
    softmax = stats.finish()
    if g is None:
        return softmax, None
    # The gradient at the target is minus the sum of all others.
    at_target = transform.chain_(-stats.s[:, None], stats.y[:, None]).squeeze(1)
    scale = (stats.m - softmax.lse).exp()
    scales = _scales(joins)
    if g.dtype == torch.float16:
        down = power_above(stats.s / LARGEST_SUM).clamp_(min=1)
        at_target, scales, scale = at_target / down, scales / down, scale * down
    arithmetic.join(g, -(-width // 64) * 64, scales, targets, at_target)
    return softmax, scale


def _scales(joins: Tensor) -> Tensor:
    """Return the factors [blocks, n] that make the weights of all blocks relative to the last of the references.

    These are new · Π old over later blocks, for the factors (old, new) of each block.
    """
    old, new = joins.unbind(1)
    later = torch.cat([torch.ones_like(old[:1]), old.flip(0)[:-1]]).cumprod(0).flip(0)
    return new * later


def _product(g: Tensor, weight: Tensor) -> Tensor:
    """Return g @ weight in fp32."""
    out = torch.empty(len(g), weight.shape[1], dtype=torch.float32, device=g.device)
    write(out, g[:, : len(weight)], weight, add=False)
    return out
