"""Rewards: what judges a completion."""

from lightning_grpo.rewards.answers import ExactMatch, PrefixMatch
from lightning_grpo.rewards.base import FunctionReward, Reward, as_rewards, completion_text
from lightning_grpo.rewards.compute import compute_rewards
from lightning_grpo.rewards.early import EarlyJudge
from lightning_grpo.rewards.format import LengthPenalty, RegexFormat
from lightning_grpo.rewards.reasoning_gym import ReasoningGym
from lightning_grpo.rewards.text import decode_completions, template_opening

__all__ = [
    "EarlyJudge",
    "ExactMatch",
    "FunctionReward",
    "LengthPenalty",
    "PrefixMatch",
    "ReasoningGym",
    "RegexFormat",
    "Reward",
    "as_rewards",
    "completion_text",
    "compute_rewards",
    "decode_completions",
    "template_opening",
]
