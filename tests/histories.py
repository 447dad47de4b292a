"""Histories of made-up runs for the tests of the diagnosis."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lightning_grpo.diagnosis import Finding, History
from lightning_grpo.diagnosis.rule import Rule
from lightning_grpo.diagnosis.ruleset import RuleSet

Metric = float | Callable[[int], float]

OPTIONS = {
    "model.optimizer.lr": 3e-6,
    "model.num_generations": 8,
    "model.max_completion_length": 256,
    "model.objective.loss_type": "dr_grpo",
    "model.objective.beta": 0.0,
    "data.prompts_per_rollout": 16,
    "data.validation_size": 256,
    "trainer.accumulate_grad_batches": 4,
}
INFO = {"reward_names": ["correct", "format"], "completions_per_step": 128}


def rising(step: int, low: float = 0.2, high: float = 0.8, over: int = 100) -> float:
    """An S-shaped curve from ``low`` to ``high`` within about ``over`` steps."""
    return low + (high - low) / (1 + np.exp(-8 * (step / over - 0.5)))


def healthy(step: int, random: np.random.Generator) -> dict[str, float]:
    """The metrics of a step of a run with a 0/1 reward that learns, with the noise of 128 completions."""
    rate = rising(step)
    correct = random.binomial(128, rate) / 128
    form = random.binomial(128, min(1.0, 0.6 + step / 100)) / 128
    mixed = 1 - (rate**8 + (1 - rate) ** 8)
    return {
        "reward": correct + 0.2 * form,
        "reward_std": 0.4,
        "rewards/correct/mean": correct,
        "rewards/correct/std": float(np.sqrt(correct * (1 - correct))),
        "rewards/format/mean": form,
        "rewards/format/std": float(np.sqrt(form * (1 - form))),
        "rewards/correct/variance_share": 0.85 + 0.02 * random.normal(),
        "rewards/format/variance_share": 0.15 + 0.02 * random.normal(),
        "frac_reward_zero_std": 1 - random.binomial(16, mixed) / 16,
        "groups/all_wrong": random.binomial(16, (1 - rate) ** 8) / 16,
        "groups/all_right": random.binomial(16, rate**8) / 16,
        "loss": 0.01 * random.normal(),
        "grad_norm": float(np.exp(0.3 * random.normal())),
        "learning_rate": 3e-6 * min(1.0, step / 10),
        "update_ratio": 1e-4 * float(np.exp(0.2 * random.normal())),
        "entropy": 0.6 * rising(step, 1.0, 0.35) + 0.01 * random.normal(),
        "kl": 0.1 * step / 400 + 0.002 * random.random(),
        "clip_ratio/region_mean": 0.02 * random.random(),
        "completions/mean_length": 100 + 0.1 * step + 3 * random.normal(),
        "completions/clipped_ratio": random.binomial(128, 0.04) / 128,
        "completions/truncated_reward": 0.0,
        "completions/repetition": 0.08 + 0.01 * random.normal(),
        "reward_length_correlation": 0.1 * random.normal(),
        "sampling/sampling_logp_difference/mean": 0.008 * float(np.exp(0.1 * random.normal())),
        "sampling/kl": 2e-4,
        "sampling/k1": 1e-4 * random.normal(),
        "sampling/ess": 0.99,
        "sampling/sequence_ess": 0.8 + 0.02 * random.normal(),
        "sampling/chi2": 0.01,
        "sampling/ratio/mean": 1 + 1e-3 * random.normal(),
        "sampling/ratio/std": 0.05,
        "staleness": 0.0,
        "noise_scale/noise": 100 * float(np.exp(0.3 * random.normal())),
        "noise_scale/signal": 0.5 * float(np.exp(0.5 * random.normal())),
        "step_time": 4 + 0.3 * random.random(),
        "time/rollout": 2.5 + 0.2 * random.random(),
        "time/reward": 0.1,
        "time/update": 1.4,
        "memory/gib": 11.0 + 0.2 * random.random() + 0.5 * min(1, step / 5),
    }


def run(
    steps: int,
    *,
    rules: RuleSet | None = None,
    at: int = 30,
    changes: Mapping[str, Metric] | None = None,
    options: Mapping[str, Any] | None = None,
    samples: Callable[[int], list[dict[str, Any]]] | None = None,
    seed: int = 0,
    without: tuple[str, ...] = (),
) -> tuple[list[Finding], History]:
    """Check the rules after every step of a healthy run, in which ``changes`` replace metrics from step ``at`` on.

    Each value is a number, None (the metric is absent), or a function of the steps since ``at``.
    """
    rules = rules or RuleSet()
    history, random = (
        History(options=OPTIONS | (options or {}), info=INFO, samples=samples),
        np.random.default_rng(seed),
    )
    findings = []
    for step in range(1, steps + 1):
        metrics = healthy(step, random)
        if step >= at:
            changed = {n: m(step - at) if callable(m) else m for n, m in (changes or {}).items()}
            metrics |= changed
        present = {n: x for n, x in metrics.items() if n not in without and x is not None and not n.startswith("val/")}
        history.append(step, present)
        if step % 20 == 0:
            held_out = (changes or {}).get("val/pass@1") if step >= at else None
            value = held_out(step - at) if callable(held_out) else rising(step) + 0.02 * random.normal()
            history.add_held_out(step, {"val/pass@1": value})
        findings += rules.check(history)
    return findings, history


def only(rule: type[Rule], **options: Any) -> RuleSet:
    """A rule alone."""
    rules = RuleSet()
    rules.rules = [rule(**options)]
    return rules
