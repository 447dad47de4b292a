"""What a resumed run takes from the configuration: the optimizer's options, and the schedule from its first step on."""

import logging
from functools import partial

import pytest
import torch
from fitting import data, fit, module, parameters
from torch.optim import SGD, AdamW

from lightning_grpo.monitor.checkpoint import Checkpoint


def run(root, model, optimizer, *, resume=None, steps=6, **changes):
    policy = module(model, **{"micro_batch_size": 16, "optimizer": optimizer} | changes)
    checkpoint = Checkpoint(str(root), every_n_train_steps=1, save_top_k=-1)
    record = fit(
        root, policy, data(), steps=steps, accumulate=1, ckpt_path=resume and str(resume), callbacks=[checkpoint],
        enable_checkpointing=True,
    )  # fmt: skip
    return record, policy


def test_what_the_configuration_changed_is_taken_and_said(tmp_path, tiny_model_path, caplog):
    run(tmp_path / "a", tiny_model_path, partial(AdamW, lr=1e-3, weight_decay=0.0), steps=3)
    last = tmp_path / "a" / "last.ckpt"
    with caplog.at_level(logging.INFO, logger="lightning_grpo"):
        now = partial(AdamW, lr=5e-4, weight_decay=0.1, betas=(0.8, 0.99))
        record, policy = run(tmp_path / "b", tiny_model_path, now, resume=last)
    assert record["learning_rate"] == pytest.approx([5e-4] * 3)
    group = policy.trainer.optimizers[0].param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"]) == (5e-4, 0.1, (0.8, 0.99))
    # the moments went on: every parameter has seen six steps
    assert {float(state["step"]) for state in policy.trainer.optimizers[0].state.values()} == {6}
    assert "Resuming after optimizer step 3" in caplog.text and "initial_lr" not in caplog.text
    saved = torch.load(last, weights_only=False)["policy"]["optimizer"]["groups"]
    assert all("initial_lr" not in group for group in saved)
    assert (
        "changed in the configuration: lr 0.001 → 0.0005, betas (0.9, 0.999) → (0.8, 0.99), weight_decay 0.0 → 0.1"
        in caplog.text
    )
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="lightning_grpo"):
        again, same = run(tmp_path / "c", tiny_model_path, now, resume=tmp_path / "b" / "step-000005.ckpt")
    assert "no option has changed" in caplog.text
    assert again["loss"] == record["loss"][2:]
    assert all(torch.equal(p, parameters(policy)[name]) for name, p in parameters(same).items())


def test_a_new_schedule_holds_from_the_first_step_on(tmp_path, tiny_model_path):
    adam = partial(AdamW, lr=1e-3)
    linear = {"lr_schedule": "linear", "warmup_steps": 2}
    short, _ = run(tmp_path / "short", tiny_model_path, adam, steps=4, **linear)
    long, _ = run(tmp_path / "long", tiny_model_path, adam, steps=8, **linear)
    assert short["learning_rate"][3] != long["learning_rate"][3]
    resumed, _ = run(
        tmp_path / "on", tiny_model_path, adam, steps=8, resume=tmp_path / "short" / "step-000003.ckpt", **linear
    )
    assert resumed["learning_rate"] == long["learning_rate"][3:]
    doubled = partial(AdamW, lr=2e-3)
    resumed, _ = run(
        tmp_path / "twice", tiny_model_path, doubled, steps=8, resume=tmp_path / "long" / "step-000003.ckpt", **linear
    )
    assert resumed["learning_rate"] == pytest.approx([2 * rate for rate in long["learning_rate"][3:]])


class Adapting(SGD):
    """Halves its own momentum at every step, as some optimizers adapt their options."""

    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            group["momentum"] /= 2
        return loss


def test_what_an_optimizer_adapts_by_itself_is_the_checkpoints(tmp_path, tiny_model_path):
    optimizer = partial(Adapting, lr=0.1, momentum=0.5)
    run(tmp_path / "a", tiny_model_path, optimizer, steps=2)
    _, policy = run(tmp_path / "b", tiny_model_path, optimizer, steps=3, resume=tmp_path / "a" / "last.ckpt")
    assert policy.trainer.optimizers[0].param_groups[0]["momentum"] == 0.5 / 2**3


def test_another_optimizer_is_refused(tmp_path, tiny_model_path):
    run(tmp_path / "a", tiny_model_path, partial(AdamW, lr=1e-3), steps=1)
    with pytest.raises(ValueError, match="holds the state of AdamW and the optimizer is SGD"):
        run(tmp_path / "b", tiny_model_path, partial(SGD, lr=1e-3), resume=tmp_path / "a" / "last.ckpt")


def test_a_schedule_without_an_end_is_refused(tmp_path, tiny_model_path):
    with pytest.raises(ValueError, match=r"lr_schedule is cosine, .* training has no end; set one of them"):
        run(tmp_path, tiny_model_path, partial(AdamW, lr=1e-3), steps=-1, lr_schedule="cosine")
