"""A checkpoint taken at any optimizer step goes on exactly: same losses, same parameters, same samples."""

from dataclasses import dataclass, field

import pytest
import torch
from fitting import checksum, data, fit, largest_difference, module, parameters
from lightning import Callback, Trainer

from lightning_grpo import GRPOModule
from lightning_grpo.monitor.checkpoint import Checkpoint
from lightning_grpo.objective import ObjectiveConfig
from lightning_grpo.policy.load import LoRA
from lightning_grpo.rewards import PrefixMatch
from lightning_grpo.rollout import HFRollout, Rollout
from lightning_grpo.rollout.types import COMPLETION_TOKENS
from lightning_grpo.training.experience import Experience

STEPS = 7


def run(root, model, *, resume=None, steps=STEPS, changes=None, **trainer):
    """Two updates a pass, two passes a rollout: most checkpoints fall inside a rollout."""
    policy = module(
        model,
        **{"num_iterations": 2, "objective": ObjectiveConfig(beta=0.05), "warmup_steps": 3, "lr_schedule": "linear"}
        | (changes or {}),
    )
    settings = {"enable_checkpointing": True, "max_steps": STEPS} | trainer
    checkpoint = Checkpoint(str(root / "checkpoints"), every_n_train_steps=1, save_top_k=-1)
    record = fit(root, policy, data(), accumulate=2, ckpt_path=resume, callbacks=[checkpoint], **settings)
    return record, policy


@pytest.mark.parametrize(
    "changes", [{}, {"lora": LoRA(rank=4)}, {"lora": LoRA(rank=4, dropout=0.5)}], ids=["full", "lora", "dropout"]
)
def test_resume_at_every_step_is_exact(tmp_path, tiny_model_path, changes):
    whole, policy = run(tmp_path / "whole", tiny_model_path, changes=changes)
    assert len(set(whole["loss"])) == STEPS
    for step in range(1, STEPS):
        checkpoint = tmp_path / "whole" / "checkpoints" / f"step-{step:06d}.ckpt"
        resumed, other = run(tmp_path / f"from-{step}", tiny_model_path, resume=str(checkpoint), changes=changes)
        for name in ("loss", "reward", "grad_norm", "kl", "learning_rate", "num_tokens", "completions/mean_length"):
            assert resumed[name] == whole[name][step:], (step, name)
        assert largest_difference(parameters(other), parameters(policy)) == 0


def test_last_is_found_after_a_restart(tmp_path, tiny_model_path):
    run(tmp_path, tiny_model_path, max_steps=3)
    assert (tmp_path / "checkpoints" / "last.ckpt").resolve().name == "step-000003.ckpt"
    record, policy = run(tmp_path, tiny_model_path, resume="last")
    assert len(record.steps) == STEPS - 3
    assert policy.trainer.global_step == STEPS


def test_the_last_step_is_saved_whatever_the_interval(tmp_path, tiny_model_path):
    checkpoint = Checkpoint(str(tmp_path / "checkpoints"), every_n_train_steps=100)
    fit(tmp_path, module(tiny_model_path), steps=2, callbacks=[checkpoint], enable_checkpointing=True)
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["global_step"] == 2


def test_checkpoints_hold_nothing_but_plain_data_and_lora_only_its_adapter(tmp_path, tiny_model_path):
    run(tmp_path, tiny_model_path, changes={"lora": LoRA(rank=4)}, max_steps=2)
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["state_dict"] and all("lora" in name for name in state["state_dict"])


@pytest.mark.parametrize(
    ("was", "now", "message"),
    [
        (
            {"rank": 4},
            {"rank": 4, "alpha": 64},
            "lora.alpha is 64, .* trained with 32: .* scaled by 2; set lora.alpha to 32",
        ),
        ({"rank": 4}, {"rank": 8}, "lora.rank is 8, but the checkpoint's adapters have rank 4"),
        ({"target_modules": ["q_proj"]}, {}, r"lacks 24 adapter weights .*; set lora.target_modules to \['q_proj'\]"),
        ({}, {"target_modules": ["q_proj"]}, "has 24 others, .*; set lora.target_modules to 'all-linear'"),
        ({"rank": 4}, None, "only LoRA adapters, but lora is not set; set lora to {'rank': 4, 'alpha': 32"),
        (None, {"rank": 4}, "full weights, but lora is set, with rank 4"),
    ],
)
def test_other_adapters_are_refused(tmp_path, tiny_model_path, was, now, message):
    run(tmp_path, tiny_model_path, changes={"lora": was if was is None else LoRA(**was)}, max_steps=1)
    with pytest.raises(ValueError, match=message):
        run(tmp_path, tiny_model_path, resume="last", changes={"lora": now if now is None else LoRA(**now)})


class SaveAnywhere(Callback):
    """What a cluster does that ends a job: save between any two lines."""

    def __init__(self, folder):
        self.folder = folder

    def save(self, trainer, where):
        begun = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}-{begun}-{where}.ckpt")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.save(trainer, "batch-begins")

    def on_after_backward(self, trainer, pl_module):
        self.save(trainer, "gradient-there")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.save(trainer, "batch-ends")


