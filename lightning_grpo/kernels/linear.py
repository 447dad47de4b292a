"""Log-probs and entropies from hidden states, without materializing the logits [N, V].

Shapes: N tokens, V vocabulary, H hidden size, W columns of a block of the vocabulary.
"""

from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_grpo.errors import UserError
from lightning_grpo.kernels import blockwise, chunkwise
from lightning_grpo.kernels.blocks import Part
from lightning_grpo.kernels.inputs import Inputs
from lightning_grpo.kernels.scaling import in_range
from lightning_grpo.kernels.softmax import Softmax, Statistics, Transform, check_type


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
    coefficient: Tensor | None = None,
    grad_norm: bool = False,
) -> tuple[Tensor, ...]:
    """Return the targets' log-probs and the entropy of softmax(softcap(scale·(hidden·weightᵀ + bias)) / temperature).

    The logits are computed one block of the vocabulary at a time. The gradient ∂logprob/∂logits = G = onehot − p does
    not depend on the loss. If the head is frozen, the forward therefore computes G·weight as well. If it is trained,
    the forward keeps as much of G as fits in the `Budget`, and the backward recomputes the rest. Rows whose gradient is
    exactly 0 may contain NaN. `blockwise` does this on a CPU, and `chunkwise` on a GPU.

    Args:
        hidden: [N, H], the last hidden states of the model. Under autocast they are cast, as by a linear layer.
        weight: [V, H]. If it needs no gradient, the backward repeats no matrix product.
        targets: [N] integers in [0, V).
        temperature: a number, or [N] with one value per row.
        softcap: c of c·tanh(x / c), which is applied before the temperature.
        bias: [V].
        scale: factor of the head's output.
        entropy_grad: propagate gradients from the entropy too, which computes all logits twice.
        coefficient: [N], ∂loss/∂logprob up to a common factor, if it is known before the loss, as it is on-policy
            without a KL term: −advantage × weight. The forward then computes the gradients of a trained head too, and
            no matrix product is repeated. The backward compares it with the actual gradient of the loss, and computes
            the gradients again if they differ. On a GPU it is not needed while all of G fits in the `Budget`.
        grad_norm: also return ‖∂logprob/∂logits‖² = 1 − 2p(target) + Σ p² [N] fp32, without gradients for any result.

    Returns:
        (logprobs, entropy), [N] each, fp32, in nats; with ``grad_norm`` a third value.

    Raises:
        UserError: shapes or dtypes that do not match, or targets outside the vocabulary.
    """
    if (
        hidden.dim() != 2
        or weight.dim() != 2
        or hidden.shape[1] != weight.shape[1]
        or targets.shape != hidden.shape[:1]
    ):
        raise UserError(
            f"linear_logprob takes hidden [N, H], weight [V, H], targets [N]; "
            f"got {tuple(hidden.shape)}, {tuple(weight.shape)}, {tuple(targets.shape)}"
        )
    for name, x, shape in (("bias", bias, weight.shape[:1]), ("coefficient", coefficient, targets.shape)):
        if x is not None and x.shape != shape:
            raise UserError(f"{name} has shape {tuple(x.shape)}; linear_logprob takes {tuple(shape)}")
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):
        hidden = hidden.to(torch.get_autocast_dtype(device_type))
    elif hidden.dtype != weight.dtype:
        raise UserError(f"hidden is {hidden.dtype} and weight is {weight.dtype}; cast one of them, or use autocast")
    check_type("hidden", hidden)
    transform = Transform.build(targets, len(weight), temperature, softcap, scale)
    targets = targets.long()
    coefficient = None if coefficient is None else coefficient.detach().float()
    with torch.autocast(device_type, enabled=False):
        if grad_norm:
            return _with_grad_norm(Inputs(hidden, weight, bias, targets, transform))
        return _LinearLogprob.apply(
            hidden, weight, bias, targets, transform, entropy_grad, coefficient, torch.is_grad_enabled()
        )


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, transform, entropy_grad, coefficient, recording):
        head, inputs = _head_for(hidden), Inputs(hidden, weight, bias, targets, transform)
        needs = ctx.needs_input_grad[:3]
        recording = recording and any(needs)
        ctx.frozen = recording and not (needs[1] or needs[2] or entropy_grad)
        ctx.gradients, parts = None, []
        if ctx.frozen:
            softmax, slope, size = head.frozen(inputs)
            ctx.save_for_backward(slope, size)
        elif recording and coefficient is not None and not entropy_grad and head.can_use(coefficient, inputs):
            ctx.coefficient = in_range(coefficient, hidden, transform.factor)
            softmax, ctx.gradients = head.with_coefficient(inputs, ctx.coefficient, needs)
            parts = head.parts(inputs)
        else:
            stats = Statistics.empty(len(hidden), hidden.device)
            softmax, parts = head.softmax(stats, inputs, keep=recording and not entropy_grad)
        if recording and not ctx.frozen:
            ctx.transform, ctx.ranges = transform, [part.range for part in parts]
            kept = (x for part in parts for x in (part.g, part.scale))
            ctx.save_for_backward(hidden, weight, bias, targets, *softmax, *kept)
        ctx.set_materialize_grads(False)
        if not entropy_grad:
            ctx.mark_non_differentiable(softmax.entropy)
        return softmax.logprob, softmax.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, c_logprob, c_entropy):
        if c_logprob is None and c_entropy is None:
            return (None,) * 8
        if ctx.frozen:
            slope, size = ctx.saved_tensors
            grad = (slope * (c_logprob * size)[:, None]).masked_fill_(c_logprob[:, None] == 0, 0)
            return (grad.to(slope.dtype), *[None] * 7)
        # They are returned without a copy; a second backward through a retained graph computes them again.
        gradients, ctx.gradients = ctx.gradients, None
        scale = None if gradients is None else _multiple(c_logprob, ctx.coefficient)
        if scale is not None:
            return (*(None if x is None else x if scale == 1 else x.mul_(scale) for x in gradients), *[None] * 5)
        hidden, weight, bias, targets, logprob, entropy, lse, rest, *kept = ctx.saved_tensors
        inputs, softmax = Inputs(hidden, weight, bias, targets, ctx.transform), Softmax(logprob, entropy, lse, rest)
        parts = [Part(*part) for part in zip(ctx.ranges, kept[::2], kept[1::2], strict=True)]
        c_logprob = torch.zeros_like(lse) if c_logprob is None else c_logprob
        with torch.autocast(hidden.device.type, enabled=False):
            grads = _head_for(hidden).gradients(inputs, softmax, parts, c_logprob, c_entropy, ctx.needs_input_grad[:3])
        return (*grads, *[None] * 5)


def _multiple(c: Tensor, coefficient: Tensor) -> float | None:
    """Return s if c = s·coefficient up to rounding, else None."""
    if not len(c):
        return None
    scale = (c * coefficient).sum() / coefficient.square().sum().clamp(min=torch.finfo(torch.float32).tiny)
    same = torch.isfinite(scale) & ((c - scale * coefficient).abs() <= 1e-6 * c.abs().amax()).all()
    scale, same = torch.stack([scale, same.to(scale.dtype)]).tolist()
    return scale if same else None


@torch.no_grad()
def _with_grad_norm(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probs, entropy and ‖∂logprob/∂logits‖² of the rows."""
    hidden = inputs.hidden
    stats = Statistics.empty(len(hidden), hidden.device, squares=True)
    softmax, _ = _head_for(hidden).softmax(stats, inputs, keep=False)
    return softmax.logprob, softmax.entropy, stats.grad_norm(softmax)


def _head_for(hidden: Tensor) -> ModuleType:
    """Return the module that computes the head on this device."""
    return chunkwise if hidden.is_cuda else blockwise
