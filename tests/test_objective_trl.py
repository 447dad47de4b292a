"""The objective against figures computed by TRL 1.16's GRPOTrainer (float32, CPU), kept in data/trl-1.16.json."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from reference import GivenWeight

from lightning_grpo.objective import ObjectiveConfig, group_advantages, policy_loss

CASES = json.loads((Path(__file__).parent / "data" / "trl-1.16.json").read_text())
SAME = {"loss_type", "beta", "epsilon", "epsilon_high", "delta", "top_entropy_quantile", "entropy_coef"}
SAME |= {"off_policy_mask_threshold", "max_completion_length"}
METRICS = {
    "kl",
    "entropy",
    *(f"clip_ratio/{x}" for x in ("low_mean", "low_min", "high_mean", "high_max", "region_mean")),
}


def config_of(case: dict) -> ObjectiveConfig:
    figures, weight = case["config"], case["rollout_weight"]
    with warnings.catch_warnings():
        # TRL's cases set a clip range for surrogates that have none, for which ObjectiveConfig warns
        warnings.simplefilter("ignore")
        return ObjectiveConfig(
            importance_sampling_level=figures["level"],
            use_bias_correction_kl=figures["kl_importance_weighting"],
            rollout_correction=None if weight is None else GivenWeight(torch.tensor(weight)),
            **{name: figures[name] for name in SAME},
        )


def name_of(case: dict) -> str:
    names = ("loss_type", "level", "beta", "top_entropy_quantile", "off_policy_mask_threshold")
    return "-".join(str(case["config"][name]) for name in names)


@pytest.mark.parametrize("case", CASES["objective"], ids=name_of)
def test_objective(case):
    inputs = {
        name: torch.tensor(case[name])
        for name in ("old_logprobs", "ref_logprobs", "rollout_logprobs", "entropy")
        if case[name] is not None
    }
    logprobs = torch.tensor(case["logprobs"], requires_grad=True)
    loss, metrics = policy_loss(
        config_of(case),
        logprobs=logprobs,
        advantages=torch.tensor(case["advantages"]),
        mask=torch.tensor(case["mask"]),
        **inputs,
    )
    loss.backward()
    torch.testing.assert_close(loss.item(), case["loss"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logprobs.grad, torch.tensor(case["grad"]), rtol=1e-6, atol=1e-6)
    for name in METRICS & metrics.keys() & case["metrics"].keys():
        torch.testing.assert_close(metrics[name].compute().item(), case["metrics"][name], rtol=1e-5, atol=1e-6)


def test_objective_cases_cover_every_shared_name():
    assert len(CASES["objective"]) == 52
    assert {c["config"]["loss_type"] for c in CASES["objective"]} == {
        *("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
    }


@pytest.mark.parametrize(
    "case", CASES["advantages"], ids=lambda c: f"{c['scale_rewards']}-{c['aggregation']}-{c['num_generations']}"
)
def test_advantages(case):
    rewards = torch.tensor([[float("nan") if r is None else r for r in row] for row in case["rewards"]])
    advantages = group_advantages(
        rewards,
        case["num_generations"],
        scale_rewards=case["scale_rewards"],
        aggregation=case["aggregation"],
        weights=case["weights"],
    )
    torch.testing.assert_close(advantages, torch.tensor(case["advantages"]), rtol=1e-6, atol=1e-6)
