"""The built-in rules, by theme."""

from lightning_grpo.diagnosis.rule import Rule
from lightning_grpo.diagnosis.rules.optimization import (
    Clipping,
    GradientSpikes,
    LearningRateHigh,
    LearningRateLow,
    NonFinite,
    NoUpdate,
    SmallBatch,
)
from lightning_grpo.diagnosis.rules.policy import (
    EntropyCollapse,
    EntropyExplosion,
    KLRunaway,
    Repetition,
    Truncation,
)
from lightning_grpo.diagnosis.rules.resources import MemoryGrowth, SlowerSteps
from lightning_grpo.diagnosis.rules.rewards import (
    DeadGroups,
    DeadReward,
    DominatingReward,
    HeldOutFalls,
    LengthHacking,
    RewardHacking,
)
from lightning_grpo.diagnosis.rules.sync import EngineMismatch, StaleSamples, StaleWeights

RULES: tuple[type[Rule], ...] = (
    StaleWeights,
    EngineMismatch,
    StaleSamples,
    NonFinite,
    NoUpdate,
    LearningRateHigh,
    LearningRateLow,
    Clipping,
    GradientSpikes,
    SmallBatch,
    EntropyCollapse,
    EntropyExplosion,
    KLRunaway,
    Repetition,
    Truncation,
    DeadGroups,
    DeadReward,
    DominatingReward,
    HeldOutFalls,
    RewardHacking,
    LengthHacking,
    SlowerSteps,
    MemoryGrowth,
)
