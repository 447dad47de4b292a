"""The policy loss: surrogate × masks × rollout weight + β·KL, aggregated, minus the entropy bonus.

Shapes: N completions, T tokens. Log-probs and entropies are in nats.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_grpo.errors import UserError
from lightning_grpo.metrics import EffectiveShare, Mean, Metric, Percentile99, Spread
from lightning_grpo.objective.aggregation import aggregate
from lightning_grpo.objective.config import ObjectiveConfig
from lightning_grpo.objective.kl import kl_divergence
from lightning_grpo.objective.masks import off_policy_mask, top_entropy_mask
from lightning_grpo.objective.surrogate import Surrogate, Terms
from lightning_grpo.objective.tensors import LOG_LIMIT, exp, extremes, fill, has_tokens, mean_metric, sequence_mean

SEQUENCE_ESS = "sampling/sequence_ess"


def policy_loss(
    config: ObjectiveConfig,
    *,
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    num_tokens: Tensor | float | None = None,
    num_sequences: Tensor | float | None = None,
) -> tuple[Tensor, dict[str, Metric]]:
    """Return the loss of one micro-batch, and metrics that can be merged over micro-batches and ranks.

    Masked positions may hold any value, including NaN.

    Args:
        config: The objective.
        logprobs: [N, T], with gradient.
        advantages: [N], or [N, T] if they differ between the tokens of a completion.
        mask: [N, T] bool or 0/1: tokens that the policy sampled (no padding, no tool output).
        old_logprobs: [N, T], of the policy at the start of the rollout. None: on-policy, old = sg[logprobs].
        ref_logprobs: [N, T], of the reference. Required if β ≠ 0 and the KL is in the loss; the KL is reported whenever
            they are given.
        rollout_logprobs: [N, T], of the engine; NaN for tokens that it could not score. Used by the rollout correction,
            the off-policy mask and DPPO; without them the latter two use old_logprobs.
        entropy: [N, T]. Required by the entropy bonus (with gradient) and the top-entropy mask; its mean is reported
            whenever it is given.
        num_tokens: Divisor of the global token mean and the entropy bonus: loss tokens in the optimizer step, summed
            over ranks, divided by the number of losses that the trainer averages (micro-batches × ranks). None: the
            tokens in ``mask``.
        num_sequences: Divisor of means over completions, computed in the same way. None: N. It may exceed N if
            completions with A = 0 were skipped.

    Returns:
        The scalar loss, and metrics by name: means over tokens, or over completions for a ratio per completion.

    Raises:
        UserError: An input that the objective needs is missing or has the wrong shape.
    """
    check_inputs(config, logprobs, advantages, mask, old_logprobs, ref_logprobs, rollout_logprobs, entropy)
    parts = config.resolved
    mask = mask.bool()
    logprobs = fill(logprobs, mask)
    old = logprobs.detach() if old_logprobs is None else fill(old_logprobs, mask).detach()
    engine = None if rollout_logprobs is None else fill(rollout_logprobs, mask).detach()
    A = fill(advantages[:, None], has_tokens(mask)) if advantages.dim() == 1 else fill(advantages, mask)
    correction = config.rollout_correction
    terms = Terms(
        logprobs=logprobs,
        old_logprobs=old,
        behavior_logprobs=old if engine is None else engine,
        ratio=importance_ratio(logprobs, old, mask, parts.importance_sampling_level),
        advantages=A.to(logprobs.dtype),
        mask=mask,
        rollout_weight=None if correction is None else correction.weight(old, engine, mask),
    )
    metrics = mismatch_metrics(old, engine, terms.rollout_weight, mask) | ratio_metrics(parts.surrogate, terms)
    if engine is not None:
        metrics[SEQUENCE_ESS] = sequence_ess(logprobs, engine, mask)

    loss = parts.surrogate(terms)
    if config.off_policy_mask_threshold is not None:
        kept = off_policy_mask(logprobs, terms.behavior_logprobs, A, mask, config.off_policy_mask_threshold)
        loss = loss * kept
        metrics["off_policy_kept"] = mean_metric(kept.to(loss.dtype), mask)
    bonus_mask = mask
    if entropy is not None:
        entropy = fill(entropy, mask)
        metrics["entropy"] = mean_metric(entropy, mask)
    if config.top_entropy_quantile < 1:
        bonus_mask = top_entropy_mask(entropy.detach(), mask, config.top_entropy_quantile)
        loss = loss * bonus_mask
    if terms.rollout_weight is not None and not parts.surrogate.applies_rollout_weight:
        loss = loss * terms.rollout_weight

    if ref_logprobs is not None:
        kl = kl_divergence(logprobs, fill(ref_logprobs, mask).detach(), parts.kl_estimator)
        if config.use_bias_correction_kl:
            kl = kl * terms.ratio
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
        mean_entropy = (entropy * bonus_mask).sum() / bonus_mask.sum().clamp(min=1)
        total = total - config.entropy_coef * mean_entropy * tokens / num_tokens
    return total, metrics


def importance_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, level: str) -> Tensor:
    """π/π_old: [N, T] of each token, or [N, 1] as the geometric mean over a completion (``level`` sequence)."""
    log_ratio = logprobs - old_logprobs
    return exp(sequence_mean(log_ratio, mask) if level == "sequence" else log_ratio)


def ratio_metrics(surrogate: Surrogate, terms: Terms) -> dict[str, Metric]:
    """The distribution of the ratio, and the share of tokens whose gradient the surrogate clips to 0."""
    lowest, highest = extremes(terms.ratio, terms.mask)
    metrics: dict[str, Metric] = {
        "ratio/mean": mean_metric(terms.ratio, terms.mask),
        "ratio/min": lowest,
        "ratio/max": highest,
    }
    if (clipped := surrogate.clipped(terms)) is not None:
        low, high = (side.to(terms.logprobs.dtype) for side in clipped)
        metrics["clip_ratio/low_mean"] = mean_metric(low, terms.mask)
        metrics["clip_ratio/high_mean"] = mean_metric(high, terms.mask)
        metrics["clip_ratio/region_mean"] = mean_metric(low + high, terms.mask)
        metrics["clip_ratio/low_min"] = extremes(_per_completion(low, terms.mask), terms.mask)[0]
        metrics["clip_ratio/high_max"] = extremes(_per_completion(high, terms.mask), terms.mask)[1]
    return metrics


def _per_completion(x: Tensor, mask: Tensor) -> Tensor:
    """[N, 1]: the mean of ``x`` [N, T] over each completion's tokens; ``x`` itself if it is [N, 1]."""
    return x if x.shape[1] == 1 else sequence_mean(x, mask)


