"""Held-out figures: pass@k, majority votes, intervals, sources, and rewards that are never trained on."""

import json
import math
from string import ascii_lowercase

import pytest
import torch
from fitting import checksum, data, done, fit, module
from lightning import Trainer

from lightning_grpo import PromptDataModule
from lightning_grpo.data import Prompt, PromptBatch
from lightning_grpo.metrics import Spread
from lightning_grpo.monitor.intervals import interval
from lightning_grpo.monitor.terminal import held_out_figures, with_interval
from lightning_grpo.rewards import ExactMatch, FunctionReward
from lightning_grpo.rollout import HFRollout, Rollout
from lightning_grpo.training.evaluation import Evaluation, majority


def prompt(index: int, source: str = "") -> Prompt:
    return Prompt(index=index, place="", ids=[1], messages="?", columns={"source": source or None})


def evaluate(rewards: list[list[float]], sources: list[str], real: list[bool] | None = None, **options) -> dict:
    """The figures of prompts with these rewards, each given alone to `Evaluation.observe`."""
    rows = [prompt(i, source) for i, source in enumerate(sources)]
    evaluation = Evaluation(num_generations=len(rewards[0]), pass_threshold=1.0)
    evaluation.reset(rows)
    for i, row in enumerate(rows):
        batch = PromptBatch([row], real=[real[i]] if real else None)
        rollout = Rollout.collate([row.ids], [[done(*[5] * (i + 1)) for _ in rewards[i]]], pad_id=0)
        values = torch.tensor(rewards[i], dtype=torch.float32)[:, None]
        evaluation.observe(batch, rollout, values, values[:, 0], ["right"], **options)
    return evaluation.compute()


def test_pass_at_k_and_its_interval():
    figures = evaluate([[1, 0, 0, 0, 0, 0.0], [1, 1, 1, 0, 0, 0], [0] * 6], ["", "", ""])
    assert figures["pass@1"] == pytest.approx(4 / 18)
    assert figures["pass@2"] == pytest.approx((1 - 10 / 15 + 1 - 3 / 15) / 3)
    assert figures["pass@4"] == pytest.approx((1 - 5 / 15 + 1) / 3)
    assert figures["pass@6"] == pytest.approx(2 / 3)
    for k in (1, 2, 4, 6):
        assert 0 <= figures[f"pass@{k}/low"] < figures[f"pass@{k}"] < figures[f"pass@{k}/high"] <= 1
    spread = math.sqrt(torch.tensor([1 / 6, 1 / 2, 0]).var() / 3)
    assert figures["reward/high"] - figures["reward"] == pytest.approx(1.959964 * spread)
    assert figures["completions/mean_length"] == 2 and figures["completions/max_length"] == 3
    assert not any("/reward" in name for name in figures)


def test_figures_of_each_source_without_prompts_that_fill_a_batch():
    rewards = [[1.0, 1], [0, 1], [0, 0], [1, 1]]
    figures = evaluate(rewards, ["easy", "hard", "hard", "easy"], real=[True, True, True, False])
    assert (figures["pass@1"], figures["easy/pass@1"], figures["hard/pass@1"]) == (0.5, 1.0, 0.25)
    assert (figures["hard/pass@2"], figures["hard/reward"], figures["hard/completions/mean_length"]) == (0.5, 0.25, 2.5)
    assert figures["hard/pass@1/low"] > 0 and figures["easy/pass@1/low"] < 0.9
    many = evaluate([[1.0]] * 21, [f"s{i}" for i in range(21)])
    assert many["pass@1"] == 1 and not any(name.startswith("s0/") for name in many)


def test_majority_votes():
    answers = ["7", "7", "8", None, "1", "2", "1", "2", None, None, None, None]
    right = [True, True, False, False, False, True, False, True, False, False, False, True]
    assert majority(answers, right, 4).tolist() == [1.0, 0.5, 0.0]


def test_equal_answers_have_one_form():
    finds = ExactMatch(extract="<answer>(.*?)</answer>").final_answers
    assert finds(["<answer>0.50</answer>", "<answer>1/2</answer>"]) == ["1/2", "1/2"]
    assert finds(["<answer>0.0</answer>", "<answer>0</answer>", "0"]) == ["0", "0", None]
    assert finds(["<answer>New  York.</answer>", "<answer>new york</answer>"]) == ["new york"] * 2
    assert FunctionReward(function=checksum).final_answers(["1"]) is None


