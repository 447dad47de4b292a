"""The objective, in pure tensors: advantages from rewards, a loss from log-probs."""

from .adaptive import AdaptiveBeta, AdaptiveEntropy
from .advantages import AdvantageConfig, group_advantages, total_rewards
from .coefficients import Coefficients
from .config import ObjectiveConfig
from .correction import RolloutCorrection
from .kl import kl_divergence, kl_penalty
from .loss import policy_loss
from .presets import PRESETS, Preset
from .surrogate import CISPO, DPPO, GMPO, SAPO, VESPO, Clipped, Reinforce, Surrogate, Terms
from .tensors import Max, Metric, Min, Sum

__all__ = [
    "CISPO",
    "DPPO",
    "GMPO",
    "PRESETS",
    "SAPO",
    "VESPO",
    "AdaptiveBeta",
    "AdaptiveEntropy",
    "AdvantageConfig",
    "Clipped",
    "Coefficients",
    "Max",
    "Metric",
    "Min",
    "ObjectiveConfig",
    "Preset",
    "Reinforce",
    "RolloutCorrection",
    "Sum",
    "Surrogate",
    "Terms",
    "group_advantages",
    "kl_divergence",
    "kl_penalty",
    "policy_loss",
    "total_rewards",
]
