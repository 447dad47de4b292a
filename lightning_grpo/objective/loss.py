"""The objective: surrogate × masks × rollout weight + β·KL, aggregated, less the entropy bonus."""

import torch
from torch import Tensor

from lightning_grpo.errors import UserError
from lightning_grpo.metrics import Metric, Percentile99
from lightning_grpo.objective.aggregation import aggregate
from lightning_grpo.objective.config import ObjectiveConfig
from lightning_grpo.objective.correction import bound, rollout_ratio
from lightning_grpo.objective.kl import kl_divergence
from lightning_grpo.objective.masks import off_policy_mask, top_entropy_mask
from lightning_grpo.objective.surrogate import Surrogate, Terms
from lightning_grpo.objective.tensors import exp, extremes, fill, mean_metric, rows, sequence_mean


def policy_loss(
    config: ObjectiveConfig,
    *,
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    rollout_weight: Tensor | None = None,
    entropy: Tensor | None = None,
    num_tokens: Tensor | float | None = None,
    num_sequences: Tensor | float | None = None,
) -> tuple[Tensor, dict[str, Metric]]:
    """The loss of one micro-batch, and its metrics in a form that merges over micro-batches and ranks.

    Shapes: N completions, T tokens; log-probs in nats. Masked positions may hold anything, NaN included.

    Args:
        config: The objective.
        logprobs: [N, T], with gradient.
        advantages: [N], or [N, T] where tokens differ.
        mask: [N, T] bool or 0/1: the policy's own tokens (no padding, no tool output).
        old_logprobs: [N, T], those at the rollout's start. None: the step is on-policy, old = sg[logprobs].
        ref_logprobs: [N, T], needed where β ≠ 0 and the KL is in the loss; the KL is reported whenever they are given.
        rollout_logprobs: [N, T], the engine's; NaN where it could not score a token. For the rollout correction, the
            off-policy mask and DPPO; the latter two fall back on old_logprobs.
        rollout_weight: [N, T], [N, 1] or [N]: takes the place of the computed correction.
        entropy: [N, T], needed for the entropy bonus (with gradient) and the top-entropy mask; reported when given.
        num_tokens: Divisor of the global token mean and of the entropy bonus: the tokens of the optimizer step over all
            ranks, divided by the number of losses that the trainer averages (micro-batches · ranks). None: the tokens
            given here.
        num_sequences: Divisor of sequence means, likewise. None: N. Larger than N where rows with A = 0 were left out.

    Returns:
        The scalar loss, and metrics by name: means over tokens (over completions, where the ratio is per sequence).

    Raises:
        ValueError: An input that the objective needs is missing or misshapen.
    """
    parts = config.resolved
    given = {
        "old_logprobs": old_logprobs,
        "ref_logprobs": ref_logprobs,
        "rollout_logprobs": rollout_logprobs,
        "entropy": entropy,
    }
    check_inputs(config, logprobs, advantages, mask, given, rollout_weight)
    mask = mask.bool()
    logprobs = fill(logprobs, mask)
    old = logprobs.detach() if old_logprobs is None else fill(old_logprobs, mask).detach()
    engine = None if rollout_logprobs is None else fill(rollout_logprobs, mask).detach()
    A = fill(advantages[:, None], rows(mask)) if advantages.dim() == 1 else fill(advantages, mask)

    log_ratio = logprobs - old
    if parts.importance_sampling_level == "sequence":
        log_ratio = sequence_mean(log_ratio, mask)
    ratio = exp(log_ratio)
    if rollout_weight is not None:
        weight = rollout_weight[:, None] if rollout_weight.dim() == 1 else rollout_weight
        weight = fill(weight, mask if weight.shape[1] == mask.shape[1] else rows(mask), 1.0).detach()
    elif config.rollout_correction is not None:
        weight = bound(rollout_ratio(old, engine, mask, config.rollout_correction.level), config.rollout_correction)
    else:
        weight = None

    terms = Terms(
        logprobs=logprobs,
        old_logprobs=old,
        behavior_logprobs=old if engine is None else engine,
        ratio=ratio,
        advantages=A.to(logprobs.dtype),
        mask=mask,
        rollout_weight=weight,
    )
    loss = parts.surrogate(terms)
    metrics = mismatch_metrics(old, engine, weight, mask) | ratio_metrics(parts.surrogate, terms)

    keep = mask
    if config.off_policy_mask_threshold is not None:
        near = off_policy_mask(logprobs, terms.behavior_logprobs, A, mask, config.off_policy_mask_threshold)
        loss = loss * near
        metrics["off_policy_kept"] = mean_metric(near.to(loss.dtype), mask)
    if entropy is not None:
        entropy = fill(entropy, mask)
        metrics["entropy"] = mean_metric(entropy, mask)
    if config.top_entropy_quantile < 1:
        keep = top_entropy_mask(entropy.detach(), mask, config.top_entropy_quantile)
        loss = loss * keep
    if weight is not None and not parts.surrogate.applies_rollout_weight:
        loss = loss * weight
    if ref_logprobs is not None:
        kl = kl_divergence(logprobs, fill(ref_logprobs, mask).detach(), parts.kl_estimator)
        if config.use_bias_correction_kl:
            kl = kl * ratio
        metrics["kl"] = mean_metric(kl, mask)
        if config.kl_in_loss:
            loss = loss + parts.beta * kl

    tokens = mask.sum()
    num_tokens = tokens if num_tokens is None else num_tokens
    num_tokens = num_tokens + (num_tokens == 0)
    total = aggregate(
        torch.where(mask, loss, 0.0),
        mask,
        parts.aggregation,
        num_tokens=num_tokens,
        num_sequences=max(1, mask.shape[0]) if num_sequences is None else num_sequences,
        max_completion_length=config.max_completion_length,
    )
    if config.entropy_coef != 0:
        mean_entropy = (entropy * keep).sum() / keep.sum().clamp(min=1)
        total = total - config.entropy_coef * mean_entropy * tokens / num_tokens
    return total, metrics


