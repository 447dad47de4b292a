"""The algorithm under a real Trainer: what the update must not depend on, what it logs, what it refuses."""

import json
import math
import time
from string import ascii_lowercase
from types import SimpleNamespace

import pytest
import torch
from fitting import checksum, data, fit, largest_difference, module, parameters
from lightning import Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader

from lightning_grpo import GRPOModule, PromptDataModule
from lightning_grpo.kernels import linear
from lightning_grpo.objective import AdaptiveBeta, AdaptiveEntropy, AdvantageConfig, ObjectiveConfig
from lightning_grpo.objective.advantages import ESTIMATORS
from lightning_grpo.objective.presets import PRESETS
from lightning_grpo.objective.surrogate import Surrogate
from lightning_grpo.policy.load import LoRA
from lightning_grpo.rewards import FunctionReward, PrefixMatch, Reward
from lightning_grpo.rollout import HFRollout, Sampling

GLOBAL = ["grpo", "dr_grpo", "dapo", "cispo", "gspo", "sapo"]


@pytest.mark.parametrize("loss_type", GLOBAL)
def test_gradient_does_not_depend_on_the_cut_into_micro_batches(tmp_path, tiny_model_path, loss_type):
    ends = []
    for micro_batch_size, accumulate in [(32, 1), (8, 4), (2, 16)]:
        policy = module(
            tiny_model_path,
            micro_batch_size=micro_batch_size,
            objective=ObjectiveConfig(loss_type=loss_type, beta=0.1),
            optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        )
        fit(tmp_path, policy, steps=1, accumulate=accumulate)
        ends.append(parameters(policy))
    start = parameters_at_start(tiny_model_path)
    moved = largest_difference(ends[0], start)
    assert moved > 1e-5
    assert largest_difference(ends[0], ends[1]) < 1e-4 * moved
    assert largest_difference(ends[0], ends[2]) < 1e-4 * moved


class Squared(Surrogate):
    """A loss whose gradient follows the log-probs, at every ratio."""

    def __call__(self, terms):
        return terms.advantages * terms.logprobs.square()


@pytest.mark.parametrize(
    ("objective", "known"),
    [*[({"loss_type": name}, True) for name in PRESETS], ({"surrogate": Squared()}, False)],
    ids=[*PRESETS, "of one's own"],
)
def test_a_coefficient_known_ahead_is_used(tmp_path, tiny_model_path, monkeypatch, objective, known):
    """In each micro-batch, or not computed at all."""
    used = []
    multiple = linear._multiple
    monkeypatch.setattr(linear, "_multiple", lambda *c: used.append(multiple(*c)) or used[-1])
    policy = module(tiny_model_path, objective=ObjectiveConfig(beta=0.0, **objective))
    fit(tmp_path, policy, steps=1)
    assert (len(used) > 0 and None not in used) if known else used == []


def parameters_at_start(model):
    policy = module(model)
    policy.configure_model()
    return parameters(policy)


