"""A checkpoint taken at any optimizer step goes on exactly: same losses, same parameters, same samples."""

import pytest
import torch
from fitting import data, fit, largest_difference, module, parameters
from lightning import Trainer

from lightning_grpo.monitor.checkpoint import Checkpoint
from lightning_grpo.objective import ObjectiveConfig
from lightning_grpo.policy import LoRA

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


@pytest.mark.parametrize("changes", [{}, {"lora": LoRA(rank=4)}], ids=["full", "lora"])
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


def test_another_cut_in_the_middle_of_a_rollout_is_refused(tmp_path, tiny_model_path):
    run(tmp_path, tiny_model_path, max_steps=2)
    with pytest.raises(ValueError, match="micro_batch_size 8 → 4"):
        run(tmp_path, tiny_model_path, resume="last", changes={"micro_batch_size": 4})


def test_other_adapters_are_refused(tmp_path, tiny_model_path):
    run(tmp_path, tiny_model_path, changes={"lora": LoRA(rank=4, target_modules=["q_proj"])}, max_steps=2)
    with pytest.raises(ValueError, match=r"lacks .* adapter weights"):
        run(tmp_path, tiny_model_path, resume="last", changes={"lora": LoRA(rank=4)})


def test_a_checkpoint_inside_an_optimizer_step_is_said_and_refused(tmp_path, tiny_model_path, caplog):
    from lightning import Callback

    class SaveAtOnce(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 0:
                trainer.save_checkpoint(tmp_path / "inside.ckpt")

    fit(tmp_path, module(tiny_model_path), steps=1, callbacks=[SaveAtOnce()])
    assert "saved inside an optimizer step" in caplog.text
    with pytest.raises(ValueError, match="saved inside an optimizer step"):
        fit(tmp_path, module(tiny_model_path), ckpt_path=str(tmp_path / "inside.ckpt"))