class SaveAfterStep(GRPOModule):
    """And also between an optimizer step and the end of the batch that took it."""

    folder = None

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        if self.folder is not None:
            SaveAnywhere(self.folder).save(self.trainer, "stepped")


def test_a_checkpoint_saved_at_any_moment_goes_on_exactly(tmp_path, tiny_model_path):
    """Two rollouts of two optimizer steps of two micro-batches; the second resamples groups."""
    steps = 4
    settings = {
        "rewards": [PrefixMatch(), checksum], "resampling_rounds": 1, "lr_schedule": "linear", "warmup_steps": 2,
    }  # fmt: skip

    def train(root, resume=None, folder=None):
        policy = module(tiny_model_path, kind=SaveAfterStep, **settings)
        policy.folder = folder
        callbacks = [SaveAnywhere(folder)] if folder else []
        record = fit(
            root, policy, data(), steps=steps, accumulate=2, ckpt_path=resume, callbacks=callbacks,
            enable_checkpointing=True,
        )  # fmt: skip
        return record, parameters(policy)

    folder = tmp_path / "saved"
    whole, ended = train(tmp_path / "whole", folder=folder)
    saved = sorted(folder.iterdir())
    assert len(saved) == 2 * steps * 3 + steps
    for path in saved:
        # Lightning counts a step only after the hook that takes it
        step = int(path.name.partition("-")[0]) + ("stepped" in path.name)
        resumed, other = train(tmp_path / path.stem, resume=str(path))
        for name in ("loss", "reward", "grad_norm", "num_tokens", "learning_rate"):
            assert resumed[name] == whole[name][step:], (path.name, name)
        assert largest_difference(other, ended) == 0, path.name


def test_old_log_probs_drop_what_the_update_drops(tmp_path, tiny_model_path):
    """With dropout too, the first ratio is 1; the second rollout drops other units."""
    record, policy = run(tmp_path, tiny_model_path, changes={"lora": LoRA(rank=4, dropout=0.5)}, max_steps=1)
    assert record["ratio/min"] == record["ratio/max"] == [1.0]
    draws = {}
    for number in (0, 1):
        with policy.scorer.seeded(policy.trainer, number, 0):
            draws[number] = torch.rand(4).tolist()
    assert draws[0] != draws[1]


def test_no_checkpoint_is_saved_while_the_optimizer_steps(tmp_path, tiny_model_path):
    """Its weights could be changed in part, and the step would be taken again."""

    class Saving(torch.optim.SGD):
        def step(self, closure=None):
            loss = super().step(closure)
            policy.trainer.save_checkpoint(tmp_path / "within.ckpt")
            return loss

    policy = module(tiny_model_path, optimizer=lambda p: Saving(p, lr=1.0))
    with pytest.raises(RuntimeError, match="while the optimizer changes the weights"):
        fit(tmp_path, policy)
    assert not (tmp_path / "within.ckpt").exists()


def test_weights_alone_are_validated_and_not_gone_on_from(tmp_path, tiny_model_path):
    policy, prompts = module(tiny_model_path), data(validation_size=4)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[HFRollout()], default_root_dir=tmp_path
    )
    trainer.validate(policy, prompts)
    path = str(tmp_path / "weights.ckpt")
    trainer.save_checkpoint(path)
    trainer.validate(module(tiny_model_path), data(validation_size=4), ckpt_path=path)
    with pytest.raises(ValueError, match="contains only weights"):
        fit(tmp_path, module(tiny_model_path), ckpt_path=path)


@dataclass(kw_only=True)
class Noted(Rollout):
    """One more column with a value per completion token."""

    noted: torch.Tensor = field(metadata=COMPLETION_TOKENS)


@dataclass(kw_only=True)
class NotedExperience(Experience, Noted):
    """The same column in the experience."""


class Weighted(GRPOModule):
    """Multiplies log-probs by a column that `rollout` adds."""

    rollout_class, experience_class = Noted, NotedExperience

    def rollout(self, batch):
        rollout = super().rollout(batch)
        return Noted(**vars(rollout), noted=1 + rollout.completion_ids % 3)

    def compute_loss(self, logprobs, entropy, experience, **sizes):
        assert experience.noted.shape == logprobs.shape
        return super().compute_loss(logprobs * experience.noted, entropy, experience, **sizes)


def test_columns_of_a_subclass_reach_its_loss_and_survive_a_resume(tmp_path, tiny_model_path):
    def run(root, **settings):
        policy = module(tiny_model_path, Weighted, rewards=[checksum])
        return fit(root, policy, accumulate=2, callbacks=[Checkpoint(str(root), every_n_train_steps=1)], **settings)

    whole = run(tmp_path / "a", steps=3, enable_checkpointing=True)
    first = run(tmp_path / "b", steps=1, enable_checkpointing=True)
    rest = run(tmp_path / "b", steps=3, enable_checkpointing=True, ckpt_path=str(tmp_path / "b" / "last.ckpt"))
    assert first["loss"] + rest["loss"] == whole["loss"]
    assert len(set(whole["loss"])) == 3
