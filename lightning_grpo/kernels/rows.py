"""Row arithmetic on one block of the vocabulary, in plain torch; `triton_rows` does the same on a GPU.

A block a [N, ≥ W] holds the head's output for W neighbouring ids of the vocabulary; columns past W are padding. z are
the logits of the sampled distribution. The softmax over the whole vocabulary is put together block by block from
statistics of each row's tokens *other than its target*:

    m  largest z so far      s  Σ exp(z − m)      t  Σ exp(z − m)·z      y  the target's z

Leaving the target out until the end keeps 1 − p(target) exact where p(target) is nearly 1, as it is for most tokens
that a model samples itself.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Stands for −inf: 0 · FLOOR is 0, and the softmax of a block without a finite logit is no NaN.
FLOOR = -1e30
# fp32 elements of some rows that stay in a core's cache from one pass to the next.
CACHED = 1 << 19


class Transform(NamedTuple):
    """From the head's output to the logits: z = factor·a, or cap·tanh(factor·a / cap) with a softcap.

    Both are [N] in fp32 and already divided by the temperature: factor = scale / τ, cap = softcap / τ.
    """

    factor: Tensor
    cap: Tensor | None

    @classmethod
    def build(
        cls,
        targets: Tensor,
        vocabulary: int,
        temperature: float | Tensor,
        softcap: float | None = None,
        scale: float = 1.0,
    ) -> "Transform":
        """For the rows of ``targets`` [N]; says what is wrong where ids or temperatures are out of range."""
        if targets.numel():
            low, high = (int(x) for x in targets.aminmax())
            if low < 0 or high >= vocabulary:
                raise ValueError(f"targets span {low} to {high}; the head has ids 0 to {vocabulary - 1}")
        temperature = torch.as_tensor(temperature, dtype=torch.float32, device=targets.device).expand(len(targets))
        if not (temperature > 0).all():
            raise ValueError(f"temperature is {float(temperature.min())}; set it above 0")
        return cls(scale / temperature, None if softcap is None else softcap / temperature)

    def rows(self, index: slice | Tensor) -> "Transform":
        return Transform(self.factor[index], None if self.cap is None else self.cap[index])

    def logits(self, a: Tensor) -> Tensor:
        """z in fp32, new memory, no lower than FLOOR."""
        z = torch.mul(a, self.factor[:, None])
        if self.cap is not None:
            z.div_(self.cap[:, None]).tanh_().mul_(self.cap[:, None])
        return z.clamp_(min=FLOOR)

    def chain_(self, g: Tensor, z: Tensor) -> Tensor:
        """g·∂z/∂a, in place, but for ``factor``, which is cheaper applied to [N, H]."""
        return g if self.cap is None else g.mul_(1 - (z / self.cap[:, None]).square_().clamp_(max=1))


class Statistics(NamedTuple):
    """m, s, t, y of the module's docstring, each [N] in fp32."""

    m: Tensor
    s: Tensor
    t: Tensor
    y: Tensor

    @classmethod
    def empty(cls, n: int, device: torch.device) -> "Statistics":
        return cls(torch.full((n,), FLOOR, device=device), *torch.zeros(3, n, device=device).unbind())

    def finish(self) -> "Softmax":
        m = torch.maximum(self.m, self.y)
        shrink = (self.m - m).exp()
        target = (self.y - m).exp()
        total = self.s * shrink + target
        log_total = total.log()
        mean = (self.t * shrink + target * self.y) / total
        return Softmax(self.y - m - log_total, m + log_total - mean, m + log_total, self.s * shrink / total)


class Softmax(NamedTuple):
    """Of each row, [N] in fp32: the target's log-prob, the entropy, log Σ exp z, and 1 − p(target)."""

    logprob: Tensor
    entropy: Tensor
    lse: Tensor
    rest: Tensor

    def rows(self, index: slice | Tensor) -> "Softmax":
        return Softmax(*(x[index] for x in self))


def accumulate(
    a: Tensor, ids: slice, targets: Tensor, transform: Transform, stats: Statistics, weights: Tensor | None = None
) -> Tensor | None:
    """Take the block ``a`` of the vocabulary's ``ids`` into the statistics, in place.

    With ``weights`` [N, W] (may be ``a``), these are set to w ∝ exp(z)·∂z/∂a of the tokens other than the target, and
    the factors (old, new) [2, N] are returned by which a sum over the vocabulary goes on: sum·old + new·Σ w·x.
    """
    if a.is_cuda:
        from lightning_grpo.kernels import triton_rows

        return triton_rows.accumulate(a, ids, targets, transform, stats, weights)
    width = ids.stop - ids.start
    joins = None if weights is None else torch.empty(2, len(a), device=a.device)
    for i in _cached_rows(a):
        some = transform.rows(i)
        m, s, t, y = (x[i] for x in stats)
        z = some.logits(a[i, :width])
        here = targets_within(targets[i], ids)
        y[here[0]] = z[here]
        z[here] = FLOOR
        # torch's softmax is one fused pass, faster than exp alone: p is exp(z − top) times its own largest element. Its
        # denominator is summed too roughly (1e-5 at 50,000 ids) to be taken for the sum of exp(z − top).
        p = torch.softmax(z, 1)
        top = z.amax(1)
        largest = torch.maximum(m, top)
        old, new = (m - largest).exp_(), (top - largest).exp_().div_(p.amax(1))
        s.mul_(old).add_(new * p.sum(1))
        t.mul_(old).add_(new * torch.linalg.vecdot(p, z))
        m.copy_(largest)
        if weights is not None:
            weights[i, :width].copy_(some.chain_(p, z))
            joins[0, i], joins[1, i] = old, new
    return joins


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
    """Write ∂loss/∂a, but for ``factor``, into ``out`` [N, ≥ W], which may be ``a``.

    From c_logprob = ∂loss/∂logprob and c_entropy = ∂loss/∂entropy, [N] each:
    ∂loss/∂z = c_logprob·(onehot − p) − c_entropy·p·(log p + entropy).
    """
    if a.is_cuda:
        from lightning_grpo.kernels import triton_rows

        return triton_rows.gradient(a, out, ids, targets, transform, softmax, c_logprob, c_entropy)
    width = ids.stop - ids.start
    for i in _cached_rows(a):
        some, row, c = transform.rows(i), softmax.rows(i), c_logprob[i]
        z = some.logits(a[i, :width])
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
        out[i, :width].copy_(some.chain_(g, z))


def _cached_rows(a: Tensor) -> Iterator[slice]:
    step = max(1, CACHED // a.shape[1])
    return (slice(i, i + step) for i in range(0, a.shape[0], step))


def targets_within(targets: Tensor, ids: slice) -> tuple[Tensor, Tensor]:
    """Rows whose target lies in the block, and its columns."""
    rows = ((targets >= ids.start) & (targets < ids.stop)).nonzero().squeeze(1)
    return rows, targets[rows] - ids.start
