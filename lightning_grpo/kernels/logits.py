"""Log-probs from logits that the model has computed."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_grpo.errors import UserError
from lightning_grpo.kernels import rows
from lightning_grpo.kernels.softmax import Softmax, Statistics, Transform, check_type


def logits_logprob(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    entropy_grad: bool = False,
    grad_norm: bool = False,
) -> tuple[Tensor, ...]:
    """Return the log-prob of each target and the entropy of softmax(logits / temperature).

    For heads that `linear_logprob` does not support. The backward keeps the logits rather than a softmax in fp32.

    Args:
        logits: [N, V].
        targets: [N] integers in [0, V).
        temperature: a number, or [N] with one value per row.
        entropy_grad: propagate gradients from the entropy too.
        grad_norm: also return ‖∂logprob/∂logits‖² [N]; see `linear_logprob`.

    Returns:
        (logprobs, entropy), [N] each, fp32, in nats; with ``grad_norm`` a third value.
    """
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        raise UserError(
            f"logits_logprob takes logits [N, V] and targets [N]; got {tuple(logits.shape)}, {tuple(targets.shape)}"
        )
    check_type("logits", logits)
    transform = Transform.build(targets, logits.shape[1], temperature)
    targets = targets.long()
    if grad_norm:
        stats, softmax = _softmax(logits.detach(), targets, transform, squares=True)
        return softmax.logprob, softmax.entropy, stats.grad_norm(softmax)
    return _LogitsLogprob.apply(logits, targets, transform, entropy_grad)


def _softmax(
    logits: Tensor, targets: Tensor, transform: Transform, *, squares: bool = False
) -> tuple[Statistics, Softmax]:
    stats = Statistics.empty(len(logits), logits.device, squares=squares)
    ids = slice(0, logits.shape[1])
    rows.rows_for(logits, None, transform).accumulate(logits, ids, targets, transform, stats)
    return stats, stats.finish()


class _LogitsLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, transform, entropy_grad):
        _, softmax = _softmax(logits, targets, transform)
        ctx.transform = transform
        ctx.save_for_backward(logits, targets, *softmax)
        ctx.set_materialize_grads(False)
        if not entropy_grad:
            ctx.mark_non_differentiable(softmax.entropy)
        return softmax.logprob, softmax.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, c_logprob, c_entropy):
        if c_logprob is None and c_entropy is None:
            return (None,) * 4
        logits, targets, *softmax = ctx.saved_tensors
        c_logprob = torch.zeros_like(softmax[0]) if c_logprob is None else c_logprob
        grad = torch.empty_like(logits)
        c = c_logprob * ctx.transform.factor
        ce = None if c_entropy is None else c_entropy * ctx.transform.factor
        ids = slice(0, logits.shape[1])
        arithmetic = rows.rows_for(logits, grad, ctx.transform)
        arithmetic.gradient(logits, grad, ids, targets, ctx.transform, Softmax(*softmax), c, ce)
        return grad, None, None, None
