"""The objective, as functions of tensors: advantages from rewards, and the loss from log-probs."""

from lightning_grpo.objective.adaptive import AdaptiveBeta, AdaptiveEntropy
from lightning_grpo.objective.advantages import AdvantageConfig, group_advantages, total_rewards
from lightning_grpo.objective.coefficients import Coefficients
from lightning_grpo.objective.config import ObjectiveConfig
from lightning_grpo.objective.correction import RolloutCorrection
from lightning_grpo.objective.kl import append_kl, kl_divergence, kl_penalty
from lightning_grpo.objective.loss import on_policy_coefficient, policy_loss
from lightning_grpo.objective.presets import PRESETS, Preset
from lightning_grpo.objective.surrogate import CISPO, DPPO, GMPO, SAPO, VESPO, Clipped, Reinforce, Surrogate, Terms
from lightning_grpo.objective.turns import turn_advantages

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
    "ObjectiveConfig",
    "Preset",
    "Reinforce",
    "RolloutCorrection",
    "Surrogate",
    "Terms",
    "append_kl",
    "group_advantages",
    "kl_divergence",
    "kl_penalty",
    "on_policy_coefficient",
    "policy_loss",
    "total_rewards",
    "turn_advantages",
]
