"""Log-probs and entropies from hidden states, without materializing the logits [N, V].

Shapes: N tokens, V vocabulary, H hidden size, W columns of a block of the vocabulary.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_grpo.errors import UserError
from lightning_grpo.kernels import rows
from lightning_grpo.kernels.blocks import (
    Block,
    block_width,
    budget_for,
    cut,
    gradient_buffer,
    scratch_like,
    targets_by_block,
)
from lightning_grpo.kernels.products import block_logits, block_memory, logits_dtype, product, view, write
from lightning_grpo.kernels.scaling import in_range, power_above
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
    the forward keeps G for as many blocks as fit in the `Budget`, and the backward recomputes the others. Rows whose
    gradient is exactly 0 are skipped, and may contain NaN.

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
            the gradients again if they differ.
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
            return _with_grad_norm(hidden, weight, bias, targets, transform)
        return _LinearLogprob.apply(
            hidden, weight, bias, targets, transform, entropy_grad, coefficient, torch.is_grad_enabled()
        )


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, transform, entropy_grad, coefficient, recording):
        needs = ctx.needs_input_grad[:3]
        recording = recording and any(needs)
        ctx.frozen = recording and not (needs[1] or needs[2] or entropy_grad)
        ctx.gradients = None
        if ctx.frozen:
            softmax, slope, size = _frozen(hidden, weight, bias, targets, transform)
            ctx.save_for_backward(slope, size)
        elif recording and coefficient is not None and not entropy_grad and coefficient.isfinite().all():
            coefficient = in_range(coefficient, hidden, transform.factor)
            softmax, *ctx.gradients = _with_known_coefficient(
                hidden, weight, bias, targets, transform, coefficient, needs
            )
            ctx.coefficient = coefficient
            blocks = [Block(ids) for ids in cut(weight, block_width(hidden, weight))]
        else:
            buffer = gradient_buffer(hidden, weight, budget_for(hidden).kept if recording and not entropy_grad else 0)
            stats = Statistics.empty(len(hidden), hidden.device)
            softmax, blocks = _softmax(stats, hidden, weight, bias, targets, transform, buffer)
        if recording and not ctx.frozen:
            ctx.transform, ctx.ids = transform, [block.ids for block in blocks]
            kept = (x for block in blocks for x in (block.g, block.scale))
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
        softmax = Softmax(logprob, entropy, lse, rest)
        blocks = [Block(*block) for block in zip(ctx.ids, kept[::2], kept[1::2], strict=True)]
        c_logprob = torch.zeros_like(lse) if c_logprob is None else c_logprob
        with torch.autocast(hidden.device.type, enabled=False):
            grads = _gradients(
                hidden,
                weight,
                bias,
                targets,
                ctx.transform,
                softmax,
                blocks,
                c_logprob,
                c_entropy,
                ctx.needs_input_grad,
            )
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
def _with_grad_norm(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, transform: Transform
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probs, entropy and ‖∂logprob/∂logits‖² of the rows."""
    stats = Statistics.empty(len(hidden), hidden.device, squares=True)
    softmax, _ = _softmax(stats, hidden, weight, bias, targets, transform, gradient_buffer(hidden, weight, 0))
    return softmax.logprob, softmax.entropy, stats.grad_norm(softmax)


def _softmax(
    stats: Statistics,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: Transform,
    buffer: Tensor,
) -> tuple[Softmax, list[Block]]:
    """Return the softmax of the rows, and the blocks of the vocabulary with as many gradients as fit in ``buffer``.

    The empty ``stats`` are filled.
    """
    width = block_width(hidden, weight)
    memory = block_memory(hidden, width, logits_dtype(hidden))
    cuts, blocks = cut(weight, width), []
    for ids in cuts:
        _, a = block_logits(hidden, weight, bias, ids, memory)
        g = None
        if a.numel() <= buffer.numel():
            g, buffer = view(buffer, a.shape), buffer[a.numel() :]
        joins = rows.rows_for(a, g, transform).accumulate(a, ids, targets, transform, stats, weights=g)
        blocks.append(Block(ids) if g is None else Block(ids, g, stats.m + joins[1].log()))
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


def _frozen(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, transform: Transform
) -> tuple[Softmax, Tensor, Tensor]:
    """Return the softmax of the rows, and ∂logprob/∂hidden as a product of slope [N, H] and size [N]."""
    stats = Statistics.empty(len(hidden), hidden.device)
    expected = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    width = block_width(hidden, weight)
    memory = block_memory(hidden, width, logits_dtype(hidden))
    scratch = scratch_like(memory, hidden, width)
    for ids in cut(weight, width):
        w, a = block_logits(hidden, weight, bias, ids, memory)
        g = a if scratch is memory else view(scratch, a.shape)
        old, new = rows.rows_for(a, g, transform).accumulate(a, ids, targets, transform, stats, weights=g)
        expected.mul_(old[:, None]).addcmul_(product(g[:, : len(w)], w), new[:, None])
    softmax = stats.finish()
    at_target = transform.chain_(softmax.rest.clone()[:, None], stats.y[:, None])
    expected.mul_(-(stats.m - softmax.lse).exp()[:, None]).addcmul_(at_target, weight[targets])
    expected.mul_(transform.factor[:, None])
    # The slope of a token with probability near 1 would underflow in float16.
    size = power_above(expected.abs().amax(1))
    return softmax, (expected / size[:, None]).to(hidden.dtype), size


def _with_known_coefficient(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: Transform,
    coefficient: Tensor,
    needs: tuple[bool, ...],
) -> tuple[Softmax, Tensor | None, Tensor | None, Tensor | None]:
    """Return the softmax of the rows and all gradients, computed in chunks of tokens so that no logits are repeated."""
    largest = max(budget_for(hidden).chunk // (len(weight) * hidden.element_size()), 64)
    # Chunks of equal size, because a small last chunk would make slow matrix products.
    step = -(-len(hidden) // max(-(-len(hidden) // largest), 1)) or 1
    softmaxes, grad_hidden = [], torch.empty_like(hidden) if needs[0] else None
    grad_weight = grad_bias = None
    buffer = gradient_buffer(hidden[:step], weight)
    for start in range(0, max(len(hidden), 1), step):
        i = slice(start, start + step)
        stats = Statistics.empty(len(targets[i]), hidden.device)
        softmax, blocks = _softmax(stats, hidden[i], weight, bias, targets[i], transform.rows(i), buffer)
        softmaxes.append(softmax)
        chunk = hidden[i], weight, bias, targets[i], transform.rows(i), softmax, blocks
        part, grad_weight, grad_bias = _gradients(*chunk, coefficient[i], None, needs, (grad_weight, grad_bias))
        if grad_hidden is not None:
            grad_hidden[i] = part
    return Softmax(*map(torch.cat, zip(*softmaxes, strict=True))), grad_hidden, grad_weight, grad_bias


def _gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: Transform,
    softmax: Softmax,
    blocks: list[Block],
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
    all_active, width = len(active) == len(hidden), max(block.ids.stop - block.ids.start for block in blocks)
    h, targets, size, transform = hidden[active], targets[active], size[active], transform.rows(active)
    softmax = softmax.rows(active)
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
        ids = block.ids
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
        grad_hidden = grad_hidden.mul_(factor).to(hidden.dtype)
        grad_hidden = grad_hidden if all_active else torch.zeros_like(hidden).index_copy_(0, active, grad_hidden)
    return grad_hidden, grad_weight, grad_bias
