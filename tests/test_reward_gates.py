"""Rewards that require other rewards, and weights that change over the optimizer steps."""

import math

import pytest
import torch
from fitting import checksum, data, fit, largest_difference, module, parameters

from lightning_grpo.errors import UserError
from lightning_grpo.record import Record, read_run
from lightning_grpo.rewards import ExactMatch, FunctionReward, RegexFormat
from lightning_grpo.rewards.check import check_rows
from lightning_grpo.rewards.gates import check_gates, gated

NAN = math.nan


def is_even(completion_ids):
    return [float(sum(ids) % 2 == 0) for ids in completion_ids]


def rewards(**options):
    return [FunctionReward(function=is_even), FunctionReward(function=checksum, **options)]


# ── Gates ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_reward_counts_if_the_required_ones_are_high_enough():
    three = [
        FunctionReward(function=is_even, requires={"checksum": 0.5, "exact_match": 0}),
        FunctionReward(function=checksum, requires={"is_even": 1.0}),
        ExactMatch(),
    ]
    values = torch.tensor([[1, 1, 1], [1, 0.4, 1], [1, 0.5, -1], [0.9, 1, 0], [NAN, 1, 1], [1, NAN, 1], [1, 1, NAN]])
    expected = [[1, 1, 1], [0, 0.4, 1], [0, 0.5, -1], [0.9, 0, 0], [NAN, NAN, 1], [NAN, NAN, 1], [NAN, 1, NAN]]
    assert torch.equal(gated(three, values).nan_to_num(nan=-9), torch.tensor(expected).nan_to_num(nan=-9))
    assert gated(rewards(), values) is values


@pytest.mark.parametrize(
    ("trained", "held_out", "message"),
    [
        (rewards(requires={"exact_match": 1}), [], r"'checksum' requires 'exact_match'; .* another reward: is_even"),
        (rewards(requires={"checksum": 1}), [], "'checksum' requires 'checksum'"),
        ([ExactMatch(requires={"x": 1})], [], "of which there is none"),
        (rewards(), [ExactMatch(requires={"is_even": 1})], "of eval_rewards requires others"),
    ],
    ids=["unknown", "itself", "alone", "held out"],
)
def test_wrong_requirements_are_refused(trained, held_out, message):
    with pytest.raises(UserError, match=message):
        check_gates(trained, held_out)
    with pytest.raises(UserError, match=message):
        module("nowhere", rewards=trained, eval_rewards=held_out)


def test_rewards_of_a_source_include_the_required_ones():
    class Row:
        columns, place, rewards = {"answer": "1"}, "train.jsonl, line 3", ("exact_match",)

    with pytest.raises(UserError, match="line 3: the reward 'exact_match' requires 'regex_format', which the"):
        check_rows([RegexFormat(), ExactMatch(requires={"regex_format": 1.0})], [Row()])
    with pytest.raises(UserError, match=r"exact_match\.requires.regex_format is '1'"):
        ExactMatch(requires={"regex_format": "1"})


def test_a_run_trains_on_what_counts_and_logs_both(tmp_path, tiny_model_path):
    seen = []

    class Watched(module.__globals__["GRPOModule"]):
        def compute_advantages(self, rewards, rollout):
            seen.append(rewards)
            return super().compute_advantages(rewards, rollout)

    policy = module(tiny_model_path, kind=Watched, rewards=rewards(requires={"is_even": 1.0}, weight=2.0))
    logged = fit(
        tmp_path, policy, data(validation_size=4), steps=2, callbacks=[Record(print_every=0)],
        limit_val_batches=1.0, val_check_interval=4, check_val_every_n_epoch=None,
    )  # fmt: skip
    run = read_run(tmp_path)
    rows = run.samples().to_pylist()
    assert len(rows) == 64
    for row in rows:
        ids = row["completion_ids"]
        assert [row["rewards/is_even"], row["rewards/checksum"]] == pytest.approx([*is_even([ids]), *checksum([ids])])
        assert row["reward"] == pytest.approx(row["rewards/is_even"] * (1 + 2 * row["rewards/checksum"]))
    for i in range(2):
        half = rows[i * 32 : (i + 1) * 32]
        assert logged["rewards/checksum/mean"][i] == pytest.approx(sum(r["rewards/checksum"] for r in half) / 32)
        counted = [2 * r["rewards/checksum"] * r["rewards/is_even"] for r in half]
        assert logged["rewards/checksum/contribution"][i] == pytest.approx(sum(counted) / 32)
        assert logged["reward"][i] == pytest.approx(sum(r["reward"] for r in half) / 32)
        assert (2 * seen[i][:, 1]).tolist() == pytest.approx(counted)
    (held_out, *_) = run.held_out
    assert held_out["val/reward"] <= held_out["val/rewards/is_even/mean"] * 3
    assert held_out["val/reward"] != pytest.approx(
        held_out["val/rewards/is_even/mean"] + 2 * held_out["val/rewards/checksum/mean"]
    )


