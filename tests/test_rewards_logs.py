"""TRL's arguments log_metric and log_extra of reward functions."""

import pytest
import torch
from fitting import checksum, data, fit, module

from lightning_grpo.errors import UserError
from lightning_grpo.record import Record, read_run
from lightning_grpo.rewards import FunctionReward, Reward, as_rewards, compute_rewards
from lightning_grpo.rewards.logs import RewardLogs


def evaluate(*rewards, logs=None):
    return compute_rewards(as_rewards(rewards), ["a", "b"], ["x", "yy"], [[1], [2, 2]], [{}, {}], logs=logs)


class Columns(Reward):
    """A reward that takes all columns for lists."""

    def __call__(self, completions, trainer_state, **columns):
        assert all(len(values) == len(completions) for values in columns.values())
        return [0.0] * len(completions)


class Logs(Reward):
    def __call__(self, completions, log_metric, log_extra, **columns):
        log_extra("length", torch.tensor([len(text) for text in completions]))
        log_metric("mine", torch.tensor(2.0))
        return [1.0] * len(completions)


def test_functions_and_classes_that_ask_for_them_get_them():
    def named(completions, log_extra):
        log_extra("upper", [text.upper() for text in completions])
        return [0.0, 0.0]

    def as_in_trl(completions, **kwargs):
        kwargs["log_extra"]("answer", [None, {1, 2}])
        kwargs["log_metric"]("mine", 4)
        return [0.0, 0.0]

    async def concurrent(completions, log_metric=None, log_extra=None):
        log_extra("big", [10**400, True])
        return [0.0, 0.0]

    logs = RewardLogs(2)
    assert evaluate(named, as_in_trl, concurrent, Columns(), Logs(), logs=logs)[:, 4].tolist() == [1, 1]
    assert logs.metrics == {"mine": [4.0, 2.0]}
    assert logs.extras[0] == {"upper": "X", "answer": None, "big": str(10**400), "length": 1}
    assert logs.extras[1] == {"upper": "YY", "answer": "{1, 2}", "big": True, "length": 2}
    FunctionReward(function=named).check([{}])


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (lambda log_metric, log_extra: log_extra("x", [1]), r"log_extra\('x'\) got 1 values for 2 completions"),
        (lambda log_metric, log_extra: log_metric("x", "1"), r"log_metric\('x'\) got '1' \(str\); pass a number"),
        (lambda log_metric, log_extra: log_metric("x", None), r"log_metric\('x'\) got None"),
    ],
    ids=["too few values", "a text", "nothing"],
)
def test_wrong_logs_are_errors(log, message):
    def reward(completions, log_metric, log_extra):
        log(log_metric, log_extra)
        return [0.0, 0.0]

    with pytest.raises(UserError, match=message):
        evaluate(reward)


def logging_reward(completion_ids, log_metric, log_extra):
    values = checksum(completion_ids)
    log_extra("total", [sum(ids) for ids in completion_ids])
    log_metric("mine", sum(values) / len(values))
    log_metric("loss", 1e9)
    return values


@pytest.mark.parametrize("early", [False, True], ids=["after sampling", "while sampling"])
def test_logs_reach_metrics_and_samples(tmp_path, tiny_model_path, early):
    policy = module(
        tiny_model_path, rewards=[FunctionReward(function=logging_reward, early=early)], resampling_rounds=1
    )
    logged = fit(
        tmp_path, policy, data(validation_size=4), steps=4, accumulate=2, callbacks=[Record(print_every=0)],
        limit_val_batches=1.0, val_check_interval=8, check_val_every_n_epoch=None,
    )  # fmt: skip
    run = read_run(tmp_path)
    table = run.samples()
    assert table["extra/total"].to_pylist() == [float(sum(ids)) for ids in table["completion_ids"].to_pylist()]
    assert [line["val/mine"] for line in run.held_out] == pytest.approx([line["val/reward"] for line in run.held_out])
    assert [line["step"] for line in run.held_out] == [0, 4]
    # logged once per rollout of two optimizer steps, over all of its samples, with those that were resampled
    means = table.group_by("rollout").aggregate([("reward", "mean")]).sort_by("rollout")["reward_mean"].to_pylist()
    assert [line["mine"] for line in run.metrics[::2]] == pytest.approx(means, abs=0.1)
    assert all(abs(loss) < 10 for loss in logged["loss"])


def test_logs_of_a_rollout_outlive_a_checkpoint(tmp_path, tiny_model_path):
    def train(folder, steps, **options):
        policy = module(tiny_model_path, rewards=[logging_reward])
        fit(folder, policy, steps=steps, accumulate=2, callbacks=[Record(print_every=0)], **options)
        return policy.trainer

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(whole, 4)
    train(parts, 3).save_checkpoint(tmp_path / "middle.ckpt")
    train(parts, 4, ckpt_path=str(tmp_path / "middle.ckpt"))
    columns = ["step", "completion", "extra/total", "seed"]
    assert read_run(parts).samples(columns) == read_run(whole).samples(columns)
