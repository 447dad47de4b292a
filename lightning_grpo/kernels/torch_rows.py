"""The row arithmetic in plain PyTorch, which runs on any device and defines what the compiled versions compute."""

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_grpo.kernels.softmax import FLOOR, Softmax, Statistics, Transform, targets_within

# Elements of a group of rows, in fp32, that fit in the cache of a core.
CACHED = 1 << 19


def accumulate(
    a: Tensor,
    ids: slice,
    targets: Tensor,
    transform: Transform,
    stats: Statistics,
    weights: Tensor | None = None,
    joins: Tensor | None = None,
) -> None:
    """Add the block ``a`` [N, ≥ W] with the vocabulary's ``ids`` to the statistics, in place.

    If ``weights`` [N, ≥ W] and ``joins`` [2, N], which is 1, are given, set ``weights`` to w ∝ exp(z)·∂z/∂a for tokens
    other than the target, and ``joins`` to factors (old, new) that continue a sum over the vocabulary:
    sum ← sum·old + new·Σ w·x. On a CPU ``weights`` may be ``a``.
    """
    width = ids.stop - ids.start
    for i in _cached_rows(a):
        chunk = transform.rows(i)
        m, s, t, y, q = stats.rows(i)
        z = chunk.logits(a[i, :width])
        here = targets_within(targets[i], ids)
        y[here[0]] = z[here]
        z[here] = FLOOR
        # torch's softmax is one fused pass and faster than exp: p is exp(z − top) times the largest element of p. Its
        # denominator is not accurate enough (1e-5 at 50,000 ids) to be used as the sum of exp(z − top).
        p = torch.softmax(z, 1)
        top = z.amax(1)
        largest = torch.maximum(m, top)
        old, new = (m - largest).exp_(), (top - largest).exp_().div_(p.amax(1))
        s.mul_(old).add_(new * p.sum(1))
        t.mul_(old).add_(new * torch.linalg.vecdot(p, z))
        if q is not None:
            q.mul_(old.square()).add_(new.square() * torch.linalg.vecdot(p, p))
        m.copy_(largest)
        if weights is not None:
            weights[i, :width].copy_(chunk.chain_(p, z))
            joins[0, i], joins[1, i] = old, new


def gradient(
    a: Tensor,
    out: Tensor,
    ids: slice,
    targets: Tensor,
    transform: Transform,
    softmax: Softmax,
    c_logprob: Tensor,
    c_entropy: Tensor | None,
) -> None:
    """Write ∂loss/∂a without the factor ``transform.factor`` to ``out`` [N, ≥ W], which may be ``a``.

    With c_logprob = ∂loss/∂logprob and c_entropy = ∂loss/∂entropy, [N] each,
    ∂loss/∂z = c_logprob·(onehot − p) − c_entropy·p·(log p + entropy). A row for which both are 0 may contain NaN, and
    its gradient is 0.
    """
    width = ids.stop - ids.start
    for i in _cached_rows(a):
        chunk, row, c = transform.rows(i), softmax.rows(i), c_logprob[i]
        z = chunk.logits(a[i, :width])
        here = targets_within(targets[i], ids)
        p = torch.softmax(z, 1)
        scale = (z.amax(1) - row.lse).exp_().div_(p.amax(1))
        at_target = (c * row.rest)[here[0]]
        if c_entropy is None:
            g = p.mul_((-c * scale)[:, None])
        else:
            surprise = (z - (row.lse - row.entropy)[:, None]).mul_(c_entropy[i][:, None])
            p.mul_(scale[:, None])
            at_target -= (p * surprise)[here]
            g = surprise.add_(c[:, None]).mul_(p).neg_()
        g[here] = at_target
        idle = c == 0 if c_entropy is None else (c == 0) & (c_entropy[i] == 0)
        out[i, :width].copy_(chunk.chain_(g, z))
        if idle.any():
            out[i, :width].masked_fill_(idle[:, None], 0)


def join(g: Tensor, width: int, scales: Tensor, targets: Tensor, at_target: Tensor) -> None:
    """Multiply each block of ``g`` [N, ≥ V], of ``width`` columns, by its scales, and set the columns of the targets.

    Args:
        g: the weights of `accumulate` for the whole vocabulary.
        width: columns of a block; the last may be narrower.
        scales: [blocks, N], fp32.
        targets: [N].
        at_target: [N], fp32. NaN and infinite values are written as 0, here and in the blocks.
    """
    for start, scale in zip(range(0, g.shape[1], width), scales, strict=True):
        block = g[:, start : start + width]
        block.copy_((block * scale[:, None]).nan_to_num_(0, 0, 0))
    g.scatter_(1, targets[:, None], at_target.nan_to_num(0, 0, 0)[:, None].to(g.dtype))


def _cached_rows(a: Tensor) -> Iterator[slice]:
    step = max(1, CACHED // a.shape[1])
    return (slice(i, i + step) for i in range(0, a.shape[0], step))
