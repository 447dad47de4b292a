"""Training with a baseline for each token: the norms of the policy that it is weighted by, and what is kept of them."""

import pytest
import torch
from engines import CopyRollout
from fitting import AHEAD, checksum, fit, module

from lightning_grpo import GRPOModule
from lightning_grpo.configure.callback import workload_of
from lightning_grpo.configure.hardware import this_machine
from lightning_grpo.objective import AdvantageConfig, ObjectiveConfig
from lightning_grpo.policy.load import load_policy


class Spy(GRPOModule):
    """Keeps the first rollout, its norms and its advantages."""

    seen = None

    def compute_advantages(self, rewards, rollout):
        advantages = super().compute_advantages(rewards, rollout)
        self.seen = self.seen or (rollout, rollout.grad_norms, advantages)
        return advantages


def norms_by_hand(model, rollout):
    """[N, T]: ‖onehot − p‖² of each token, one row at a time, without padding."""
    found = torch.full(rollout.completion_ids.shape, torch.nan)
    for n, mask in enumerate(rollout.completion_mask):
        prompt, completion = rollout.prompt_ids[n][rollout.prompt_mask[n]], rollout.completion_ids[n][mask]
        with torch.no_grad():
            logits = model(input_ids=torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
        p = logits.softmax(-1)
        found[n, : len(completion)] = (torch.nn.functional.one_hot(completion, p.shape[1]) - p).square().sum(1)
    return found


@pytest.mark.parametrize("options", [{}, AHEAD], ids=["synchronous", "rollout_ahead"])
def test_tokens_are_scored_before_the_advantages(tmp_path, tiny_model_path, options):
    advantage = AdvantageConfig(estimator="optimal_token_baseline")
    policy = module(tiny_model_path, Spy, advantage=advantage, **{"rewards": [checksum]} | options)
    record = fit(tmp_path, policy, steps=3, accumulate=2, rollout=CopyRollout())
    rollout, norms, advantages = policy.seen
    expected = norms_by_hand(load_policy(tiny_model_path), rollout)
    assert torch.allclose(norms, expected, atol=1e-5, equal_nan=True)
    assert torch.equal(norms.isnan(), ~rollout.completion_mask)
    assert advantages.shape == norms.shape and not advantages[norms.isnan()].any()
    spread = [row[mask].std() for row, mask in zip(advantages, rollout.completion_mask, strict=True) if mask.sum() > 1]
    assert max(spread) > 1e-3, "tokens of a completion differ"
    assert rollout.grad_norms is None
    # two updates per rollout, so that old log-probs are needed
    assert (record["ratio/min"][0], record["ratio/max"][0]) == (1, 1)
    # the cost model counts both: a pass for the baseline and one for the old log-probs
    assert workload_of(policy.trainer, policy, this_machine()).scoring_passes == 2


def test_log_probs_that_only_the_baseline_needs_are_not_kept(tmp_path, tiny_model_path):
    known = []

    class Look(GRPOModule):
        def known_coefficient(self, experience, sizes):
            known.append((experience.old_logprobs, super().known_coefficient(experience, sizes)))
            return known[-1][1]

    advantage = AdvantageConfig(estimator="optimal_token_baseline")
    fit(tmp_path, module(tiny_model_path, Look, rewards=[checksum], advantage=advantage), steps=1)
    assert known and all(old is None and coefficient.dim() == 2 for old, coefficient in known)


def test_the_kl_in_the_reward_takes_the_same_scores(tmp_path, tiny_model_path):
    objective = ObjectiveConfig(beta=0.5, kl_placement="reward")
    advantage = AdvantageConfig(estimator="optimal_token_baseline")
    policy = module(tiny_model_path, Spy, rewards=[checksum], objective=objective, advantage=advantage)
    record = fit(tmp_path, policy, steps=2)
    assert record["kl"][0] == 0 and policy.seen[2].dim() == 2
