"""Choosing an objective: a name, and the parts in which yours differs from it."""

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
    """What is optimised. Every field left at None takes the value of ``loss_type``'s published form."""

    loss_type: str = "dr_grpo"
    """One of the names in docs/objectives.md. The default is Dr. GRPO: sums divided by a constant, no length bias."""
    surrogate: Surrogate | None = None
    """Per-token loss, by class path; yours, or one of ours with other numbers. None: the preset's."""
    importance_sampling_level: RatioLevel | None = None
    """Ratio of each token, or of the whole completion (its geometric mean)."""
    aggregation: Aggregation | None = None
    """How token losses become one number."""
    epsilon: float | None = None
    """Lower clip range of the ratio; alone, also the upper."""
    epsilon_high: float | None = None
    """Upper clip range of the ratio. For CISPO the largest weight itself."""
    delta: float | None = None
    """Bound of the unclipped branch of the clipped surrogate. None: none."""
    dual_clip: float | None = None
    """Bound c > 1 on the loss of negative advantages in the clipped surrogate. None: off."""
    beta: float | None = None
    """Weight of the KL to the reference. 0 loads no reference policy. Recent recipes use 0; DeepSeekMath 0.04."""
    kl_estimator: KLEstimator | None = None
    """k1, abs, k2 or k3. None: the preset's in the loss, k1 in the reward, where it alone is unbiased."""
    kl_placement: Literal["loss", "reward"] = "loss"
    """Add β·KL to the loss, or subtract it from the rewards before advantages."""
    use_bias_correction_kl: bool = False
    """Multiply the KL in the loss by the ratio, making its gradient unbiased off-policy (DeepSeek-V3.2)."""
    adaptive_beta: AdaptiveBeta | None = None
    """Moves β towards a target KL. None: fixed."""
    top_entropy_quantile: float = 1.0
    """Share of tokens, those of highest entropy, that the policy term keeps (0.2 in arXiv:2506.01939)."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus. Above 0 the entropy needs a gradient, which costs memory and time."""
    adaptive_entropy: AdaptiveEntropy | None = None
    """Moves the entropy bonus towards a target entropy. None: fixed."""
    mask_truncated_completions: bool = False
    """Leave completions that ended for their length out of the loss."""
    off_policy_mask_threshold: float | None = None
    """Drop completions with A < 0 whose mean log π_rollout − log π exceeds this. None: keep all."""
    rollout_correction: RolloutCorrection | None = None
    """Reweights by π_old/π_engine. None: the engine's probabilities are taken to be the trainer's."""
    max_completion_length: int | None = None
    """Divisor of the constant aggregation, in tokens. None: filled in from the generation settings."""

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
                "objective.use_bias_correction_kl is true, but objective.kl_placement is 'reward', where there is no"
                " ratio; set kl_placement to 'loss', or use_bias_correction_kl to false"
            )
        # resolving builds the surrogate, which checks its own numbers
        if self.resolved.beta == 0 and self.adaptive_beta is not None:
            raise UserError(
                "objective.adaptive_beta is set, but objective.beta is 0, which it multiplies; set beta to where it"
                " should start, e.g. 0.01"
            )
        if self.adaptive_entropy is not None and not self.adaptive_entropy.minimum <= self.entropy_coef:
            raise UserError(
                f"objective.entropy_coef is {self.entropy_coef}, below objective.adaptive_entropy.minimum"
                f" {self.adaptive_entropy.minimum}; set entropy_coef to where it should start"
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
                    f"objective.{name} is {value} beside objective.surrogate, which has its own {name}; set it there"
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
        """The parts in force: the preset's, with the fields that are set here in their places."""
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
        return replace(preset, surrogate=replace(preset.surrogate, **clip), **changes)

    @property
    def needs_reference(self) -> bool:
        """Whether reference log-probs are needed, in the loss or for the rewards."""
        return self.resolved.beta != 0

    @property
    def kl_in_loss(self) -> bool:
        return self.resolved.beta != 0 and self.kl_placement == "loss"

    @property
    def kl_in_reward(self) -> bool:
        """Whether `kl_penalty` is to be subtracted from the rewards."""
        return self.resolved.beta != 0 and self.kl_placement == "reward"

    @property
    def needs_entropy(self) -> bool:
        """Whether `policy_loss` needs entropies (it reports their mean whenever it is given them)."""
        return self.needs_entropy_grad or self.top_entropy_quantile < 1

    @property
    def needs_entropy_grad(self) -> bool:
        """Whether those entropies need a gradient, now or later in the run."""
        return self.entropy_coef != 0 or self.adaptive_entropy is not None

    def needs_old_logprobs(self, num_updates_per_rollout: int) -> bool:
        """Whether a forward pass for old log-probs is due: never where the rollout gives only one update."""
        used = self.resolved.surrogate.uses_ratio or self.rollout_correction is not None
        return num_updates_per_rollout > 1 and (used or (self.kl_in_loss and self.use_bias_correction_kl))

    @property
    def constant_on_policy(self) -> bool:
        """Whether at ratio 1 the loss's gradient in the log-probs does not depend on them."""
        return not (
            self.kl_in_loss
            or self.needs_entropy
            or self.rollout_correction is not None
            or self.off_policy_mask_threshold is not None
        )

    @property
    def token_wise(self) -> bool:
        """Whether each token's coefficient follows from that token alone, so that a row may be processed in pieces."""
        resolved, correction = self.resolved, self.rollout_correction
        return (
            resolved.surrogate.token_wise
            and resolved.importance_sampling_level == "token"
            and (correction is None or correction.level == "token")
            and self.off_policy_mask_threshold is None
            and self.top_entropy_quantile == 1
        )

    @property
    def global_tokens(self) -> bool:
        """Whether the loss is defined over the whole step's tokens, so that `policy_loss` needs num_tokens."""
        return self.resolved.aggregation == "global_tokens" or self.needs_entropy_grad

    def loss_mask(self, completion_mask: Tensor, truncated: Tensor) -> Tensor:
        """The tokens that the loss is about, [N, T] bool: `policy_loss` takes them, num_tokens counts them."""
        return loss_mask(completion_mask, truncated, drop_truncated=self.mask_truncated_completions)

    @property
    def skips_zero_advantage(self) -> bool:
        """Whether completions with A = 0 may be left out of the forward pass (num_sequences still counts them)."""
        return not (
            self.kl_in_loss
            or self.needs_entropy_grad
            or self.top_entropy_quantile < 1
            or self.resolved.aggregation == "local_tokens"
        )


def field_names(surrogate: Surrogate) -> set[str]:
    """Names of the numbers that a surrogate takes; none where it is no dataclass."""
    return {f.name for f in fields(surrogate)} if is_dataclass(surrogate) else set()
