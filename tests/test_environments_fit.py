"""Training in environments: exact tokens, losses, resumed and killed runs, evaluations, records."""

import multiprocessing
import os
import re
import signal
from dataclasses import dataclass, field
from itertools import groupby

import pytest
import torch
from engines import CopyRollout
from fitting import AHEAD, checksum, data, fit, largest_difference, module, parameters

from lightning_grpo.configure import Prediction
from lightning_grpo.environments import Environment, Step
from lightning_grpo.errors import UserError
from lightning_grpo.monitor.checkpoint import Checkpoint
from lightning_grpo.objective import AdvantageConfig, ObjectiveConfig
from lightning_grpo.record import Record, read_run
from lightning_grpo.rewards import EnvironmentReward, FunctionReward
from lightning_grpo.rollout import HFRollout, Sampling


@dataclass(kw_only=True, eq=False)
class Letters(Environment):
    """Answers each turn by a number, until the policy writes an e."""

    max_turns: int = 3
    max_turn_tokens: int | None = 5
    turns: int = field(default=0, init=False)

    def step(self, completion):
        self.turns += 1
        return Step(
            observation=str(self.turns),
            reward=sum(map(ord, completion)) % 7 / 6,
            done="e" in completion,
            metrics={"letters/written": len(completion)},
            extras={"text": completion},
        )


class Lengthened(Letters):
    """Appends a message to the prompt."""

    def reset(self, row):
        return [{"role": "user", "content": row["answer"]}]


class Killed(Letters):
    """Ends the process in the second turn of the second rollout."""

    steps = 0

    def step(self, completion):
        Killed.steps += self.turns == 1
        if Killed.steps == 40:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(completion)


def acting(model, environment=None, **changes):
    settings = {"rewards": [], "environment": environment or Letters(), "max_completion_length": 24}
    return module(model, **settings | {"max_prompt_length": 12} | changes)


def chat(**changes):
    return data(chat=True, **changes)


def train(root, model, environment=None, *, steps=2, prompts=None, rollout=None, resume=None, callbacks=(), **changes):
    policy = acting(model, environment, **changes)
    record = fit(
        root, policy, prompts or chat(), steps=steps, accumulate=2, ckpt_path=resume, rollout=rollout,
        callbacks=list(callbacks), enable_checkpointing=bool(callbacks),
    )  # fmt: skip
    return record, policy


def assert_same_runs(one, other, names=("loss", "reward", "grad_norm", "environment/turns")):
    for name in names:
        assert one[0][name] == other[0][name], name
    assert largest_difference(parameters(one[1]), parameters(other[1])) == 0


def letters(text):
    """The text without special tokens."""
    return re.sub(r"<\w+>", "", text)


def assert_trained_on_what_was_sampled(experience, tokenizer):
    """The tokens of each completion are its conversation, and the loss mask is True on those of the policy."""
    lengths = set()
    for n, conversation in enumerate(experience.conversations):
        own = [message["content"] for message in conversation if message["role"] == "assistant"]
        length = int(experience.completion_mask[n].nonzero().max()) + 1
        text = tokenizer.decode(experience.completion_ids[n, :length])
        assert letters(text) == letters(tokenizer.apply_chat_template(conversation, tokenize=False))
        assert letters(tokenizer.decode(experience.written_ids()[n])) == letters("".join(own))
        assert experience.turn_rewards[n].sum() == pytest.approx(float(experience.rewards[n, 0]), abs=1e-6)
        lengths.add(len(own))
    assert lengths == {1, 2, 3}


@pytest.mark.parametrize("kind", [Letters, Lengthened])
def test_what_was_sampled_is_what_is_trained_on(tmp_path, tiny_model_path, tokenizer, kind):
    record, policy = train(tmp_path, tiny_model_path, kind(), steps=1)
    experience = policy.progress.experience
    assert record["sampling/sampling_logp_difference/max"][0] < 1e-5, "engine and trainer see the same tokens"
    assert_trained_on_what_was_sampled(experience, tokenizer)
    prompt = tokenizer.decode(experience.prompt_ids[0][experience.prompt_mask[0]])
    assert prompt.count("<user>") == (2 if kind is Lengthened else 1)
    assert len(experience.prompts[0]) == prompt.count("<user>")


def test_metrics_describe_the_episodes(tmp_path, tiny_model_path):
    record, policy = train(tmp_path, tiny_model_path, steps=1)
    step, experience = record.steps[0], policy.progress.experience
    turns = [len(rewards) for rewards in experience.rewards_of_turns()]
    assert step["environment/turns"] == pytest.approx(sum(turns) / len(turns))
    assert step["environment/reward"] == pytest.approx(float(experience.rewards.mean()))
    ends = [step[f"environment/{reason}"] for reason in ("done", "turn_limit", "token_limit")]
    assert sum(ends) == pytest.approx(1)
    assert 0 < ends[0] < 1
    assert step["rollout_tokens"] == experience.completion_mask.sum()
    written = [extras["text"] for extras in experience.extras]
    assert written == [conversation[-1]["content"] for conversation in experience.conversations]


