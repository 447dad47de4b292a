"""Rewards: what scores a completion."""

from lightning_grpo.lazy import lazy_names

_MODULES = {
    "answers": ("ExactMatch", "PrefixMatch"),
    "base": ("Reward", "completion_text"),
    "choice": ("MultipleChoice",),
    "code": ("CodeTests",),
    "compute": ("compute_rewards",),
    "constraints": ("Constraints",),
    "cosine": ("CosineLength",),
    "early": ("EarlyRewards",),
    "environment": ("EnvironmentReward",),
    "format": ("LengthPenalty", "RegexFormat", "RepetitionPenalty"),
    "function": ("FunctionReward", "as_rewards"),
    "fuzzy": ("FuzzyMatch",),
    "judge": ("LLMJudge",),
    "mathematics": ("MathMatch",),
    "reasoning_gym": ("ReasoningGym",),
    "response": ("AnswerReward", "ResponseReward"),
    "reward_model": ("RewardModel",),
    "schema": ("JSONSchema",),
    "text": ("decode_completions", "template_opening"),
    "text_reward": ("TextReward",),
}
__all__ = sorted(name for names in _MODULES.values() for name in names)

# worker processes import rewards without torch and transformers
__getattr__, __dir__ = lazy_names(
    __name__, {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names}
)