@pytest.mark.parametrize("loss_type", ["dr_grpo", "dapo", "grpo"])
def test_skipping_rows_without_advantage_changes_nothing(tmp_path, tiny_model_path, loss_type):
    class Unskipping(ObjectiveConfig):
        skips_zero_advantage = False

    def reward(completions, **columns):
        # only the second group of every four differs within itself
        return [float(i % 4 == 0 and i // 4 % 4 == 1) for i in range(len(completions))]

    ends, skipped = [], []
    for kind in (ObjectiveConfig, Unskipping):
        policy = module(
            tiny_model_path,
            rewards=[FunctionReward(function=reward)],
            objective=kind(loss_type=loss_type, beta=0.0),
            optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
        )
        record = fit(tmp_path, policy, steps=1)
        ends.append(parameters(policy))
        skipped.append(sum(map(len, policy.progress.micro_batches)))
        assert record["frac_reward_zero_std"] == [0.75]
    assert skipped[0] < skipped[1] == 32
    moved = largest_difference(ends[0], parameters_at_start(tiny_model_path))
    assert moved > 1e-6
    assert largest_difference(ends[0], ends[1]) < 1e-4 * moved


def test_same_seed_same_run(tmp_path, tiny_model_path):
    runs = []
    for noise in (0, 1):
        torch.manual_seed(noise)
        policy = module(tiny_model_path)
        record = fit(tmp_path, policy)
        runs.append((record["loss"], record["reward"], parameters(policy)))
    assert runs[0][:2] == runs[1][:2]
    assert largest_difference(runs[0][2], runs[1][2]) == 0
    other = fit(tmp_path, module(tiny_model_path, seed=1))
    assert other["reward"] != runs[0][1]


def test_several_updates_and_passes_a_rollout_start_at_ratio_one(tmp_path, tiny_model_path):
    policy = module(tiny_model_path, num_iterations=2, rewards=[checksum])
    record = fit(tmp_path, policy, steps=5, accumulate=2)  # two updates a pass, two passes a rollout
    extremes = [(low, high) for low, high in zip(record["ratio/min"], record["ratio/max"], strict=True)]
    assert extremes[0] == (1, 1) and extremes[4] == (1, 1)
    assert all(low < 1 < high for low, high in extremes[1:4])
    assert record["staleness"] == [0, 1, 2, 3, 0]
    assert [step["time/rollout"] > 0 for step in record.steps] == [True, False, False, False, True]


def test_reference_is_the_start_and_kl_starts_at_zero(tmp_path, tiny_model_path):
    policy = module(tiny_model_path, objective=ObjectiveConfig(beta=0.1))
    record = fit(tmp_path, policy, steps=4)
    assert record["kl"][0] == 0
    assert record["kl"][3] > 1e-6
    start = parameters_at_start(tiny_model_path)
    reference = dict(policy.scorer.reference.named_parameters())
    assert largest_difference(start, reference) == 0
    assert not any("reference" in name for name in policy.state_dict())
    assert module(tiny_model_path).scorer.reference is None


def test_lora_reference_costs_no_copy(tmp_path, tiny_model_path):
    policy = module(tiny_model_path, objective=ObjectiveConfig(beta=0.1), lora=LoRA(rank=4))
    record = fit(tmp_path, policy, steps=3)
    assert policy.scorer.reference is None
    assert record["kl"][0] == 0 and record["kl"][2] > 0
    assert all("lora" in name for name, p in policy.named_parameters() if p.requires_grad)


def test_batch_statistics_and_several_weighted_rewards(tmp_path, tiny_model_path):
    def length(completions, **columns):
        return [float(len(c)) for c in completions]

    def never(completions):
        return [None] * len(completions)

    rewards = [PrefixMatch(weight=2.0), FunctionReward(function=length, weight=0.5), FunctionReward(function=never)]
    record = fit(tmp_path, module(tiny_model_path, rewards=rewards), steps=1)
    step = record.steps[0]
    assert step["reward"] == pytest.approx(2 * step["rewards/prefix_match/mean"] + 0.5 * step["rewards/length/mean"])
    assert "rewards/never/mean" not in step


def test_true_means_over_the_window(tmp_path, tiny_model_path):
    seen = []

    class Spy(GRPOModule):
        def compute_loss(self, logprobs, entropy, experience, **sizes):
            mask = experience.completion_mask
            self.prompt_tokens = getattr(self, "prompt_tokens", 0) + experience.prompt_mask.sum()
            seen.append((float(entropy[mask].sum()), int(mask.sum()), experience.rewards.sum().item()))
            return super().compute_loss(logprobs, entropy, experience, **sizes)

    policy = module(tiny_model_path, Spy, objective=ObjectiveConfig(beta=0.1))
    record = fit(tmp_path, policy, steps=1)
    entropy, tokens, rewards = (sum(part) for part in zip(*seen, strict=True))
    step = record.steps[0]
    assert len(seen) == 4
    assert step["entropy"] == pytest.approx(entropy / tokens, rel=1e-5)
    assert step["reward"] == pytest.approx(rewards / 32, rel=1e-5)
    assert step["completion_tokens"] == tokens == round(step["completions/mean_length"] * 32)
    # every letter is a token, and each of the eight prompts is seen once per completion
    assert step["num_tokens"] == tokens + int(policy.prompt_tokens)
    assert {"loss", "grad_norm", "learning_rate", "step_time", "tokens_per_second", "reward_std"} <= step.keys()
    assert {"time/sync", "time/rollout", "time/reward", "time/score", "time/update"} <= step.keys()
    assert step["sampling/sampling_logp_difference/max"] < 1e-4


def test_resampling_replaces_flat_groups(tmp_path, tiny_model_path):
    seen = {}

    class Spy(GRPOModule):
        def compute_advantages(self, rewards, rollout):
            seen["flat"] = int((rewards.view(-1, 4).std(1) == 0).sum())
            return super().compute_advantages(rewards, rollout)

    first = fit(tmp_path, module(tiny_model_path, Spy, resampling_rounds=3), steps=1)
    resampled = seen["flat"]
    plain = fit(tmp_path, module(tiny_model_path, Spy), steps=1)
    assert resampled < seen["flat"]
    assert first["frac_reward_zero_std"][0] > 0 and plain["frac_reward_zero_std"] == [seen["flat"] / 8]


@pytest.mark.parametrize("column", ["source", "data_source"])
def test_resampled_completions_keep_the_source_of_their_prompt(tmp_path, tiny_model_path, column):
    seen = []

    class Spy(GRPOModule):
        def compute_advantages(self, rewards, rollout):
            prompts = self.tokenizer.batch_decode([[int(ids[-1])] for ids in rollout.prompt_ids])
            seen.append(([f"from {prompt}" for prompt in prompts], rollout.sources))
            return super().compute_advantages(rewards, rollout)

    rows = [{"prompt": letter, "answer": letter * 6, column: f"from {letter}"} for letter in ascii_lowercase]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    prompts = PromptDataModule(str(tmp_path / "rows.json"), prompts_per_rollout=8, seed=1)
    fit(tmp_path, module(tiny_model_path, Spy, resampling_rounds=2), prompts, steps=1)
    assert len(seen) == 1 and seen[0][0] == seen[0][1] and len(set(seen[0][1])) == 8


def test_a_gradient_that_is_not_finite_stops_before_the_weights(tmp_path, tiny_model_path):
    class Broken(GRPOModule):
        def compute_loss(self, *args, **kwargs):
            loss, metrics = super().compute_loss(*args, **kwargs)
            return loss * math.inf, metrics

    policy = module(tiny_model_path, Broken, objective=ObjectiveConfig(beta=0.1))
    with pytest.raises(FloatingPointError, match="the weights are unchanged"):
        fit(tmp_path, policy)
    assert largest_difference(parameters(policy), parameters_at_start(tiny_model_path)) == 0


def test_a_head_in_float32_agrees_better_with_the_engine(tmp_path, tiny_model_path):
    difference = "sampling/sampling_logp_difference/mean"
    runs = {
        head: fit(tmp_path, module(tiny_model_path, head_in_float32=head), steps=1, precision="bf16-mixed")
        for head in (False, True)
    }
    assert runs[True][difference][0] < runs[False][difference][0]


def test_one_completion_per_prompt(tmp_path, tiny_model_path):
    """Advantages are whitened over the batch: the mean is 0, and what the update uses differs between the prompts."""
    seen = []

    class Spy(GRPOModule):
        def compute_loss(self, logprobs, entropy, experience, **sizes):
            seen.append(experience.advantages)
            return super().compute_loss(logprobs, entropy, experience, **sizes)

    options = {"num_generations": 1, "rewards": [checksum], "advantage": AdvantageConfig(estimator="reinforce_pp")}
    record = fit(tmp_path, module(tiny_model_path, Spy, micro_batch_size=2, **options), steps=2)
    advantages = torch.cat(seen[:4])
    assert len(advantages) == 8 and float(advantages.std()) == pytest.approx(1, abs=1e-3)
    assert float(advantages.mean()) == pytest.approx(0, abs=1e-6)
    assert record["grad_norm"][0] > 0 and "frac_reward_zero_std" not in record.steps[0]


@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
def test_only_estimators_without_groups_learn_from_one_completion(estimator):
    config = AdvantageConfig(estimator=estimator, k=1 if estimator == "pass_at_k" else None)
    sizes = {"lengths": torch.tensor([1, 2, 3, 4]), "grad_norms": torch.ones(4, 2)}
    advantages = config(torch.tensor([0.0, 1.0, 0.5, 1.0]), 1, **sizes)
    assert bool((advantages != 0).any()) is not config.needs_groups


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_generations": 1}, "num_generations is 1, but .* set 2 or more, or advantage.estimator to reinforce_pp"),
        (
            {"num_generations": 1, "advantage": AdvantageConfig(estimator="reinforce_pp"), "resampling_rounds": 1},
            "resampling_rounds is 1, but num_generations is 1",
        ),
        ({"micro_batch_size": 0}, "micro_batch_size is 0"),
        ({"rewards": []}, "rewards is empty"),
        ({"sampling": Sampling(temperature=0)}, "temperature is 0"),
        ({"sampling": Sampling(top_p=0.9, top_k=5)}, "sampling.top_p = 0.9, sampling.top_k = 5"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"model": "no/such/folder"}, "model is 'no/such/folder'"),
        ({"max_completion_length": 250}, "set max_completion_length to 248"),
        ({"micro_batch_size": 5}, "micro_batch_size is 5"),
        ({"num_generations": 3}, "micro_batch_size|accumulate"),
    ],
)
def test_refused_at_start(tmp_path, tiny_model_path, changes, named):
    with pytest.raises(ValueError, match=named):
        fit(tmp_path, module(**{"model": tiny_model_path} | changes))