# ── Weights over steps ────────────────────────────────────────────────────────────────────────────────────────────────


def test_weights_are_linear_between_steps():
    reward = ExactMatch(weight={10: 1.0, 30: 0.2, 40: 1})
    expected = {0: 1, 10: 1, 20: 0.6, 30: 0.2, 35: 0.6, 40: 1, 10**6: 1}
    assert {step: pytest.approx(reward.weight_at(step)) for step in expected} == expected
    assert ExactMatch(weight={5: 2}).weight_at(0) == ExactMatch(weight=2).weight_at(9) == 2.0


@pytest.mark.parametrize("weight", [{}, {0: NAN}, {-1: 1.0}, {0.5: 1.0}, {0: "1"}, math.inf], ids=str)
def test_wrong_weights_are_refused(weight):
    with pytest.raises(UserError, match="the weight of the reward 'exact_match' is"):
        ExactMatch(weight=weight)


def test_a_rollout_has_the_weights_of_its_first_step_also_after_a_resume(tmp_path, tiny_model_path):
    def train(folder, steps, **options):
        policy = module(tiny_model_path, rewards=rewards(weight={0: 1.0, 4: 5.0}, requires={"is_even": 1.0}))
        logged = fit(folder, policy, steps=steps, accumulate=2, callbacks=[Record(print_every=0)], **options)
        return policy, logged

    whole, logged = train(tmp_path / "whole", 6)
    assert [
        total / raw
        for total, raw in zip(
            logged["rewards/checksum/contribution"],
            [mean_of_counted(tmp_path / "whole", step) for step in range(1, 7)],
            strict=True,
        )
    ] == pytest.approx([1, 1, 3, 3, 5, 5])
    # in the middle of the second rollout
    first, _ = train(tmp_path / "parts", 3)
    first.trainer.save_checkpoint(tmp_path / "middle.ckpt")
    resumed, rest = train(tmp_path / "parts", 6, ckpt_path=str(tmp_path / "middle.ckpt"))
    assert largest_difference(parameters(whole), parameters(resumed)) == 0
    for name in ("reward", "rewards/checksum/contribution", "rewards/checksum/variance_share"):
        assert rest[name] == logged[name][3:]


def mean_of_counted(folder, step):
    rows = [row for row in read_run(folder).samples().to_pylist() if row["step"] == step]
    return sum(row["rewards/checksum"] * row["rewards/is_even"] for row in rows) / len(rows)


def test_a_checkpoint_of_an_earlier_version_continues(tmp_path, tiny_model_path):
    policy = module(tiny_model_path, rewards=rewards(weight=2.0))
    fit(tmp_path, policy, steps=1, accumulate=2)
    policy.trainer.save_checkpoint(tmp_path / "new.ckpt")
    checkpoint = torch.load(tmp_path / "new.ckpt", weights_only=True)
    for rank in checkpoint["grpo"]["ranks"]:
        del rank["experience"]["contributions"]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    logged = [
        fit(tmp_path, module(tiny_model_path, rewards=rewards(weight=2.0)), steps=2, accumulate=2, ckpt_path=str(path))
        for path in (tmp_path / "new.ckpt", tmp_path / "old.ckpt")
    ]
    assert logged[0]["reward"] == logged[1]["reward"] != []