def test_the_cut_into_micro_batches_and_shared_prompts_change_nothing(tmp_path, tiny_model_path):
    objective = ObjectiveConfig(beta=0.05)
    whole = train(tmp_path, tiny_model_path, steps=1, objective=objective)
    for changes in ({"share_prompt": False}, {"gradient_checkpointing": True}):
        record, policy = train(tmp_path, tiny_model_path, steps=1, objective=objective, **changes)
        assert record["loss"] == pytest.approx(whole[0]["loss"], abs=1e-6)
        assert record["grad_norm"] == pytest.approx(whole[0]["grad_norm"], rel=1e-4)
        assert largest_difference(parameters(policy), parameters(whole[1])) < 1e-4


def test_turns_are_credited_with_their_return_to_go(tmp_path, tiny_model_path):
    advantage = AdvantageConfig(turn_credit="return_to_go")
    record, policy = train(tmp_path, tiny_model_path, steps=1, advantage=advantage)
    experience = policy.progress.experience
    assert experience.advantages.shape == experience.completion_mask.shape
    assert not experience.advantages[~experience.completion_mask].any()
    several = [row[mask].unique() for row, mask in zip(experience.advantages, experience.completion_mask, strict=True)]
    assert max(map(len, several)) == 3
    assert all(norm > 0 for norm in record["grad_norm"])


def test_the_start_up_summary_names_the_environment(tmp_path, tiny_model_path, caplog):
    with caplog.at_level("INFO", logger="lightning_grpo"):
        train(
            tmp_path, tiny_model_path, steps=1, callbacks=[Prediction(calibration=str(tmp_path / "calibration.json"))]
        )
    assert "turns   up to 3 per completion of at most 5 tokens, in Letters" in caplog.text


# ── Rewards ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def turns_taken(environments):
    return [environment.turns for environment in environments]


def texts(completions, prompts, turn_rewards):
    for conversation, prompt in zip(completions, prompts, strict=True):
        assert conversation[0]["role"] == conversation[-1]["role"] == "assistant"
        assert {message["role"] for message in prompt} == {"user"}
    return [len(rewards) for rewards in turn_rewards]


@pytest.mark.parametrize("early", [False, True])
def test_rewards_get_conversations_turn_rewards_and_environments(tmp_path, tiny_model_path, early):
    rewards = [turns_taken, FunctionReward(function=texts, early=early), EnvironmentReward(weight=0.5, early=early)]
    _, policy = train(tmp_path, tiny_model_path, rewards=rewards, steps=1)
    values = policy.progress.experience.rewards
    assert torch.equal(values[:, 0], values[:, 1])
    assert set(values[:, 0].tolist()) == {1, 2, 3}
    assert values[:, 2].tolist() == pytest.approx(policy.progress.experience.turn_rewards.sum(1).tolist())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"environment": None, "rewards": [turns_taken]}, "the reward 'turns_taken' uses environments"),
        (
            {"environment": None, "rewards": [EnvironmentReward()]},
            "'environment_reward' uses turn_rewards.* set model.env",
        ),
        ({"environment": None}, "rewards is empty"),
        (
            {"advantage": AdvantageConfig(turn_credit="return_to_go"), "rewards": [checksum]},
            "no reward is that of the env",
        ),
        ({"eval_rewards": [turns_taken]}, "'turns_taken' of eval_rewards uses environments.*weight: 0"),
        ({"sampling": Sampling(cutoff=0.9)}, r"sampling.cutoff is 0.9, but with model.environment"),
        ({"validation_sampling": Sampling(cutoff=0.5)}, r"validation_sampling.cutoff is 0.5"),
    ],
    ids=["environments", "turn rewards", "no reward", "turn credit", "evaluation", "cutoff", "cutoff of validation"],
)
def test_options_that_do_not_fit_are_refused(tiny_model_path, changes, message):
    with pytest.raises(UserError, match=message):
        module(tiny_model_path, **{"rewards": [], "environment": Letters()} | changes)


def test_plain_prompts_are_refused_at_start(tmp_path, tiny_model_path):
    with pytest.raises(UserError, match=r"the prompt is plain text.* set data.chat to true"):
        train(tmp_path, tiny_model_path, prompts=data())


# ── Other ways to sample ──────────────────────────────────────────────────────────────────────────────────────────────


