"""The log-probability boundary: hidden states in, log-probs and entropy out, never [N, V] logits in between."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_grpo.kernels import rows

# Bytes of one block of logits: enough for the matrix products to run at full speed, small beside a model.
BLOCK_BYTES = 64 << 20


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    bias: Tensor | None = None,
    scale: float = 1.0,
    entropy_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target, and the entropy, under softmax(softcap(scale·(hidden @ weight.T + bias)) / temperature).

    Args:
        hidden: [N, H], the trunk's last hidden states. Under autocast they are cast, as by a linear layer.
        weight: [V, H]; where it needs no gradient the backward multiplies nothing again.
        targets: [N] int64 in [0, V).
        temperature: a number, or [N] with one for each row.
        softcap: c of c·tanh(x / c), applied before the temperature.
        bias: [V].
        scale: factor of the head's output.
        entropy_grad: let gradients flow from the entropy too; it costs a frozen head a second pass.

    Returns:
        (logprobs, entropy), [N] each, fp32, in nats.

    The logits exist one block of the vocabulary at a time. With G = onehot − p, ∂logprob/∂logits does not depend on
    the loss, so a frozen head's G·weight is computed in the forward; a trainable head recomputes its blocks in the
    backward. Rows whose gradient is exactly 0 take no part in it, whatever they hold.
    """
    if (
        hidden.dim() != 2
        or weight.dim() != 2
        or hidden.shape[1] != weight.shape[1]
        or targets.shape != hidden.shape[:1]
    ):
        raise ValueError(
            f"linear_logprob takes hidden [N, H], weight [V, H], targets [N]; "
            f"got {tuple(hidden.shape)}, {tuple(weight.shape)}, {tuple(targets.shape)}"
        )
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        hidden = hidden.to(torch.get_autocast_dtype(kind))
    elif hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}; cast one, or run under autocast")
    transform = rows.Transform.build(targets, len(weight), temperature, softcap, scale)
    with torch.autocast(kind, enabled=False):
        return _LinearLogprob.apply(hidden, weight, bias, targets, transform, entropy_grad, torch.is_grad_enabled())


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, transform, entropy_grad, recording):
        ctx.frozen = recording and not (ctx.needs_input_grad[1] or ctx.needs_input_grad[2] or entropy_grad)
        stats = rows.Statistics.empty(len(hidden), hidden.device)
        expected = torch.zeros(hidden.shape, device=hidden.device) if ctx.frozen else None
        for block, w, a in _blocks(hidden, weight, bias):
            joins = rows.accumulate(a, block.start, targets, transform, stats, weights=a if ctx.frozen else None)
            if ctx.frozen:
                expected.mul_(joins[0][:, None]).add_((a @ w).mul_(joins[1][:, None]))
        softmax = stats.finish()
        if ctx.frozen:
            at_target = transform.chain_(softmax.rest.clone()[:, None], stats.y[:, None])
            expected.mul_(-(stats.m - softmax.lse).exp()[:, None]).addcmul_(at_target, weight[targets])
            ctx.save_for_backward(expected.mul_(transform.factor[:, None]).to(hidden.dtype))
        elif recording:
            ctx.transform = transform
            ctx.save_for_backward(hidden, weight, bias, targets, *softmax)
        ctx.set_materialize_grads(False)
        if not entropy_grad:
            ctx.mark_non_differentiable(softmax.entropy)
        return softmax.logprob, softmax.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, c_logprob, c_entropy):
        if ctx.frozen:
            (slope,) = ctx.saved_tensors
            grad = None if c_logprob is None else slope * c_logprob[:, None]
            return (
                None if grad is None else grad.masked_fill_(c_logprob[:, None] == 0, 0).to(slope.dtype),
                *[None] * 6,
            )
        hidden, weight, bias, targets, *softmax = ctx.saved_tensors
        with torch.autocast(hidden.device.type, enabled=False):
            grads = _backward(ctx, hidden, weight, bias, targets, rows.Softmax(*softmax), c_logprob, c_entropy)
        return (*grads, *[None] * 4)


def _backward(ctx, hidden, weight, bias, targets, softmax, c_logprob, c_entropy):
    needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    c_logprob = torch.zeros_like(softmax.lse) if c_logprob is None else c_logprob
    size = c_logprob.abs() if c_entropy is None else c_logprob.abs() + c_entropy.abs()
    active = size.nonzero().squeeze(1)
    h, transform, size = hidden[active], ctx.transform.rows(active), size[active]
    # The size of the loss's gradient stays out of the block, where in half precision it could vanish.
    units = [None if c is None else c[active] / size for c in (c_logprob, c_entropy)]
    factor = (size * transform.factor)[:, None]
    scaled = (h * factor).to(h.dtype)
    grad_hidden = torch.zeros(h.shape, device=h.device) if needs_hidden else None
    grad_weight = torch.empty_like(weight) if needs_weight else None
    grad_bias = torch.empty_like(bias) if needs_bias else None
    for block, w, a in _blocks(h, weight, bias):
        rows.gradient(a, a, block.start, targets[active], transform, softmax.rows(active), *units)
        if needs_hidden:
            grad_hidden += a @ w
        if needs_weight:
            grad_weight[block] = a.T @ scaled
        if needs_bias:
            grad_bias[block] = (a.T @ factor.to(a.dtype)).squeeze(1)
    if needs_hidden:
        active_grad = grad_hidden.mul_(factor).to(hidden.dtype)
        grad_hidden = (
            active_grad if len(active) == len(hidden) else torch.zeros_like(hidden).index_copy_(0, active, active_grad)
        )
    return grad_hidden, grad_weight, grad_bias


def _blocks(hidden: Tensor, weight: Tensor, bias: Tensor | None):
    """(vocabulary slice, its weights [W, H], the head's output [N, W]) block by block; the output's memory is reused."""
    n, vocabulary = len(hidden), len(weight)
    width = BLOCK_BYTES // (max(n, 1) * hidden.element_size()) // 64 * 64
    width = min(max(width, 512), vocabulary)
    buffer = hidden.new_empty(n * width)
    for first in range(0, vocabulary, width):
        block = slice(first, min(first + width, vocabulary))
        w = weight[block].to(hidden.dtype)
        a = torch.mm(hidden, w.T, out=buffer[: n * len(w)].view(n, len(w)))
        if bias is not None:
            a += bias[block]
        yield block, w, a