def test_a_reward_that_returns_the_wrong_count_is_named(tmp_path, tiny_model_path):
    def short(completions):
        return [1.0]

    with pytest.raises(ValueError, match="short"):
        fit(tmp_path, module(tiny_model_path, rewards=[FunctionReward(function=short)]))


def test_an_epoch_that_ends_inside_an_optimizer_step_is_refused(tmp_path, tiny_model_path):
    with pytest.raises(RuntimeError, match="after 2 of the 4 micro-batches"):
        fit(tmp_path, module(tiny_model_path), limit_train_batches=2)


def test_a_loader_that_does_not_repeat_is_refused(tmp_path, tiny_model_path):
    class Hasty(PromptDataModule):
        def train_dataloader(self):
            loader = super().train_dataloader()
            repeats = self.trainer.lightning_module.steps_per_rollout
            batches = [batch for n, batch in enumerate(loader) if n % repeats == 0] * repeats
            return DataLoader(batches, batch_size=None)

    prompts = Hasty("letters", size=26, prompts_per_rollout=8, seed=1)
    with pytest.raises(RuntimeError, match="yielded other prompts at micro-batch 1 of 4"):
        fit(tmp_path, module(tiny_model_path), prompts)


def test_validation_counts_pass_at_k(tmp_path, tiny_model_path):
    class Sometimes(Reward):
        def __call__(self, completions, **columns):
            return [float(i % 4 == 0) for i in range(len(completions))]

    policy = module(
        tiny_model_path, rewards=[Sometimes()], validation_generations=4, validation_sampling=Sampling(top_p=0.9)
    )
    prompts = data(validation_size=6)
    fit(tmp_path, policy, prompts, steps=1, limit_val_batches=1.0, num_sanity_val_steps=-1)
    assert policy.held_out["val/pass@1"] == 0.25
    assert policy.held_out["val/pass@4"] == 1.0