def mismatch_metrics(old: Tensor, engine: Tensor | None, weight: Tensor | None, mask: Tensor) -> dict[str, Metric]:
    """The difference between the trainer's and the engine's log-probs, and the weights that correct for it."""
    metrics: dict[str, Metric] = {}
    if engine is not None:
        scored = mask & ~engine.isnan()
        log_ratio = fill(old - engine, scored)
        difference = log_ratio.abs()
        metrics |= sampling_ratio_metrics(log_ratio, scored)
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


def sampling_ratio_metrics(log_ratio: Tensor, mask: Tensor) -> dict[str, Metric]:
    """The distribution of w = π_trainer/π_engine over tokens, before any bound, from log w [N, T]."""
    ratio = log_ratio.double().clamp(-LOG_LIMIT, LOG_LIMIT).exp()
    lowest, highest = extremes(ratio, mask)
    moments = Spread.masked(ratio, mask)
    return {
        "sampling/ratio/min": lowest,
        "sampling/ratio/mean": Mean(moments.value, moments.count),
        "sampling/ratio/max": highest,
        "sampling/ratio/std": moments,
        "sampling/ess": EffectiveShare.of(log_ratio, mask),
        "sampling/chi2": Mean(moments.square - moments.count, moments.count),
        "sampling/k1": mean_metric(-log_ratio, mask),
    }


