"""The step that is scaled by the effective sample size: what it changes, and what it leaves as it was."""

import math

import pytest
import torch
from engines import CopyRollout
from fitting import AHEAD, checksum, data, fit, largest_difference, module, parameters
from lightning.pytorch.plugins import MixedPrecision

from lightning_grpo import GRPOModule
from lightning_grpo.errors import UserError
from lightning_grpo.monitor.checkpoint import Checkpoint
from lightning_grpo.objective import ObjectiveConfig, RolloutCorrection
from lightning_grpo.policy import LoRA
from lightning_grpo.rollout import HFRollout

SCALED = ObjectiveConfig(rollout_correction=RolloutCorrection(), ess_scaled_step=True)
LR = 0.02


def sgd(params):
    return torch.optim.SGD(params, lr=LR)


def tensor_rate(params):
    return torch.optim.Adam(params, lr=torch.tensor(LR), foreach=False)


class Steps(GRPOModule):
    """Notes the learning rates of each optimizer step, and how far the weights went."""

    def on_train_start(self):
        super().on_train_start()
        self.used, self.moved = [], []
        (optimizer,) = self.trainer.optimizers
        optimizer.register_step_post_hook(lambda found, *_: self.used.append(float(found.param_groups[0]["lr"])))

    def optimizer_step(self, *args, **kwargs):
        before = parameters(self)
        super().optimizer_step(*args, **kwargs)
        after = parameters(self)
        self.moved.append(math.sqrt(sum(float((after[name] - before[name]).square().sum()) for name in before)))


def train(root, model, *, steps=4, resume=None, kind=Steps, objective=SCALED, callbacks=(), trainer=None, **changes):
    settings = AHEAD | {"objective": objective, "optimizer": sgd} | changes
    policy = module(model, kind, **settings)
    record = fit(
        root, policy, data(), steps=steps, accumulate=2, ckpt_path=resume,
        rollout=HFRollout() if policy.lora else CopyRollout(), callbacks=list(callbacks),
        enable_checkpointing=bool(callbacks), **trainer or {},
    )  # fmt: skip
    return record, policy


@pytest.mark.parametrize(
    "changes",
    [{}, {"lr_schedule": "linear", "warmup_steps": 1}, {"lora": LoRA(rank=4), "rollout_ahead": 0}],
    ids=["constant", "scheduled", "lora"],
)
def test_each_step_is_scaled_and_the_schedule_is_not(tmp_path, tiny_model_path, changes):
    record, policy = train(tmp_path, tiny_model_path, **changes)
    plain = ObjectiveConfig(rollout_correction=RolloutCorrection())
    scheduled, _ = train(tmp_path, tiny_model_path, objective=plain, **changes)
    assert record["learning_rate"] == scheduled["learning_rate"]
    assert "learning_rate_scale" not in scheduled.steps[0]
    scales = record["learning_rate_scale"]
    assert scales[0] == pytest.approx(1, abs=1e-6), "the first step is on-policy"
    assert scales[3] < 1 - 1e-6, "the second step of the second rollout is not"
    assert scales == pytest.approx([math.sqrt(ess) for ess in record["sampling/sequence_ess"]])
    assert policy.used == pytest.approx([r * s for r, s in zip(record["learning_rate"], scales, strict=True)])
    # SGD moves the weights by the gradient times the rate
    lengths = [rate * norm for rate, norm in zip(policy.used, record["grad_norm"], strict=True)]
    assert policy.moved == pytest.approx(lengths, rel=1e-3)


def test_a_learning_rate_that_is_a_tensor_is_scaled_in_place(tmp_path, tiny_model_path):
    record, policy = train(tmp_path, tiny_model_path, optimizer=tensor_rate)
    assert policy.used == pytest.approx([LR * scale for scale in record["learning_rate_scale"]])
    assert min(policy.used) < LR == pytest.approx(float(policy.trainer.optimizers[0].param_groups[0]["lr"]))


def test_resume_at_every_step_is_exact(tmp_path, tiny_model_path):
    def run(root, resume=None):
        checkpoint = Checkpoint(str(root), every_n_train_steps=1, save_top_k=-1)
        changes = {"lr_schedule": "linear", "optimizer": lambda p: torch.optim.AdamW(p, lr=LR)}
        return train(root, tiny_model_path, resume=resume, kind=GRPOModule, callbacks=[checkpoint], **changes)

    whole, policy = run(tmp_path / "whole")
    assert min(whole["learning_rate_scale"]) < 0.999
    for step in range(1, 4):
        path = tmp_path / "whole" / f"step-{step:06d}.ckpt"
        saved = torch.load(path, weights_only=True)
        assert saved["optimizer_states"][0]["param_groups"][0]["lr"] == saved["lr_schedulers"][0]["_last_lr"][0]
        resumed, other = run(tmp_path / f"from-{step}", str(path))
        for name in ("loss", "learning_rate", "learning_rate_scale", "sampling/sequence_ess"):
            assert resumed[name] == whole[name][step:], (step, name)
        assert largest_difference(parameters(other), parameters(policy)) == 0


def test_a_step_that_the_gradient_scaler_skips_leaves_the_rate_as_it_was(tmp_path, tiny_model_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    record, policy = train(tmp_path, tiny_model_path, trainer={"plugins": [plugin]}, steps=2)
    assert policy.moved == [0, 0] and scaler.get_scale() < 2.0**100, "skipped, since the gradients were infinite"
    assert policy.trainer.optimizers[0].param_groups[0]["lr"] == LR
    assert len(record["learning_rate_scale"]) == 2


def test_a_single_completion_per_step_is_refused(tmp_path, tiny_model_path):
    policy = module(tiny_model_path, objective=SCALED, rewards=[checksum], micro_batch_size=1)
    with pytest.raises(UserError, match="a single completion, whose effective sample size is always 1"):
        fit(tmp_path, policy, accumulate=1)


def test_a_loss_that_does_not_report_it_is_refused(tmp_path, tiny_model_path):
    class Own(GRPOModule):
        def compute_loss(self, logprobs, entropy, experience, **sizes):
            return -(logprobs * experience.advantages[:, None]).mean(), {}

    with pytest.raises(UserError, match="compute_loss does not return the metric sampling/sequence_ess"):
        train(tmp_path, tiny_model_path, kind=Own)