def ratio_metrics(surrogate: Surrogate, terms: Terms) -> dict[str, Metric]:
    """How far the policy has moved, and the share of tokens that the surrogate no longer moves."""
    lowest, highest = extremes(terms.ratio, terms.mask)
    metrics: dict[str, Metric] = {
        "ratio/mean": mean_metric(terms.ratio, terms.mask),
        "ratio/min": lowest,
        "ratio/max": highest,
    }
    if (cut := surrogate.clipped(terms)) is not None:
        low, high = (side.to(terms.logprobs.dtype) for side in cut)
        metrics["clip_ratio/low_mean"] = mean_metric(low, terms.mask)
        metrics["clip_ratio/high_mean"] = mean_metric(high, terms.mask)
        metrics["clip_ratio/region_mean"] = mean_metric(low + high, terms.mask)
        metrics["clip_ratio/low_min"] = extremes(per_sequence(low, terms.mask), terms.mask)[0]
        metrics["clip_ratio/high_max"] = extremes(per_sequence(high, terms.mask), terms.mask)[1]
    return metrics


def per_sequence(x: Tensor, mask: Tensor) -> Tensor:
    """[N, 1]: the mean over each row's tokens, or ``x`` itself where it is one value a row."""
    return x if x.shape[1] == 1 else sequence_mean(x, mask)


def mismatch_metrics(old: Tensor, engine: Tensor | None, weight: Tensor | None, mask: Tensor) -> dict[str, Metric]:
    """How far the engine's probabilities are from the trainer's, and the weights in force for it."""
    metrics: dict[str, Metric] = {}
    if engine is not None:
        scored = mask & ~engine.isnan()
        difference = fill(old - engine, scored).abs()
        metrics["sampling/sampling_logp_difference/mean"] = mean_metric(difference, scored)
        metrics["sampling/sampling_logp_difference/max"] = extremes(difference, scored)[1]
        metrics["sampling/sampling_logp_difference/p99"] = Percentile99.of(difference, scored)
        metrics["sampling/kl"] = mean_metric(fill(kl_divergence(engine, old), scored), scored)
    if weight is not None:
        lowest, highest = extremes(weight, mask)
        metrics["sampling/importance_sampling_ratio/min"] = lowest
        metrics["sampling/importance_sampling_ratio/mean"] = mean_metric(weight, mask)
        metrics["sampling/importance_sampling_ratio/max"] = highest
    return metrics


def check_inputs(
    config: ObjectiveConfig,
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    given: dict[str, Tensor | None],
    rollout_weight: Tensor | None,
) -> None:
    """Everything that the objective needs is there and fits [N, T]."""
    if logprobs.dim() != 2:
        raise UserError(f"logprobs is shaped {list(logprobs.shape)}; give [N, T]")
    N, T = shape = logprobs.shape
    for name, x in {"mask": mask, **given}.items():
        if x is not None and x.shape != shape:
            raise UserError(f"{name} is shaped {list(x.shape)}, but logprobs {[N, T]}; give the same shape")
    if advantages.shape not in ((N,), (N, T)):
        raise UserError(f"advantages is shaped {list(advantages.shape)}; give [N] = {[N]} or [N, T] = {[N, T]}")
    if rollout_weight is not None and rollout_weight.shape not in ((N,), (N, 1), (N, T)):
        raise UserError(f"rollout_weight is shaped {list(rollout_weight.shape)}; give {[N]}, {[N, 1]} or {[N, T]}")
    if config.resolved.aggregation == "constant" and config.max_completion_length is None:
        raise UserError(
            f"objective.max_completion_length is not set, but loss_type {config.loss_type!r} divides by it; set it to"
            " the generation limit in tokens"
        )
    weighted = config.rollout_correction is not None and rollout_weight is None
    for name, needed, why in (
        ("ref_logprobs", config.kl_in_loss, f"beta is {config.resolved.beta}; set it to 0 to do without"),
        ("rollout_logprobs", weighted, "rollout_correction is set; set it to null to do without"),
        ("entropy", config.entropy_coef != 0, f"entropy_coef is {config.entropy_coef}; set it to 0 to do without"),
        (
            "entropy",
            config.top_entropy_quantile < 1,
            f"top_entropy_quantile is {config.top_entropy_quantile}; set it to 1",
        ),
    ):
        if needed and given[name] is None:
            raise UserError(f"{name} is None, but objective.{why}")