def test_the_interval_covers_the_mean_about_as_often_as_it_states():
    """Prompts of different difficulty with 4 samples each: 40 of them, 2000 times."""
    random = torch.Generator().manual_seed(0)
    difficulty = torch.rand(2000, 40, 1, generator=random)
    samples = (torch.rand(2000, 40, 4, generator=random) < difficulty).double().mean(2)
    for draws in (4, None):
        limits = [interval(Spread.of(row), draws=draws) for row in samples]
        covered = sum(low <= 0.5 <= high for low, high in limits) / 2000
        assert 0.93 < covered < 0.975


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_interval_of_a_share_does_not_vanish(share):
    low, high = interval(Spread.of(torch.full((20,), share)), draws=4)
    # Wilson's interval of 0 of 20
    assert (low, 1 - high)[int(share)] == 0 and high - low == pytest.approx(0.1611, abs=1e-4)
    assert interval(Spread.of(torch.tensor([3.0])), draws=None) is None


def test_a_run_reports_intervals_majorities_and_rewards_of_evaluations_alone(tmp_path, tiny_model_path):
    trained = []

    def spy(completion_ids, **columns):
        trained.append(columns["trainer_state"].training)
        return [2.0] * len(completion_ids)

    first = ExactMatch(extract="(.)")
    rows = [
        {"prompt": letter, "answer": letter, "source": "early" if letter < "k" else "late"}
        for letter in ascii_lowercase
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    prompts = PromptDataModule(str(tmp_path / "rows.json"), prompts_per_rollout=8, seed=1, validation_size=8)
    policy = module(tiny_model_path, rewards=[first], eval_rewards=[spy], validation_generations=4)
    record = fit(tmp_path, policy, prompts, steps=1, limit_val_batches=1.0, num_sanity_val_steps=-1)
    held_out = policy.held_out
    assert not any(trained)
    assert held_out["val/rewards/spy/mean"] == 2 and held_out["val/reward"] == held_out["val/rewards/exact_match/mean"]
    assert "rewards/spy/mean" not in record.steps[0] and 0 <= held_out["val/majority@4"] <= 1
    assert {"val/early/pass@1", "val/late/majority@4/high"} <= held_out.keys()
    shown = held_out_figures(held_out)
    assert list(map(str, shown)) == [
        *("val/reward", "val/pass@1", "val/pass@4", "val/majority@4", "val/completions/mean_length"),
        *("val/early/pass@1", "val/late/pass@1"),
    ]
    assert " ± " in with_interval(held_out, "val/pass@1")


def test_two_rewards_of_one_name_are_refused(tiny_model_path):
    with pytest.raises(ValueError, match="two rewards are named 'checksum'"):
        module(tiny_model_path, rewards=[checksum], eval_rewards=[checksum])


def test_rewards_of_evaluations_check_held_out_rows_alone(tmp_path, tiny_model_path):
    policy = module(tiny_model_path, eval_rewards=[ExactMatch(answer="solution", extract="whole")])
    assert fit(tmp_path, policy, data(), steps=1)["reward"]
    with pytest.raises(ValueError, match=r"ExactMatch\.answer is 'solution'"):
        fit(tmp_path, policy, data(validation_size=4), steps=1)


def test_a_checkpoint_is_evaluated_with_the_reward_weights_of_its_step(tmp_path, tiny_model_path):
    def policy():
        rewards = [FunctionReward(function=lambda completions: [1.0] * len(completions), weight={0: 1.0, 4: 3.0})]
        return module(tiny_model_path, rewards=rewards)

    trained = policy()
    fit(tmp_path, trained, data(validation_size=2), steps=2)
    trained.trainer.save_checkpoint(path := tmp_path / "step.ckpt")
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = Trainer(default_root_dir=tmp_path, callbacks=[HFRollout()], **settings)
    new, loaded = (
        trainer.validate(policy(), data(validation_size=2), ckpt_path=ckpt, weights_only=False, verbose=False)[0]
        for ckpt in (None, path)
    )
    assert (new["val/reward"], loaded["val/reward"]) == (1.0, 2.0)
