"""The log-probability boundary: hidden states in, log-probs and entropy out, never [N, V] logits in between."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_grpo.kernels import rows

# Bytes of one block of logits: enough for the matrix products to run at full speed, small beside a model.
BLOCK_BYTES = 64 << 20
# Bytes of logits that a trainable head's forward keeps, so that the backward need not multiply again.
KEEP_BYTES = 256 << 20


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
        width = _width(hidden, weight)
        memory = _memory(hidden, width, _dtype(hidden))
        scratch = memory if memory.dtype == hidden.dtype or not ctx.frozen else _memory(hidden, width, hidden.dtype)
        keep = KEEP_BYTES // memory.nbytes if recording and not ctx.frozen and memory.numel() else 0
        kept = []
        for i, ids in enumerate(_ids(weight, width)):
            if 0 < i <= keep:
                memory = _memory(hidden, width, memory.dtype)
            w, a = _head(hidden, weight, bias, ids, memory)
            g = _view(scratch, a.shape) if ctx.frozen else None
            joins = rows.accumulate(a, ids, targets, transform, stats, weights=g)
            if ctx.frozen:
                expected.mul_(joins[0][:, None]).add_((g[:, : len(w)] @ w).mul_(joins[1][:, None]))
            if i < keep:
                kept.append(a)
        softmax = stats.finish()
        if ctx.frozen:
            at_target = transform.chain_(softmax.rest.clone()[:, None], stats.y[:, None])
            expected.mul_(-(stats.m - softmax.lse).exp()[:, None]).addcmul_(at_target, weight[targets])
            ctx.save_for_backward(expected.mul_(transform.factor[:, None]).to(hidden.dtype))
        elif recording:
            ctx.transform, ctx.width = transform, width
            ctx.save_for_backward(hidden, weight, bias, targets, *softmax, *kept)
        ctx.set_materialize_grads(False)
        if not entropy_grad:
            ctx.mark_non_differentiable(softmax.entropy)
        return softmax.logprob, softmax.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, c_logprob, c_entropy):
        if ctx.frozen:
            (slope,) = ctx.saved_tensors
            grads = (slope * c_logprob[:, None]).masked_fill_(c_logprob[:, None] == 0, 0).to(slope.dtype), None, None
        else:
            with torch.autocast(ctx.transform.factor.device.type, enabled=False):
                grads = _recompute(ctx, c_logprob, c_entropy)
        return (*grads, *[None] * 4)


def _recompute(ctx, c_logprob: Tensor | None, c_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of hidden, weight and bias, from the loss's gradients of log-probs and entropy [N]."""
    hidden, weight, bias, targets, logprob, entropy, lse, rest, *kept = ctx.saved_tensors
    needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    c_logprob = torch.zeros_like(lse) if c_logprob is None else c_logprob
    size = c_logprob.abs() if c_entropy is None else c_logprob.abs() + c_entropy.abs()
    active = size.nonzero().squeeze(1)
    every = len(active) == len(hidden)
    h, targets, size, transform = hidden[active], targets[active], size[active], ctx.transform.rows(active)
    softmax = rows.Softmax(logprob, entropy, lse, rest).rows(active)
    # The size of the loss's gradient stays out of the block, where in half precision it could vanish.
    c_logprob = c_logprob[active] / size
    c_entropy = None if c_entropy is None else c_entropy[active] / size
    factor = (size * transform.factor)[:, None]
    scaled = (h * factor).to(h.dtype)
    kept = kept if every else [a[active] for a in kept]
    grad_hidden = torch.zeros(h.shape, device=h.device) if needs_hidden else None
    grad_weight = torch.empty_like(weight) if needs_weight else None
    grad_bias = torch.empty_like(bias) if needs_bias else None
    memory = _memory(h, ctx.width, _dtype(h))
    scratch = memory if memory.dtype == h.dtype else _memory(h, ctx.width, h.dtype)
    for i, ids in enumerate(_ids(weight, ctx.width)):
        w, a = (weight[ids].to(h.dtype), kept[i]) if i < len(kept) else _head(h, weight, bias, ids, memory)
        g = _view(scratch, a.shape)
        rows.gradient(a, g, ids, targets, transform, softmax, c_logprob, c_entropy)
        g = g[:, : len(w)]
        if needs_hidden:
            grad_hidden += g @ w
        if needs_weight:
            grad_weight[ids] = g.T @ scaled
        if needs_bias:
            grad_bias[ids] = (g.T @ factor.to(g.dtype)).squeeze(1)
    if needs_hidden:
        grad_hidden = grad_hidden.mul_(factor).to(hidden.dtype)
        grad_hidden = grad_hidden if every else torch.zeros_like(hidden).index_copy_(0, active, grad_hidden)
    return grad_hidden, grad_weight, grad_bias


def _width(hidden: Tensor, weight: Tensor) -> int:
    """Vocabulary ids in a block of logits."""
    width = BLOCK_BYTES // (max(len(hidden), 1) * _dtype(hidden).itemsize) // 64 * 64
    return min(max(width, 512), len(weight))


def _dtype(hidden: Tensor) -> torch.dtype:
    """Of the logits: fp32 where the matrix product can give it."""
    return torch.float32 if hidden.is_cuda else hidden.dtype


def _ids(weight: Tensor, width: int) -> Iterator[slice]:
    return (slice(i, min(i + width, len(weight))) for i in range(0, len(weight), width))


def _memory(hidden: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """For a block of logits [N, W]. On a GPU rows are padded to 128 bytes, or an odd width would split every access."""
    return torch.empty(len(hidden), width + (-width % 64 if hidden.is_cuda else 0), dtype=dtype, device=hidden.device)


def _view(memory: Tensor, shape: torch.Size) -> Tensor:
    return memory.view(-1)[: shape.numel()].view(shape)


def _head(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: slice, memory: Tensor) -> tuple[Tensor, Tensor]:
    """The weights [W, H] of ``ids`` and the head's output [N, ≥ W] for them, which is put into ``memory``."""
    w = weight[ids].to(hidden.dtype)
    a = _view(memory, torch.Size((len(hidden), len(w) + (-len(w) % 64 if hidden.is_cuda else 0))))
    out = a[:, : len(w)]
    wider = {} if out.dtype == hidden.dtype else {"out_dtype": out.dtype}
    if bias is None:
        torch.mm(hidden, w.T, **wider, out=out)
    else:
        torch.addmm(bias[ids].to(hidden.dtype), hidden, w.T, **wider, out=out)
    return w, a