def test_clipping_bounds_the_step_and_takes_fused_optimizers(tmp_path, tiny_model_path):
    policy = module(tiny_model_path, optimizer=lambda p: torch.optim.SGD(p, lr=1.0, fused=True))
    record = fit(tmp_path, policy, steps=1, gradient_clip_val=1e-3, precision="bf16-mixed")
    start, end = parameters_at_start(tiny_model_path), parameters(policy)
    moved = torch.cat([(end[name] - start[name]).flatten() for name in start]).norm()
    assert record["grad_norm"][0] > 2e-3
    assert float(moved) == pytest.approx(1e-3, rel=1e-2)


def test_a_fused_optimizer_is_refused_where_gradients_are_scaled(tmp_path, tiny_model_path):
    policy = module(tiny_model_path, optimizer=lambda p: torch.optim.AdamW(p, fused=True))
    policy.configure_model()
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(policy)
    policy.trainer = trainer
    trainer.strategy.precision_plugin = MixedPrecision("16-mixed", "cpu")
    with pytest.raises(ValueError, match="fused is true"):
        policy.configure_optimizers()


def test_gradients_are_gone_while_the_engine_samples(tmp_path, tiny_model_path):
    held = []

    class Spy(GRPOModule):
        def rollout(self, batch):
            held.append([name for name, p in self.named_parameters() if p.grad is not None])
            return super().rollout(batch)

    fit(tmp_path, module(tiny_model_path, Spy), steps=2)
    assert held == [[], []]


