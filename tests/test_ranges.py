"""Every numeric option of the algorithm has its range: each class with its options, what they take and what not."""

import dataclasses
import inspect
import math
import re

import pytest

from lightning_grpo import GRPOModule, PromptDataModule
from lightning_grpo.data import DifficultySampler
from lightning_grpo.errors import UserError
from lightning_grpo.objective import (
    CISPO,
    DPPO,
    GMPO,
    SAPO,
    VESPO,
    AdaptiveBeta,
    AdaptiveEntropy,
    AdvantageConfig,
    Clipped,
    ObjectiveConfig,
    RolloutCorrection,
)
from lightning_grpo.policy.load import LoRA
from lightning_grpo.ranges import check_ranges
from lightning_grpo.rewards import LengthPenalty, PrefixMatch, ReasoningGym
from lightning_grpo.rollout import Sampling
from lightning_grpo.training.reference import ReferenceRefresh
from lightning_grpo.training.schedules import Cosine, Polynomial, WarmupStableDecay

POSITIVE, ANY, SHARE = ([0.1, 5], [0, -1]), ([-1.5, 0, 2.5], []), ([0.1, 1], [0, -0.1, 1.1])
SHARE_OR_NONE = ([0, 0.1, 1], [-0.1, 1.1])
NOT_NEGATIVE, COUNT = ([0, 0.5, 7], [-0.1, -1]), ([1, 5], [0, -1])
MODULE = {"model": "nowhere", "rewards": [PrefixMatch()]}
LENGTH = {"max_completion_length": 100, "soft_punish_cache": 10}

# class: what it needs besides, and option: (what it takes, what it refuses); NaN and infinity are refused by all
OPTIONS = [
    (ObjectiveConfig, {}, {
        "epsilon": NOT_NEGATIVE, "epsilon_high": NOT_NEGATIVE, "delta": ([1.1, 5], [1, 0, -2]),
        "dual_clip": ([1.1, 3], [1, 0, -2]), "beta": NOT_NEGATIVE, "top_entropy_quantile": SHARE, "entropy_coef": ANY,
        "off_policy_mask_threshold": NOT_NEGATIVE, "max_completion_length": COUNT,
    }),
    (AdaptiveBeta, {"target": 0.1}, {
        "target": POSITIVE, "gain": ([0.1, 1], [0, -1, 5]), "clip": ([0.2, 1], [0, -1, 10]),
    }),
    (AdaptiveEntropy, {}, {
        "target": NOT_NEGATIVE, "delta": NOT_NEGATIVE, "minimum": ([0, 1], [-0.1, 1.1]), "maximum": ([0, 2], [-0.1]),
    }),
    (Clipped, {}, {
        "epsilon": NOT_NEGATIVE, "epsilon_high": NOT_NEGATIVE, "delta": ([1.1], [1, 0]), "dual_clip": ([1.1], [1, 0]),
    }),
    (CISPO, {}, {"epsilon_high": POSITIVE}),
    (SAPO, {}, {"temperature_positive": POSITIVE, "temperature_negative": POSITIVE}),
    (VESPO, {}, dict.fromkeys(["k_positive", "lambda_positive", "k_negative", "lambda_negative"], NOT_NEGATIVE)),
    (GMPO, {}, {"epsilon": NOT_NEGATIVE, "epsilon_high": NOT_NEGATIVE}),
    (DPPO, {}, {"threshold": SHARE}),
    (RolloutCorrection, {}, {"lower": ([0, 0.5, 1], [-0.1, 1.1]), "upper": ([1, 5], [0.9, 0, -1])}),
    (AdvantageConfig, {"estimator": "pass_at_k", "k": 2}, {"k": COUNT}),
    (Sampling, {}, {
        "temperature": NOT_NEGATIVE, "top_p": SHARE, "top_k": ([0, 5], [-1]), "min_p": ([0, 0.5, 1], [-0.1, 1.1]),
        "repetition_penalty": POSITIVE, "cutoff": SHARE,
    }),
    (ReferenceRefresh, {}, {"mixing": SHARE, "every_n_steps": COUNT}),
    (Cosine, {}, {"minimum": SHARE_OR_NONE}),
    (Polynomial, {}, {"minimum": SHARE_OR_NONE, "power": POSITIVE}),
    (WarmupStableDecay, {}, {"minimum": SHARE_OR_NONE, "decay": ([0, 0.1, 5], [-1, 1.5])}),
    (LoRA, {}, {
        "rank": COUNT, "alpha": POSITIVE, "dropout": ([0, 0.9], [-0.1, 1]),
        "rank_pattern": ([{"q_proj": 1}], [{"q_proj": 0}, {"q_proj": math.nan}]),
        "alpha_pattern": ([{"q_proj": 0.5}], [{"q_proj": 0}, {"q_proj": math.inf}]),
        "layers_to_transform": ([[0, 3]], [[-1]]),
    }),
    (PromptDataModule, {"source": "letters"}, {
        "size": COUNT, "validation_size": ([0, 3], [-1]), "prompts_per_rollout": COUNT, "max_prompt_length": COUNT,
        "validation_batch_size": COUNT, "seed": ([0, 3], [-1]),
    }),
    (DifficultySampler, {}, {
        "floor": SHARE, "smoothing": SHARE, "low": ([-1, 0.5], [1, 2]), "high": ([0.5, 3], [0, -1]),
    }),
    (LengthPenalty, LENGTH, {
        "max_completion_length": ([10, 50], [0]), "soft_punish_cache": ([1, 100], [0, 101]), "weight": ANY,
        "time_limit": POSITIVE,
    }),
    (ReasoningGym, {}, {"threshold": ANY, "weight": ANY, "time_limit": POSITIVE, "seconds": POSITIVE}),
    (GRPOModule, MODULE, {
        "max_prompt_length": COUNT, "max_completion_length": COUNT, "validation_generations": COUNT,
        "pass_threshold": ANY, "warmup_steps": ([0, 0.1, 5], [-1, 1.5]), "seed": ([0, 5], [-1]),
        "num_generations": ([2, 5], [1, 0]),
        "resampling_rounds": ([0, 2], [-1]), "micro_batch_size": COUNT, "micro_batch_tokens": COUNT,
        "num_iterations": COUNT,
        "rollout_ahead": ([0], [2, -1]),
    }),
]  # fmt: skip
CASES = [(kind, needs, name, *values) for kind, needs, options in OPTIONS for name, values in options.items()]