def sequence_ess(logprobs: Tensor, engine: Tensor, mask: Tensor) -> EffectiveShare:
    """The effective sample size of the completions, relative to their number, with the weights w = Π π/π_engine over
    the tokens of each, before any bound (arXiv:2602.17616). A token that the engine could not score has π/π_engine = 1.

    Args:
        logprobs: [N, T], of the policy.
        engine: [N, T], of the engine; NaN for tokens that it could not score.
        mask: [N, T] bool.
    """
    log_ratio = (logprobs - engine).detach().double()
    return EffectiveShare.of(fill(log_ratio, mask & ~engine.isnan()).sum(1, keepdim=True), has_tokens(mask))


def check_inputs(
    config: ObjectiveConfig,
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    entropy: Tensor | None,
) -> None:
    """Raise `UserError` unless every input that the objective needs is given and has the shape [N, T]."""
    if logprobs.dim() != 2:
        raise UserError(f"logprobs has shape {list(logprobs.shape)}; give [N, T]")
    N, T = logprobs.shape
    given = {
        "mask": mask,
        "old_logprobs": old_logprobs,
        "ref_logprobs": ref_logprobs,
        "rollout_logprobs": rollout_logprobs,
        "entropy": entropy,
    }
    for name, x in given.items():
        if x is not None and x.shape != logprobs.shape:
            raise UserError(f"{name} has shape {list(x.shape)}, but logprobs has {[N, T]}; give both the same shape")
    if advantages.shape not in ((N,), (N, T)):
        raise UserError(f"advantages has shape {list(advantages.shape)}; give [N] = {[N]} or [N, T] = {[N, T]}")
    if config.resolved.aggregation == "constant" and config.max_completion_length is None:
        raise UserError(
            f"objective.max_completion_length is not set, but loss_type {config.loss_type!r} divides by it; set it to"
            " the largest number of tokens in a completion"
        )
    beta, quantile = config.resolved.beta, config.top_entropy_quantile
    for name, needed, reason in (
        ("ref_logprobs", config.kl_in_loss, f"beta is {beta}; give them, or set beta to 0"),
        (
            "rollout_logprobs",
            config.rollout_correction is not None,
            "rollout_correction is set; give them, or set it to null",
        ),
        (
            "entropy",
            config.entropy_coef != 0,
            f"entropy_coef is {config.entropy_coef}; give it, or set the coefficient to 0",
        ),
        ("entropy", quantile < 1, f"top_entropy_quantile is {quantile}; give it, or set the quantile to 1"),
    ):
        if needed and given[name] is None:
            raise UserError(f"{name} is None, but objective.{reason}")


def on_policy_coefficient(loss: Callable[[Tensor], Tensor], rollout_logprobs: Tensor) -> Tensor | None:
    """∂loss/∂log-prob [N, T] of a ``loss`` whose gradient does not depend on the log-probs, or None if it does.

    It is computed at the engine's log-probs, which are close to the policy's, and at slightly lower ones: a surrogate
    may use the log-probs themselves, as DPPO's trust region does.

    Args:
        loss: the loss for log-probs [N, T].
        rollout_logprobs: [N, T], of the engine; NaN for tokens that it could not score.
    """

    def gradient(logprobs: Tensor) -> Tensor:
        with torch.enable_grad():
            logprobs = logprobs.detach().requires_grad_()
            return torch.autograd.grad(loss(logprobs), logprobs)[0]

    near = rollout_logprobs.nan_to_num()
    here, beside = gradient(near), gradient(near - 0.01)
    return here if torch.allclose(here, beside, rtol=1e-5, atol=0) else None