def one_group_differs(completions, **columns):
    """Within itself only the second group of every four has different rewards."""
    return [float(i % 4 == 0 and i // 4 % 4 == 1) for i in range(len(completions))]


@pytest.mark.parametrize(("says", "rows"), [(None, 32), (True, 8), (False, 32)])
def test_a_loss_of_ones_own_sees_every_completion_unless_it_says_otherwise(tmp_path, tiny_model_path, says, rows):
    seen = []

    class Own(GRPOModule):
        skips_zero_advantage = says

        def compute_loss(self, logprobs, entropy, experience, **sizes):
            seen.extend(experience.advantages.tolist())
            return super().compute_loss(logprobs, entropy, experience, **sizes)

    fit(tmp_path, module(tiny_model_path, Own, rewards=[one_group_differs]), steps=1)
    assert len(seen) == rows


def test_advantages_may_differ_from_token_to_token(tmp_path, tiny_model_path):
    class EachToken(GRPOModule):
        def compute_advantages(self, rewards, rollout):
            return super().compute_advantages(rewards, rollout)[:, None].expand_as(rollout.completion_ids)

    ends = []
    for kind in (GRPOModule, EachToken):
        policy = module(tiny_model_path, kind, rewards=[one_group_differs])
        record = fit(tmp_path, policy, steps=2, accumulate=2)
        ends.append((record["loss"], parameters(policy)))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-6)
    assert largest_difference(ends[0][1], ends[1][1]) < 1e-7


CUT = ("time", "step_time", "tokens_per_second", "memory", "mfu", "padding_share", "noise_scale")
"""Metrics that depend on the cut into micro-batches by their meaning, or on the clock."""


@pytest.mark.parametrize("loss_type", ["dr_grpo", "dapo"])
def test_metrics_do_not_depend_on_the_cut_into_micro_batches(tmp_path, tiny_model_path, loss_type):
    seen = []
    for micro_batch_size, accumulate in [(32, 1), (8, 4), (1, 32)]:
        policy = module(
            tiny_model_path,
            rewards=[one_group_differs],
            micro_batch_size=micro_batch_size,
            objective=ObjectiveConfig(loss_type=loss_type, beta=0.0),
        )
        step = fit(tmp_path, policy, steps=1, accumulate=accumulate).steps[0]
        seen.append({name: value for name, value in step.items() if not name.startswith(CUT)})
    assert seen[0]["entropy"] > 1
    for other in seen[1:]:
        assert other.keys() == seen[0].keys()
        for name in seen[0].keys() - {"loss"}:  # a mean over micro-batches
            assert other[name] == pytest.approx(seen[0][name], rel=2e-5, abs=3e-6, nan_ok=True), name


def test_tokens_that_are_seen_twice_are_counted_once(tmp_path, tiny_model_path):
    record = fit(tmp_path, module(tiny_model_path, num_iterations=2), steps=4)
    trained, seen = record["completion_tokens"], record["num_tokens"]
    assert trained[1] == 2 * trained[0] and seen[1] == seen[0] < seen[2] == seen[3]


def test_resampled_tokens_are_counted_and_resampled_groups_are_not(tmp_path, tiny_model_path):
    sampled, groups = [], []

    class Spy(GRPOModule):
        def rollout(self, batch):
            rollout = super().rollout(batch)
            sampled.append(int(rollout.completion_mask.sum()))
            return rollout

        def compute_rewards(self, rollout, batch):
            rewards = super().compute_rewards(rollout, batch)
            groups.append(rewards.view(-1, 4).std(1))
            return rewards

    record = fit(tmp_path, module(tiny_model_path, Spy, resampling_rounds=2), steps=1)
    assert len(sampled) == 3
    assert record["rollout_tokens"] == [sum(sampled)]
    assert record["frac_reward_zero_std"] == [float((groups[0] == 0).double().mean())]
    assert record["group_reward_std"][0] == pytest.approx(float(groups[0].mean()), abs=1e-7)


def test_adaptive_coefficients_are_logged_as_they_were_in_force(tmp_path, tiny_model_path):
    objective = ObjectiveConfig(
        beta=0.1,
        adaptive_beta=AdaptiveBeta(target=0.01),
        entropy_coef=0.01,
        adaptive_entropy=AdaptiveEntropy(target=100.0, delta=0.005),
    )
    policy = module(tiny_model_path, objective=objective)
    record = fit(tmp_path, policy, steps=3)
    assert record["beta"] == pytest.approx([0.1, 0.098, 0.098 * record["beta"][2] / record["beta"][1]])
    assert record["beta"][0] > record["beta"][1] and policy.coefficients.beta != record["beta"][2]
    assert record["entropy_coef"] == pytest.approx([0.0, 0.015, 0.02])  # no bonus in the first step
    assert not {"beta", "entropy_coef"} & fit(tmp_path, module(tiny_model_path), steps=1).steps[0].keys()


def test_adaptive_coefficients_rest_where_everything_is_truncated(tmp_path, tiny_model_path):
    objective = ObjectiveConfig(
        beta=0.1,
        adaptive_beta=AdaptiveBeta(target=0.01),
        entropy_coef=0.01,
        adaptive_entropy=AdaptiveEntropy(target=100.0),
        mask_truncated_completions=True,
    )

    class Cut(GRPOModule):
        def rollout(self, batch):
            rollout = super().rollout(batch)
            rollout.truncated[:] = True
            return rollout

    policy = module(tiny_model_path, Cut, objective=objective)
    record = fit(tmp_path, policy, steps=2)
    assert record["beta"] == pytest.approx([0.1, 0.1]) and record["entropy_coef"] == [0.0, 0.0]
    assert "kl" not in record.steps[1] and record["grad_norm"] == [0.0, 0.0]
    assert largest_difference(parameters(policy), parameters_at_start(tiny_model_path)) == 0


def test_masked_truncated_completions_move_nothing(tmp_path, tiny_model_path):
    """The update equals that of the same run in which their advantage is 0, but for the tokens that divide."""
    ends = []

    class Zero(GRPOModule):
        def compute_advantages(self, rewards, rollout):
            assert 0 < rollout.truncated.sum() < 32
            return super().compute_advantages(rewards, rollout).masked_fill(rollout.truncated, 0.0)

    for kind, mask in [(GRPOModule, True), (Zero, False), (GRPOModule, False)]:
        objective = ObjectiveConfig(mask_truncated_completions=mask)
        optimizer = {"optimizer": lambda p: torch.optim.SGD(p, lr=1.0)}
        policy = module(tiny_model_path, kind, rewards=[checksum], objective=objective, seed=3, **optimizer)
        fit(tmp_path, policy, data(prompts_per_rollout=8), steps=1)
        ends.append(parameters(policy))
    moved = largest_difference(ends[0], parameters_at_start(tiny_model_path))
    assert moved > 1e-4
    assert largest_difference(ends[0], ends[1]) < 1e-4 * moved
    assert largest_difference(ends[0], ends[2]) > 1e-2 * moved


def test_predictions_are_no_part_of_the_next_validation(tmp_path, tiny_model_path):
    policy = module(tiny_model_path, rewards=[checksum])
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = Trainer(default_root_dir=tmp_path, callbacks=[HFRollout()], **settings)
    validated = trainer.validate(policy, datamodule=data(validation_size=6), verbose=False)
    trainer.predict(policy, datamodule=data(validation_size=12, seed=5))
    assert trainer.validate(policy, datamodule=data(validation_size=6), verbose=False) == validated


def test_validation_inside_an_optimizer_step_is_no_part_of_its_time(tmp_path, tiny_model_path, monkeypatch):
    real, ahead = time.perf_counter, [0.0]
    monkeypatch.setattr("lightning_grpo.metrics.time", SimpleNamespace(perf_counter=lambda: real() + ahead[0]))

    class Slow(GRPOModule):
        def validation_step(self, batch, batch_idx):
            ahead[0] += 10_000
            super().validation_step(batch, batch_idx)

    validation = {"limit_val_batches": 1.0, "num_sanity_val_steps": 0, "val_check_interval": 2}
    record = fit(tmp_path, module(tiny_model_path, Slow), data(validation_size=4), steps=2, **validation)
    assert ahead[0] >= 30_000
    assert max(record["step_time"]) < 10_000 and max(record["time/update"]) < 10_000


def test_gradient_checkpointing_changes_no_gradient(tmp_path, tiny_model_path):
    ends = []
    for checkpointing in (False, True):
        policy = module(
            tiny_model_path,
            rewards=[checksum],
            gradient_checkpointing=checkpointing,
            objective=ObjectiveConfig(beta=0.1),
            optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
        )
        record = fit(tmp_path, policy, steps=3, accumulate=2)
        assert (record["ratio/min"][0], record["ratio/max"][0], record["kl"][0]) == (1, 1, 0)
        assert policy.policy.is_gradient_checkpointing == checkpointing
        ends.append(parameters(policy))
    moved = largest_difference(ends[0], parameters_at_start(tiny_model_path))
    assert moved > 1e-3
    assert largest_difference(*ends) < 1e-4 * moved


def test_stop_strings_end_completions_that_are_trained_on(tmp_path, tiny_model_path):
    seen = []

    class Spy(GRPOModule):
        def rollout(self, batch):
            seen.append(super().rollout(batch))
            return seen[-1]

    policy = module(
        tiny_model_path,
        Spy,
        rewards=[checksum],
        sampling=Sampling(stop=list("0zM?Q7B")),
        max_completion_length=30,
    )
    record = fit(tmp_path, policy, steps=2)
    texts = policy.tokenizer.batch_decode(
        [ids[mask].tolist() for r in seen for ids, mask in zip(r.completion_ids, r.completion_mask, strict=True)]
    )
    stopped = [text for text in texts if text[-1] in "0zM?Q7B"]
    assert len(stopped) > 10 and not any(set(text[:-1]) & set("0zM?Q7B") for text in texts)
    cut = torch.cat([rollout.truncated for rollout in seen]).tolist()
    assert all(not truncated for text, truncated in zip(texts, cut, strict=True) if text[-1] in "0zM?Q7B")
    lengths = torch.cat([rollout.completion_mask.sum(1) for rollout in seen]).tolist()
    assert all((length == 30) >= truncated for length, truncated in zip(lengths, cut, strict=True))
    assert (record["ratio/min"], record["ratio/max"]) == ([1, 1], [1, 1])
    assert max(record["sampling/sampling_logp_difference/max"]) < 1e-5


def test_only_training_holds_a_reference(tmp_path, tiny_model_path):
    policy = module(tiny_model_path, objective=ObjectiveConfig(beta=0.1), rewards=[checksum])
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = Trainer(default_root_dir=tmp_path, callbacks=[HFRollout()], **settings)
    trainer.validate(policy, datamodule=data(validation_size=6), verbose=False)
    assert policy.scorer.reference is None
    with torch.no_grad():
        for parameter in policy.policy.parameters():
            parameter.mul_(1.1)  # as of a checkpoint that was validated
    fit(tmp_path, policy, steps=1)
    start = parameters_at_start(tiny_model_path)
    assert largest_difference(start, dict(policy.scorer.reference.named_parameters())) == 0
