"""The configuration of the objective: the name of a published form, and options that replace parts of it."""

from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from typing import Literal, get_args
from warnings import warn

from torch import Tensor

from lightning_grpo.errors import UserError
from lightning_grpo.objective.adaptive import AdaptiveBeta, AdaptiveEntropy
from lightning_grpo.objective.aggregation import Aggregation
from lightning_grpo.objective.correction import RolloutCorrection
from lightning_grpo.objective.kl import KLEstimator
from lightning_grpo.objective.masks import loss_mask
from lightning_grpo.objective.presets import PRESETS, Preset, RatioLevel
from lightning_grpo.objective.surrogate import Surrogate
from lightning_grpo.ranges import check_ranges

RANGES = {
    "epsilon": "[0, inf)",
    "epsilon_high": "[0, inf)",
    "delta": "(1, inf)",
    "dual_clip": "(1, inf)",
    "beta": "[0, inf)",
    "top_entropy_quantile": "(0, 1]",
    "entropy_coef": "(-inf, inf)",
    "off_policy_mask_threshold": "[0, inf)",
    "max_completion_length": "[1, inf)",
}
CLIP_OPTIONS = ("epsilon", "epsilon_high", "delta", "dual_clip")


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The objective. A field that is None has the value of the published objective ``loss_type``."""

    loss_type: str = "dr_grpo"
    """Name of a published objective (docs/objectives.md); the options below override its parts. The default is Dr.
    GRPO, which divides by a constant and so has no length bias."""
    surrogate: Surrogate | None = None
    """Per-token loss, by class path: your own class, or a built-in one with other arguments. By default that of
    loss_type."""
    importance_sampling_level: RatioLevel | None = None
    """Compute the ratio per token, or per completion (the geometric mean over its tokens). By default that of
    loss_type."""
    aggregation: Aggregation | None = None
    """How to aggregate the losses of tokens into one number (docs/objectives.md). By default that of loss_type."""
    epsilon: float | None = None
    """Lower clip range of the ratio, and the upper one if epsilon_high is not set."""
    epsilon_high: float | None = None
    """Upper clip range of the ratio. For CISPO, the maximum weight itself."""
    delta: float | None = None
    """Upper bound of the ratio in the unclipped branch of the clipped surrogate. Unbounded by default."""
    dual_clip: float | None = None
    """Bound c > 1 on the loss of tokens with negative advantages in the clipped surrogate. Unbounded by default."""
    beta: float | None = None
    """Coefficient of the KL divergence from the reference model. 0, as in most recent recipes, loads no reference;
    DeepSeekMath used 0.04. Raise it if the reward rises while held-out rewards fall."""
    kl_estimator: KLEstimator | None = None
    """KL estimator: k1, abs, k2 or k3. By default that of loss_type in the loss, and k1, the only unbiased one there,
    in the reward."""
    kl_placement: Literal["loss", "reward"] = "loss"
    """Add β·KL to the loss, or subtract it from the rewards before advantages are computed."""
    use_bias_correction_kl: bool = False
    """Multiply the KL in the loss by the ratio, which makes its gradient unbiased off-policy (DeepSeek-V3.2)."""
    adaptive_beta: AdaptiveBeta | None = None
    """Adapt β during training to reach a target KL. By default β is constant."""
    top_entropy_quantile: float = 1.0
    """Fraction of tokens, those with the highest entropy, that contribute to the policy loss (0.2 in arXiv:2506.01939).
    1 keeps all tokens."""
    entropy_coef: float = 0.0
    """Coefficient of the entropy bonus. Values other than 0 cost memory and time for the gradient of the entropy."""
    adaptive_entropy: AdaptiveEntropy | None = None
    """Adapt the entropy bonus during training to reach a target entropy. By default it is constant."""
    mask_truncated_completions: bool = False
    """Exclude completions truncated at the length limit from the loss."""
    off_policy_mask_threshold: float | None = None
    """Exclude completions with a negative advantage whose mean log π_rollout − log π, in nats, exceeds this value. By
    default all are kept."""
    rollout_correction: RolloutCorrection | None = None
    """Reweight tokens or completions by π_old/π_engine. By default the engine's probabilities are assumed to equal the
    trainer's."""
    ess_scaled_step: bool = False
    """Multiply the learning rate of each optimizer step by the square root of sampling/sequence_ess, so that a step to
    which few completions contribute, because the samples are off-policy, is small (arXiv:2602.17616)."""
    max_completion_length: int | None = None
    """Divisor of the constant aggregation, in tokens. By default model.max_completion_length."""

    def __post_init__(self) -> None:
        if self.loss_type not in PRESETS:
            raise UserError(f"objective.loss_type is {self.loss_type!r}; set one of {', '.join(PRESETS)}")
        for name, kind in (
            ("importance_sampling_level", RatioLevel),
            ("aggregation", Aggregation),
            ("kl_estimator", KLEstimator),
            ("kl_placement", Literal["loss", "reward"]),
        ):
            value = getattr(self, name)
            if value is not None and value not in get_args(kind):
                raise UserError(f"objective.{name} is {value!r}; set one of {', '.join(get_args(kind))}")
        check_ranges(self, RANGES, prefix="objective.")
        if self.use_bias_correction_kl and self.kl_placement == "reward":
            raise UserError(
                "objective.use_bias_correction_kl is true, but objective.kl_placement is 'reward', where no ratio is"
                " defined; set kl_placement to 'loss', or use_bias_correction_kl to false"
            )
        # `resolved` builds the surrogate, which checks its own options.
        if self.resolved.beta == 0 and self.adaptive_beta is not None:
            raise UserError(
                "objective.adaptive_beta is set, but objective.beta is 0, which it multiplies; set beta to its initial"
                " value, e.g. 0.01"
            )
        if self.adaptive_entropy is not None and not self.adaptive_entropy.minimum <= self.entropy_coef:
            raise UserError(
                f"objective.entropy_coef is {self.entropy_coef}, below objective.adaptive_entropy.minimum"
                f" {self.adaptive_entropy.minimum}; set entropy_coef to its initial value"
            )

        self._check_clip_options()

    def _check_clip_options(self) -> None:
        takes = field_names(self.surrogate or PRESETS[self.loss_type].surrogate)
        kind = type(self.surrogate or PRESETS[self.loss_type].surrogate).__name__
        for name in CLIP_OPTIONS:
            value = getattr(self, name)
            if value is None:
                continue
            if self.surrogate is not None and name in takes:
                raise UserError(
                    f"objective.{name} is {value}, but objective.surrogate has its own {name}; set it there"
                )
            if name in ("delta", "dual_clip") and name not in takes:
                raise UserError(
                    f"objective.{name} is {value}, but the surrogate {kind} has no {name}; set it to null, or choose a"
                    " loss_type with the clipped surrogate, e.g. dr_grpo"
                )
            if name not in takes:
                warn(f"objective.{name} is {value}, but the surrogate {kind} does not use it", stacklevel=4)

    @cached_property
    def resolved(self) -> Preset:
        """The parts of ``loss_type``'s published form, replaced by the fields that are set."""
        preset = PRESETS[self.loss_type]
        names = ("importance_sampling_level", "aggregation", "beta", "kl_estimator")
        changes = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.kl_placement == "reward":
            changes.setdefault("kl_estimator", "k1")
        if self.surrogate is not None:
            return replace(preset, surrogate=self.surrogate, **changes)
        takes = field_names(preset.surrogate)
        clip = {name: getattr(self, name) for name in CLIP_OPTIONS if getattr(self, name) is not None and name in takes}
        if "epsilon" in clip:
            clip.setdefault("epsilon_high", None)
        return replace(preset, surrogate=replace(preset.surrogate, **clip), **changes)  # type: ignore[type-var]

    @property
    def needs_reference(self) -> bool:
        """Whether reference log-probs are needed, for the loss or for the rewards."""
        return self.resolved.beta != 0

    @property
    def kl_in_loss(self) -> bool:
        return self.resolved.beta != 0 and self.kl_placement == "loss"

    @property
    def kl_in_reward(self) -> bool:
        """Whether `kl_penalty` is subtracted from the rewards."""
        return self.resolved.beta != 0 and self.kl_placement == "reward"

    @property
    def needs_entropy(self) -> bool:
        """Whether `policy_loss` requires the entropy (it reports the mean whenever the entropy is given)."""
        return self.needs_entropy_grad or self.top_entropy_quantile < 1

    @property
    def needs_entropy_grad(self) -> bool:
        """Whether the entropy needs a gradient at any time in the run."""
        return self.entropy_coef != 0 or self.adaptive_entropy is not None

    def needs_old_logprobs(self, num_updates_per_rollout: int) -> bool:
        """Whether old log-probs must be computed by a forward pass; never if there is one update per rollout."""
        used = self.resolved.surrogate.uses_ratio or self.rollout_correction is not None
        return num_updates_per_rollout > 1 and (used or (self.kl_in_loss and self.use_bias_correction_kl))

    @property
    def constant_on_policy(self) -> bool:
        """Whether, at ratio 1, the gradient of the loss with respect to the log-probs does not depend on them."""
        return not (
            self.kl_in_loss
            or self.needs_entropy
            or self.rollout_correction is not None
            or self.off_policy_mask_threshold is not None
        )

    @property
    def couples_completions(self) -> bool:
        """Whether the gradient of one completion of a micro-batch depends on the log-probs of others."""
        return self.top_entropy_quantile < 1

    def loss_mask(self, completion_mask: Tensor, truncated: Tensor) -> Tensor:
        """The tokens in the loss, [N, T] bool, which `policy_loss` takes as mask and num_tokens counts."""
        return loss_mask(completion_mask, truncated, drop_truncated=self.mask_truncated_completions)

    @property
    def skips_zero_advantage(self) -> bool:
        """Whether completions with A = 0 can be left out of the forward pass (num_sequences still counts them)."""
        return not (
            self.kl_in_loss
            or self.needs_entropy_grad
            or self.top_entropy_quantile < 1
            or self.resolved.aggregation == "local_tokens"
        )


def field_names(surrogate: Surrogate) -> set[str]:
    """The names of a surrogate's options; empty if it is not a dataclass."""
    return {f.name for f in fields(surrogate)} if is_dataclass(surrogate) else set()
