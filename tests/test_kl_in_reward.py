"""The KL to the reference as part of the reward: its sign and size, whose log-probs it takes, what is kept of them."""

import pytest
import torch
from engines import CopyRollout
from fitting import checksum, fit, module

from lightning_grpo import GRPOModule
from lightning_grpo.objective import ObjectiveConfig, RolloutCorrection
from lightning_grpo.policy.load import LoRA, load_policy
from lightning_grpo.training.scorer import RowsToScore

IN_REWARD = {"beta": 0.5, "kl_placement": "reward"}


class Spy(GRPOModule):
    """A reference that is not the policy, and what of it enters the advantages."""

    def configure_model(self):
        if self.policy is None:
            super().configure_model()
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(7)
                for parameter in self.scorer.reference.parameters():
                    parameter.add_(0.02 * torch.randn_like(parameter))

    def compute_advantages(self, rewards, rollout):
        self.seen_rewards, self.seen_rollout = rewards, rollout
        return super().compute_advantages(rewards, rollout)


def by_hand(model, ids, mask, prompt_ids, prompt_mask):
    """[N, T] log-probs, one row at a time, without padding."""
    found = torch.zeros(ids.shape)
    for n in range(len(ids)):
        prompt, completion = prompt_ids[n][prompt_mask[n]], ids[n][mask[n]]
        with torch.no_grad():
            logits = model(input_ids=torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
        found[n, : len(completion)] = logits.log_softmax(-1).gather(-1, completion[:, None])[:, 0]
    return found


def test_the_reward_loses_beta_times_the_kl(tmp_path, tiny_model_path):
    policy = module(tiny_model_path, Spy, rewards=[checksum], objective=ObjectiveConfig(**IN_REWARD))
    record = fit(tmp_path, policy, steps=1)
    rollout = policy.seen_rollout
    texts = rollout.completion_ids, rollout.completion_mask, rollout.prompt_ids, rollout.prompt_mask
    before = by_hand(load_policy(tiny_model_path), *texts)
    reference = by_hand(policy.scorer.reference, *texts)
    expected = -0.5 * (before - reference).sum(1)  # k1: log π − log π_ref of the sampled tokens
    assert expected.abs().max() > 0.1
    assert policy.seen_rewards.shape == (32, 2)
    assert torch.allclose(policy.seen_rewards[:, 1], expected, atol=1e-4)
    # logged is what the rewards gave alone, and the KL by k1
    assert record["reward"][0] == pytest.approx(float(policy.seen_rewards[:, 0].mean()), abs=1e-6)
    tokens = int(rollout.completion_mask.sum())
    assert record["kl"][0] == pytest.approx(float((before - reference).sum() / tokens), abs=1e-5)


def test_the_first_ratio_is_exactly_one(tmp_path, tiny_model_path):
    objective = ObjectiveConfig(loss_type="gspo", **IN_REWARD)
    policy = module(tiny_model_path, Spy, rewards=[checksum], objective=objective)
    # two updates per rollout, so that old log-probs are needed, and the cut by length matters
    record = fit(tmp_path, policy, steps=3, accumulate=2, precision="bf16-mixed")
    assert (record["ratio/min"][0], record["ratio/max"][0]) == (1, 1)
    assert (record["ratio/min"][2], record["ratio/max"][2]) == (1, 1)
    assert record["ratio/min"][1] < 1 < record["ratio/max"][1]


@pytest.mark.parametrize("lora", [None, LoRA(rank=4)])
def test_log_probs_that_only_the_kl_needs_are_not_kept(tmp_path, tiny_model_path, lora):
    ahead = []

    class Look(GRPOModule):
        def known_coefficient(self, experience, sizes):
            ahead.append((experience.old_logprobs, super().known_coefficient(experience, sizes)))
            return ahead[-1][1]

    policy = module(tiny_model_path, Look, rewards=[checksum], objective=ObjectiveConfig(**IN_REWARD), lora=lora)
    fit(tmp_path, policy, steps=1)
    assert len(ahead) == 4
    assert all(old is None and coefficient is not None for old, coefficient in ahead)


def test_one_rollout_ahead_the_samplers_log_probs_count(tmp_path, tiny_model_path):
    seen = []

    class Keep(Spy):
        def compute_advantages(self, rewards, rollout):
            reference = self.scorer.score_reference(
                self.policy, RowsToScore(rollout, self.cut(rollout, skip_zero_advantage=False), 0, self.trainer)
            )
            seen.append((rewards[:, 1], 0.5 * (reference - rollout.rollout_logprobs).sum(1)))
            return super().compute_advantages(rewards, rollout)

    objective = ObjectiveConfig(**IN_REWARD, rollout_correction=RolloutCorrection())
    policy = module(tiny_model_path, Keep, rewards=[checksum], rollout_ahead=1, objective=objective)
    record = fit(tmp_path, policy, steps=3, rollout=CopyRollout())
    assert record["staleness"] == [0, 1, 1]
    for penalty, expected in seen:
        assert torch.allclose(penalty, expected, atol=1e-5)
