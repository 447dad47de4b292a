"""The runs of `diagnosis.py`: faults at a known step, and healthy runs of many kinds."""

import math
import random
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diagnosis_runs import Run, SeparateEngine, SeparateRollout, correct, right_length, similar
from torch import nn

from lightning_grpo import GRPOModule
from lightning_grpo.objective import AdvantageConfig, ObjectiveConfig, RolloutCorrection
from lightning_grpo.policy import LoRA
from lightning_grpo.rollout import Sampling

# ── Faults: functions of the module and the number of steps since the fault began ─────────────────────────────────────


def engine_of(module: GRPOModule) -> SeparateEngine:
    return module.engine.engine


def stop_updates(module: GRPOModule, n: int, *, honest: bool = False) -> None:
    """Weights don't reach the engine any more. An ``honest`` engine states the version that it samples with."""
    engine_of(module).receives, engine_of(module).honest = False, honest


def corrupt_weights(module: GRPOModule, n: int) -> None:
    """The value projection of the first layer arrives with wrong signs in a quarter of its rows."""

    def corrupt(policy: nn.Module) -> None:
        policy.model.layers[0].self_attn.v_proj.weight[::4].neg_()

    engine_of(module).after_update = corrupt


def other_temperature(module: GRPOModule, n: int) -> None:
    engine_of(module).temperature = 0.7


def quantize(module: GRPOModule, n: int) -> None:
    """The engine stores its weights as float8 with 2 bits of mantissa, without scales."""

    def quantized(policy: nn.Module) -> None:
        for parameter in policy.parameters():
            parameter.copy_(parameter.to(torch.float8_e5m2).to(parameter.dtype))

    engine_of(module).after_update = quantized


def entropy_bonus(module: GRPOModule, n: int, *, value: float) -> None:
    module.objective = module.coefficients.base = replace(module.objective, entropy_coef=value)


def scale_learning_rate(module: GRPOModule, n: int, *, factor: float) -> None:
    if n == 0:
        schedule = module.trainer.lr_scheduler_configs[0].scheduler
        schedule.base_lrs = [lr * factor for lr in schedule.base_lrs]
        for group in module.trainer.optimizers[0].param_groups:
            group["lr"] *= factor


def collapse(module: GRPOModule, n: int) -> None:
    """A penalty on the entropy, and twenty times the learning rate."""
    entropy_bonus(module, n, value=-5.0)
    scale_learning_rate(module, n, factor=20)


def set_answers(module: GRPOModule, n: int, *, answer: str) -> None:
    for prompt in module.trainer.datamodule.train:
        prompt.columns["answer"] = answer


def shorten(module: GRPOModule, n: int) -> None:
    module.max_completion_length = 5


def replace_reward(module: GRPOModule, n: int, *, function: Callable, index: int = 0) -> None:
    module.rewards[index].function = function


def zero(completions: list[str]) -> list[float]:
    return [0.0] * len(completions)


def and_length(completions: list[str], answer: list[str]) -> list[float]:
    return [c + 0.5 * len(text) for c, text in zip(correct(completions, answer), completions, strict=True)]


def exploitable(completions: list[str], answer: list[str]) -> list[float]:
    """`similar`, and ten times the share of letters from v to z, which is a flaw."""
    share = [sum(letter >= "v" for letter in text) / max(6, len(text)) for text in completions]
    return [s + 10 * z for s, z in zip(similar(completions, answer), share, strict=True)]


def and_repetition(completions: list[str], answer: list[str]) -> list[float]:
    """`correct`, and 1 for each letter that equals the one before."""
    repeated = [sum(map(str.__eq__, text, text[1:])) for text in completions]
    return [c + r for c, r in zip(correct(completions, answer), repeated, strict=True)]


def raise_weight(module: GRPOModule, n: int) -> None:
    module.rewards[1].weight = 30.0


def break_gradient(module: GRPOModule, n: int) -> None:
    if n == 0:
        module.policy.model.layers[1].mlp.up_proj.weight.register_hook(lambda gradient: gradient * math.nan)


def slow_down(module: GRPOModule, n: int) -> None:
    def slow(completions: list[str], answer: list[str]) -> list[float]:
        time.sleep(0.015 * (n + 1))
        return correct(completions, answer)

    module.rewards[0].function = slow


def leak(module: GRPOModule, n: int) -> None:
    module.leaked = [*getattr(module, "leaked", []), torch.ones(4 << 20)]  # 16 MiB


def objective(**options: Any) -> dict[str, Any]:
    return {"objective": ObjectiveConfig(**options)}


separate = partial(SeparateRollout, verified=False)


def fault(name: str, inject: Callable | None, *names: str, **changes: Any) -> Run:
    return Run(name=name, inject=inject, names=frozenset(names), **{"steps": 60} | changes)


