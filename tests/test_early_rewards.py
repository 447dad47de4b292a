"""Rewards that score groups while others are still being sampled."""

import threading

import pytest
from fitting import checksum, fit, largest_difference, module, parameters

from lightning_grpo.rewards import EarlyRewards, FunctionReward, PrefixMatch
from lightning_grpo.rollout import HFRollout
from lightning_grpo.rollout.hf.engine import HFEngine


def test_they_are_the_same_rewards(tmp_path, tiny_model_path):
    runs = []
    for early in (False, True):
        rewards = [PrefixMatch(), FunctionReward(function=checksum, early=early, weight=0.5)]
        policy = module(tiny_model_path, rewards=rewards, resampling_rounds=1)
        runs.append((fit(tmp_path, policy), parameters(policy)))
    (late, ended), (early, ended_early) = runs
    for name in ("loss", "reward", "rewards/checksum/mean", "rewards/prefix_match/mean", "frac_reward_zero_std"):
        assert late[name] == early[name]
    assert largest_difference(ended, ended_early) == 0


def test_a_group_is_judged_while_others_are_sampled(tmp_path, tiny_model_path, monkeypatch):
    """The second half of the rollout is not sampled before the first half's first group is scored."""
    scored, calls, halves = threading.Event(), [], []
    sample = HFEngine.sample

    def in_two_halves(self, rows, *args, **settings):
        if len(rows) == 16:
            halves.append(rows)
            assert len(halves) == 1 or scored.wait(30), "no reward came before the second half was sampled"
        return sample(self, rows, *args, **settings)

    monkeypatch.setattr(HFEngine, "sample", in_two_halves)

    def slow(completion_ids, trainer_state):
        calls.append((threading.current_thread() is threading.main_thread(), len(completion_ids)))
        scored.set()
        return [0.0] * len(completion_ids)

    policy = module(tiny_model_path, rewards=[FunctionReward(function=slow, early=True)])

    fit(tmp_path, policy, steps=1, rollout=HFRollout(max_num_seqs=16))
    assert len(halves) == 2
    assert calls == [(False, 4)] * 8


def test_groups_are_scored_at_once_if_workers_score():
    barrier = threading.Barrier(2)

    def score(index, group):
        barrier.wait(30)
        return index + group

    with EarlyRewards(score, threads=2) as scores:
        for index in range(2):
            scores.submit(index, 10)
        assert scores.gather() == [10, 11]


def test_an_error_ends_the_sampling_and_names_the_reward(tmp_path, tiny_model_path, monkeypatch):
    sample, batches = HFEngine.sample, []

    def counting(self, rows, *args, **settings):
        batches.append(len(rows))
        return sample(self, rows, *args, **settings)

    def broken(completion_ids):
        raise ConnectionError("the reward server does not answer")

    monkeypatch.setattr(HFEngine, "sample", counting)
    policy = module(tiny_model_path, rewards=[FunctionReward(function=broken, early=True)])
    with pytest.raises(ConnectionError, match="the reward server does not answer") as error:
        fit(tmp_path, policy, rollout=HFRollout(max_num_seqs=1))
    assert error.value.__notes__ == ["raised by the reward 'broken'"]
    assert sum(batches) < 1 + 8 * 4, "the rest must not be sampled"


def test_rewards_are_prepared_before_the_first_completion(tmp_path, tiny_model_path):
    events = []

    class Prepared(FunctionReward):
        def prepare(self):
            events.append("prepare")

    def score(completions):
        events.append("score")
        return [0.0] * len(completions)

    fit(tmp_path, module(tiny_model_path, rewards=[Prepared(function=score)]), steps=1)
    assert events[:2] == ["prepare", "score"]