def test_groups_are_resampled(tmp_path, tiny_model_path):
    def rarely(turn_rewards):
        return [float(sum(rewards) > 1.5) for rewards in turn_rewards]

    _, policy = train(tmp_path, tiny_model_path, rewards=[rarely], resampling_rounds=2, steps=1)
    experience = policy.progress.experience
    totals = [sum(rewards) > 1.5 for rewards in experience.rewards_of_turns()]
    assert totals == experience.rewards[:, 0].bool().tolist()
    assert len(experience.conversations) == len(experience.prompts) == len(experience.extras) == 32


def test_held_out_prompts_act_in_the_environment(tmp_path, tiny_model_path):
    policy = acting(tiny_model_path, validation_generations=2)
    prompts = chat(validation_size=3, validation_batch_size=2)
    record = fit(tmp_path, policy, prompts, steps=1, limit_val_batches=1.0, num_sanity_val_steps=-1)
    assert 1 < policy.held_out["val/environment/turns"] <= 3
    assert policy.held_out["val/reward"] == pytest.approx(policy.held_out["val/environment/reward"])
    assert record.steps
    [records] = policy.trainer.predict(policy, datamodule=prompts)[:1]
    assert {message["role"] for message in records[0]["conversation"]} <= {"assistant", "user"}
    assert records[0]["completion"] == records[0]["conversation"][-1]["content"]


def assert_parts(row, tokenizer):
    """The parts of the text are those of the tokens."""
    runs = groupby(zip(row["sampled"], row["completion_ids"], strict=True), key=lambda token: token[0])
    parts = [tokenizer.decode([token for _, token in part]) for _, part in runs]
    assert [len(part) for part in parts] == row["part_lengths"]
    assert "".join(parts) == row["completion"]


def test_samples_are_recorded_with_all_tokens(tmp_path, tiny_model_path, tokenizer):
    train(tmp_path, tiny_model_path, callbacks=[Record(print_every=0, logprobs=True)], steps=2)
    rows = read_run(tmp_path).samples().to_pylist()
    assert len(rows) == 32
    for row in rows:
        assert row["completion"] == tokenizer.decode(row["completion_ids"])
        assert_parts(row, tokenizer)
        assert len(row["sampled"]) == len(row["completion_ids"]) == len(row["engine_logprobs"])
        assert [value is None for value in row["engine_logprobs"]] == [not sampled for sampled in row["sampled"]]
        assert row["sampled"][-1]
        assert row["extra/text"] in row["completion"]
        assert row["finish_reason"] == ("length" if row["truncated"] else "stop")
    assert not all(all(row["sampled"]) for row in rows)


# ── Resumed runs ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "ahead"])
def test_resume_at_every_step_is_exact(tmp_path, tiny_model_path, ahead):
    changes = AHEAD | {"rewards": []} if ahead else {}

    def run(root, resume=None):
        checkpoint = Checkpoint(str(root / "checkpoints"), every_n_train_steps=1, save_top_k=-1)
        rollout = CopyRollout() if ahead else HFRollout()
        return train(root, tiny_model_path, steps=4, resume=resume, callbacks=[checkpoint], rollout=rollout, **changes)

    whole, policy = run(tmp_path / "whole")
    assert len(set(whole["loss"])) == 4
    for step in (1, 2):
        saved = tmp_path / "whole" / "checkpoints" / f"step-{step:06d}.ckpt"
        resumed, other = run(tmp_path / f"from-{step}", str(saved))
        for name in ("loss", "reward", "grad_norm", "num_tokens"):
            assert resumed[name] == whole[name][step:], (step, name)
        assert largest_difference(parameters(other), parameters(policy)) == 0


def train_until_killed(root, model, environment=None):
    checkpoint = Checkpoint(str(root), every_n_train_steps=1, save_top_k=1)
    resume = "last" if any(root.glob("*.ckpt")) else None
    return train(root, model, environment, steps=4, resume=resume, callbacks=[checkpoint])


@pytest.mark.slow
def test_a_run_killed_between_turns_samples_the_same_episodes_again(tmp_path, tiny_model_path):
    whole, ended = train_until_killed(tmp_path / "whole", tiny_model_path)
    root = tmp_path / "killed"
    child = multiprocessing.get_context("forkserver").Process(
        target=train_until_killed, args=(root, tiny_model_path, Killed())
    )
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    record, policy = train_until_killed(root, tiny_model_path)
    assert len(record.steps) == 2, "the first rollout was trained on, and the second one was being sampled"
    for name in ("loss", "reward", "grad_norm", "environment/turns"):
        assert record[name][:1] == whole[name][2:3], name
    assert record["loss"] == whole["loss"][2:]
    assert largest_difference(parameters(policy), parameters(ended)) == 0