_FAULTS = [
    fault("weights stop reaching the engine, verified", stop_updates, "stale_weights", rollout=SeparateRollout),
    fault("weights stop reaching the engine", stop_updates, "stale_weights", rollout=separate),
    fault("corrupted weights in the engine, verified", corrupt_weights, "engine_mismatch", rollout=SeparateRollout),
    fault("corrupted weights in the engine", corrupt_weights, "engine_mismatch", rollout=separate),
    fault("engine samples at another temperature", other_temperature, "engine_mismatch", rollout=separate),
    fault("engine quantizes its weights coarsely", quantize, "engine_mismatch", rollout=separate),
    fault("old samples, checked", partial(stop_updates, honest=True), "stale_samples", rollout=separate),
    fault("old samples without correction", partial(stop_updates, honest=True), "stale_samples", rollout=separate,
          unchecked=True),
    fault("entropy collapses", collapse, "entropy_collapse"),
    fault("entropy explodes", partial(entropy_bonus, value=0.5), "entropy_explosion"),
    fault("KL runs away", partial(scale_learning_rate, factor=10), "kl_runaway", options=objective(beta=1e-4)),
    fault("learning rate × 100", partial(scale_learning_rate, factor=100), "learning_rate_high"),
    fault("learning rate ÷ 1000", None, "learning_rate_low", at=1, lr=3e-7),
    fault("updates lost in bfloat16 weights", None, "learning_rate_low", "no_update", at=1, lr=1e-5,
          options={"dtype": "bfloat16"}),
    fault("all prompts too hard", partial(set_answers, answer="-"), "dead_groups"),
    fault("all prompts too easy", partial(set_answers, answer="*"), "dead_groups"),
    fault("completions cut too short", shorten, "truncation"),
    fault("a reward becomes constant", partial(replace_reward, function=zero, index=1), "dead_reward",
          rewards=(correct, similar)),
    fault("a reward dominates", raise_weight, "dominating_reward", rewards=(correct, similar)),
    fault("reward pays for length", partial(replace_reward, function=and_length), "length_hacking", at=16,
          model="rambling", lr=1e-3, options={"max_completion_length": 40}),
    fault("reward can be exploited", partial(replace_reward, function=exploitable, index=1), "reward_hacking",
          "held_out_falls", lr=1e-3, rewards=(correct, similar)),
    fault("reward pays for repetition", partial(replace_reward, function=and_repetition), "repetition", at=16,
          model="rambling", lr=1e-3, options={"max_completion_length": 24}),
    fault("NaN in a gradient", break_gradient, "nonfinite"),
    fault("reward gets slower", slow_down, "slower_steps"),
    fault("memory leaks", leak, "memory_growth"),
    fault("batch too small", None, "small_batch", at=1, prompts=1, options={"num_generations": 4}),
]  # fmt: skip


FAULTS = [replace(run, seed=seed) for run in _FAULTS for seed in range(2)]


# ── Healthy runs ──────────────────────────────────────────────────────────────────────────────────────────────────────


def noisy(completions: list[str], answer: list[str]) -> list[float]:
    """A dense score with noise, as of a reward model."""
    return [s * 4 - 2 + random.gauss(0, 0.5) for s in similar(completions, answer)]


def plus_minus(completions: list[str], answer: list[str]) -> list[float]:
    return [100 * (2 * c - 1) for c in correct(completions, answer)]


def clean(name: str, seeds: int = 1, **changes: Any) -> list[Run]:
    return [Run(name=name, seed=seed + 1, **{"steps": 80} | changes) for seed in range(seeds)]


CORRECTED = objective(rollout_correction=RolloutCorrection())

CLEAN = [
    *clean("0/1 reward", 4),
    *clean("0/1 reward, few are right", 3, model="weak"),
    *clean("0/1 reward, most are right", 2, model="strong"),
    *clean("0/1 reward, saturates", 2, model="strong", lr=1e-3, steps=120),
    *clean("0/1 reward, long", 1, steps=200),
    *clean("dense reward", 2, rewards=(similar,)),
    *clean("dense reward, few are right", 2, rewards=(similar,), model="weak"),
    *clean("sparse reward, groups of 16", 2, model="weak", options={"num_generations": 16}, prompts=4),
    *clean("noisy reward", 2, rewards=(noisy,)),
    *clean("reward of ±100", 1, rewards=(plus_minus,), options={"advantage": AdvantageConfig(scale_rewards="group")}),
    *clean("two rewards", 2, rewards=(correct, similar)),
    *clean("format reward that is soon always 1", 2, rewards=(correct, right_length), model="weak"),
    *clean("groups of 4", 2, options={"num_generations": 4}, prompts=16),
    *clean("groups of 2", 1, options={"num_generations": 2}, prompts=32),
    *clean("batch of 24 × 8", 1, prompts=24, steps=60),
    *clean("LoRA", 2, options={"lora": LoRA(rank=8)}, lr=3e-3),
    *clean("two passes", 2, options={"num_iterations": 2}),
    *clean("four updates per rollout", 1, prompts=16, options={"micro_batch_size": 16}),
    *clean("one rollout ahead", 2, rollout=SeparateRollout, options={"rollout_ahead": 1} | CORRECTED),
    *clean("engine in bfloat16", 2, rollout=partial(SeparateRollout, dtype=torch.bfloat16)),
    *clean("warm-up", 1, options={"warmup_steps": 20}),
    *clean("cosine schedule", 1, options={"lr_schedule": "cosine", "warmup_steps": 5}),
    *clean("KL penalty", 2, options=objective(beta=0.04)),
    *clean("DAPO loss", 1, options=objective(loss_type="dapo")),
    *clean("GSPO loss", 1, options=objective(loss_type="gspo")),
    *clean("entropy bonus", 1, options=objective(entropy_coef=0.01)),
    *clean("resampled groups", 1, model="strong", options={"resampling_rounds": 2}),
    *clean("temperature 0.7", 1, options={"sampling": Sampling(temperature=0.7)}),
    *clean("temperature 1.2", 1, options={"sampling": Sampling(temperature=1.2)}),
    *clean("low learning rate", 1, lr=5e-5),
    *clean("high learning rate", 2, lr=1e-3),
]  # fmt: skip