@pytest.mark.parametrize(
    ("kind", "needs", "name", "taken", "refused"), CASES, ids=[f"{case[0].__name__}.{case[2]}" for case in CASES]
)
def test_a_number_outside_its_range_is_refused(kind, needs, name, taken, refused):
    for value in taken:
        kind(**needs | {name: value})
    not_finite = [] if isinstance(taken[0], dict | list) else [math.nan, math.inf, -math.inf]
    for value in [*refused, *not_finite]:
        with pytest.raises(UserError, match=rf"\b{name}\b.*\bis "):
            kind(**needs | {name: value})


@pytest.mark.parametrize("kind", [kind for kind, _, _ in OPTIONS])
def test_no_numeric_option_is_forgotten(kind):
    """Every argument that is annotated with a number stands in the table."""
    known = {name for other, _, options in OPTIONS for name in options if issubclass(kind, other)}
    if dataclasses.is_dataclass(kind):
        annotated = {f.name: str(f.type) for f in dataclasses.fields(kind)}
    else:
        parents = [parent for parent in kind.__mro__ if parent.__module__.startswith("lightning_grpo")]
        signatures = [inspect.signature(parent.__init__).parameters.values() for parent in parents]
        annotated = {p.name: str(p.annotation) for parameters in signatures for p in parameters}
    numbers = {name for name, kind_ in annotated.items() if re.search(r"\b(int|float)\b", kind_)}
    numbers -= {"requires"}  # a mapping, whose values are checked by name
    assert numbers <= known, f"no range is tested for {numbers - known}"


def test_a_range_is_said_in_words():
    for value, interval, words in [
        (0, "[1, inf)", "micro is 0; set 1 or more"),
        (0.0, "(0, inf)", "micro is 0.0; set a number above 0"),
        (2, "[0, 1)", r"micro is 2; set a number in \[0, 1\)"),
        (math.nan, "(-inf, inf)", "micro is nan; set a finite number"),
        (True, "[0, 1]", r"micro is True; set a number in \[0, 1\]"),
        ("1", "[0, 1]", "micro is '1'; set"),
    ]:
        with pytest.raises(UserError, match=words):
            check_ranges({"micro": value}, {"micro": interval})
    check_ranges({"micro": None}, {"micro": "[1, inf)"})
    check_ranges({"micro": math.inf}, {"micro": "[1, inf]"})
